// Loss, norm and learning rate over the map, on its axis of steps, with marks where findings begin.

import { byId, number, short } from "./text.js";
import { arrays, capacity, columnAt, columnMiddle, columnOf, columnSteps, isolated, meta, part, seen, state, stepsOf } from "./run.js";
import { addCanvas, css, curve, describe, fitted, line, mark, spread, type } from "./canvas.js";
import { addFigure } from "./pointing.js";

const SERIES_HEIGHT = 58;
const MARKS_HEIGHT = 14;

function seriesOf(i) {
  const [level, low, high] = [arrays.seriesMean, arrays.seriesLeast, arrays.seriesMost].map((array) => part(array, i));
  let [least, most] = [Infinity, -Infinity];
  for (const v of low) if (v < least) least = v;
  for (const v of high) if (v > most) most = v;
  const isLog = least > 0 && Number.isFinite(most) && most > 30 * least;
  const scale = (values) => (isLog ? values.map(Math.log10) : values);
  return { level: scale(level), low: scale(low), high: scale(high), isLog, bad: part(arrays.seriesNonfinite, i) };
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
    meta.series.forEach((name, i) => drawOneSeries(context, name, seriesOf(i), { left, top: i * SERIES_HEIGHT + 6, width: width - left, height: SERIES_HEIGHT - 12 }));
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
      const t = place ? Math.max(seen.from, Math.min(seen.to - 1, place.t + dx)) : seen.to - 1;
      return { t, near: [] };
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

function drawOneSeries(context, name, { level, low, high, isLog, bad }, box) {
  const ends = spread([low, high], 0);
  if (ends[0] === ends[1]) ends[1] = ends[0] + (Math.abs(ends[0]) || 1);
  const { left, top, width, height } = box;
  type(context, 12, "right", "middle");
  context.fillText(fitted(context, name, left - 12), left - 8, top + height / 2);
  context.strokeStyle = css("--line");
  line(context, left, top + height, left + width, top + height);
  curve(context, box, ends, level, low, high, bad);
  // In the margin, above and below the name, where no curve runs.
  type(context, 10, "right", "top");
  const text = (value) => short(Number((isLog ? 10 ** value : value).toPrecision(3)));
  context.fillText(text(ends[1]), left - 8, top - 3);
  context.textBaseline = "bottom";
  context.fillText(text(ends[0]), left - 8, top + height + 1);
}

function seriesText(i, t) {
  const [mean, least, most] = [arrays.seriesMean, arrays.seriesLeast, arrays.seriesMost].map((array) => array[i * capacity + t]);
  const broken = arrays.seriesNonfinite[i * capacity + t] ? ", NaN or infinite" : "";
  return (least === most ? number(mean) : `${number(mean)} (${number(least)} to ${number(most)})`) + broken;
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
