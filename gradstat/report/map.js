// The map: a row for each layer, a column for each column of records, log2 rms as colour.

const rowHeight = L <= 36 ? 20 : Math.max(1, Math.floor(720 / L));
const [MAP_TOP, MAP_BOTTOM] = [rowHeight < 12 ? 7 : 0, 24];
const rowTop = (layer) => MAP_TOP + layer * rowHeight;

// Ends of the colour scale: all but the outermost two hundredths of the values.
const scale = (() => {
  const known = Float32Array.from(arrays.level.filter(Number.isFinite)).sort();
  if (!known.length) return { low: -1, high: 0, below: false, above: false };
  const at = (q) => known[Math.round(q * (known.length - 1))];
  let [low, high] = [Math.floor(at(0.01)), Math.ceil(at(0.99))];
  if (high - low < 2) high = low + 2;
  return { low, high, below: known[0] < low, above: known[known.length - 1] > high };
})();

const levelColor = (level) => colorAt(viridis, (level - scale.low) / (scale.high - scale.low));

// A pixel for each cell; enlarged when it is drawn.
function mapImage() {
  const image = document.createElement("canvas");
  image.width = T;
  image.height = L;
  const context = image.getContext("2d");
  const pixels = context.createImageData(T, L);
  const [broken, zero] = [rgb(css("--broken")), rgb(css("--zero"))];
  for (let i = 0; i < L * T; i++) {
    const level = arrays.level[i];
    let color = null;
    if (arrays.nonfinite[i]) color = broken;
    else if (level === -Infinity) color = zero;
    else if (!Number.isNaN(level)) color = levelColor(level);
    if (color) pixels.data.set([...color, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return image;
}

function buildMap(select) {
  const plot = byId("map-plot");
  let left = 0;
  const main = addCanvas(plot, rowTop(L) + MAP_BOTTOM, (context, width) => {
    type(context, 12, "right", "middle");
    const room = Math.min(240, width * 0.3);
    const every = Math.ceil(14 / rowHeight);
    let widest = 0;
    for (let i = 0; i < L; i += every) widest = Math.max(widest, context.measureText(fitted(context, meta.layers[i], room)).width);
    left = Math.ceil(widest) + 12;
    for (let i = 0; i < L; i += every) {
      context.fillText(fitted(context, meta.layers[i], room), left - 8, rowTop(i) + rowHeight / 2);
    }
    context.fillStyle = css("--sunken");
    context.fillRect(left, MAP_TOP, width - left, L * rowHeight);
    context.imageSmoothingEnabled = false;
    context.drawImage(mapImage(), left, MAP_TOP, width - left, L * rowHeight);
    if (rowHeight >= 12) {
      context.fillStyle = css("--surface");
      for (let i = 1; i < L; i++) context.fillRect(left, rowTop(i) - 1, width - left, 1);
    }
    // However small its cell is, what is not finite can be seen.
    context.fillStyle = css("--broken");
    const cell = (width - left) / T;
    for (let i = 0; i < L * T; i++) {
      if (!arrays.nonfinite[i]) continue;
      const [x, y] = [left + (i % T) * cell, rowTop(Math.floor(i / T))];
      const [dx, dy] = [Math.max(0, 3 - cell) / 2, Math.max(0, 3 - rowHeight) / 2];
      if (dx || dy) context.fillRect(x - dx, y - dy, cell + 2 * dx, rowHeight + 2 * dy);
    }
    stepAxis(context, meta.steps.map((each) => each[0]), left, width - left, rowTop(L));
  });
  const over = addCanvas(plot, main.height, (context, width) => {
    context.strokeStyle = css("--ink");
    context.lineWidth = 1.5;
    const y = rowTop(state.layer);
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
    context.strokeRect(left + state.cell.t * cell, rowTop(state.cell.layer), Math.max(2, cell), Math.max(2, rowHeight - 1));
  });
  const cellAt = (x, y) => {
    const width = main.canvas.clientWidth;
    const t = Math.floor(((x - left) / (width - left)) * T);
    const layer = Math.floor((y - MAP_TOP) / rowHeight);
    if (layer < 0 || layer >= L) return null;
    return { layer, t: Math.min(t, T - 1) };
  };
  onHover(main.canvas, (event, x, y) => {
    const cell = cellAt(x, y);
    state.cell = cell && cell.t >= 0 ? cell : null;
    over.redraw();
    if (state.cell) showTip(event, meta.layers[cell.layer], cellLines(cell.layer, cell.t));
    else if (cell) showTip(event, meta.layers[cell.layer], []);
    else hideTip();
  }, () => {
    state.cell = null;
    over.redraw();
  });
  main.canvas.addEventListener("click", (event) => {
    const box = main.canvas.getBoundingClientRect();
    const cell = cellAt(event.clientX - box.left, event.clientY - box.top);
    if (cell) select(cell.layer, { from: "map" });
  });
  buildLegend();
  return over;
}

function cellLines(layer, t) {
  const at = layer * T + t;
  const lines = [stepsOf(t)];
  if (Number.isNaN(arrays.level[at]) && !arrays.nonfinite[at]) return [...lines, "no gradient"];
  lines.push(`rms ${magnitude(arrays.level[at])}`);
  if (meta.sizes[t] > 1) lines.push(`of one record: ${magnitude(arrays.least[at])} to ${magnitude(arrays.most[at])}`);
  lines.push(`zeros ${share(arrays.zeros[at])}`);
  if (arrays.nonfinite[at]) lines.push(`${whole(arrays.nonfinite[at])} NaN or infinite`);
  return lines;
}

function buildLegend() {
  const legend = byId("map-legend");
  const holder = document.createElement("div");
  holder.style.width = "min(340px, 100%)";
  legend.append(holder);
  addCanvas(holder, 30, (context, width) => {
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
  const kinds = [
    ["NaN or infinity", "--broken", arrays.nonfinite.some((n) => n > 0)],
    ["all zero", "--zero", arrays.level.includes(-Infinity)],
    ["no gradient", "--sunken", arrays.level.some((x, i) => Number.isNaN(x) && !arrays.nonfinite[i])],
  ];
  for (const [text, color] of kinds.filter((kind) => kind[2])) {
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.setProperty("--of", `var(${color})`);
    swatch.textContent = text;
    legend.append(swatch);
  }
}
