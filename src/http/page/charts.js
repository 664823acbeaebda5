// Charts as SVG, each with axes, units and a table that says the same.

import { h } from "./dom.js";
import { shape, shortWord, verdict } from "./words.js";

const [WIDTH, HEIGHT] = [640, 220];
const EDGE = { left: 48, right: 12, top: 12, bottom: 30 };
const [INNER_W, INNER_H] = [WIDTH - EDGE.left - EDGE.right, HEIGHT - EDGE.top - EDGE.bottom];

// A round number at or above `value`: 1, 2 or 5 times a power of ten.
function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function label(date, step) {
  if (step >= 86_400_000) return date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
}

// Axes: lines at the parts of `top` that `whole` numbers allow, and words below.
function frame(top, format, ticks, whole = true) {
  const lines = [0, 0.25, 0.5, 0.75, 1].filter((part) => !whole || (part * top) % 1 === 0 || top > 20);
  return [
    lines.map((part) => {
      const y = EDGE.top + INNER_H * (1 - part);
      return [h("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y, y2: y }),
        h("text", { class: "axis", x: EDGE.left - 8, y: y + 4, "text-anchor": "end" }, format(top * part))];
    }),
    ticks.map(([x, text]) => h("text", { class: "axis", x: EDGE.left + INNER_W * x, y: HEIGHT - 8, "text-anchor": x > 0.94 ? "end" : x < 0.03 ? "start" : "middle" }, text)),
  ];
}

function timeTicks(data) {
  const [from, to] = [Date.parse(data.from), Date.parse(data.to)];
  return [0, 0.25, 0.5, 0.75, 1].map((part) => [part, label(new Date(from + (to - from) * part), data.step_ms >= 21_600_000 ? 86_400_000 : 0)]);
}

// series: [{ name, class, of: step → number or null }]; kind: bars (stacked) or lines.
export function timeChart({ title, unit, data, series, kind = "lines", top: fixedTop, format = (v) => String(+v.toPrecision(3)) }) {
  const [from, to] = [Date.parse(data.from), Date.parse(data.to)];
  const steps = data.steps.map((step) => ({ step, at: Date.parse(step.at) }));
  const values = steps.map(({ step }) => series.map((line) => line.of(step)));
  const sums = values.map((row) => (kind === "bars" ? row.reduce((a, b) => a + (b ?? 0), 0) : Math.max(0, ...row.map((v) => v ?? 0))));
  const top = fixedTop ?? roundUp(Math.max(0, ...sums));
  const y = (value) => EDGE.top + INNER_H * (1 - value / top);
  const x = (at) => EDGE.left + INNER_W * Math.min(1, Math.max(0, (at - from) / (to - from)));
  const marks = [];
  if (kind === "bars") {
    const width = Math.max(2, (INNER_W * data.step_ms) / (to - from) - 1.5);
    steps.forEach(({ at }, i) => {
      let base = 0;
      series.forEach((line, j) => {
        const value = values[i][j] ?? 0;
        if (value > 0) marks.push(h("rect", { class: `area ${line.class}`, x: x(at), y: y(base + value), width: Math.min(width, WIDTH - EDGE.right - x(at) + 1), height: y(base) - y(base + value) }));
        base += value;
      });
    });
  } else {
    series.forEach((line, j) => {
      const points = steps.map(({ at }, i) => [x(at + data.step_ms / 2), values[i][j], at]).filter(([, value]) => value !== null && value !== undefined);
      // A gap of more than a few steps is a gap, not a line.
      let run = [];
      const runs = [run];
      points.forEach(([px, value, at], i) => {
        if (i && at - points[i - 1][2] > data.step_ms * 3) runs.push(run = []);
        run.push(`${px.toFixed(1)},${y(value).toFixed(1)}`);
      });
      for (const part of runs) marks.push(h("polyline", { class: `line ${line.class}`, points: part.join(" ") }));
      for (const [px, value] of points) marks.push(h("circle", { class: `dot ${line.class}`, cx: px, cy: y(value), r: 2.5 }));
    });
  }
  const empty = !marks.length;
  const caption = h("figcaption", {}, h("h2", {}, title, h("span", { class: "unit" }, unit)),
    series.length > 1 && h("ul", { class: "key" }, series.map((line) => h("li", { class: line.class }, line.mark ?? h("span", { class: "swatch" }), line.name))));
  const drawing = h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}, ${unit}. The table below has the numbers.` },
    frame(top, format, timeTicks(data), kind === "bars" || unit.startsWith("highest")), marks,
    empty && h("text", { class: "empty", x: EDGE.left + INNER_W / 2, y: EDGE.top + INNER_H / 2, "text-anchor": "middle" }, "nothing in this time"));
  return h("figure", { class: "chart panel" }, caption, drawing, table(title, unit, steps, series, format, data.step_ms));
}

function table(title, unit, steps, series, format, step) {
  const rows = steps.map(({ step: values, at }) => h("tr", {}, h("th", { scope: "row" }, new Date(at).toLocaleString("en-GB", step >= 86_400_000 ? { dateStyle: "medium" } : { dateStyle: "short", timeStyle: "short" })),
    series.map((line) => { const value = line.of(values); return h("td", {}, value === null || value === undefined ? "–" : format(value)); })));
  return h("details", {}, h("summary", {}, "Numbers as a table"),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title}, table` }, h("table", { class: "numbers" },
      h("caption", { class: "unseen" }, `${title}, ${unit}`),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "From"), series.map((line) => h("th", { scope: "col" }, line.name)))),
      h("tbody", {}, rows))));
}

const SHAPES = {
  positive: (x, y) => h("path", { class: "point positive", d: `M${x} ${y - 6}l6 11h-12z` }),
  negative: (x, y) => h("circle", { class: "point negative", cx: x, cy: y, r: 4.5 }),
  indeterminate: (x, y) => h("path", { class: "point indeterminate", d: `M${x} ${y - 6}l6 6-6 6-6-6z` }),
};

// Probabilities of a study's pictures in their order, against the threshold.
export function studyPlot(pictures, chosen, go) {
  const known = pictures.map((row, i) => [i, row]).filter(([, row]) => typeof row.probability === "number");
  const x = (i) => EDGE.left + (pictures.length < 2 ? INNER_W / 2 : 8 + ((INNER_W - 16) * i) / (pictures.length - 1));
  const y = (value) => EDGE.top + INNER_H * (1 - value);
  const threshold = known[0]?.[1].threshold ?? 0.5;
  const steps = Math.min(5, pictures.length);
  const ticks = steps < 2 ? [[0.5, "1"]] : Array.from({ length: steps }, (_, i) => {
    const index = Math.round(((pictures.length - 1) * i) / (steps - 1));
    return [(x(index) - EDGE.left) / INNER_W, String(index + 1)];
  });
  const marks = known.map(([i, row]) => {
    const mark = (SHAPES[verdict(row)] ?? SHAPES.negative)(x(i), y(row.probability));
    if (i === chosen) mark.classList.add("chosen");
    mark.addEventListener("click", () => go(i));
    mark.append(h("title", {}, `picture ${i + 1}: ${row.probability.toFixed(3)}, ${shortWord(verdict(row))}`));
    return mark;
  });
  const names = [...new Set(known.map(([, row]) => verdict(row)))];
  return h("figure", { class: "chart" },
    h("figcaption", {}, h("h2", {}, "Probability by picture", h("span", { class: "unit" }, "0 to 1, in the order in which they were taken")),
      h("ul", { class: "key" }, names.map((n) => h("li", { class: n }, shape(n), shortWord(n))), h("li", {}, h("span", { class: "dash" }), `threshold ${threshold}`))),
    h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Probability of each picture against the threshold. The list of pictures has the numbers." },
      frame(1, (v) => v.toFixed(2), ticks, false),
      h("line", { class: "threshold", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(threshold), y2: y(threshold) }),
      h("polyline", { class: "line thin", points: known.map(([i, row]) => `${x(i)},${y(row.probability)}`).join(" ") }), marks));
}
