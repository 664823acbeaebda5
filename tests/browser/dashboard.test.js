// The dashboard in a real Chromium, against the real program and a real Mosquitto.

import assert from "node:assert/strict";
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { Stage, pause, waitFor } from "./support.js";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

async function accessProblems(page) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate((tags) => globalThis.axe.run(document, { runOnly: { type: "tag", values: tags } }), RULES);
  return violations.map((v) => `${v.id} (${v.impact}): ${v.nodes.slice(0, 3).map((n) => `${n.html}\n    ${n.failureSummary}`).join("\n  ")}`);
}

// Horizontal scrolling, with the elements that cause it.
function fitProblems(page) {
  return page.evaluate(() => {
    if (document.documentElement.scrollWidth <= innerWidth) return [];
    const wide = [...document.querySelectorAll("main *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll"));
    return [`is ${document.documentElement.scrollWidth} pixels wide in a window of ${innerWidth}: ${wide.slice(0, 3).map((e) => e.outerHTML.slice(0, 80)).join(" | ")}`];
  });
}

describe("the dashboard", { timeout: 600_000 }, () => {
  let stage;
  let files;
  before(async () => {
    stage = await Stage.open({ config: "[preview]\nenabled = true\n[alert]\nquiet_s = 30\n" });
    files = stage.slices(12);
  });
  after(async () => {
    await stage?.close();
    assert.deepEqual(stage?.errors ?? [], [], "errors on the pages");
  });

  test("results and an alert appear by themselves, and two windows agree on the acknowledgement", async () => {
    const [desk, ward] = [await stage.page(), await stage.page()];
    assert.equal(await desk.locator(".appliance .state").innerText(), "Online");
    await assert.doesNotReject(desk.getByText("No result yet").waitFor());
    files.slice(0, 6).forEach((file, i) => stage.scan(file, `study/${i}.png`));
    for (const page of [desk, ward]) {
      await page.locator("tbody tr").nth(5).waitFor();
      await page.getByRole("button", { name: /Acknowledge/ }).waitFor();
      await page.locator("tbody tr .picture img").first().waitFor();
    }
    const words = await desk.locator("tbody .decision").allInnerTexts();
    assert.ok(words.includes("Tumour pattern found") && words.includes("No tumour pattern found by this model"), words.join());
    assert.match(await desk.locator("#announce").textContent(), /New alert: tumour pattern found by this model/);
    assert.match(await desk.title(), /^\(1\) /);
    assert.match(await desk.locator("tbody .bar").first().getAttribute("aria-label"), /probability 0\.\d{3}, threshold 0\.500/);
    assert.ok(await desk.getByText("Research use only, not for diagnosis").isVisible());
    await desk.getByRole("button", { name: /Acknowledge/ }).click();
    for (const page of [desk, ward]) await page.getByText(/Acknowledged .* by radiology-mri-1/).waitFor();
    assert.equal((await stage.state()).alerts[0].acknowledged_by, "radiology-mri-1");
    await ward.getByRole("button", { name: /Take back/ }).click();
    await desk.getByRole("button", { name: /Acknowledge/ }).waitFor();
    await desk.close();
    await ward.close();
  });

  test("a scan shows picture, activation map, decision, model and notice; a study its plot and strip", async () => {
    const page = await stage.page();
    await page.locator("tbody tr.positive a").first().click();
    await page.locator("#answer-title").waitFor();
    const text = await page.locator("main").innerText();
    for (const words of ["braintumor 0.2", "threshold of 0.500", "never leaves the appliance", "research use only, not for diagnosis", "Part of the picture"]) {
      assert.ok(text.includes(words), `${words} is missing`);
    }
    assert.equal(await page.locator(".heat").count(), 0);
    await page.getByLabel("Activation map").check();
    await page.locator(".size-448 .heat").waitFor();
    const colours = await page.locator(".heat").evaluate((canvas) => new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size);
    assert.ok(colours > 10, "the activation map is drawn");
    await page.locator("dd a").click();
    await page.getByRole("heading", { name: /^Study/ }).waitFor();
    assert.equal(await page.locator(".strip li").count(), 6);
    assert.equal(await page.locator("svg .point").count(), 6);
    await page.locator(".strip a").nth(2).click();
    await page.getByRole("heading", { name: /^Scan/ }).waitFor();
    await page.close();
  });

  test("filters live in the address, and older results come page by page", async () => {
    const page = await stage.page("#/results?decision=positive");
    await page.locator("tbody tr").first().waitFor();
    const expected = (await stage.results("&decision=positive")).length;
    assert.equal(await page.locator("tbody tr").count(), expected);
    await page.locator("select[name=decision]").selectOption("negative");
    await page.waitForFunction(() => location.hash.includes("decision=negative"));
    await page.locator("tbody tr.negative").first().waitFor();
    assert.equal(await page.locator("tbody tr.positive").count(), 0);
    await page.goto(`${stage.url}/#/results?range=1h&appliance=radiology/mri-1`);
    await page.getByText(/6 results shown/).waitFor();
    assert.equal(await page.locator("select[name=range]").inputValue(), "1h");
    await page.goto(`${stage.url}/#/charts`);
    await page.locator("svg rect.area").first().waitFor();
    await page.getByText("Numbers as a table").first().click();
    assert.ok(await page.locator("table.numbers tbody tr").first().isVisible());
    await page.close();
  });

  test("an uploaded image gets its result, and the same bytes again the same one", async () => {
    const page = await stage.page("#/upload");
    const folder = join(stage.folder, "mine");
    mkdirSync(folder);
    const [name, other] = ["Jane Doe 1970.png", "letter.txt"].map((n) => join(folder, n));
    writeFileSync(name, readFileSync(files[7]));
    writeFileSync(other, "Dear colleague");
    await page.locator("#files").setInputFiles([name, other]);
    await page.locator(".upload .outcome .decision").nth(1).waitFor();
    const shown = await page.locator(".uploads").innerText();
    assert.match(shown, /umour pattern found/);
    assert.match(shown, /Rejected/);
    await page.locator("#files").setInputFiles(name);
    await page.getByText("These bytes were classified before").waitFor();
    await page.locator(".upload .outcome").nth(2).waitFor();
    const names = readdirSync(join(stage.export, "uploads"));
    assert.equal(names.length, 2);
    assert.ok(names.every((n) => /^upload-[0-9a-f]{32}(\.png)?$/.test(n)), names.join());
    assert.ok(!readFileSync(join(stage.folder, "log"), "utf8").includes("Jane"));
    // By drag and drop, too.
    const bytes = [...readFileSync(files[8])];
    const transfer = await page.evaluateHandle((data) => {
      const carried = new DataTransfer();
      carried.items.add(new File([new Uint8Array(data)], "dropped.png"));
      return carried;
    }, bytes);
    await page.dispatchEvent(".dropzone", "drop", { dataTransfer: transfer });
    await page.locator(".upload .outcome").nth(3).waitFor();
    await page.close();
  });

  test("the loss of broker and server is said, and the page recovers by itself", async () => {
    const page = await stage.page();
    await stage.stopBroker();
    await page.getByText(/^Broker away since/).waitFor();
    const before = (await stage.results()).length;
    stage.scan(files[9], "while-away.png");
    await stage.startBroker();
    await page.getByText(/^Broker away/).waitFor({ state: "detached" });
    await waitFor("the result from the outage", async () => (await stage.results()).length === before + 1);
    await stage.stopDaemon();
    await page.getByText(/^Connection to the server lost at/).waitFor();
    assert.ok(await page.evaluate(() => document.documentElement.classList.contains("stale")));
    await stage.startDaemon();
    await page.getByText(/^Connection to the server lost/).waitFor({ state: "detached" });
    stage.scan(files[10], "after-all.png");
    await waitFor("the new result on the old page", async () => (await page.locator("tbody tr").count()) === before + 2);
    await page.close();
  });

  test("keys alone are enough", async () => {
    const page = await stage.page();
    const focused = () => page.evaluate(() => document.activeElement.textContent.trim());
    await page.keyboard.press("Tab");
    assert.equal(await focused(), "Skip to the content");
    await page.keyboard.press("Enter");
    assert.equal(await page.evaluate(() => document.activeElement.id), "main");
    const reach = async (pattern) => {
      for (let i = 0; i < 60; i++) {
        await page.keyboard.press("Tab");
        if (pattern.test(await focused())) return;
      }
      assert.fail(`${pattern} cannot be reached`);
    };
    await reach(/^Acknowledge/);
    await page.keyboard.press("Enter");
    await page.getByText(/Acknowledged .* by/).first().waitFor();
    await reach(/umour pattern found$/);
    await page.keyboard.press("Enter");
    await page.getByRole("heading", { name: /^(Scan|Study)/ }).waitFor();
    assert.equal(await page.evaluate(() => document.activeElement.id), "main", "the focus goes to the new view");
    const outline = await page.evaluate(() => { document.querySelector("#theme").focus(); return getComputedStyle(document.querySelector("#theme")).outlineStyle; });
    assert.notEqual(outline, "none");
    await page.close();
  });

  test("every view is accessible in light and dark, and fits a phone", async () => {
    const row = (await stage.results()).find((r) => r.preview);
    const place = `${row.site}/${row.device}`;
    const views = ["#/", "#/results", "#/alerts", "#/charts", "#/upload", `#/scan/${place}/${row.scan_id}`, `#/study/${place}/${row.study_id}`, "#wall", "#/nowhere"];
    const problems = [];
    for (const theme of ["light", "dark"]) {
      for (const view of views) {
        const page = await stage.page(view);
        await page.emulateMedia({ colorScheme: theme, reducedMotion: "reduce" });
        await pause(300);
        const dark = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
        assert.equal(dark, theme === "dark" ? "rgb(12, 19, 22)" : "rgb(243, 245, 244)");
        problems.push(...(await accessProblems(page)).map((line) => `${view} ${theme}: ${line}`));
        if (theme === "light") {
          await page.setViewportSize({ width: 360, height: 740 });
          await pause(100);
          problems.push(...(await fitProblems(page)).map((line) => `${view} ${line}`));
          await page.setViewportSize({ width: 2560, height: 1440 });
          problems.push(...(await fitProblems(page)).map((line) => `${view} ${line}`));
        }
        await page.close();
      }
    }
    assert.deepEqual(problems, []);
    // The switch wins over the system.
    const page = await stage.page();
    await page.locator("#theme").click();
    await page.locator("#theme").click();
    assert.equal(await page.locator("#theme").innerText(), "Theme: dark");
    await page.reload();
    assert.equal(await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor), "rgb(12, 19, 22)");
    await page.locator("#theme").click();
    await page.close();
  });

  test("a scan says when the appliance has put its own rule in the place of the model's", async () => {
    const row = (await stage.results()).find((r) => typeof r.probability === "number");
    const answer = await (await fetch(`${stage.url}/api/scan/radiology/mri-1/${row.scan_id}`)).json();
    const { message } = answer.frames[0];
    assert.equal(message.decision_rule, "model");
    const id = "5".repeat(32);
    const changed = { ...message, scan_id: id, event_id: id, threshold: 0.4, indeterminate: [0.3, 0.6], decision_rule: "appliance" };
    stage.publish("scansentry/radiology/mri-1/result", JSON.stringify(changed));
    await waitFor("the result", async () => (await (await fetch(`${stage.url}/api/scan/radiology/mri-1/${id}`)).json()).frames?.length);
    const page = await stage.page(`#/scan/radiology/mri-1/${id}`);
    await page.getByText("threshold of 0.400, set on the appliance: at or above it the decision is positive, and from 0.300 up to 0.600 there is no clear answer.").waitFor();
    await page.goto(`${stage.url}/#/scan/radiology/mri-1/${row.scan_id}`);
    await page.getByText(`threshold of ${message.threshold.toFixed(3)}: at or above it the decision is positive`).waitFor();
    await page.close();
  });
});
