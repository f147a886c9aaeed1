// The map: a row for each layer of a kind, a column for each column of records, log2 rms as colour.

import { byId, magnitude, number, powerOfTwo, share, whole } from "./text.js";
import { arrays, byKind, capacity, columnAt, columnMiddle, columnOf, columnSteps, firstSteps, meta, nounOf, part, place, seen, state, stepsOf, titleOf } from "./run.js";
import { addCanvas, colorAt, css, describe, rgb, roundTicks, shortNames, stepAxis, type, viridis } from "./canvas.js";
import { addFigure } from "./pointing.js";
import { buildSeries } from "./series.js";

const MAP_BOTTOM = 24;

// How the layers of a kind are shown.
export function viewOf(kind) {
  const layers = byKind[kind];
  const rowHeight = layers.length <= 36 ? 20 : Math.max(1, Math.floor(720 / layers.length));
  const top = rowHeight < 12 ? 7 : 0;
  return { kind, layers, rowHeight, top, bottom: top + layers.length * rowHeight, ...cellsOf(layers) };
}

// The cells of the columns that are seen, row by row: levels, what is not finite, what the colours
// show, and their scale, which is null where there is nothing to show.
function cellsOf(layers) {
  const [n, colour] = [seen.to - seen.from, colourNow()];
  const size = n * layers.length;
  const [level, shown, nonfinite] = [new Float32Array(size), new Float32Array(size), new Float64Array(size)];
  layers.forEach((layer, i) => {
    level.set(part(arrays.level, layer), i * n);
    shown.set(colour.part(layer), i * n);
    nonfinite.set(part(arrays.nonfinite, layer), i * n);
  });
  return { n, level, shown, nonfinite, scale: shown.some(Number.isFinite) ? colour.scale(shown) : null };
}

const rowTop = (row) => state.view.top + row * state.view.rowHeight;

// Ends of the colour scale: all but the outermost two hundredths of the values.
function scaleOf(level) {
  const known = level.filter(Number.isFinite).sort();
  const at = (q) => known[Math.round(q * (known.length - 1))];
  let [low, high] = [Math.floor(at(0.01)), Math.ceil(at(0.99))];
  if (high - low < 2) high = low + 2;
  return { low, high, below: known[0] < low, above: known[known.length - 1] > high };
}

// A pixel for each cell; enlarged when it is drawn.
function mapImage({ layers, n, level, shown, nonfinite, scale }) {
  const image = document.createElement("canvas");
  image.width = n;
  image.height = layers.length;
  const context = image.getContext("2d");
  const pixels = context.createImageData(n, layers.length);
  const [broken, zero] = [rgb(css("--broken")), rgb(css("--zero"))];
  for (let i = 0; i < level.length; i++) {
    let color = null;
    if (nonfinite[i]) color = broken;
    else if (level[i] === -Infinity) color = zero;
    else if (shown[i] === Infinity) color = colorAt(viridis, 1);
    else if (!Number.isNaN(shown[i])) color = colorAt(viridis, (shown[i] - scale.low) / (scale.high - scale.low));
    if (color) pixels.data.set([...color, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return image;
}

function drawMap(context, width, left, names) {
  const { layers, rowHeight, top, bottom, n, nonfinite } = state.view;
  const L = layers.length;
  const every = Math.ceil(14 / rowHeight);
  for (let i = 0; i < L; i += every) context.fillText(names[i], left - 8, rowTop(i) + rowHeight / 2);
  context.fillStyle = css("--sunken");
  context.fillRect(left, top, width - left, bottom - top);
  context.imageSmoothingEnabled = false;
  context.drawImage(mapImage(state.view), left, top, width - left, bottom - top);
  if (rowHeight >= 12) {
    context.fillStyle = css("--surface");
    for (let i = 1; i < L; i++) context.fillRect(left, rowTop(i) - 1, width - left, 1);
  }
  // What is not finite can be seen however small its cell is.
  context.fillStyle = css("--broken");
  const cell = (width - left) / n;
  for (let i = 0; i < L * n; i++) {
    if (!nonfinite[i]) continue;
    const [x, y] = [left + (i % n) * cell, rowTop(Math.floor(i / n))];
    const [dx, dy] = [Math.max(0, 3 - cell) / 2, Math.max(0, 3 - rowHeight) / 2];
    if (dx || dy) context.fillRect(x - dx, y - dy, cell + 2 * dx, rowHeight + 2 * dy);
  }
  stepAxis(context, firstSteps(), left, width - left, bottom);
}

// Marks the row of the selected layer, and a cell.
function drawMapMarks(context, width, left) {
  const { rowHeight, n } = state.view;
  context.strokeStyle = css("--ink");
  context.lineWidth = 1.5;
  const y = rowTop(place[state.layer]);
  // Around a row that is high enough to be seen inside it.
  if (rowHeight >= 6) context.strokeRect(left + 0.75, y + 0.25, width - left - 1.5, rowHeight - 1);
  context.fillStyle = css("--ink");
  context.beginPath();
  context.moveTo(left, y + rowHeight / 2);
  context.lineTo(left - 7, y + rowHeight / 2 - 5);
  context.lineTo(left - 7, y + rowHeight / 2 + 5);
  context.fill();
  const marked = state.cell ?? (state.step === null ? null : { layer: state.layer, t: columnOf(state.step) });
  if (!marked || marked.t < seen.from || marked.t >= seen.to) return;
  const cell = (width - left) / n;
  context.strokeRect(left + (marked.t - seen.from) * cell, rowTop(place[marked.layer]), Math.max(2, cell), Math.max(2, rowHeight - 1));
}

export function buildMap(select) {
  const plot = byId("map-plot");
  let left = 0;
  const main = addCanvas(plot, 0, (context, width) => {
    const { layers, rowHeight } = state.view;
    type(context, 12, "right", "middle");
    const names = shortNames(context, layers.map((layer) => meta.layers[layer]), Math.min(240, width * 0.3));
    let widest = 0;
    for (let i = 0; i < layers.length; i += Math.ceil(14 / rowHeight)) widest = Math.max(widest, context.measureText(names[i]).width);
    // The names of the lines above it, such as a norm's, stand in the same margin.
    left = Math.ceil(Math.max(widest + 12, Math.min(100, 0.25 * width)));
    drawMap(context, width, left, names);
  }, "Map");
  const over = addCanvas(plot, 0, (context, width) => drawMapMarks(context, width, left));
  addFigure(main.canvas, {
    at(x, y) {
      const layer = state.view.layers[Math.floor((y - state.view.top) / state.view.rowHeight)];
      return layer === undefined ? null : { layer, t: columnAt(x, left, main.canvas.clientWidth) };
    },
    show(cell) {
      state.cell = cell && cell.t !== null ? cell : null;
      over.redraw();
      return cell && [titleOf(cell.layer), state.cell ? cellLines(cell.layer, cell.t) : []];
    },
    move(cell, dx, dy) {
      const { layers } = state.view;
      if (!cell) return { layer: state.layer, t: state.step === null ? seen.to - 1 : Math.max(seen.from, Math.min(seen.to - 1, columnOf(state.step))) };
      const row = Math.max(0, Math.min(layers.length - 1, place[cell.layer] + dy));
      return { layer: layers[row], t: Math.max(seen.from, Math.min(seen.to - 1, cell.t + dx)) };
    },
    where: ({ layer, t }) => [columnMiddle(t, left, main.canvas.clientWidth), rowTop(place[layer]) + state.view.rowHeight],
    choose: ({ layer, t }) => select(layer, { from: "map", step: t === null ? null : meta.steps[t][0] }),
    between: (x0, x1) => columnSteps(x0, x1, left, main.canvas.clientWidth),
    column: ({ t }) => t,
  });
  const series = buildSeries(select, () => left);
  const legend = buildLegend();
  return {
    drawings: [series.drawing, main, ...legend.drawings],
    show() {
      for (const drawing of [main, over]) drawing.height = state.view.bottom + MAP_BOTTOM;
      describe(main.canvas, `Map: the ${colourNow().label} of each layer's ${meta.nouns[state.view.kind]}, by step, as colour. Arrow keys move from cell to cell, Enter selects. The table of layers has the numbers.`);
      series.show();
      legend.show();
    },
    mark: over.redraw,
  };
}

export function cellLines(layer, t) {
  const at = layer * capacity + t;
  const lines = [stepsOf(t)];
  if (Number.isNaN(arrays.level[at]) && !arrays.nonfinite[at]) return [...lines, `no ${nounOf(layer)}`];
  lines.push(`rms ${magnitude(arrays.level[at])}`);
  if (meta.sizes[t] > 1) lines.push(`of one record: ${magnitude(arrays.least[at])} to ${magnitude(arrays.most[at])}`);
  lines.push(`zeros ${share(arrays.zeros[at])}`);
  if (arrays.nonfinite[at]) lines.push(`${whole(arrays.nonfinite[at])} NaN or infinite`);
  return [...lines, ...formatLines(layer, t)];
}

// The numbers of some layers in the columns that are seen.
export function cellsTable(layers) {
  const rows = [["layer", "kind", "first step", "last step", "records", "rms", "least rms of a record", "most rms of a record", "share of zeros", "NaN or infinite"]];
  rows[0].push(...meta.formats.flatMap((name) => [`${name} SNR in dB`, `${name} share to zero`]));
  for (const layer of layers) {
    for (let t = seen.from; t < seen.to; t++) {
      const at = layer * capacity + t;
      const sizes = [arrays.level, arrays.least, arrays.most].map((array) => 2 ** array[at]);
      rows.push([meta.layers[layer], nounOf(layer), ...meta.steps[t], meta.sizes[t], ...sizes, arrays.zeros[at], arrays.nonfinite[at]]);
      meta.formats.forEach((_, f) => {
        const own = (layer * meta.formats.length + f) * capacity + t;
        rows[rows.length - 1].push(arrays.snr[own], arrays.lost[own]);
      });
    }
  }
  return rows;
}

// What the map's colours show: the rms, or what a narrow format would do, where that was measured.

export const RMS = { key: "", label: "rms", title: "Magnitude by layer and step", scale: scaleOf, part: (layer) => part(arrays.level, layer) };

// The choices, the rms first.
function colours() {
  return [RMS, ...(meta.formats ?? []).flatMap((name, f) => [snrOf(name, f), lostOf(name, f)])];
}

const ofFormat = (array, f) => (layer) => part(array, layer * meta.formats.length + f);

const snrOf = (name, f) => ({
  key: `snr ${name}`,
  label: `SNR in ${name}`,
  title: `Signal-to-noise ratio in ${name}`,
  hint: (noun) => `Colour is how much larger a layer's ${noun} is than the error that ${name} would make, in dB; 20 dB is an error of a tenth.`,
  scale: scaleOf,
  part: ofFormat(arrays.snr, f),
  tick: (k) => `${k} dB`,
  isWhole: true,
});

const lostOf = (name, f) => ({
  key: `zero ${name}`,
  label: `to zero in ${name}`,
  title: `Share that ${name} would flush to zero`,
  hint: (noun) => `Colour is the share of a layer's ${noun} that ${name} would flush to zero, of what is not zero already.`,
  scale: () => ({ low: 0, high: 1, below: false, above: false }),
  part: ofFormat(arrays.lost, f),
  tick: (k) => `${Math.round(100 * k)} %`,
});

export const colourNow = () => colours().find((each) => each.key === state.colour) ?? RMS;

// What each format would do to a layer in a column, a line each.
function formatLines(layer, t) {
  return (meta.formats ?? []).flatMap((name, f) => {
    const at = (layer * meta.formats.length + f) * capacity + t;
    const [snr, lost] = [arrays.snr[at], arrays.lost[at]];
    if (Number.isNaN(snr)) return [];
    return [`${name}: ${snr === Infinity ? "exact" : `${(Math.abs(snr) < 0.05 ? 0 : snr).toFixed(1)} dB`}${lost ? `, ${share(lost)} to zero` : ""}`];
  });
}

// A control for what the colours show, where there are formats.
export function buildColours(changed) {
  const control = byId("colour");
  control.addEventListener("change", () => {
    state.colour = control.value;
    changed();
  });
  return {
    begin() {
      control.parentElement.hidden = colours().length < 2;
      control.replaceChildren(...colours().map(({ key, label }) => new Option(label, key)));
    },
    show() {
      control.value = colourNow().key;
      byId("map-title").textContent = colourNow().title;
    },
  };
}

// What the colours of the map mean in numbers.

function buildLegend() {
  const holder = document.createElement("div");
  holder.style.width = "min(420px, 100%)";
  byId("map-legend").append(holder);
  const drawing = addCanvas(holder, 42, drawScale, "Colour scale");
  return {
    // In a picture that is saved the other colours stand below the scale.
    drawings: [drawing, { canvas: drawing.canvas, height: 16, draw: drawSwatches }],
    show() {
      const [{ scale }, { tick, label }] = [state.view, colourNow()];
      const ends = scale && [scale.low, scale.high].map(tick ?? ((k) => number(2 ** k)));
      holder.hidden = !scale;
      if (scale) describe(drawing.canvas, `Colours from dark to light: ${label}, ${ends[0]} to ${ends[1]}`);
      const swatches = otherColors().map(([text, color]) => {
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.setProperty("--of", color.startsWith("--") ? `var(${color})` : color);
        swatch.textContent = text;
        return swatch;
      });
      byId("map-legend").replaceChildren(holder, ...swatches);
    },
  };
}

// Colours of cells without a magnitude, those that there are.
function otherColors() {
  const { kind, level, shown, nonfinite } = state.view;
  return [
    ["exact", `rgb(${colorAt(viridis, 1).join()})`, shown.includes(Infinity)],
    ["NaN or infinity", "--broken", nonfinite.some((n) => n > 0)],
    ["all zero", "--zero", level.includes(-Infinity)],
    [`no ${meta.nouns[kind]}`, "--sunken", level.some((x, i) => Number.isNaN(x) && !nonfinite[i])],
    ["not measured", "--sunken", shown.some((x, i) => Number.isNaN(x) && Number.isFinite(level[i]) && !nonfinite[i])],
  ].filter((each) => each[2]);
}

function drawSwatches(context) {
  let x = 30;
  for (const [text, color] of otherColors()) {
    context.fillStyle = color.startsWith("--") ? css(color) : color;
    context.fillRect(x, 2, 10, 10);
    type(context, 11, "left", "middle");
    context.fillText(text, x + 15, 7);
    x += context.measureText(text).width + 32;
  }
}

// Powers of two under the colours, and the same in decimals where there is room; or other numbers.
function drawScale(context, width) {
  const { scale } = state.view;
  if (!scale) return;
  const inner = width - 60;
  for (let x = 0; x < inner; x++) {
    context.fillStyle = `rgb(${colorAt(viridis, x / (inner - 1)).join()})`;
    context.fillRect(30 + x, 0, 1, 10);
  }
  type(context, 11, "center", "top");
  let edge = -Infinity;
  const { tick, isWhole } = colourNow();
  for (const k of roundTicks(scale.low, scale.high, 5, !tick || isWhole)) {
    const x = 30 + ((k - scale.low) / (scale.high - scale.low)) * inner;
    const sign = scale.below && k === scale.low ? "\u2264 " : scale.above && k === scale.high ? "\u2265 " : "";
    context.fillText(sign + (tick ?? powerOfTwo)(k), x, 14);
    if (tick) continue;
    const half = context.measureText(number(2 ** k)).width / 2;
    if (x - half < edge + 6) continue;
    edge = x + half;
    context.fillText(number(2 ** k), x, 28);
  }
}
