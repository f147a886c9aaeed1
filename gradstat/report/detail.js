// The selected layer: its rms, its distribution over time, one record's histogram, its numbers.

const LEFT = 54;
const NAMES = [
  ["numel", "elements"], ["rms", "rms"], ["mean", "mean"], ["std", "std"], ["min", "min"], ["max", "max"],
  ["l2", "l2 norm"], ["zeros", "zeros"], ["nan", "NaN"], ["posinf", "+infinity"], ["neginf", "\u2212infinity"],
  ["ratio", "update / parameter"], ["dead", "dead units"],
];

function buildDetail(select) {
  const curvePlot = byId("detail-curve");
  const rms = addCanvas(curvePlot, 98, drawCurve);
  const rmsOver = addCanvas(curvePlot, 98, (context, width, height) => {
    if (state.t !== null) mark(context, LEFT + ((state.t + 0.5) / T) * (width - LEFT), height - 22);
  });
  const plot = byId("detail-distribution");
  const distribution = addCanvas(plot, 172, drawDistribution);
  const over = addCanvas(plot, 172, (context, width, height) => {
    mark(context, LEFT + ((state.sample + 0.5) / K) * (width - LEFT), height - 22);
  });
  const histogram = addCanvas(byId("detail-histogram"), 96, drawHistogram);
  const holder = document.createElement("div");
  holder.style.width = "100%";
  byId("detail-legend").append(holder);
  const legend = addCanvas(holder, 14, drawShares);

  onHover(rms.canvas, (event, x) => {
    const t = Math.floor(((x - LEFT) / (rms.canvas.clientWidth - LEFT)) * T);
    state.t = t >= 0 && t < T ? t : null;
    rmsOver.redraw();
    if (state.t === null) hideTip();
    else showTip(event, titleOf(state.layer), cellLines(state.layer, t));
  }, () => {
    state.t = null;
    rmsOver.redraw();
  });
  onHover(distribution.canvas, (event, x, y) => {
    const sample = Math.floor(((x - LEFT) / (distribution.canvas.clientWidth - LEFT)) * K);
    if (sample < 0 || sample >= K) return hideTip();
    showSample(sample);
    const { low, high } = extent(state.layer);
    const value = high - (y / (distribution.height - 22)) * (high - low);
    const row = rowAt(state.layer, sample, value);
    showTip(event, `${titleOf(state.layer)}, step ${whole(meta.sampleSteps[sample])}`, [
      ...(row === null ? [] : rowLines(state.layer, sample, row)),
      ...outside(state.layer, sample),
    ]);
  }, () => showSample(state.home));
  onHover(histogram.canvas, (event, x) => {
    const { low, high } = extent(state.layer);
    const value = low + ((x - LEFT) / (histogram.canvas.clientWidth - LEFT)) * (high - low);
    const row = rowAt(state.layer, state.sample, value);
    if (row === null) return hideTip();
    showTip(event, `${titleOf(state.layer)}, step ${whole(meta.sampleSteps[state.sample])}`, rowLines(state.layer, state.sample, row));
  }, () => {});

  function showSample(sample) {
    state.sample = sample;
    over.redraw();
    histogram.redraw();
    const when = `Histogram at step ${whole(meta.sampleSteps[sample])}`;
    byId("detail-when").textContent = when;
    byId("detail-outside").textContent = outside(state.layer, sample).join(", ");
    describe(histogram.canvas, `${when}. ${byId("detail-outside").textContent}`);
  }
  const beside = (by) => state.view.layers[place[state.layer] + by];
  byId("previous").addEventListener("click", () => select(beside(-1), { from: "detail" }));
  byId("next").addEventListener("click", () => select(beside(1), { from: "detail" }));
  return () => {
    // A name may be broken after a dot.
    const parts = titleOf(state.layer).split(/(?<=\.)/);
    byId("detail-name").replaceChildren(...parts.flatMap((text) => [text, document.createElement("wbr")]));
    byId("previous").disabled = beside(-1) === undefined;
    byId("next").disabled = beside(1) === undefined;
    byId("detail-newest").textContent = `Newest record, step ${whole(meta.sampleSteps[K - 1])}`;
    byId("detail-numbers").replaceChildren(...NAMES.flatMap(([name, text]) => {
      const [term, value] = [document.createElement("dt"), document.createElement("dd")];
      const x = meta.newest[name]?.[state.layer];
      if (x === undefined) return [];
      term.textContent = text;
      const isCount = ["numel", "zeros", "nan", "posinf", "neginf"].includes(name);
      value.textContent = Number.isInteger(x) && isCount ? whole(x) : name === "dead" ? share(x ?? NaN) : number(x);
      return [term, value];
    }));
    describe(rms.canvas, `rms of ${titleOf(state.layer)} by step`);
    describe(distribution.canvas, `Distribution of ${titleOf(state.layer)} by step, as colour`);
    for (const drawing of [rms, rmsOver, distribution, legend]) drawing.redraw();
    showSample(state.home);
  };
}

function mark(context, x, bottom) {
  context.strokeStyle = css("--ink");
  context.lineWidth = 1;
  line(context, x, 0, x, bottom);
}

// The ends of each filled row of a layer's distribution in one sample, and its share.
function* filledRows(layer, k) {
  const finite = arrays.sampleFinite[layer * K + k];
  for (let row = 0; row < meta.rows[layer]; row++) {
    const count = countAt(layer, k, row);
    if (count) yield [...rowEnds(layer, k, row), count / finite];
  }
}

// Ends of the vertical axis of a layer's distribution, and its largest share in a row.
function extent(layer) {
  let [low, high, largest] = [Infinity, -Infinity, 0];
  for (let k = 0; k < K; k++) {
    for (const [a, b, share] of filledRows(layer, k)) {
      [low, high, largest] = [Math.min(low, a), Math.max(high, b), Math.max(largest, share)];
    }
  }
  return low < high ? { low, high, largest } : { low: -1, high: 0, largest: 1 };
}

function rowAt(layer, sample, value) {
  for (let row = 0; row < meta.rows[layer]; row++) {
    const [low, high] = rowEnds(layer, sample, row);
    if (value >= low && value < high) return row;
  }
  return null;
}

function rowLines(layer, sample, row) {
  const count = countAt(layer, sample, row);
  const [low, high] = rowEnds(layer, sample, row);
  const smallest = meta.log2 && meta.first[layer] + row === 0;
  const range = !meta.log2
    ? `${number(low)} to ${number(high)}`
    : smallest
      ? `|${nounOf(layer)}| below ${number(2 ** high)}, not zero`
      : `|${nounOf(layer)}| ${number(2 ** low)} to ${number(2 ** high)}`;
  const finite = arrays.sampleFinite[layer * K + sample];
  return [range, `${plural(count, "element")}, ${share(count / finite)} of the finite ones`];
}

// What the rows of a sample do not show.
function outside(layer, sample) {
  const at = layer * K + sample;
  const [finite, zeros, nonfinite] = [arrays.sampleFinite[at], arrays.sampleZeros[at], arrays.sampleNonfinite[at]];
  if (!finite && !nonfinite) return [`no ${nounOf(layer)}`];
  const lines = [];
  if (zeros || !meta.log2) lines.push(`${whole(zeros)} of ${plural(finite, "finite element")} are zero`);
  if (!meta.log2) {
    let inside = 0;
    for (let row = 0; row < meta.rows[layer]; row++) inside += countAt(layer, sample, row);
    if (finite > inside) lines.push(`${whole(finite - inside)} outside the range of the bins`);
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
  stepAxis(context, meta.steps.map((each) => each[0]), LEFT, width - LEFT, height - 22);
}

function drawDistribution(context, width, height) {
  const layer = state.layer;
  const { low, high, largest } = extent(layer);
  const bottom = height - 22;
  const colors = dark.matches ? densityDark : densityLight;
  const y = (v) => bottom * (1 - (v - low) / (high - low));
  const cell = (width - LEFT) / K;
  for (let k = 0; k < K; k++) {
    for (const [a, b, share] of filledRows(layer, k)) {
      context.fillStyle = `rgb(${colorAt(colors, 0.08 + 0.92 * Math.sqrt(share / largest)).join()})`;
      context.fillRect(LEFT + k * cell, y(b), cell + 0.4, y(a) - y(b) + 0.4);
    }
    if (arrays.sampleNonfinite[layer * K + k]) {
      context.fillStyle = css("--broken");
      context.fillRect(LEFT + k * cell, bottom - 3, cell + 0.4, 3);
    }
  }
  context.strokeStyle = css("--line");
  line(context, LEFT, bottom, width, bottom);
  valueAxis(context, low, high, (tick, text) => {
    line(context, LEFT - 4, y(tick), LEFT, y(tick));
    context.fillText(text, LEFT - 6, Math.max(6, Math.min(bottom - 4, y(tick))));
  }, true);
  stepAxis(context, meta.sampleSteps, LEFT, width - LEFT, bottom);
}

function drawShares(context, width) {
  const colors = dark.matches ? densityDark : densityLight;
  const { largest } = extent(state.layer);
  type(context, 11, "left", "middle");
  const text = `share of the elements, up to ${share(largest)}`;
  for (let x = 0; x < 60; x++) {
    context.fillStyle = `rgb(${colorAt(colors, 0.08 + 0.92 * Math.sqrt(x / 59)).join()})`;
    context.fillRect(LEFT + x, 3, 1, 8);
  }
  context.fillStyle = css("--muted");
  context.fillText(text, LEFT + 68, 7);
}

function drawHistogram(context, width, height) {
  const { layer, sample } = state;
  const { low, high } = extent(layer);
  const bottom = height - 22;
  const x = (v) => LEFT + ((v - low) / (high - low)) * (width - LEFT);
  const finite = arrays.sampleFinite[layer * K + sample];
  let most = 0;
  for (let row = 0; row < meta.rows[layer]; row++) most = Math.max(most, countAt(layer, sample, row));
  context.fillStyle = css("--accent");
  for (let row = 0; row < meta.rows[layer]; row++) {
    const count = countAt(layer, sample, row);
    if (!count) continue;
    const [a, b] = rowEnds(layer, sample, row);
    const top = (bottom - 6) * (count / most);
    const gap = x(b) - x(a) > 5 ? 1 : 0;
    context.fillRect(x(a), bottom - top, Math.max(1, x(b) - x(a) - gap), top);
  }
  context.strokeStyle = css("--line");
  line(context, LEFT, bottom, width, bottom);
  if (most) {
    type(context, 11, "right", "middle");
    context.fillText(share(most / finite), LEFT - 6, 8);
  }
  valueAxis(context, low, high, (tick, text) => {
    line(context, x(tick), bottom, x(tick), bottom + 4);
    const half = context.measureText(text).width / 2;
    context.fillText(text, Math.max(LEFT - 20 + half, Math.min(width - half, x(tick))), bottom + 6);
  }, false);
}
