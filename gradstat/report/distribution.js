// Drawings of the selected layer: its rms, its distribution over time, one record's histogram.

const LEFT = 54;

function mark(context, x, bottom) {
  context.strokeStyle = css("--ink");
  context.lineWidth = 1;
  line(context, x, 0, x, bottom);
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
    context.fillText(text, LEFT - 6, Math.max(6, Math.min(bottom - 4, y(tick))));
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
  context.textAlign = "left";
  context.fillText("share of the finite elements", LEFT + bar + 27, 5);
}

function drawHistogram(context, width, height) {
  const { layer, sample } = state;
  const { low, high } = extent(layer);
  const bottom = height - 22;
  const x = (v) => LEFT + ((v - low) / (high - low)) * (width - LEFT);
  const filled = [...filledRows(layer, sample)];
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
    context.fillText(text, Math.max(LEFT - 20 + half, Math.min(width - half, x(tick))), bottom + 6);
  }, false);
}

// The counts of some samples of a layer.
function countsTable(layer, ks) {
  const rows = [["layer", "kind", "step", meta.log2 ? "least magnitude" : "from", meta.log2 ? "below" : "to", "count", "share of the finite elements"]];
  for (const k of ks) {
    for (const [a, b, share, count] of filledRows(layer, k)) {
      const ends = meta.log2 ? [a === -127 ? 0 : 2 ** a, 2 ** b] : [a, b];
      rows.push([meta.layers[layer], nounOf(layer), samples[k].step, ...ends, count, share]);
    }
  }
  return rows;
}
