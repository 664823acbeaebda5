// The views. Each fills its root and returns { end } if there is something to stop when another one is shown.

import { facts, fill, h, heading } from "./dom.js";
import { studyPlot, timeChart } from "./charts.js";
import { acknowledge, ask, listen, live, needsAttention, rowKey, sortedAlerts, sortedAppliances, uploadToken } from "./live.js";
import { bar, legend, picture } from "./picture.js";
import {
  DECISION_NAMES, applianceState, band, count, decision, decisionWord, flagWord, milliseconds, name, noteWord, ownRule, probability, remark, shape,
  shortId, shortWord, stateMark, time, verdict,
} from "./words.js";

const scanLink = (row) => `#/scan/${row.site}/${row.device}/${row.scan_id}`;
const studyLink = (row) => `#/study/${row.site}/${row.device}/${row.study_id}`;
const failed = (error) => h("p", { class: "trouble", role: "alert" }, error.message);
const loading = () => h("p", { class: "loading" }, "Loading …");
const empty = (text, hint) => h("div", { class: "empty-state" }, h("p", {}, text), hint && h("p", { class: "hint" }, hint));

// The choice is kept while the page is open: who wants activation maps wants them everywhere.
let heat = false;
function heatToggle(changed) {
  const box = h("input", { type: "checkbox", onchange: (event) => { heat = event.target.checked; changed(); } });
  box.checked = heat;
  return h("label", { class: "toggle" }, box, "Activation map");
}

// A list's items; one that cannot be shown does not take the others with it.
function each(things, card) {
  return things.map((thing) => {
    try { return card(thing); } catch (error) {
      console.error(error);
      return h("li", { class: "trouble" }, `${name(thing)}: cannot be shown; what it reported is not what this page knows`);
    }
  });
}

// ---- alerts ---------------------------------------------------------------------------------------------------------

function alertCard(alert, level = 3) {
  const problem = h("p", { class: "wrong", role: "alert", hidden: true });
  const act = async (event, takeBack) => {
    const button = event.currentTarget;
    button.disabled = true;
    problem.hidden = true;
    try {
      await acknowledge(alert, takeBack);
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
      button.disabled = false;
    }
  };
  const acknowledged = alert.acknowledged_by
    ? h("p", { class: "acknowledged" }, "Acknowledged ", time(alert.acknowledged_at), ` by ${alert.acknowledged_by}`)
    : null;
  const button = acknowledged
    ? h("button", { class: "quiet", type: "button", onclick: (event) => act(event, true) }, "Take back")
    : h("button", { class: "primary", type: "button", onclick: (event) => act(event, false) }, "Acknowledge");
  button.setAttribute("aria-label", `${button.textContent}, alert of ${name(alert)}`);
  return h("li", { class: `alert ${acknowledged ? "seen" : "new"}`, "data-alert": alert.alert_id },
    h("div", { class: "alert-mark" }, shape("positive")),
    h("div", { class: "alert-text" },
      h(`h${level}`, {}, h("a", { href: studyLink(alert) }, decisionWord("positive")), h("span", { class: "by" }, "by this model")),
      h("p", {}, h("strong", {}, name(alert)), ` · ${alert.positives} of ${count(alert.images, "picture")} positive · highest probability ${probability(alert.max_probability)} (threshold ${probability(alert.threshold)}${ownRule(alert)})`),
      h("p", { class: "hint" }, "Raised ", time(alert.raised_at), alert.closed ? " · the study is complete" : [" · last change ", time(alert.updated_at)]),
      acknowledged, problem),
    h("div", { class: "alert-act" }, button));
}

function alertSection(level) {
  const section = h("section", { class: "alerts", "aria-labelledby": "alerts-title" });
  const draw = () => {
    const alerts = sortedAlerts();
    const fresh = alerts.filter((alert) => !alert.acknowledged_by).length;
    const focused = document.activeElement?.closest?.("[data-alert]")?.dataset.alert;
    fill(section,
      h(`h${level}`, { id: "alerts-title" }, "Alerts", h("span", { class: "count" }, fresh ? `${fresh} to acknowledge` : "none to acknowledge")),
      alerts.length ? h("ol", { class: "plain" }, each(alerts, (alert) => alertCard(alert, level + 1)))
        : h("p", { class: "hint" }, "No alert is open. Alerts say what this model found; their absence says nothing about a patient."),
      live.openAlerts > alerts.length && h("p", { class: "hint" }, `${live.openAlerts - alerts.length} more; acknowledge these first.`));
    if (focused) {
      // The card was drawn anew under the reader's hand: give the place back, or go to the heading when it is gone.
      const place = section.querySelector(`[data-alert="${focused}"] button`) ?? section.querySelector("h2,h1");
      if (!place.matches("button")) place.tabIndex = -1;
      place.focus();
    }
  };
  return { section, draw };
}

// ---- appliances -----------------------------------------------------------------------------------------------------

function applianceCard(appliance) {
  const health = appliance.health;
  const state = applianceState(appliance, Date.now());
  const conditions = health?.conditions ?? [];
  const gone = state === "offline" ? "Its connection to the broker was lost without a word."
    : state === "stopped" ? "It was stopped in order."
      : state === "silent" ? "It says that it is online, but reports nothing." : null;
  return h("li", { class: `appliance panel ${state}` },
    h("h3", {}, h("a", { href: `#/results?appliance=${appliance.site}/${appliance.device}` }, name(appliance)), stateMark(state)),
    gone && h("p", { class: "why" }, gone),
    conditions.length > 0 && h("ul", { class: "why" }, conditions.map((c) => h("li", {}, c.message, " ", h("span", { class: "hint" }, "since ", time(c.since))))),
    facts([
      ["Waiting", health && `${count(health.backlog.files, "file")}, ${count(health.backlog.messages, "message")}`],
      ["Oldest waiting", health?.backlog.oldest && time(health.backlog.oldest)],
      ["Last error", health?.last_error && h("span", {}, time(health.last_error.at), " ", health.last_error.message)],
      ["Model", health && `${health.model?.name ?? "?"} ${health.model?.version ?? ""}`],
      ["Version", health?.version],
      ["Last seen", appliance.seen_at && time(appliance.seen_at)],
    ]));
}

// Appliances that are drawn at once. In a larger fleet those that need attention come first, and the list is drawn once a second at most.
const CARDS = 60;
const BY_NEED = ["offline", "silent", "degraded", "unknown", "stopped", "online"];
const large = () => live.appliances.size > CARDS;

function appliancesByNeed() {
  const appliances = sortedAppliances();
  if (!large()) return appliances;
  const now = Date.now();
  const need = new Map(appliances.map((appliance) => [appliance, BY_NEED.indexOf(applianceState(appliance, now))]));
  return appliances.sort((a, b) => need.get(a) - need.get(b));
}

function applianceSection() {
  const section = h("section", { class: "appliances", "aria-labelledby": "appliances-title" });
  let most = CARDS;
  let due = 0;
  const draw = () => {
    const appliances = appliancesByNeed();
    const rest = appliances.length - most;
    fill(section, h("h2", { id: "appliances-title" }, "Appliances", h("span", { class: "count" }, String(appliances.length))),
      appliances.length ? h("ul", { class: "plain cards" }, each(appliances.slice(0, most), applianceCard))
        : empty("No appliance has been heard of yet.", "They appear when they connect to the same broker under the same topic prefix."),
      rest > 0 && h("p", {}, h("button", { class: "quiet", type: "button", onclick: () => { most = Infinity; draw(); } }, `Show ${count(rest, "more appliance")}`),
        h("span", { class: "hint" }, " Those that need attention come first.")));
  };
  const soon = () => {
    if (!large()) draw();
    else if (!due) due = setTimeout(() => { due = 0; draw(); }, 1000);
  };
  return { section, draw, soon, end: () => clearTimeout(due) };
}

// ---- results --------------------------------------------------------------------------------------------------------

function resultRow(row) {
  const note = remark(row);
  return h("tr", { "data-row": rowKey(row), class: verdict(row) },
    h("td", { class: "thumb" }, picture(row, { size: 56, heat })),
    h("td", { class: "what" }, h("a", { href: scanLink(row) }, decision(row)), row.frame && h("span", { class: "hint" }, ` frame ${row.frame}`), h("span", { class: "narrow hint" }, name(row)), note && h("span", { class: "narrow hint" }, note)),
    h("td", { class: "how" }, bar(row)),
    h("td", { class: "where wide" }, name(row)),
    h("td", { class: "note wide" }, note || ""),
    h("td", { class: "when" }, time(row.processed_at)));
}

function resultTable(caption) {
  const body = h("tbody", {});
  const table = h("table", { class: "results" }, h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "unseen" }, "Picture")), h("th", { scope: "col" }, "Decision"), h("th", { scope: "col" }, "Probability"),
      h("th", { scope: "col", class: "wide" }, "Appliance"), h("th", { scope: "col", class: "wide" }, "Remarks"), h("th", { scope: "col" }, "Time"))), body);
  table.addEventListener("click", (event) => {
    // The whole row is a target for a finger; the link in it is the one for keys.
    const row = event.target.closest("tbody tr");
    if (row && !event.target.closest("a, button") && !getSelection()?.toString()) row.querySelector("a").click();
  });
  return { table, body };
}

export function liveView(root) {
  const alerts = alertSection(2);
  const appliances = applianceSection();
  const { table, body } = resultTable("Latest results, newest first");
  const state = h("p", { class: "hint" });
  let paused = false;
  const pause = h("button", { class: "quiet", type: "button", "aria-pressed": "false", onclick: () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Go on" : "Pause";
    if (!paused) draw();
  } }, "Pause");
  const thumbs = () => table.classList.toggle("no-thumbs", !live.rows.some((row) => row.preview));
  const draw = () => {
    if (!live.loaded) return;
    thumbs();
    fill(body, live.rows.map(resultRow));
    fill(state, live.rows.length ? "" : "No result yet. New ones appear here by themselves.");
    table.hidden = !live.rows.length;
  };
  fill(root, h("h1", { class: "unseen" }, "Live"), alerts.section,
    h("div", { class: "columns" },
      h("section", { class: "stream", "aria-labelledby": "stream-title" },
        h("div", { class: "bar-line" }, h("h2", { id: "stream-title" }, "Results"), h("span", { class: "spacer" }), heatToggle(draw), pause),
        state, table, h("p", {}, h("a", { href: "#/results" }, "All results"))),
      appliances.section));
  if (live.loaded) { alerts.draw(); appliances.draw(); draw(); } else state.textContent = "Loading …";
  const clock = setInterval(() => live.loaded && appliances.draw(), 30_000);
  const stop = listen((kind, data) => {
    if (kind === "state") { alerts.draw(); appliances.draw(); if (!paused) draw(); }
    if (kind === "alerts") alerts.draw();
    if (kind === "appliances") appliances.soon();
    if (kind === "rows" && !paused) {
      for (const row of data.rows.toReversed()) {
        body.querySelector(`[data-row="${rowKey(row)}"]`)?.remove();
        const line = resultRow(live.rows.find((r) => rowKey(r) === rowKey(row)) ?? row);
        line.classList.add("fresh");
        body.prepend(line);
      }
      while (body.children.length > live.rows.length) body.lastChild.remove();
      fill(state);
      table.hidden = false;
    }
    if (kind === "previews" && !paused) {
      thumbs();
      for (const [key] of data) {
        const row = live.rows.find((r) => rowKey(r) === key);
        const line = row && body.querySelector(`[data-row="${key}"] .thumb`);
        if (line) fill(line, picture(row, { size: 56, heat }));
      }
    }
  });
  return { end: () => { stop(); clearInterval(clock); appliances.end(); } };
}

// ---- filters --------------------------------------------------------------------------------------------------------

const RANGES = { "1h": ["Last hour", 3.6e6], "24h": ["Last 24 hours", 8.64e7], "7d": ["Last 7 days", 6.048e8], "30d": ["Last 30 days", 2.592e9] };

function go(path, values) {
  const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value));
  location.hash = `${path}${query.size ? `?${query}` : ""}`;
}

function options(pairs, chosen) {
  return pairs.map(([value, text]) => { const option = h("option", { value }, text); option.selected = value === chosen; return option; });
}

function applianceChoice(words) {
  const known = sortedAppliances().map((a) => `${a.site}/${a.device}`);
  const chosen = words.get("appliance") ?? "";
  if (chosen && !known.includes(chosen)) known.push(chosen);
  return h("label", {}, "Appliance", h("select", { name: "appliance" }, options([["", "All"], ...known.map((k) => [k, k.replace("/", " / ")])], chosen)));
}

const local = (iso) => {
  const date = new Date(iso ?? NaN);
  if (Number.isNaN(date.getTime())) return "";
  return new Date(date.getTime() - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
};

export function resultsView(root, _, words) {
  const custom = words.has("from") || words.has("to");
  const range = words.get("range") ?? "";
  const from = h("input", { type: "datetime-local", name: "from", value: local(words.get("from")) });
  const to = h("input", { type: "datetime-local", name: "to", value: local(words.get("to")) });
  const times = h("span", { class: "times", hidden: !custom }, h("label", {}, "From", from), h("label", {}, "To", to));
  const form = h("form", { class: "filters panel", "aria-label": "Filter results" });
  const submit = () => {
    const data = new FormData(form);
    const chosen = data.get("range");
    times.hidden = chosen !== "custom";
    const iso = (text) => (text ? new Date(text).toISOString() : "");
    if (chosen === "custom" && !data.get("from") && !data.get("to")) { from.focus(); return; }
    go("/results", { appliance: data.get("appliance"), decision: data.get("decision"),
      ...(chosen === "custom" ? { from: iso(data.get("from")), to: iso(data.get("to")) } : { range: chosen }) });
  };
  form.addEventListener("change", submit);
  form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  const drawForm = () => fill(form, applianceChoice(words),
    h("label", {}, "Decision", h("select", { name: "decision" }, options([["", "All"], ...DECISION_NAMES.map((d) => [d, shortWord(d)])], words.get("decision") ?? ""))),
    h("label", {}, "Time", h("select", { name: "range" }, options([["", "All"], ...Object.entries(RANGES).map(([k, [text]]) => [k, text]), ["custom", "From … to …"]], custom ? "custom" : range))),
    times);
  drawForm();
  const { table, body } = resultTable("Results that match the filters, newest first");
  const status = h("p", { class: "hint", role: "status" }, "Loading …");
  const more = h("button", { class: "quiet", type: "button", hidden: true }, "Show older results");
  const shown = [];
  const redraw = () => {
    table.classList.toggle("no-thumbs", !shown.some((row) => row.preview));
    fill(body, shown.map(resultRow));
  };
  const load = async (before) => {
    const query = new URLSearchParams({ limit: "50" });
    for (const key of ["appliance", "decision", "from", "to"]) if (words.get(key)) query.set(key, words.get(key));
    if (RANGES[range]) query.set("from", new Date(Date.now() - RANGES[range][1]).toISOString());
    if (before) query.set("before", before);
    more.disabled = true;
    try {
      const { rows, more: further } = await ask(`/api/results?${query}`);
      const first = body.children.length;
      shown.push(...rows);
      redraw();
      more.hidden = !further;
      table.hidden = !shown.length;
      fill(status, shown.length ? `${count(shown.length, "result")} shown${further ? ", there are older ones" : ""}` : "No result matches these filters.");
      if (before) body.children[first]?.querySelector("a")?.focus();
    } catch (error) {
      fill(status, error.message);
    }
    more.disabled = false;
  };
  more.addEventListener("click", () => load(shown.at(-1)?.id));
  table.hidden = true;
  fill(root, h("div", { class: "bar-line" }, heading(1, "Results"), h("span", { class: "spacer" }), heatToggle(redraw)), form, status, table, more);
  load();
  const stop = listen((kind) => { if (kind === "state") drawForm(); });
  return { end: stop };
}

export function alertsView(root) {
  const open = alertSection(2);
  const list = h("ol", { class: "plain" });
  const status = h("p", { class: "hint", role: "status" }, "Loading …");
  const more = h("button", { class: "quiet", type: "button", hidden: true, onclick: () => load(last) }, "Show older alerts");
  let last = null;
  const load = async (before) => {
    try {
      const { alerts, more: further } = await ask(`/api/alerts?limit=30${before ? `&before=${encodeURIComponent(before)}` : ""}`);
      if (!before) list.replaceChildren();
      list.append(...each(alerts, (alert) => alertCard(alert)));
      last = alerts.at(-1)?.raised_at ?? last;
      more.hidden = !further;
      fill(status, list.children.length ? "" : "No alert has been acknowledged and closed yet.");
    } catch (error) {
      fill(status, error.message);
    }
  };
  fill(root, heading(1, "Alerts"), open.section, h("section", { "aria-labelledby": "closed-title" }, h("h2", { id: "closed-title" }, "Acknowledged and complete"), status, list, more));
  if (live.loaded) open.draw();
  load();
  const stop = listen((kind) => {
    if (kind === "state" || kind === "alerts") { open.draw(); load(); }
  });
  return { end: stop };
}

// The server sends no more pictures of one study.
const STUDY_PICTURES = 1000;

// ---- study ----------------------------------------------------------------------------------------------------------

// The pictures at hand may be fewer than the study's: older than the history, or more than one answer holds. So the appliance's own counts
// are asked too, and the highest ones hold.
function studyCounts({ pictures, summary, alert }) {
  const most = (key, found) => Math.max(found, ...[summary?.[key], alert?.[key]].filter(Number.isFinite));
  const found = (...names) => pictures.filter((row) => names.includes(verdict(row))).length;
  return { images: most("images", pictures.length), positives: most("positives", found("positive")), negatives: found("negative"),
    indeterminate: found("indeterminate"), rejected: found("rejected", "skipped") };
}

// "No tumour pattern" is said only where every picture is at hand and has its decision.
function studyLead(study) {
  const { images, positives, negatives, indeterminate } = studyCounts(study);
  const shown = study.pictures.length;
  if (positives) return `Tumour pattern found by this model in ${count(positives, "picture")} of ${images}.`;
  if (!shown) return "The pictures of this study are older than the history.";
  if (indeterminate) return `No clear answer by this model in ${count(indeterminate, "picture")} of ${images}.`;
  if (shown < images || shown >= STUDY_PICTURES) return `Only ${count(shown, "picture")} of this study are in the history; nothing can be said about all of them.`;
  return negatives ? "No tumour pattern found by this model." : "No picture of this study could be classified.";
}

export function studyView(root, [site, device, id]) {
  fill(root, loading());
  let study = null;
  let timer = 0;
  const draw = () => {
    const { pictures, summary, alert } = study;
    const { images, positives, rejected } = studyCounts(study);
    const highest = Math.max(...pictures.map((row) => row.probability ?? -1));
    const strip = h("ol", { class: "strip" }, pictures.map((row, i) => h("li", {},
      h("a", { href: scanLink(row) + (row.frame ? `?frame=${row.frame}` : ""), class: verdict(row) },
        picture(row, { size: 96, heat }), h("span", { class: "strip-line" }, shape(verdict(row)), h("span", {}, `${i + 1}`), h("span", { class: "number" }, probability(row.probability))),
        h("span", { class: "unseen" }, decisionWord(verdict(row)))))));
    fill(root,
      h("div", { class: "bar-line" }, heading(1, "Study ", shortId(id)), h("span", { class: "spacer" }), heatToggle(draw)),
      h("p", { class: "lead" }, studyLead(study)),
      alert && h("ol", { class: "plain" }, alertCard(alert, 2)),
      h("div", { class: "columns even" },
        h("section", { class: "panel" }, studyPlot(pictures, -1, (i) => { location.hash = scanLink(pictures[i]); })),
        h("section", { class: "panel" }, heading(2, "Summary"), facts([
          ["Appliance", `${site} / ${device}`],
          ["State", summary ? "complete: quiet for the set time" : "open: pictures may still come"],
          ["Pictures", String(images)],
          ["Positive", String(positives)],
          ["Rejected or skipped", String(Math.max(summary?.rejected ?? 0, rejected))],
          ["Highest probability", highest >= 0 ? probability(highest) : null],
          ["First picture", summary?.opened_at && time(summary.opened_at)],
          ["Last picture", summary?.last_at && time(summary.last_at)],
          ["Study id", h("code", { class: "long" }, id)],
        ]))),
      h("section", { "aria-labelledby": "strip-title" }, h("h2", { id: "strip-title" }, "Pictures", h("span", { class: "count" }, "in the order in which they were taken")),
        pictures.length ? strip : empty("The pictures of this study are older than the history."), heat && legend()));
  };
  const load = async () => {
    try {
      study = await ask(`/api/study/${site}/${device}/${id}`);
      draw();
    } catch (error) {
      if (!study) fill(root, heading(1, "Study"), failed(error));
    }
  };
  load();
  const soon = () => { clearTimeout(timer); timer = setTimeout(load, 700); };
  const stop = listen((kind, data) => {
    if (kind === "rows" && data.rows.some((row) => row.study_id === id)) soon();
    if (kind === "alerts" && data.alerts.some((alert) => alert.study_id === id)) soon();
    if (kind === "previews" && study?.pictures.some((row) => !row.preview && data.has(rowKey(row)))) soon();
    if (kind === "state") soon();
  });
  return { end: () => { stop(); clearTimeout(timer); } };
}

// ---- scan -----------------------------------------------------------------------------------------------------------

const MEASURES = { brain_share: "Contour's share of the picture", solidity: "Solidity of the contour", corner_share: "Bright share of the corners",
  contrast: "Contrast", clipped: "Pure white share", color_share: "Coloured share" };

export function scanView(root, [site, device, id], words) {
  fill(root, loading());
  let frames = null;
  let wanted = Number(words.get("frame") ?? 0);
  const draw = () => {
    const row = frames.find((f) => (f.frame ?? 0) === wanted) ?? frames[0];
    const message = row.message;
    const quality = message.quality;
    const timings = message.timings_ms;
    const roi = message.roi;
    const flags = quality?.flags ?? [];
    const notes = quality?.notes ?? [];
    const choice = frames.length > 1 && h("label", { class: "toggle" }, "Frame ", h("select", { onchange: (event) => { wanted = Number(event.target.value); draw(); } },
      options(frames.map((f) => [String(f.frame ?? 0), `${f.frame} of ${frames.length}`]), String(row.frame ?? 0))));
    const shown = row.preview
      ? [picture(row, { size: 448, heat, label: "The cropped picture as the model saw it" }), row.heatmap ? heatToggle(draw) : h("p", { class: "hint" }, "This model gives no activation map."),
        heat && row.heatmap && [legend(), h("p", { class: "hint" }, "Where the answer came from, relative to this picture's own highest value, and fainter the further the probability is below the threshold. It is no outline of anything.")]]
      : h("div", { class: "picture size-448 none" }, h("span", {}, "No preview was published for this picture."), h("span", { class: "hint" }, "Previews are an option of the appliance ([preview] enabled) and are kept for a limited time."));
    fill(root,
      h("div", { class: "bar-line" }, heading(1, "Scan ", shortId(id)), h("span", { class: "spacer" }), choice),
      h("div", { class: "columns scan" },
        h("section", { class: "panel look", "aria-label": "Picture" }, shown,
          h("p", { class: "hint" }, "This is the part that the model saw, cropped and scaled. The image beyond the crop never leaves the appliance.")),
        h("section", { class: `panel answer ${verdict(row)}`, "aria-labelledby": "answer-title" },
          h("h2", { id: "answer-title" }, decision(row), verdict(row) === "positive" && h("span", { class: "by" }, "by this model")),
          typeof row.probability === "number" && h("div", { class: "big-bar" }, bar(row), h("p", { class: "hint" }, `Probability against the threshold of ${probability(row.threshold)}${ownRule(message)}: at or above it the decision is positive${band(message)}.`)),
          remark(row) && h("p", { class: "why" }, row.rejected ? h("code", {}, row.rejected.code) : null, row.rejected ? " " : null, row.rejected || row.misfit ? remark(row) : `Unusual: ${remark(row)}`),
          facts([
            ["Model", `${message.model?.name ?? "?"} ${message.model?.version ?? ""}`],
            ["Model file", message.model?.sha256 && h("code", { class: "long" }, message.model.sha256)],
            ["Scores", message.scores && Object.entries(message.scores).map(([label, p]) => `${label} ${probability(p)}`).join(", ")],
            ["Part of the picture", roi && `x ${roi.x}, y ${roi.y}, ${roi.width} × ${roi.height} pixels`],
            ["Time", timings && `${milliseconds(timings.total)} (decode ${milliseconds(timings.decode)}, find ${milliseconds(timings.roi)}, scale ${milliseconds(timings.resize)}, model ${milliseconds(timings.infer)})`],
            ["Quality", quality && (flags.length ? flags.map(flagWord).join(", ") : "nothing unusual measured")],
            ["Decoding", notes.length ? notes.map(noteWord).join(", ") : null],
            ["Source", message.source && `${String(message.source).toUpperCase()}${message.modality ? `, ${message.modality}` : ""}`],
            ["Taken", message.acquired_at && time(message.acquired_at)],
            ["Processed", time(message.processed_at)],
            ["Appliance", `${site} / ${device}`],
            ["Study", row.study_id && h("a", { href: studyLink(row) }, shortId(row.study_id))],
            ["Scan id", h("code", { class: "long" }, id)],
          ]),
          quality && h("details", {}, h("summary", {}, "Quality measures, 0 to 1"), facts(Object.entries(MEASURES).map(([key, text]) => [text, typeof quality[key] === "number" ? quality[key].toFixed(3) : null]))),
          message.replayed && h("p", { class: "hint" }, "Classified again after an interruption."),
          h("p", { class: "small-notice" }, message.notice ?? "research use only, not for diagnosis"))));
  };
  const load = async () => {
    try {
      ({ frames } = await ask(`/api/scan/${site}/${device}/${id}`));
      draw();
    } catch (error) {
      if (!frames) fill(root, heading(1, "Scan"), failed(error));
    }
  };
  load();
  const stop = listen((kind, data) => {
    if (kind === "previews" && [...data.keys()].some((key) => key.includes(id))) load();
    if (kind === "rows" && data.rows.some((row) => row.scan_id === id)) load();
  });
  return { end: stop };
}

// ---- charts ---------------------------------------------------------------------------------------------------------

export function chartsView(root, _, words) {
  const range = RANGES[words.get("range")] ? words.get("range") : "24h";
  const area = h("div", { class: "charts" }, loading());
  const form = h("form", { class: "filters panel", "aria-label": "Filter charts", onchange: () => {
    const data = new FormData(form);
    go("/charts", { appliance: data.get("appliance"), range: data.get("range") });
  } });
  const drawForm = () => fill(form, applianceChoice(words), h("label", {}, "Time", h("select", { name: "range" }, options(Object.entries(RANGES).map(([k, [text]]) => [k, text]), range))));
  drawForm();
  const load = async () => {
    const to = Date.now();
    const query = new URLSearchParams({ from: new Date(to - RANGES[range][1]).toISOString(), to: new Date(to).toISOString() });
    if (words.get("appliance")) query.set("appliance", words.get("appliance"));
    try {
      const data = await ask(`/api/charts?${query}`);
      const minutes = data.step_ms / 60_000;
      const each = minutes < 60 ? `${minutes} min` : minutes < 1440 ? count(minutes / 60, "hour") : count(minutes / 1440, "day");
      const decided = (s) => s.positive + s.negative + s.indeterminate;
      const open = new Set([...area.querySelectorAll("details[open]")].map((d) => d.closest("figure").dataset.chart));
      const charts = [
        timeChart({ title: "Pictures", unit: `by decision, each ${each}`, data, kind: "bars",
          series: ["negative", "positive", "indeterminate", "rejected"].map((d) => ({ name: shortWord(d), class: d, mark: shape(d), of: (s) => s[d] })) }),
        timeChart({ title: "Positive rate", unit: "% of classified pictures", data, top: 100,
          series: [{ name: "Positive", class: "positive", of: (s) => (decided(s) ? (100 * s.positive) / decided(s) : null) }] }),
        timeChart({ title: "Time for one picture", unit: "ms", data,
          series: [{ name: "Median", class: "first", of: (s) => s.p50_ms }, { name: "95th percentile", class: "second", of: (s) => s.p95_ms }] }),
        timeChart({ title: "Backlog", unit: "highest number waiting", data,
          series: [{ name: "Files", class: "first", of: (s) => s.files }, { name: "Messages", class: "second", of: (s) => s.messages }] }),
      ];
      charts.forEach((chart, i) => { chart.dataset.chart = String(i); if (open.has(String(i))) chart.querySelector("details").open = true; });
      fill(area, charts);
    } catch (error) {
      fill(area, failed(error));
    }
  };
  fill(root, heading(1, "Charts"), form, area);
  load();
  const timer = setInterval(() => { if (!area.contains(document.activeElement)) load(); }, 30_000);
  const stop = listen((kind) => { if (kind === "state") { drawForm(); load(); } });
  return { end: () => { stop(); clearInterval(timer); } };
}

// ---- upload ---------------------------------------------------------------------------------------------------------

const AT_ONCE = 2;
const RESULT_PATIENCE_MS = 120_000;

export function uploadView(root) {
  const list = h("ol", { class: "plain uploads" });
  const queue = [];
  let busy = 0;
  const waiting = new Map();
  const input = h("input", { id: "files", type: "file", multiple: true, accept: ".png,.jpg,.jpeg,.bmp,.tif,.tiff,.dcm,.dicom,image/*", onchange: () => { take(input.files); input.value = ""; } });
  const zone = h("div", { class: "dropzone panel" }, h("label", { for: "files" }, "Choose images, or drop them here"), input,
    h("p", { class: "hint" }, "PNG, JPEG, BMP, TIFF or DICOM. They are copied into the export folder of this appliance under new names and take the normal way; their own names stay in this browser."));
  const over = (on) => (event) => { event.preventDefault(); zone.classList.toggle("over", on); };
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (event) => { over(false)(event); take(event.dataTransfer.files); });

  function take(files) {
    for (const file of files) {
      const progress = h("progress", { max: 100, value: 0, "aria-label": `Upload of ${file.name}` });
      const status = h("p", { class: "hint", role: "status" }, "Waiting");
      const line = h("li", { class: "panel upload" }, h("p", { class: "file" }, file.name), progress, status);
      list.prepend(line);
      if (live.upload && file.size > live.upload.bytes) {
        status.textContent = `file: is larger than ${Math.round(live.upload.bytes / 1_048_576)} MB; see limits.file_bytes`;
        status.classList.add("wrong");
        progress.remove();
        continue;
      }
      queue.push({ file, progress, status, line });
    }
    next();
  }

  function next() {
    while (busy < AT_ONCE && queue.length) {
      busy += 1;
      send(queue.shift()).finally(() => { busy -= 1; next(); });
    }
  }

  async function send({ file, progress, status, line }) {
    status.textContent = "Sending";
    try {
      const answer = await post(file, (share) => { progress.value = Math.round(share * 100); });
      progress.value = 100;
      if (answer.known && !answer.shown) {
        status.textContent = "These bytes were classified before, but the result is not in this dashboard's history any more.";
        return;
      }
      status.textContent = answer.known ? "These bytes were classified before; this is their result." : "In the export folder; waiting for the result.";
      waiting.set(answer.scan_id, { answer, status, line, progress, until: Date.now() + RESULT_PATIENCE_MS });
      look();
    } catch (error) {
      status.textContent = error.message;
      status.classList.add("wrong");
      progress.remove();
    }
  }

  async function look() {
    for (const [id, item] of [...waiting]) {
      try {
        const { frames } = await ask(`/api/scan/${item.answer.site}/${item.answer.device}/${id}`);
        if (!waiting.delete(id)) continue;
        item.progress.remove();
        const top = frames.reduce((a, b) => ((b.probability ?? -1) > (a.probability ?? -1) ? b : a));
        item.line.append(h("div", { class: "outcome" }, picture(top, { size: 56 }), h("a", { href: scanLink(top) }, decision(top)), bar(top), remark(top) && h("span", { class: "hint" }, remark(top))));
        if (!item.answer.known) item.status.textContent = "Result:";
      } catch {
        if (Date.now() > item.until && waiting.delete(id)) item.status.textContent = "No result yet. It will appear under Results when the appliance has worked on the file.";
      }
    }
  }

  const stop = listen((kind, data) => {
    if (kind === "rows" && data.rows.some((row) => waiting.has(row.scan_id))) look();
    if (kind === "state") draw();
  });
  const timer = setInterval(look, 3000);
  const draw = () => { zone.hidden = !live.upload; off.hidden = !live.loaded || Boolean(live.upload); };
  const off = h("p", { class: "trouble", hidden: true }, "upload: is off here; it works on the appliance itself, see dashboard.upload");
  fill(root, heading(1, "Upload"), off, zone, list);
  draw();
  return { end: () => { stop(); clearInterval(timer); } };
}

// XMLHttpRequest, because fetch does not tell how far it is.
function post(file, progress) {
  const ending = /\.([A-Za-z0-9]{1,5})$/.exec(file.name)?.[1] ?? "";
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `/api/upload?extension=${encodeURIComponent(ending)}`);
    request.setRequestHeader("content-type", "application/octet-stream");
    request.setRequestHeader("x-scansentry-token", uploadToken());
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onerror = () => reject(new Error("server: does not answer; try again"));
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* an error without JSON */ }
      if (request.status === 200) resolve(answer);
      else reject(new Error(answer.error ?? `server: answered with ${request.status}; try again`));
    };
    request.send(file);
  });
}

// ---- wall -----------------------------------------------------------------------------------------------------------

export function wallView(root) {
  const draw = () => {
    if (!live.loaded) { fill(root, loading()); return; }
    const alerts = sortedAlerts().filter(needsAttention);
    const fresh = alerts.filter((alert) => !alert.acknowledged_by);
    const latest = live.rows.slice(0, 6);
    fill(root, h("h1", { class: "unseen" }, "Wall"),
      h("section", { class: `wall-alerts ${fresh.length ? "new" : ""}`, "aria-label": "Alerts" },
        fresh.length
          ? [h("p", { class: "wall-number" }, shape("positive"), String(Math.max(fresh.length, live.openAlerts - (alerts.length - fresh.length)))), h("div", {}, h("p", { class: "wall-lead" }, "Tumour pattern found by this model"), h("ul", { class: "plain" }, fresh.slice(0, 4).map((alert) => h("li", {}, `${name(alert)}: ${alert.positives} of ${count(alert.images, "picture")}, since `, time(alert.raised_at)))))]
          : h("p", { class: "wall-lead" }, "No alert to acknowledge")),
      h("section", { class: "wall-grid", "aria-label": "Appliances" }, appliancesByNeed().slice(0, CARDS).map((appliance) => {
        const state = applianceState(appliance, Date.now());
        return h("div", { class: `panel appliance ${state}` }, h("h2", {}, name(appliance)), stateMark(state),
          (appliance.health?.conditions ?? []).slice(0, 1).map((c) => h("p", { class: "why" }, c.message)),
          h("p", { class: "hint" }, appliance.health ? `${count(appliance.health.backlog.files, "file")} and ${count(appliance.health.backlog.messages, "message")} waiting` : "no report yet"));
      }), large() && h("p", { class: "hint" }, `${live.appliances.size - CARDS} more; those that need attention come first.`)),
      h("section", { class: "wall-latest", "aria-label": "Latest results" }, latest.map((row) => h("div", { class: `panel ${verdict(row)}` }, picture(row, { size: 160, heat: true }),
        h("p", {}, decision(row)), bar(row), h("p", { class: "hint" }, name(row), " · ", time(row.processed_at))))),
      h("p", { class: "wall-foot" }, h("span", {}, "Research use only, not for diagnosis"), h("span", { class: "wall-clock" }, new Date().toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" })), h("a", { href: "#/" }, "Leave the wall view")));
  };
  draw();
  let due = 0;
  const stop = listen((kind) => {
    // At most one drawing a second, however fast results come.
    if (kind !== "connection" && !due) due = setTimeout(() => { due = 0; draw(); }, 1000);
  });
  const timer = setInterval(draw, 30_000);
  return { end: () => { stop(); clearInterval(timer); clearTimeout(due); } };
}

export function notFound(root) {
  fill(root, heading(1, "Not found"), empty("There is no such view.", "Choose one above."));
}
