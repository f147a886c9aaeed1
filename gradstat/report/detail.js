// The selected layer: its rms, its distribution over time, one record's histogram, its numbers.

const NAMES = [
  ["numel", "elements"], ["rms", "rms"], ["mean", "mean"], ["std", "std"], ["min", "min"], ["max", "max"],
  ["l2", "l2 norm"], ["zeros", "zeros"], ["nan", "NaN"], ["posinf", "+infinity"], ["neginf", "\u2212infinity"],
  ["ratio", "update / parameter", "update"], ["dead", "dead units", "activation"],
];
const COUNTED = ["numel", "zeros", "nan", "posinf", "neginf"];

function buildDetail(select) {
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
  const holder = document.createElement("div");
  holder.style.width = "100%";
  byId("detail-legend").append(holder);
  const legend = addCanvas(holder, 26, drawShares, "Colour scale");
  const histogram = addCanvas(byId("detail-histogram"), 96, drawHistogram, "Histogram");

  const within = (t) => Math.max(seen.from, Math.min(seen.to - 1, t));
  addFigure(rms.canvas, {
    at: (x) => columnAt(x, LEFT, rms.canvas.clientWidth),
    show(t) {
      state.t = t;
      rmsOver.redraw();
      return t === null ? null : [titleOf(state.layer), cellLines(state.layer, t)];
    },
    move: (t, dx) => within(t === null ? (state.step === null ? seen.to - 1 : columnOf(state.step)) : t + dx),
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
      const at = Math.max(0, Math.min(seen.samples.length - 1, seen.samples.indexOf(place.k) + dx));
      const unit = rowSize(state.layer, place.k);
      return { k: seen.samples[at], value: Math.max(low + unit / 2, Math.min(high - unit / 2, place.value - dy * unit)) };
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
      return Math.max(low + unit / 2, Math.min(high - unit / 2, to));
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
  const beside = (by) => state.view.layers[place[state.layer] + by];
  byId("previous").addEventListener("click", () => select(beside(-1), { from: "detail" }));
  byId("next").addEventListener("click", () => select(beside(1), { from: "detail" }));
  return {
    drawings: { rms, distribution, legend, histogram },
    show(sample) {
      // A name may be broken after a dot.
      const parts = titleOf(state.layer).split(/(?<=\.)/);
      byId("detail-name").replaceChildren(...parts.flatMap((text) => [text, document.createElement("wbr")]));
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
  const [term, value] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = text;
  value.textContent = Number.isInteger(x) && COUNTED.includes(name) ? whole(x) : name === "dead" ? share(x) : number(x);
  return [term, value];
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
