// The selected layer: its rms, its distribution over time, one record's histogram, its numbers.

import { byId, clamp, make, number, plural, powerOfTwo, share, short, whole } from "./text.js";
import { arrays, columnAt, columnMiddle, columnOf, columnSteps, countAt, filledRows, firstSteps, K, meta, newest, nounOf, part, rowAt, rowEnds, sampleAt, sampleMiddle, samples, sampleSteps, sampleStepsBetween, seen, seenColumn, state, titleOf } from "./run.js";
import { addCanvas, colorAt, css, curve, dark, densityDark, densityLight, describe, line, mark, roundTicks, spread, stepAxis, type } from "./canvas.js";
import { addFigure } from "./pointing.js";
import { cellLines } from "./map.js";

export const NAMES = [
  ["numel", "elements"], ["rms", "rms"], ["mean", "mean"], ["std", "std"], ["min", "min"], ["max", "max"],
  ["l2", "l2 norm"], ["zeros", "zeros"], ["nan", "NaN"], ["posinf", "+infinity"], ["neginf", "\u2212infinity"],
  ["ratio", "update / parameter", "update"], ["dead", "dead units", "activation"],
];
const LEFT = 54;
const COUNTED = ["numel", "zeros", "nan", "posinf", "neginf"];

export function buildDetail(select) {
  const curvePlot = byId("detail-curve");
  const rms = addCanvas(curvePlot, 98, drawCurve, "rms");
  const rmsOver = addCanvas(curvePlot, 98, (context, width, height) => {
    if (state.t !== null) mark(context, columnMiddle(state.t, LEFT, width), height - 22);
  });
  const plot = byId("detail-distribution");
  const distribution = addCanvas(plot, 172, drawDistribution, "Distribution");
  const over = addCanvas(plot, 172, (context, width, height) => {
    if (seen.samples.includes(state.sample)) mark(context, sampleMiddle(state.sample, LEFT, width), height - 22);
  });
  const holder = make("div");
  holder.style.width = "100%";
  byId("detail-legend").append(holder);
  const legend = addCanvas(holder, 26, drawShares, "Colour scale");
  const histogram = addCanvas(byId("detail-histogram"), 96, drawHistogram, "Histogram");

  addFigure(rms.canvas, {
    at: (x) => columnAt(x, LEFT, rms.canvas.clientWidth),
    show(t) {
      state.t = t;
      rmsOver.redraw();
      return t === null ? null : [titleOf(state.layer), cellLines(state.layer, t)];
    },
    move: (t, dx) => seenColumn(t === null ? (state.step === null ? seen.to - 1 : columnOf(state.step)) : t + dx),
    where: (t) => [columnMiddle(t, LEFT, rms.canvas.clientWidth), 40],
    choose: (t) => select(state.layer, { from: "detail", step: meta.steps[t][0] }),
    between: (x0, x1) => columnSteps(x0, x1, LEFT, rms.canvas.clientWidth),
    column: (t) => t,
  });
  addFigure(distribution.canvas, {
    at(x, y) {
      const k = sampleAt(x, LEFT, distribution.canvas.clientWidth);
      const { low, high } = extent(state.layer);
      return k === null || x < LEFT ? null : { k, value: high - (y / (distribution.height - 22)) * (high - low) };
    },
    show(place) {
      showSample(place ? place.k : state.home);
      if (!place) return null;
      const row = place.value === null ? null : rowAt(state.layer, place.k, place.value);
      return [`${titleOf(state.layer)}, step ${whole(samples[place.k].step)}`, [
        ...(row === null ? [] : rowLines(state.layer, place.k, row)),
        ...outside(state.layer, place.k),
      ]];
    },
    move(place, dx, dy) {
      const { low, high } = extent(state.layer);
      if (!place) return { k: seen.samples.includes(state.home) ? state.home : seen.samples.at(-1), value: fullestRow(state.layer, state.home) };
      const at = clamp(seen.samples.indexOf(place.k) + dx, 0, seen.samples.length - 1);
      const unit = rowSize(state.layer, place.k);
      return { k: seen.samples[at], value: clamp(place.value - dy * unit, low + unit / 2, high - unit / 2) };
    },
    where: ({ k }) => [sampleMiddle(k, LEFT, distribution.canvas.clientWidth), 60],
    choose: ({ k }) => select(state.layer, { from: "detail", step: samples[k].step }),
    between: (x0, x1) => sampleStepsBetween(x0, x1, LEFT, distribution.canvas.clientWidth),
    column: ({ k }) => columnOf(samples[k].step),
  });
  addFigure(histogram.canvas, {
    at(x) {
      const { low, high } = extent(state.layer);
      const value = low + ((x - LEFT) / (histogram.canvas.clientWidth - LEFT)) * (high - low);
      return value >= low && rowAt(state.layer, state.sample, value) !== null ? value : null;
    },
    show(value) {
      const row = value === null ? null : rowAt(state.layer, state.sample, value);
      return row === null ? null : [`${titleOf(state.layer)}, step ${whole(samples[state.sample].step)}`, rowLines(state.layer, state.sample, row)];
    },
    move(value, dx) {
      const [{ low, high }, unit] = [extent(state.layer), rowSize(state.layer, state.sample)];
      const to = value === null ? fullestRow(state.layer, state.sample) : value + dx * unit;
      return clamp(to, low + unit / 2, high - unit / 2);
    },
    where(value) {
      const { low, high } = extent(state.layer);
      return [LEFT + ((value - low) / (high - low)) * (histogram.canvas.clientWidth - LEFT), 40];
    },
  });

  function showSample(sample) {
    state.sample = sample;
    over.redraw();
    histogram.redraw();
    const when = `Histogram at step ${whole(samples[sample].step)}`;
    byId("detail-when").textContent = when;
    byId("detail-outside").textContent = outside(state.layer, sample).join(", ");
    describe(histogram.canvas, `${when}. ${byId("detail-outside").textContent}`);
  }
  const beside = (by) => state.view.rows[state.view.rowOf[state.layer] + by];
  byId("previous").addEventListener("click", () => select(beside(-1), { from: "detail" }));
  byId("next").addEventListener("click", () => select(beside(1), { from: "detail" }));
  return {
    drawings: { rms, distribution, legend, histogram },
    show(sample) {
      // A name may be broken after a dot.
      const parts = titleOf(state.layer).split(/(?<=\.)/);
      byId("detail-name").replaceChildren(...parts.flatMap((text) => [text, make("wbr")]));
      byId("previous").disabled = beside(-1) === undefined;
      byId("next").disabled = beside(1) === undefined;
      byId("detail-newest").textContent = `Newest record, step ${whole(samples[K - 1].step)}`;
      byId("detail-numbers").replaceChildren(...NAMES.flatMap(newestNumber));
      describe(rms.canvas, `rms of ${titleOf(state.layer)} by step`);
      describe(distribution.canvas, `Distribution of ${titleOf(state.layer)} by step, as colour`);
      describe(legend.canvas, `Colours from light to dark: up to ${share(extent(state.layer).largest)} of the elements`);
      for (const drawing of [rms, rmsOver, distribution, legend]) drawing.redraw();
      showSample(sample);
    },
  };
}

function newestNumber([name, text, noun]) {
  const x = newest(name, state.layer);
  if (x === undefined || (noun && noun !== nounOf(state.layer))) return [];
  const value = Number.isInteger(x) && COUNTED.includes(name) ? whole(x) : name === "dead" ? share(x) : number(x);
  return [make("dt", { textContent: text }), make("dd", { textContent: value })];
}

// How high a row of a layer is on the axis of values, and the middle of the fullest one.
function rowSize(layer, k) {
  const [low, high] = rowEnds(layer, k, samples[k].first[layer]);
  return high - low || 1;
}

function fullestRow(layer, k) {
  const fullest = [...filledRows(layer, k)].sort((a, b) => b[3] - a[3])[0];
  const { low, high } = extent(layer);
  return fullest ? (fullest[0] + fullest[1]) / 2 : (low + high) / 2;
}

// Ends of the vertical axis of a layer's distribution, and its largest share in a row. Of magnitudes
// the smallest per mille of each sample may be below the axis: they would take most of it.
function extent(layer) {
  let [low, high, largest] = [Infinity, -Infinity, 0];
  for (let k = 0; k < K; k++) {
    let sum = 0;
    for (const [a, b, share] of filledRows(layer, k)) {
      sum += share;
      if (!meta.log2 || sum > 0.001) low = Math.min(low, a);
      [high, largest] = [Math.max(high, b), Math.max(largest, share)];
    }
  }
  return low < high ? { low, high, largest } : { low: -1, high: 0, largest: 1 };
}

function rowLines(layer, k, row) {
  const count = countAt(layer, k, row);
  const [low, high] = rowEnds(layer, k, row);
  const range = !meta.log2
    ? `${number(low)} to ${number(high)}`
    : row === 0
      ? `|${nounOf(layer)}| below ${number(2 ** high)}, not zero`
      : `|${nounOf(layer)}| ${number(2 ** low)} to ${number(2 ** high)}`;
  return [range, `${plural(count, "element")}, ${share(count / samples[k].finite[layer])} of the finite ones`];
}

// What the rows of a sample do not show.
function outside(layer, k) {
  const [finite, zeros, nonfinite] = ["finite", "zeros", "nonfinite"].map((name) => samples[k][name][layer]);
  if (!finite && !nonfinite) return [`no ${nounOf(layer)}`];
  const lines = [];
  if (zeros || !meta.log2) lines.push(`${whole(zeros)} of ${plural(finite, "finite element")} are zero`);
  if (!meta.log2) {
    let inside = 0;
    for (const each of filledRows(layer, k)) inside += each[3];
    if (finite > inside) lines.push(`${whole(finite - inside)} outside the range of the bins`);
  }
  if (meta.log2) {
    const { low } = extent(layer);
    let under = 0;
    for (const [, b, , count] of filledRows(layer, k)) if (b <= low) under += count;
    if (under) lines.push(`${whole(under)} smaller than ${powerOfTwo(low)}, below the axis`);
  }
  if (nonfinite) lines.push(`${whole(nonfinite)} NaN or infinite`);
  return lines;
}

function valueAxis(context, low, high, place, vertical) {
  type(context, 11, vertical ? "right" : "center", vertical ? "middle" : "top");
  context.strokeStyle = css("--line");
  context.lineWidth = 1;
  for (const tick of roundTicks(low, high, 5, meta.log2)) place(tick, meta.log2 ? powerOfTwo(tick) : short(tick));
}

function drawCurve(context, width, height) {
  const [level, least, most] = [arrays.level, arrays.least, arrays.most].map((array) => part(array, state.layer));
  const ends = spread([level, least, most], 2);
  const box = { left: LEFT, top: 6, width: width - LEFT, height: height - 34 };
  type(context, 11, "right", "middle");
  context.strokeStyle = css("--line");
  for (const k of roundTicks(ends[0], ends[1], 4, true)) {
    const y = box.top + box.height * (1 - (k - ends[0]) / (ends[1] - ends[0]));
    line(context, LEFT, y, width, y);
    context.fillText(powerOfTwo(k), LEFT - 6, y);
  }
  curve(context, box, ends, level, least, most, part(arrays.nonfinite, state.layer));
  stepAxis(context, firstSteps(), LEFT, width - LEFT, height - 22);
}

const densityColors = () => (dark.matches ? densityDark : densityLight);
const densityColor = (part) => `rgb(${colorAt(densityColors(), 0.08 + 0.92 * Math.sqrt(part)).join()})`;

function drawDistribution(context, width, height) {
  const layer = state.layer;
  const { low, high, largest } = extent(layer);
  const bottom = height - 22;
  const y = (v) => bottom * (1 - (v - low) / (high - low));
  const cell = (width - LEFT) / seen.samples.length;
  seen.samples.forEach((k, i) => {
    for (const [a, b, share] of filledRows(layer, k)) {
      if (b <= low) continue;
      context.fillStyle = densityColor(share / largest);
      context.fillRect(LEFT + i * cell, y(b), cell + 0.4, y(a) - y(b) + 0.4);
    }
    if (samples[k].nonfinite[layer]) {
      context.fillStyle = css("--broken");
      context.fillRect(LEFT + i * cell, bottom - 3, cell + 0.4, 3);
    }
  });
  context.strokeStyle = css("--line");
  line(context, LEFT, bottom, width, bottom);
  valueAxis(context, low, high, (tick, text) => {
    line(context, LEFT - 4, y(tick), LEFT, y(tick));
    context.fillText(text, LEFT - 6, clamp(y(tick), 6, bottom - 4));
  }, true);
  stepAxis(context, sampleSteps(), LEFT, width - LEFT, bottom);
}

// Shares of the elements under their colours: a quarter of the largest is in the middle.
function drawShares(context, width) {
  const { largest } = extent(state.layer);
  const bar = Math.min(120, width - LEFT - 185);
  for (let x = 0; x < bar; x++) {
    context.fillStyle = densityColor((x / (bar - 1)) ** 2);
    context.fillRect(LEFT + x, 0, 1, 9);
  }
  type(context, 11, "center", "top");
  for (const [at, part] of [[0.5, 0.25], [1, 1]]) context.fillText(share(part * largest), LEFT + at * bar, 12);
  context.fillText("0", LEFT + 3, 12);
  const half = context.measureText(share(largest)).width / 2;
  context.textAlign = "left";
  context.fillText("share of the finite elements", LEFT + bar + half + 8, 5);
}

function drawHistogram(context, width, height) {
  const { layer, sample } = state;
  const { low, high } = extent(layer);
  const bottom = height - 22;
  const x = (v) => LEFT + ((v - low) / (high - low)) * (width - LEFT);
  const filled = [...filledRows(layer, sample)].filter((each) => each[1] > low);
  const most = Math.max(0, ...filled.map((each) => each[3]));
  context.fillStyle = css("--accent");
  for (const [a, b, , count] of filled) {
    const top = (bottom - 6) * (count / most);
    const gap = x(b) - x(a) > 5 ? 1 : 0;
    context.fillRect(x(a), bottom - top, Math.max(1, x(b) - x(a) - gap), top);
  }
  context.strokeStyle = css("--line");
  line(context, LEFT, bottom, width, bottom);
  if (most) {
    type(context, 11, "right", "middle");
    context.fillText(share(most / samples[sample].finite[layer]), LEFT - 6, 8);
  }
  valueAxis(context, low, high, (tick, text) => {
    line(context, x(tick), bottom, x(tick), bottom + 4);
    const half = context.measureText(text).width / 2;
    context.fillText(text, clamp(x(tick), LEFT - 20 + half, width - half), bottom + 6);
  }, false);
}

// The counts of some samples of a layer.
export function countsTable(layer, ks) {
  const rows = [["layer", "kind", "step", meta.log2 ? "least magnitude" : "from", meta.log2 ? "below" : "to", "count", "share of the finite elements"]];
  for (const k of ks) {
    for (const [a, b, share, count] of filledRows(layer, k)) {
      const ends = meta.log2 ? [a === -127 ? 0 : 2 ** a, 2 ** b] : [a, b];
      rows.push([meta.layers[layer], nounOf(layer), samples[k].step, ...ends, count, share]);
    }
  }
  return rows;
}
