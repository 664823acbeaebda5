// Writes docs/images/: the main views with phantoms, as the README shows them.

import { mkdirSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Stage, pause, waitFor } from "./support.js";

const OUT = join(dirname(fileURLToPath(import.meta.url)), "../../docs/images");
const MOST_BYTES = 160_000;

mkdirSync(OUT, { recursive: true });
const stage = await Stage.open({ config: "[device]\nid = \"mri-1\"\nsite = \"radiology\"\n[preview]\nenabled = true\n[alert]\nquiet_s = 8\nupdate_s = 1\n" });

// Other appliances of a small fleet, as their brokers would have them.
const at = (seconds) => new Date(Date.now() - seconds * 1000).toISOString();
function neighbour(site, device, status, conditions, backlog) {
  const base = `scansentry/${site}/${device}`;
  const model = { name: "braintumor", version: "0.1.0", sha256: "00" };
  stage.publish(`${base}/status`, status, "-r");
  stage.publish(`${base}/health`, JSON.stringify({
    schema: "scansentry/health/1", device, site, at: at(20), state: conditions.length ? "degraded" : "ok", conditions, backlog,
    counts: {}, started_at: at(90_000), version: "0.1.0", model, engine: "LiteRT",
  }), "-r");
}

try {
  neighbour("radiology", "mri-2", "online", [{ code: "folder_away", since: at(340), message: "the export folder is not there; mount it or correct watch.folder" }], { files: 0, messages: 0 });
  neighbour("outpatients", "mri-1", "offline", [], { files: 0, messages: 12 });
  const files = stage.slices(26, 7);
  files.slice(0, 9).forEach((file, i) => stage.scan(file, `first/${i}.png`));
  await waitFor("the first study", async () => (await stage.results()).length >= 9);
  await waitFor("its alert", async () => (await stage.state()).alerts.length >= 1);
  await waitFor("its end", async () => (await stage.state()).alerts[0].closed);
  for (let i = 9; i < 26; i++) {
    stage.scan(files[i], `second/${i}.png`);
    await pause(250);
  }
  await waitFor("the second study", async () => (await stage.results()).length >= 26 && (await stage.results()).every((row) => row.preview));
  await pause(1500);

  const shoot = async (name, hash, { width = 1280, height = 720, theme = "light", type = "png", act } = {}) => {
    const page = await stage.page(hash, { width, height });
    await page.emulateMedia({ colorScheme: theme, reducedMotion: "reduce" });
    await act?.(page);
    await page.waitForLoadState("networkidle").catch(() => {});
    await pause(400);
    const path = join(OUT, `${name}.${type}`);
    await page.screenshot({ path, type, quality: type === "jpeg" ? 85 : undefined });
    const { size } = statSync(path);
    if (size > MOST_BYTES) throw new Error(`${path} has ${size} bytes; at most ${MOST_BYTES}`);
    await page.close();
  };
  const heat = (page) => page.getByLabel("Activation map").first().check();
  const row = (await stage.results("&decision=positive"))[0];
  await shoot("live-light", "", { act: heat });
  await shoot("live-dark", "", { theme: "dark", act: heat });
  await shoot("scan", `#/scan/${row.site}/${row.device}/${row.scan_id}`, { act: heat, height: 760, type: "jpeg" });
  await shoot("study", `#/study/${row.site}/${row.device}/${row.study_id}`, { theme: "dark", height: 900, type: "jpeg" });
  await shoot("charts", "#/charts?range=1h", { height: 760 });
  await shoot("phone", "", { width: 390, height: 844, type: "jpeg" });
  await shoot("wall", "#wall", { width: 1280, height: 720, theme: "dark", type: "jpeg" });
  console.log(`docs/images: written; errors on the pages: ${stage.errors.length ? stage.errors.join("; ") : "none"}`);
} finally {
  await stage.close();
}
