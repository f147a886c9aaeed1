// Loss, norm and learning rate over the map, on its axis of steps, with marks where findings begin.

import { byId, clamp, number, rounded, short } from "./text.js";
import { arrays, capacity, columnAt, columnMiddle, columnOf, columnSteps, isolated, meta, part, seen, seenColumn, state, stepsOf } from "./run.js";
import { addCanvas, css, curve, describe, fitted, line, mark, roundTicks, spread, type } from "./canvas.js";
import { addFigure } from "./pointing.js";

const [NAME_HEIGHT, LINE_HEIGHT] = [18, 48];
const SERIES_HEIGHT = NAME_HEIGHT + LINE_HEIGHT + 10;
const MARKS_HEIGHT = 14;

// How a series is drawn: on a logarithmic axis where most of it spans decades, and cut off where a few
// values are far from all others; `cut` has the largest and the smallest of these, which are written.
function seriesOf(i) {
  const [level, low, high] = [arrays.seriesMean, arrays.seriesLeast, arrays.seriesMost].map((array) => part(array, i));
  const known = level.filter(Number.isFinite).sort();
  const quantile = (q) => known[Math.round(q * (known.length - 1))];
  const [least, most] = spread([low, high], 0);
  const isLog = least > 0 && quantile(0.98) > 30 * quantile(0.02);
  const scale = isLog ? Math.log10 : (x) => x;
  const ends = [least, most].map(scale);
  const usually = [quantile(0.02), quantile(0.98)].map(scale);
  const far = 2 * (usually[1] - usually[0]);
  const cut = [null, null];
  if (far > 0 && ends[0] < usually[0] - far) [ends[0], cut[0]] = [usually[0] - far / 8, least];
  if (far > 0 && ends[1] > usually[1] + far) [ends[1], cut[1]] = [usually[1] + far / 8, most];
  const within = (values) => values.map((x) => clamp(scale(x), ...ends));
  return { level: within(level), low: within(low), high: within(high), ends, cut, isLog, bad: part(arrays.seriesNonfinite, i), extremes: [low, high] };
}

const seriesBottom = () => meta.series.length * SERIES_HEIGHT;

// The findings that have a mark, and the columns of the marks.
function marks() {
  return (meta.findings ?? [])
    .filter((finding) => finding.severity !== "note")
    .map((finding) => ({ finding, t: columnOf(finding.steps[0]) }))
    .filter(({ t }) => t >= seen.from && t < seen.to);
}

export function buildSeries(select, leftOf) {
  const drawing = addCanvas(byId("map-series"), 0, (context, width) => {
    const [left, bottom] = [leftOf(), seriesBottom()];
    meta.series.forEach((name, i) => drawOneSeries(context, name, seriesOf(i), { left, top: i * SERIES_HEIGHT + NAME_HEIGHT, width: width - left, height: LINE_HEIGHT }));
    // The worst is on top.
    for (const { finding, t } of marks().reverse()) {
      const x = columnMiddle(t, left, width);
      context.fillStyle = css(finding.severity === "severe" ? "--severe" : "--warning");
      context.beginPath();
      context.moveTo(x, bottom);
      context.lineTo(x - 5, bottom + 10);
      context.lineTo(x + 5, bottom + 10);
      context.fill();
    }
    if (state.seriesAt !== null) mark(context, columnMiddle(state.seriesAt, left, width), bottom);
  }, "By step");
  const width = () => drawing.canvas.clientWidth;
  const near = (x, y) => marks()
    .map((each) => ({ ...each, by: Math.abs(columnMiddle(each.t, leftOf(), width()) - x) }))
    .filter((each) => each.by <= 7 && y >= seriesBottom() - 4)
    .sort((a, b) => a.by - b.by);
  addFigure(drawing.canvas, {
    at(x, y) {
      const found = near(x, y);
      drawing.canvas.style.cursor = found.length ? "pointer" : "";
      const t = columnAt(x, leftOf(), width());
      return found.length || t !== null ? { t, near: found } : null;
    },
    show(place) {
      const t = place?.near.length ? null : place?.t ?? null;
      if (state.seriesAt !== t) {
        state.seriesAt = t;
        drawing.redraw();
      }
      if (place?.near.length) return [place.near[0].finding.kind, place.near.map((each) => each.finding.sentence)];
      return place && [stepsOf(place.t), meta.series.map((name, i) => `${isolated(name)}: ${seriesText(i, place.t)}`)];
    },
    move(place, dx) {
      return { t: place ? seenColumn(place.t + dx) : seen.to - 1, near: [] };
    },
    where: ({ t }) => [columnMiddle(t, leftOf(), width()), 20],
    choose({ t, near: found }) {
      if (found.length) select(found[0].finding.layer, { from: "map", step: found[0].finding.steps[0] });
      else select(state.layer, { from: "map", step: meta.steps[t][0] });
    },
    between: (x0, x1) => columnSteps(x0, x1, leftOf(), width()),
    column: ({ t }) => t,
  });
  return {
    drawing,
    show() {
      drawing.height = seriesBottom() + MARKS_HEIGHT;
      describe(drawing.canvas, `By step: ${meta.series.join(", ")}, and where findings begin. Left and right give the numbers.`);
    },
  };
}

function drawOneSeries(context, name, series, box) {
  const { level, low, high, cut, isLog, bad, extremes } = series;
  const { left, top, width, height } = box;
  const isConstant = series.ends[0] === series.ends[1];
  const ends = isConstant ? [series.ends[0] - 1, series.ends[1] + 1] : series.ends;
  const y = (v) => top + height * (1 - (v - ends[0]) / (ends[1] - ends[0]));
  type(context, 12, "left", "top");
  const title = fitted(context, `${isolated(name)}${isLog ? ", log scale" : ""}`, width / 2);
  context.fillText(title, left, top - NAME_HEIGHT + 2);
  const titleEnd = left + context.measureText(title).width + 12;
  type(context, 10, "right", "middle");
  context.strokeStyle = css("--line");
  context.lineWidth = 1;
  const ticks = isConstant ? [series.ends[0]] : level.some(Number.isFinite) ? ticksOf(ends, isLog) : [];
  for (const v of ticks) {
    line(context, left, y(v), left + width, y(v));
    context.fillText(short(Number((isLog ? 10 ** v : v).toPrecision(6))), left - 8, y(v));
  }
  curve(context, box, ends, level, low, high, bad);
  // What is cut off is written above or below its place.
  cut.forEach((value, at) => {
    if (value === null) return;
    const text = `${at ? "\u2191" : "\u2193"} ${rounded(value)}`;
    type(context, 11, "center", at ? "bottom" : "top");
    const half = context.measureText(text).width / 2;
    const x = left + ((extremes[at].indexOf(value) + 0.5) / level.length) * width;
    const from = at ? titleEnd : left;
    context.fillText(text, clamp(x, from + half, left + width - half), at ? top - 2 : top + height);
  });
}

// Numbers on the axis of a series, 12 pixels apart or more: of decades, where there are some.
function ticksOf([low, high], isLog) {
  const decades = isLog ? roundTicks(low, high, 4, true) : [];
  if (decades.length > 1) return decades;
  // One number is no scale.
  const few = isLog ? [] : roundTicks(low, high, 3);
  if (!isLog) return few.length > 1 ? few : roundTicks(low, high, 6);
  const found = [];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const digit of [1, 2, 5]) found.push(power + Math.log10(digit));
  }
  return found.filter((v) => v >= low && v <= high);
}

function seriesText(i, t) {
  const [mean, least, most] = [arrays.seriesMean, arrays.seriesLeast, arrays.seriesMost].map((array) => array[i * capacity + t]);
  const broken = arrays.seriesNonfinite[i * capacity + t] ? ", NaN or infinite" : "";
  return (least === most || Number.isNaN(mean) ? number(mean) : `${number(mean)} (${number(least)} to ${number(most)})`) + broken;
}

export function seriesTable() {
  const rows = [["series", "first step", "last step", "mean", "least", "most", "NaN or infinite"]];
  meta.series.forEach((name, i) => {
    for (let t = seen.from; t < seen.to; t++) {
      const values = [arrays.seriesMean, arrays.seriesLeast, arrays.seriesMost, arrays.seriesNonfinite].map((array) => array[i * capacity + t]);
      rows.push([name, ...meta.steps[t], ...values]);
    }
  });
  return rows;
}
