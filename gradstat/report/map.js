// The map: a row for each layer of a kind, a column for each column of records, log2 rms as colour.

const MAP_BOTTOM = 24;

// How the layers of a kind are shown.
function viewOf(kind) {
  const layers = byKind[kind];
  const rowHeight = layers.length <= 36 ? 20 : Math.max(1, Math.floor(720 / layers.length));
  const top = rowHeight < 12 ? 7 : 0;
  const level = Float32Array.from(layers.flatMap((layer) => [...part(arrays.level, layer)]));
  const nonfinite = layers.flatMap((layer) => [...part(arrays.nonfinite, layer)]);
  return { kind, layers, rowHeight, top, bottom: top + layers.length * rowHeight, level, nonfinite, scale: scaleOf(level) };
}

const rowTop = (row) => state.view.top + row * state.view.rowHeight;

// Ends of the colour scale: all but the outermost two hundredths of the values.
function scaleOf(level) {
  const known = level.filter(Number.isFinite).sort();
  if (!known.length) return { low: -1, high: 0, below: false, above: false };
  const at = (q) => known[Math.round(q * (known.length - 1))];
  let [low, high] = [Math.floor(at(0.01)), Math.ceil(at(0.99))];
  if (high - low < 2) high = low + 2;
  return { low, high, below: known[0] < low, above: known[known.length - 1] > high };
}

// A pixel for each cell; enlarged when it is drawn.
function mapImage({ layers, level, nonfinite, scale }) {
  const image = document.createElement("canvas");
  image.width = T;
  image.height = layers.length;
  const context = image.getContext("2d");
  const pixels = context.createImageData(T, layers.length);
  const [broken, zero] = [rgb(css("--broken")), rgb(css("--zero"))];
  for (let i = 0; i < level.length; i++) {
    let color = null;
    if (nonfinite[i]) color = broken;
    else if (level[i] === -Infinity) color = zero;
    else if (!Number.isNaN(level[i])) color = colorAt(viridis, (level[i] - scale.low) / (scale.high - scale.low));
    if (color) pixels.data.set([...color, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return image;
}

function buildMap(select) {
  const plot = byId("map-plot");
  let left = 0;
  const main = addCanvas(plot, 0, (context, width) => {
    const { layers, rowHeight, top, bottom, nonfinite } = state.view;
    const L = layers.length;
    type(context, 12, "right", "middle");
    const names = shortNames(context, layers.map((layer) => meta.layers[layer]), Math.min(240, width * 0.3));
    const every = Math.ceil(14 / rowHeight);
    let widest = 0;
    for (let i = 0; i < L; i += every) widest = Math.max(widest, context.measureText(names[i]).width);
    // The names of the lines above it, such as a norm's, stand in the same margin.
    left = Math.ceil(Math.max(widest + 12, Math.min(100, 0.25 * width)));
    for (let i = 0; i < L; i += every) context.fillText(names[i], left - 8, rowTop(i) + rowHeight / 2);
    context.fillStyle = css("--sunken");
    context.fillRect(left, top, width - left, bottom - top);
    context.imageSmoothingEnabled = false;
    context.drawImage(mapImage(state.view), left, top, width - left, bottom - top);
    if (rowHeight >= 12) {
      context.fillStyle = css("--surface");
      for (let i = 1; i < L; i++) context.fillRect(left, rowTop(i) - 1, width - left, 1);
    }
    // However small its cell is, what is not finite can be seen.
    context.fillStyle = css("--broken");
    const cell = (width - left) / T;
    for (let i = 0; i < L * T; i++) {
      if (!nonfinite[i]) continue;
      const [x, y] = [left + (i % T) * cell, rowTop(Math.floor(i / T))];
      const [dx, dy] = [Math.max(0, 3 - cell) / 2, Math.max(0, 3 - rowHeight) / 2];
      if (dx || dy) context.fillRect(x - dx, y - dy, cell + 2 * dx, rowHeight + 2 * dy);
    }
    stepAxis(context, meta.steps.map((each) => each[0]), left, width - left, bottom);
  }, "Map: the rms of each layer, by step, as colour. The table of layers has the numbers.");
  const over = addCanvas(plot, 0, (context, width) => {
    const { rowHeight } = state.view;
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
    if (!state.cell) return;
    const cell = (width - left) / T;
    context.strokeRect(left + state.cell.t * cell, rowTop(place[state.cell.layer]), Math.max(2, cell), Math.max(2, rowHeight - 1));
  });
  const cellAt = (x, y) => {
    const width = main.canvas.clientWidth;
    const t = Math.floor(((x - left) / (width - left)) * T);
    const layer = state.view.layers[Math.floor((y - state.view.top) / state.view.rowHeight)];
    return layer === undefined ? null : { layer, t: Math.min(t, T - 1) };
  };
  onHover(main.canvas, (event, x, y) => {
    const cell = cellAt(x, y);
    state.cell = cell && cell.t >= 0 ? cell : null;
    over.redraw();
    if (cell) showTip(event, titleOf(cell.layer), state.cell ? cellLines(cell.layer, cell.t) : []);
    else hideTip();
  }, () => {
    state.cell = null;
    over.redraw();
  });
  main.canvas.addEventListener("click", (event) => {
    const box = main.canvas.getBoundingClientRect();
    const cell = cellAt(event.clientX - box.left, event.clientY - box.top);
    if (cell) select(cell.layer, { from: "map", t: cell.t >= 0 ? cell.t : null });
  });
  buildSeries(select, () => left);
  const showLegend = buildLegend();
  return {
    show() {
      for (const drawing of [main, over]) drawing.height = state.view.bottom + MAP_BOTTOM;
      showLegend();
    },
    mark: over.redraw,
  };
}

function cellLines(layer, t) {
  const at = layer * T + t;
  const lines = [stepsOf(t)];
  if (Number.isNaN(arrays.level[at]) && !arrays.nonfinite[at]) return [...lines, `no ${nounOf(layer)}`];
  lines.push(`rms ${magnitude(arrays.level[at])}`);
  if (meta.sizes[t] > 1) lines.push(`of one record: ${magnitude(arrays.least[at])} to ${magnitude(arrays.most[at])}`);
  lines.push(`zeros ${share(arrays.zeros[at])}`);
  if (arrays.nonfinite[at]) lines.push(`${whole(arrays.nonfinite[at])} NaN or infinite`);
  return lines;
}

function buildLegend() {
  const holder = document.createElement("div");
  holder.style.width = "min(340px, 100%)";
  byId("map-legend").append(holder);
  addCanvas(holder, 30, (context, width) => {
    const { scale } = state.view;
    const inner = width - 40;
    for (let x = 0; x < inner; x++) {
      context.fillStyle = `rgb(${colorAt(viridis, x / (inner - 1)).join()})`;
      context.fillRect(20 + x, 0, 1, 10);
    }
    type(context, 11, "center", "top");
    const ticks = roundTicks(scale.low, scale.high, 5, true);
    for (const k of ticks) {
      const x = 20 + ((k - scale.low) / (scale.high - scale.low)) * inner;
      const sign = scale.below && k === scale.low ? "\u2264 " : scale.above && k === scale.high ? "\u2265 " : "";
      context.fillText(sign + powerOfTwo(k), x, 15);
    }
  });
  return () => {
    const { kind, level, nonfinite } = state.view;
    const swatches = [
      ["NaN or infinity", "--broken", nonfinite.some((n) => n > 0)],
      ["all zero", "--zero", level.includes(-Infinity)],
      [`no ${meta.nouns[kind]}`, "--sunken", level.some((x, i) => Number.isNaN(x) && !nonfinite[i])],
    ].filter((each) => each[2]).map(([text, color]) => {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.setProperty("--of", `var(${color})`);
      swatch.textContent = text;
      return swatch;
    });
    byId("map-legend").replaceChildren(holder, ...swatches);
  };
}
