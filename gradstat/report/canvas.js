// Canvases that follow their width, the screen's resolution and the colour scheme.

import { clamp, lastWhere, make, whole } from "./text.js";

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
export const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const drawings = [];

export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

// 256 colours between the stops, [r, g, b] each.
function ramp(stops) {
  const colors = stops.map(rgb);
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (colors.length - 1);
    const below = Math.min(Math.floor(at), colors.length - 2);
    return colors[below].map((c, j) => Math.round(c + (at - below) * (colors[below + 1][j] - c)));
  });
}

export const viridis = ramp(VIRIDIS);
export const densityLight = ramp(["#ffffff", "#fcdcc4", "#f59b73", "#d3546f", "#8a3a80", "#2b1550"]);
export const densityDark = ramp(["#171a1f", "#43206b", "#8a3a86", "#d3546f", "#f59b73", "#fdeec4"]);

export function colorAt(colors, x) {
  return colors[clamp(Math.round(255 * x), 0, 255)];
}

// A canvas of a height in a parent, drawn by draw(context, width, height) now and whenever its
// size or the colour scheme changes. Without a label it is hidden from screen readers.
export function addCanvas(parent, height, draw, label = "") {
  const canvas = make("canvas");
  describe(canvas, label);
  parent.append(canvas);
  const drawing = { canvas, height, draw, redraw: () => paint(drawing) };
  drawings.push(drawing);
  return drawing;
}

export function removeCanvas(drawing) {
  drawing.canvas.remove();
  drawings.splice(drawings.indexOf(drawing), 1);
}

export function describe(canvas, label) {
  if (canvas.getAttribute("role") !== "slider") canvas.setAttribute("role", label ? "img" : "presentation");
  canvas.removeAttribute("aria-hidden");
  if (label) canvas.setAttribute("aria-label", label);
  else canvas.setAttribute("aria-hidden", "true");
}

function paint({ canvas, height, draw }) {
  const width = canvas.parentElement.clientWidth;
  if (!width) return;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  draw(context, width, height);
}

export function redrawAll() {
  for (const drawing of drawings) drawing.redraw();
}

let waiting = 0;
export function redrawSoon() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(redrawAll);
}
dark.addEventListener("change", redrawSoon);
// At once: paper does not wait for a frame.
matchMedia("print").addEventListener("change", redrawAll);
window.addEventListener("resize", redrawSoon);

export function type(context, size, align, baseline) {
  context.font = `${size}px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif`;
  context.textAlign = align;
  context.textBaseline = baseline;
  context.fillStyle = css("--muted");
}

// As much of the beginning and of the end of a text as fits a width, around an ellipsis.
export function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const letters = [...text];
  const cut = (n) => `${letters.slice(0, n >> 1).join("")}\u2026${letters.slice(letters.length - n + (n >> 1)).join("")}`;
  return cut(lastWhere(letters.length, (n) => context.measureText(cut(n)).width <= width));
}

// Short names that tell layers apart: the whole ones, or without the parts that all begin or end
// with, or what fits of these; where even those are the same, with their number before them.
export function shortNames(context, names, width) {
  if (names.every((name) => context.measureText(name).width <= width)) return names;
  const parts = names.map((name) => name.split("."));
  const shortest = Math.min(...parts.map((each) => each.length));
  const alike = (at) => new Set(parts.map((each) => each.at(at))).size === 1;
  let [before, after] = [0, 0];
  while (before + 1 < shortest && alike(before)) before++;
  while (before + after + 1 < shortest && alike(-1 - after)) after++;
  const differing = parts.map((each) => each.slice(before, each.length - after).join("."));
  const ends = differing.map((name) => fitted(context, name, width));
  if (new Set(ends).size === names.length) return ends;
  return differing.map((name, i) => {
    const number = `${i + 1} `;
    return number + fitted(context, name, width - context.measureText(number).width);
  });
}

// Round numbers between two ends, about as many as asked, at least 1 apart if they are whole.
export function roundTicks(low, high, about, integers) {
  const raw = (high - low) / Math.max(1, about) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.999);
  if (integers) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step || 0);
  return ticks;
}

// Axis of steps under a plot, with its name in the margin: `first` is the first step of each of
// its columns.
export function stepAxis(context, first, left, width, top) {
  type(context, 11, "right", "top");
  context.fillText("step", left - 8, top + 6);
  type(context, 11, "center", "top");
  context.strokeStyle = css("--line");
  const last = first[first.length - 1];
  let edge = left - 14;
  for (const step of roundTicks(first[0], last, width / 55, true)) {
    let column = first.findIndex((each) => each >= step);
    if (column < 0) column = first.length - 1;
    const x = left + ((column + 0.5) / first.length) * width;
    const text = whole(step);
    const half = context.measureText(text).width / 2;
    if (x - half < edge + 10 || x + half > left + width + 12) continue;
    edge = x + half;
    line(context, x, top, x, top + 4);
    context.fillText(text, x, top + 6);
  }
}

export function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

export function mark(context, x, bottom) {
  context.strokeStyle = css("--ink");
  context.lineWidth = 1;
  line(context, x, 0, x, bottom);
}

// A line through log2 values with a band from `low` to `high`, and marks where `bad` is not zero.
export function curve(context, box, ends, level, low, high, bad) {
  const n = level.length;
  const x = (t) => box.left + ((t + 0.5) / n) * box.width;
  const y = (v) => box.top + box.height * (1 - (v - ends[0]) / (ends[1] - ends[0]));
  context.fillStyle = css("--soft");
  for (let t = 0; t < n; t++) {
    if (!Number.isFinite(high[t]) || n === 1) continue;
    const top = y(high[t]);
    const bottom = Number.isFinite(low[t]) ? y(low[t]) : box.top + box.height;
    context.fillRect(box.left + (t / n) * box.width, top, box.width / n + 0.3, bottom - top);
  }
  context.strokeStyle = css("--accent");
  context.lineWidth = 1.4;
  context.lineJoin = "round";
  context.beginPath();
  let drawing = false;
  for (let t = 0; t < n; t++) {
    if (!Number.isFinite(level[t])) {
      drawing = false;
      continue;
    }
    if (drawing) context.lineTo(x(t), y(level[t]));
    else context.moveTo(x(t), y(level[t]));
    const alone = !drawing && !Number.isFinite(level[t + 1]);
    if (alone) {
      context.fillStyle = css("--accent");
      context.fillRect(x(t) - 1.5, y(level[t]) - 1.5, 3, 3);
    }
    drawing = true;
  }
  context.stroke();
  context.fillStyle = css("--broken");
  for (let t = 0; t < n; t++) {
    if (bad[t]) context.fillRect(box.left + (t / n) * box.width, box.top + box.height - 3, Math.max(1.5, box.width / n), 3);
  }
}

// Smallest and largest finite value, at least `least` apart.
export function spread(values, least) {
  let [low, high] = [Infinity, -Infinity];
  for (const list of values) {
    for (const v of list) {
      if (!Number.isFinite(v)) continue;
      if (v < low) low = v;
      if (v > high) high = v;
    }
  }
  if (low > high) return [-1, 0];
  const missing = Math.max(0, least - (high - low)) / 2;
  return [low - missing, high + missing];
}
