// The map: a row for each layer of a kind, a column for each column of records, log2 rms as colour.

const MAP_BOTTOM = 24;

// How the layers of a kind are shown.
function viewOf(kind) {
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

function buildMap(select) {
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

function cellLines(layer, t) {
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
function cellsTable(layers) {
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
