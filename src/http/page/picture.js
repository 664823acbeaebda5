// A picture with its activation map, and a probability against its threshold.

import { h } from "./dom.js";
import { probability, verdict } from "./words.js";

// The "inferno" map, nine steps: even steps of value look like even steps of lightness.
const MAP = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];

function colour(value) {
  const place = Math.min(Math.max(value, 0), 1) * (MAP.length - 1);
  const [low, high] = [MAP[Math.floor(place)], MAP[Math.ceil(place)]];
  return low.map((part, i) => Math.round(part + (high[i] - part) * (place - Math.floor(place))));
}

// The map as a canvas of its own few cells; the browser smooths it when it is stretched over the picture. The map is scaled to its own
// highest value, so below the threshold it is drawn fainter, by the probability: else every picture would look alike.
function heatCanvas({ heatmap, probability: p, threshold = 0.5 }) {
  const strength = typeof p === "number" && threshold > 0 ? Math.min(1, p / threshold) : 1;
  const canvas = h("canvas", { class: "heat", width: heatmap.columns, height: heatmap.rows, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(heatmap.columns, heatmap.rows);
  heatmap.values.flat().forEach((value, i) => {
    const [r, g, b] = colour(value / 255);
    image.data.set([r, g, b, Math.round(255 * strength * Math.min(0.75, (value / 255) * 0.95))], i * 4);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

export function legend() {
  const canvas = h("canvas", { class: "scale", width: 64, height: 1, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  for (let x = 0; x < 64; x++) {
    context.fillStyle = `rgb(${colour(x / 63).join(",")})`;
    context.fillRect(x, 0, 1, 1);
  }
  return h("p", { class: "legend" }, h("span", {}, "little"), canvas, h("span", {}, "most of this picture"));
}

export function previewUrl(row) {
  const frame = row.frame ? `?frame=${row.frame}` : "";
  return `/api/preview/${row.site}/${row.device}/${row.scan_id}${frame}`;
}

// A picture; an empty frame where none was published.
export function picture(row, { size = 64, heat = false, label = "" } = {}) {
  const frame = h("span", { class: `picture size-${size}` });
  if (!row.preview) {
    frame.classList.add("none");
    if (label) frame.append(h("span", {}, "no preview"));
    return frame;
  }
  frame.append(h("img", { src: previewUrl(row), width: size, height: size, alt: label, loading: "lazy", decoding: "async" }));
  if (heat && row.heatmap) frame.append(heatCanvas(row));
  return frame;
}

// The probability on a line from 0 to 1 with the threshold marked.
export function bar(row) {
  if (typeof row.probability !== "number") return h("span", { class: "bar-none" }, "no probability");
  const threshold = typeof row.threshold === "number" ? row.threshold : 0.5;
  const text = `probability ${probability(row.probability)}, threshold ${probability(threshold)}`;
  const track = h("span", { class: "track" }, h("span", { class: "amount" }), h("span", { class: "threshold" }));
  track.children[0].style.width = `${row.probability * 100}%`;
  track.children[1].style.left = `${threshold * 100}%`;
  return h("span", { class: `bar ${verdict(row)}`, role: "img", "aria-label": text, title: text }, track,
    h("span", { class: "number" }, probability(row.probability)));
}
