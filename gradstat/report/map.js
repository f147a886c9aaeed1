// The map: a row for each layer of a kind, a column for each column of records, log2 rms as colour.

import { byId, clamp, lastWhere, magnitude, make, number, powerOfTwo, share, whole } from "./text.js";
import { aRow, arrays, byKind, capacity, columnAt, columnMiddle, columnOf, columnSteps, firstSteps, meta, newest, nounOf, part, seen, seenColumn, state, stepsOf, T, titleOf, usual } from "./run.js";
import { addCanvas, colorAt, css, describe, fitted, line, rgb, roundTicks, shortNames, stepAxis, type, viridis } from "./canvas.js";
import { addFigure } from "./pointing.js";
import { buildSeries } from "./series.js";

const MAP_BOTTOM = 24;
export const margin = { own: 0, beside: 0 };  // for names, here and in the pages beside this one

// Rows of more than so many are too low for a name each, and are grouped by role.
const NAMED_ROWS = 36;
const [GAP, LABEL] = [6, 13];  // between groups, and from one name to the next
const MOST_FOUND = 6;  // names of found rows in a group

// How the rows of a kind are shown: `layers` by depth, and `rows` from the top down, with the place
// of each.
export function viewOf(kind) {
  const layers = byKind[kind];
  const groups = isByRole(layers) ? rolesOf(layers) : [{ role: "", layers }];
  const high = layers.length <= NAMED_ROWS ? 20 : Math.max(1, Math.round(720 / layers.length));
  const rows = groups.flatMap((group) => group.layers);
  const [tops, heights, rowOf] = [[], [], []];
  let bottom = high < LABEL ? LABEL / 2 : 0;
  for (const group of groups) {
    if (tops.length) bottom += GAP;
    // So that each group has room for its name.
    const height = groups.length > 1 ? Math.max(high, Math.ceil(LABEL / group.layers.length)) : high;
    for (const layer of group.layers) {
      rowOf[layer] = tops.length;
      tops.push(bottom);
      heights.push(height);
      bottom += height;
    }
  }
  return { kind, layers, groups, rows, rowOf, tops, heights, bottom, ...cellsOf(rows) };
}

const roles = new WeakMap();  // of the layers of a kind

// Rows with the same name but for the numbers in it, those of a normalisation apart: its weight has
// as many elements as its bias. Groups and the rows in them are by depth.
function rolesOf(layers) {
  if (!roles.has(layers)) {
    const sizes = new Map(layers.map((layer) => [meta.layers[layer], newest("numel", layer)]));
    const groups = new Map();
    for (const layer of layers) {
      const name = meta.layers[layer];
      const other = name.replace(/(weight|bias)$/, (end) => (end === "bias" ? "weight" : "bias"));
      const isFlat = other !== name && sizes.get(other) === sizes.get(name);
      const role = name.split(".").map((part) => (/^\d+$/.test(part) ? "*" : part)).join(".");
      const key = `${role} ${isFlat}`;
      if (!groups.has(key)) groups.set(key, { role, layers: [] });
      groups.get(key).layers.push(layer);
    }
    roles.set(layers, [...groups.values()]);
  }
  return roles.get(layers);
}

const hasRoles = (layers) => rolesOf(layers).length > 1 && rolesOf(layers).length <= layers.length / 2;
const isByRole = (layers) => hasRoles(layers) && (state.order === "" ? layers.length > NAMED_ROWS : state.order === "role");

// The cells of the columns that are seen, row by row: levels, what is not finite, what the colours
// show, and their scale, which is null where there is nothing to show.
function cellsOf(rows) {
  const [n, colour] = [seen.to - seen.from, colourNow()];
  const size = n * rows.length;
  const [level, shown, nonfinite] = [new Float32Array(size), new Float32Array(size), new Float64Array(size)];
  rows.forEach((layer, i) => {
    level.set(part(arrays.level, layer), i * n);
    shown.set(colour.part(layer), i * n);
    nonfinite.set(part(arrays.nonfinite, layer), i * n);
  });
  return { n, level, shown, nonfinite, scale: shown.some(Number.isFinite) ? colour.scale(shown) : null };
}

// The row at a height, or undefined between groups.
function rowAtHeight(y) {
  const { tops, heights, rows } = state.view;
  const row = lastWhere(rows.length, (i) => tops[i] <= y);
  return y >= tops[row] && y < tops[row] + heights[row] ? rows[row] : undefined;
}

// The middle of a layer's row.
const rowMiddle = (layer) => state.view.tops[state.view.rowOf[layer]] + state.view.heights[state.view.rowOf[layer]] / 2;

// Ends of the colour scale: all but the outermost two hundredths of the values.
function scaleOf(level) {
  const known = level.filter(Number.isFinite).sort();
  const at = (q) => known[Math.round(q * (known.length - 1))];
  let [low, high] = [Math.floor(at(0.01)), Math.ceil(at(0.99))];
  if (high - low < 2) high = low + 2;
  return { low, high, below: known[0] < low, above: known[known.length - 1] > high };
}

// A pixel for each cell; enlarged when it is drawn.
function mapImage({ rows, n, level, shown, nonfinite, scale }) {
  const image = make("canvas", { width: n, height: rows.length });
  const context = image.getContext("2d");
  const pixels = context.createImageData(n, rows.length);
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

// The worst finding of each row that has more than a note.
function foundByLayer() {
  const found = new Map();
  for (const finding of meta.findings ?? []) {
    if (finding.severity !== "note" && !found.has(finding.layer)) found.set(finding.layer, finding);
  }
  return found;
}

// The names beside the map: of all rows where there is room; otherwise of the selected row, of groups
// and of rows that findings name, each moved away from the one before it, and of others between them.
// Each is {text, layer, y, to}: drawn at the height y, of what is at the height `to`.
function labelsOf() {
  const { rows, layers, groups, heights, bottom } = state.view;
  const label = (layer) => ({ text: meta.layers[layer], layer, y: rowMiddle(layer), to: rowMiddle(layer) });
  if (heights.every((height) => height >= LABEL)) return rows.map(label);
  const isGrouped = groups.length > 1;
  const found = [...new Set([state.layer, ...foundByLayer().keys()])];
  const labels = [];
  for (const group of groups) {
    const own = new Set(group.layers);
    const [first, last] = [rowMiddle(group.layers[0]), rowMiddle(group.layers.at(-1))];
    const room = clamp(Math.floor((last - first) / LABEL / 2), 1, MOST_FOUND);
    const kept = found.filter((layer) => own.has(layer)).slice(0, room);
    labels.push(...kept.map(label));
    const to = (first + last) / 2;
    if (isGrouped && own.size > 1) labels.push({ text: group.role, layer: group.layers[0], isRole: true, y: to, to });
    else if (isGrouped && !kept.length) labels.push(label(group.layers[0]));
  }
  moveApart(labels, bottom);
  if (!isGrouped) {
    for (const layer of layers) {
      const y = rowMiddle(layer);
      if (labels.every((each) => Math.abs(each.y - y) >= LABEL)) labels.push(label(layer));
    }
  }
  return labels;
}

// Names that fit: of grouped rows without the part that most begin with.
function namesOf(context, names, width) {
  if (state.view.groups.length === 1) return shortNames(context, names, width);
  const begins = names.map((name) => name.split(".")[0]);
  const most = begins.find((part) => begins.filter((each) => each === part).length > names.length / 2);
  const isWide = names.some((name) => context.measureText(name).width > width);
  return names.map((name) => fitted(context, isWide && most ? name.replace(`${most}.`, "") : name, width));
}

function moveApart(labels, bottom) {
  labels.sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i++) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + LABEL);
  let most = bottom;
  for (let i = labels.length - 1; i >= 0; i--) {
    labels[i].y = Math.min(labels[i].y, most);
    most = labels[i].y - LABEL;
  }
}

// Writes the names into their margin, with lines from those that were moved.
function drawLabels(context, labels, left) {
  const found = foundByLayer();
  for (const { text, layer, isRole, y, to } of labels) {
    const finding = isRole ? undefined : found.get(layer);
    context.fillStyle = css(finding ? `--${finding.severity}` : !isRole && layer === state.layer ? "--ink" : "--muted");
    context.fillText(text, left - 14, y);
    if (Math.abs(y - to) < 2) continue;
    context.strokeStyle = context.fillStyle;
    context.lineWidth = 0.75;
    line(context, left - 13, y, left - 7, to);
  }
  for (const [layer, { severity }] of found) {
    const row = state.view.rowOf[layer];
    if (row === undefined) continue;
    context.fillStyle = css(`--${severity}`);
    context.fillRect(left - 6, state.view.tops[row], 4, Math.max(2, state.view.heights[row] - 1));
  }
}

function drawMap(context, width, left) {
  const { rows, groups, tops, heights, bottom, n, nonfinite } = state.view;
  const image = mapImage(state.view);
  context.imageSmoothingEnabled = false;
  let row = 0;
  for (const group of groups) {
    const height = heights[row] * group.layers.length;
    context.fillStyle = css("--sunken");
    context.fillRect(left, tops[row], width - left, height);
    context.drawImage(image, 0, row, n, group.layers.length, left, tops[row], width - left, height);
    row += group.layers.length;
  }
  context.fillStyle = css("--surface");
  for (let i = 1; i < rows.length; i++) {
    if (heights[i] >= LABEL) context.fillRect(left, tops[i] - 1, width - left, 1);
  }
  // What is not finite can be seen however small its cell is.
  context.fillStyle = css("--broken");
  const cell = (width - left) / n;
  for (let i = 0; i < rows.length * n; i++) {
    if (!nonfinite[i]) continue;
    const [x, y, height] = [left + (i % n) * cell, tops[Math.floor(i / n)], heights[Math.floor(i / n)]];
    const [dx, dy] = [Math.max(0, 3 - cell) / 2, Math.max(0, 3 - height) / 2];
    if (dx || dy) context.fillRect(x - dx, y - dy, cell + 2 * dx, height + 2 * dy);
  }
  stepAxis(context, firstSteps(), left, width - left, bottom);
}

// Marks the row of the selected layer, and a cell.
function drawMapMarks(context, width, left) {
  const { tops, heights, rowOf, n } = state.view;
  const [y, height] = [tops[rowOf[state.layer]], heights[rowOf[state.layer]]];
  context.strokeStyle = css("--ink");
  context.lineWidth = 1.5;
  // Around a row that is high enough to be seen inside it.
  if (height >= 6) context.strokeRect(left + 0.75, y + 0.25, width - left - 1.5, height - 1);
  context.fillStyle = css("--ink");
  context.beginPath();
  context.moveTo(left, y + height / 2);
  context.lineTo(left - 7, y + height / 2 - 5);
  context.lineTo(left - 7, y + height / 2 + 5);
  context.fill();
  const marked = state.cell ?? (state.step === null ? null : { layer: state.layer, t: columnOf(state.step) });
  if (!marked || marked.t < seen.from || marked.t >= seen.to) return;
  const [cell, row] = [(width - left) / n, rowOf[marked.layer]];
  context.strokeRect(left + (marked.t - seen.from) * cell, tops[row], Math.max(2, cell), Math.max(2, heights[row] - 1));
}

export function buildMap(select) {
  const plot = byId("map-plot");
  let [left, labels] = [0, []];
  const main = addCanvas(plot, 0, (context, width) => {
    type(context, 12, "right", "middle");
    labels = labelsOf();
    const texts = namesOf(context, labels.map(({ text }) => text), Math.min(240, width * 0.33));
    labels.forEach((each, i) => { each.text = texts[i]; });
    margin.own = Math.ceil(Math.max(48, ...texts.map((text) => context.measureText(text).width + 18)));
    // The same as that of a page beside this one, so that their maps have the same steps in a line.
    left = Math.min(Math.max(margin.own, margin.beside), Math.max(margin.own, width / 2));
    drawLabels(context, labels, left);
    drawMap(context, width, left);
  }, "Map");
  const over = addCanvas(plot, 0, (context, width) => drawMapMarks(context, width, left));
  addFigure(main.canvas, {
    at(x, y) {
      const named = x < left - 8 ? labels.find((each) => Math.abs(each.y - y) <= LABEL / 2) : undefined;
      const layer = named?.layer ?? rowAtHeight(y);
      return layer === undefined ? null : { layer, t: columnAt(x, left, main.canvas.clientWidth) };
    },
    show(cell) {
      state.cell = cell && cell.t !== null ? cell : null;
      over.redraw();
      return cell && [titleOf(cell.layer), state.cell ? cellLines(cell.layer, cell.t) : foundLines(cell.layer)];
    },
    move(cell, dx, dy) {
      const { rows, rowOf } = state.view;
      if (!cell) return { layer: state.layer, t: state.step === null ? seen.to - 1 : seenColumn(columnOf(state.step)) };
      const row = clamp(rowOf[cell.layer] + dy, 0, rows.length - 1);
      return { layer: rows[row], t: seenColumn(cell.t + dx) };
    },
    where: ({ layer, t }) => [columnMiddle(t, left, main.canvas.clientWidth), rowMiddle(layer) + state.view.heights[state.view.rowOf[layer]] / 2],
    choose({ layer, t }) {
      const step = t === null ? foundByLayer().get(layer)?.at ?? null : meta.steps[t][0];
      select(layer, { from: "map", step });
    },
    between: (x0, x1) => columnSteps(x0, x1, left, main.canvas.clientWidth),
    column: ({ t }) => t,
  });
  const series = buildSeries(select, () => left);
  const legend = buildLegend();
  return {
    drawings: [series.drawing, main, ...legend.drawings],
    show() {
      for (const drawing of [main, over]) drawing.height = state.view.bottom + MAP_BOTTOM;
      describe(main.canvas, `Map: the ${colourNow().label} of ${aRow(state.view.kind)} by step, as colour. Arrow keys move from cell to cell, Enter selects. The table has the numbers.`);
      series.show();
      legend.show();
    },
    mark() {
      // Where rows are low, the selected one has a name.
      main.redraw();
      over.redraw();
    },
  };
}

function foundLines(layer) {
  const finding = foundByLayer().get(layer);
  return finding ? [`${finding.severity}: ${finding.kind}`] : [];
}

export function cellLines(layer, t) {
  const at = layer * capacity + t;
  const lines = [stepsOf(t)];
  if (Number.isNaN(arrays.level[at]) && !arrays.nonfinite[at]) return [...lines, `no ${nounOf(layer)}`];
  lines.push(`rms ${magnitude(arrays.level[at])}`);
  if (meta.sizes[t] > 1) lines.push(`of one record: ${magnitude(arrays.least[at])} to ${magnitude(arrays.most[at])}`);
  lines.push(`zeros ${share(arrays.zeros[at])}`);
  if (T > 1) lines.push(`median of all columns ${magnitude(usual(layer))}`);
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

// What the map's colours show: the rms, how far it is from each row's usual one, or what a narrow
// format would do, where that was measured.

export const RMS = {
  key: "",
  label: "rms",
  title: (row) => `Magnitude by ${row} and step`,
  of: (what) => `rms of ${what}`,
  scale: scaleOf,
  part: (layer) => part(arrays.level, layer),
};

const CHANGE = {
  key: "change",
  label: "change",
  title: (row) => `Change by ${row} and step`,
  of: (what) => `rms of ${what}, as a multiple of its median`,
  hint: (what) => `Colour is the rms of ${what} as a multiple of its own median over all steps.`,
  scale: changeScale,
  part: (layer) => part(arrays.level, layer).map((level) => level - usual(layer)),
  tick: (k) => (k === 0 ? "median" : `${k < 0 ? "\u00f7" : "\u00d7"}${whole(2 ** Math.abs(k))}`),
  isWhole: true,
  ticks: 9,
};

// As far down as up, so that the colour in the middle is that of no change.
function changeScale(shown) {
  const far = shown.filter(Number.isFinite).map(Math.abs).sort();
  const most = clamp(Math.ceil(far[far.length - 1]), 2, 16);
  return { low: -most, high: most, below: shown.some((x) => x < -most && x !== -Infinity), above: shown.some((x) => x > most) };
}

// The choices, the rms first.
function colours() {
  return [RMS, CHANGE, ...(meta.formats ?? []).flatMap((name, f) => [snrOf(name, f), lostOf(name, f)])];
}

const ofFormat = (array, f) => (layer) => part(array, layer * meta.formats.length + f);

const snrOf = (name, f) => ({
  key: `snr ${name}`,
  label: `SNR in ${name}`,
  title: () => `Signal-to-noise ratio in ${name}`,
  of: (what) => `SNR of ${what} in ${name}`,
  hint: (what) => `Colour is how much larger ${what} is than the error that ${name} would make, in dB; 20 dB is an error of a tenth.`,
  scale: scaleOf,
  part: ofFormat(arrays.snr, f),
  tick: (k) => `${k} dB`,
  isWhole: true,
});

const lostOf = (name, f) => ({
  key: `zero ${name}`,
  label: `to zero in ${name}`,
  title: () => `Share that ${name} would flush to zero`,
  of: (what) => `share of ${what} to zero in ${name}`,
  hint: (what) => `Colour is the share of ${what} that ${name} would flush to zero, of what is not zero already.`,
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

// Controls of what the colours show, and of the order of the rows where they have roles.
export function buildColours(changed) {
  const [control, order] = [byId("colour"), byId("order")];
  control.addEventListener("change", () => {
    state.colour = control.value;
    changed();
  });
  order.addEventListener("change", () => {
    state.order = order.value;
    changed();
  });
  return {
    begin() {
      control.replaceChildren(...colours().map(({ key, label }) => new Option(label, key)));
    },
    show() {
      const { kind, layers } = state.view;
      control.value = colourNow().key;
      order.parentElement.hidden = !hasRoles(layers);
      order.value = isByRole(layers) ? "role" : "depth";
      byId("map-title").textContent = colourNow().title(meta.owners[kind]);
    },
  };
}

// What the colours of the map mean in numbers.

function buildLegend() {
  const holder = make("div");
  holder.style.width = "min(420px, 100%)";
  byId("map-legend").append(holder);
  const drawing = addCanvas(holder, 58, drawScale, "Colour scale");
  return {
    // In a picture that is saved the other colours stand below the scale.
    drawings: [drawing, { canvas: drawing.canvas, height: 16, draw: drawSwatches }],
    show() {
      const [{ scale, kind }, { tick, of }] = [state.view, colourNow()];
      const ends = scale && [scale.low, scale.high].map(tick ?? ((k) => number(2 ** k)));
      holder.hidden = !scale;
      drawing.height = tick ? 44 : 58;
      if (scale) describe(drawing.canvas, `Colours: ${of(aRow(kind))}, ${ends[0]} to ${ends[1]}`);
      const swatches = otherColors().map(([text, color]) => {
        const swatch = make("span", { className: "swatch", textContent: text });
        swatch.style.setProperty("--of", color.startsWith("--") ? `var(${color})` : color);
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

// Over the colours what they are; under them powers of two, and the same in decimals where there is
// room, or other numbers.
function drawScale(context, width) {
  const { scale, kind } = state.view;
  if (!scale) return;
  const inner = width - 60;
  const { tick, isWhole, of, ticks = 5 } = colourNow();
  type(context, 12, "left", "top");
  context.fillText(fitted(context, of(aRow(kind)), width), 0, 0);
  context.translate(0, 18);
  for (let x = 0; x < inner; x++) {
    context.fillStyle = `rgb(${colorAt(viridis, x / (inner - 1)).join()})`;
    context.fillRect(30 + x, 0, 1, 10);
  }
  type(context, 11, "center", "top");
  const marks = roundTicks(scale.low, scale.high, ticks, !tick || isWhole).map((k) => {
    const sign = scale.below && k === scale.low ? "\u2264 " : scale.above && k === scale.high ? "\u2265 " : "";
    const texts = tick ? [sign + tick(k)] : [sign + powerOfTwo(k), number(2 ** k)];
    const half = Math.max(...texts.map((text) => context.measureText(text).width)) / 2;
    return { k, texts, half, x: 30 + ((k - scale.low) / (scale.high - scale.low)) * inner };
  });
  // Where there is little room every second one is left, or every third, and zero among them.
  let shown = marks;
  const areApart = () => shown.every(({ x, half }, i) => !i || x - half >= shown[i - 1].x + shown[i - 1].half + 6);
  for (let every = 2; !areApart(); every++) shown = marks.filter(({ k }) => Math.round(k / (marks[1].k - marks[0].k)) % every === 0);
  for (const { texts, x } of shown) texts.forEach((text, i) => context.fillText(text, x, 14 + 14 * i));
  context.translate(0, -18);
}
