// What things are called, and how numbers and times are written. The words follow the project's rules: an output is
// never a diagnosis, and a negative is "no tumour pattern found by this model", nothing more.

import { h } from "./dom.js";

// Each decision has a shape, a word and a colour; none of them stands alone.
const DECISIONS = {
  positive: { word: "Tumour pattern found", short: "Positive", path: "M8 1.5 15 14.5H1z" },
  negative: { word: "No tumour pattern found by this model", short: "Negative", path: "M8 2a6 6 0 1 1 0 12A6 6 0 0 1 8 2z" },
  indeterminate: { word: "No clear answer", short: "Indeterminate", path: "M8 1 15 8 8 15 1 8z" },
  rejected: { word: "Rejected", short: "Rejected", path: "M3.2 1.5 8 6.3l4.8-4.8 1.7 1.7L9.7 8l4.8 4.8-1.7 1.7L8 9.7l-4.8 4.8-1.7-1.7L6.3 8 1.5 3.2z" },
  skipped: { word: "Skipped, no image", short: "Skipped", path: "M1.5 6.5h13v3h-13z" },
};
export const DECISION_NAMES = Object.keys(DECISIONS);

export function verdict(row) {
  return row.outcome === "classified" ? row.decision : row.outcome;
}

export function decisionWord(name) {
  return DECISIONS[name]?.word ?? name;
}

export function shortWord(name) {
  return DECISIONS[name]?.short ?? name;
}

export function shape(name) {
  return h("svg", { class: `shape ${name}`, viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true" },
    h("path", { d: DECISIONS[name]?.path ?? DECISIONS.skipped.path }));
}

export function decision(row, words = decisionWord) {
  const name = verdict(row);
  return h("span", { class: `decision ${name}` }, shape(name), h("span", {}, words(name)));
}

const FLAGS = {
  small_contour: "small contour", large_contour: "contour fills the picture", ragged_contour: "ragged contour",
  bright_corners: "bright corners", low_contrast: "low contrast", clipped: "much pure white", color: "colours",
};
const NOTES = {
  first_page_only: "only the first page was looked at", frames_dropped: "frames beyond the limit were left out",
  sixteen_bit_reduced: "16 bits reduced to 8", exif_rotated: "rotated as the file says",
  percentile_window: "window from the picture's own levels", aspect_corrected: "stretched to square pixels",
};
export const flagWord = (flag) => FLAGS[flag] ?? String(flag).replaceAll("_", " ");
export const noteWord = (note) => NOTES[note] ?? String(note).replaceAll("_", " ");

// Why a picture has no decision, or what is unusual about it, in one short line.
export function remark(row) {
  if (row.rejected) return row.rejected.message ?? row.rejected.code;
  if (row.misfit) return row.misfit.message ?? row.misfit.code;
  const flags = Array.isArray(row.flags) ? row.flags : [];
  return flags.map(flagWord).join(", ");
}

const STATES = {
  online: { word: "Online", path: "M8 2a6 6 0 1 1 0 12A6 6 0 0 1 8 2z" },
  degraded: { word: "Degraded", path: "M8 1.5 15 14.5H1z" },
  silent: { word: "Silent", path: "M8 1 15 8 8 15 1 8z" },
  offline: { word: "Offline", path: DECISIONS.rejected.path },
  stopped: { word: "Stopped", path: "M2.5 2.5h11v11h-11z" },
  unknown: { word: "Not heard of", path: DECISIONS.skipped.path },
};
// Longer than this without a health report, and "online" is not taken at its word.
const SILENT_MS = 5 * 60_000;

export function applianceState(appliance, now) {
  if (appliance.status === "offline" || appliance.status === "stopped") return appliance.status;
  if (appliance.status !== "online") return "unknown";
  if (appliance.health && now - Date.parse(appliance.health.at) > SILENT_MS) return "silent";
  return appliance.health?.state === "degraded" ? "degraded" : "online";
}

export function stateMark(name) {
  const state = STATES[name];
  return h("span", { class: `state ${name}` },
    h("svg", { class: "shape", viewBox: "0 0 16 16", width: 12, height: 12, "aria-hidden": "true" }, h("path", { d: state.path })),
    h("span", {}, state.word));
}

export function probability(value) {
  return typeof value === "number" ? value.toFixed(3) : "–";
}

// Whose threshold it is, where it is not the model's own.
export function ownRule(message) {
  return message.decision_rule === "appliance" ? ", set on the appliance" : "";
}

// The band without a clear answer, where there is one.
export function band(message) {
  const [low, high] = Array.isArray(message.indeterminate) ? message.indeterminate : [];
  return typeof low === "number" && typeof high === "number" ? `, and from ${probability(low)} up to ${probability(high)} there is no clear answer` : "";
}

export function milliseconds(value) {
  if (typeof value !== "number") return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}

export function count(number, one, many = `${one}s`) {
  return `${Number(number).toLocaleString("en")} ${number === 1 ? one : many}`;
}

const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const FULL = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "long" });

// A time, as a clock today and with its day before; the full time is in the title.
export function time(text) {
  const date = new Date(text ?? NaN);
  if (Number.isNaN(date.getTime())) return "–";
  const today = date.toDateString() === new Date().toDateString();
  const shown = today ? CLOCK.format(date) : `${DAY.format(date)} ${CLOCK.format(date).slice(0, 5)}`;
  return h("time", { datetime: date.toISOString(), title: FULL.format(date) }, shown);
}

export function clock(date) {
  return CLOCK.format(date);
}

export function shortId(id) {
  return h("code", { title: id }, String(id).slice(0, 8));
}

export function name(appliance) {
  return `${appliance.site} / ${appliance.device}`;
}
