// What the page holds of a run: `meta`, arrays of T columns of records, K sampled records; and how
// later records are added. A layer is the index of a row, and each row has a kind.

import { clamp, lastWhere, plural, whole } from "./text.js";

export const meta = { layers: [], nouns: [], owners: [], kinds: [], order: [], formats: [], series: [], steps: [], sizes: [], records: 0, findings: null };
export const arrays = {};
export let samples = [];
export let T = 0;  // columns
export let K = 0;  // samples
export let capacity = 0;  // columns that a row of an array has room for
export let byKind = [];  // the layers of each kind
export let place = [];  // of a layer among those of its kind

const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
const BY_LAYER = { level: Float32Array, least: Float32Array, most: Float32Array, zeros: Float32Array, nonfinite: Float64Array };
const BY_FORMAT = { snr: Float32Array, lost: Float32Array };  // of each layer and format
const BY_SERIES = { seriesMean: Float32Array, seriesLeast: Float32Array, seriesMost: Float32Array, seriesNonfinite: Float64Array };

function unpack(layout, data) {
  const text = atob(data.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const found = {};
  for (const [name, [type, offset, length]] of Object.entries(layout)) {
    found[name] = new TYPES[type](bytes.buffer, offset, length);
  }
  return found;
}

// Takes a whole run, or what is new of it.
export function receive(told, data) {
  const fresh = unpack(told.arrays, data);
  if (told.head) begin(told);
  meta.steps = meta.steps.slice(0, told.from).concat(told.steps);
  meta.sizes = meta.sizes.slice(0, told.from).concat(told.sizes);
  meta.records = told.records;
  if (told.findings !== undefined) Object.assign(meta, { findings: told.findings, findingsOf: told.findingsOf ?? told.records });
  addColumns(BY_LAYER, meta.layers.length, told, fresh);
  addColumns(BY_FORMAT, meta.layers.length * meta.formats.length, told, fresh);
  addColumns(BY_SERIES, meta.series.length, told, fresh);
  addSamples(told, fresh);
  for (const name of Object.keys(fresh).filter((each) => each.startsWith("newest"))) arrays[name] = fresh[name];
  [T, K] = [meta.steps.length, samples.length];
  usuals.clear();
}

function begin(told) {
  Object.assign(meta, told.head, { series: told.series, steps: [], sizes: [] });
  capacity = told.capacity;
  samples = [];
  for (const name of Object.keys(arrays)) delete arrays[name];
  const n = meta.layers.length;
  for (const [types, rows] of [[BY_LAYER, n], [BY_FORMAT, n * meta.formats.length], [BY_SERIES, meta.series.length]]) {
    for (const [name, type] of Object.entries(types)) arrays[name] = new type(rows * capacity);
  }
  byKind = meta.nouns.map((_, kind) => meta.order.filter((layer) => meta.kinds[layer] === kind));
  place = [];
  for (const layers of byKind) layers.forEach((layer, i) => { place[layer] = i; });
}

function addColumns(types, rows, { from, steps }, fresh) {
  const n = steps.length;
  for (const name of Object.keys(types)) {
    for (let i = 0; i < rows; i++) arrays[name].set(fresh[name].subarray(i * n, (i + 1) * n), i * capacity + from);
  }
}

function addSamples(told, fresh) {
  const L = meta.layers.length;
  const known = new Map(samples.map((each) => [each.step, each]));
  let start = 0;
  told.samples.forEach((step, k) => {
    const [part, own] = [(name) => fresh[name].slice(k * L, (k + 1) * L), { step, starts: new Uint32Array(L + 1) }];
    for (const name of ["First", "Rows", "Finite", "Zeros", "Nonfinite"]) own[name.toLowerCase()] = part(`sample${name}`);
    own.rows.forEach((n, layer) => { own.starts[layer + 1] = own.starts[layer] + n; });
    own.counts = fresh.sampleCounts.slice(start, start + own.starts[L]);
    own.edges = fresh.sampleEdges.slice(2 * k * L, 2 * (k + 1) * L);
    start += own.starts[L];
    known.set(step, own);
  });
  samples = told.kept.map((step) => known.get(step));
}

// The columns of one layer or series.
export const wholePart = (array, i) => array.subarray(i * capacity, i * capacity + T);

// The median of a row's levels over all columns.
const usuals = new Map();
export function usual(layer) {
  if (!usuals.has(layer)) {
    const known = wholePart(arrays.level, layer).filter(Number.isFinite).sort();
    usuals.set(layer, known.length ? known[known.length >> 1] : NaN);
  }
  return usuals.get(layer);
}

export const newest = (name, layer) => arrays[`newest${name[0].toUpperCase()}${name.slice(1)}`]?.[layer];

export function countAt(layer, k, row) {
  const { first, rows, starts, counts } = samples[k];
  const at = row - first[layer];
  return at >= 0 && at < rows[layer] ? counts[starts[layer] + at] : 0;
}

// Lower and upper end of a row of a sample's histogram: log2 |value|, or value.
export function rowEnds(layer, k, row) {
  if (meta.log2) return [row - 127, row - 126];
  const { edges, rows } = samples[k];
  const [low, high] = edges.subarray(2 * layer, 2 * layer + 2);
  return [row, row + 1].map((at) => low + ((high - low) * at) / rows[layer]);
}

// The row that a value is in, or null.
export function rowAt(layer, k, value) {
  const { first, rows } = samples[k];
  for (let row = first[layer]; row < first[layer] + rows[layer]; row++) {
    const [low, high] = rowEnds(layer, k, row);
    if (value >= low && value < high) return row;
  }
  return meta.log2 && value >= -127 && value < 128 ? Math.floor(value) + 127 : null;
}

// The ends of each filled row of a layer's distribution in one sample, and its share.
export function* filledRows(layer, k) {
  const { first, rows, finite } = samples[k];
  for (let row = first[layer]; row < first[layer] + rows[layer]; row++) {
    const count = countAt(layer, k, row);
    if (count) yield [...rowEnds(layer, k, row), count / finite[layer], count];
  }
}

// Text around a name that is written from right to left keeps its own direction.
const rightToLeft = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;
export const isolated = (name) => (rightToLeft.test(name) ? `\u2068${name}\u2069` : name);

export function isolateNames(text) {
  if (!rightToLeft.test(text)) return text;
  const names = [...new Set(meta.layers)].filter((name) => rightToLeft.test(name) && text.includes(name));
  return names.reduce((isolating, name) => isolating.replaceAll(name, isolated(name)), text);
}

export const nounOf = (layer) => meta.nouns[meta.kinds[layer]];
export const titleOf = (layer) => isolated(meta.layers[layer]) + (nounOf(layer) === "gradient" ? "" : `\u00a0\u00b7 ${nounOf(layer)}`);

// What a row of a kind is of, in words: a parameter's gradient.
export function aRow(kind) {
  const [owner, noun] = [meta.owners[kind], meta.nouns[kind]];
  return owner === noun ? `a ${noun}` : `a ${owner}'s ${noun}`;
}

export function stepsOf(column) {
  const [first, last] = meta.steps[column];
  return first === last
    ? `step ${whole(first)}`
    : `steps ${whole(first)} to ${whole(last)}, ${plural(meta.sizes[column], "record")} together`;
}

// The column of records that a step belongs to.
export const columnOf = (step) => lastWhere(T, (t) => meta.steps[t][0] <= step);

// The sample nearest to a step.
export function sampleNear(step) {
  let nearest = 0;
  for (let k = 1; k < K; k++) {
    if (Math.abs(samples[k].step - step) < Math.abs(samples[nearest].step - step)) nearest = k;
  }
  return nearest;
}

// Which steps are seen: all, or those from one to another. Places on an axis of steps.

export const zoom = { first: null, last: null };  // null: from the first one on, to the newest
export const seen = { from: 0, to: 0, samples: [] };  // columns, and samples, of those steps

export function see() {
  let [first, last] = [zoom.first ?? -Infinity, zoom.last ?? Infinity];
  [seen.from, seen.to] = [0, T];
  // Another run, or a link, may have set steps that are not here: then all are seen.
  if (!meta.steps.some(([a, b]) => b >= first && a <= last)) [first, last] = [-Infinity, Infinity];
  while (seen.from < T - 1 && meta.steps[seen.from][1] < first) seen.from++;
  while (seen.to > seen.from + 1 && meta.steps[seen.to - 1][0] > last) seen.to--;
  const all = samples.map((_, k) => k);
  const [low, high] = T ? [meta.steps[seen.from][0], meta.steps[seen.to - 1][1]] : [0, 0];
  seen.samples = all.filter((k) => samples[k].step >= low && samples[k].step <= high);
  if (!seen.samples.length && K) seen.samples = [sampleNear(low)];
}

export const seenColumn = (t) => clamp(t, seen.from, seen.to - 1);
export const isZoomed = () => seen.from > 0 || seen.to < T;

// The columns that are seen of one layer or series.
export const part = (array, i) => array.subarray(i * capacity + seen.from, i * capacity + seen.to);
export const firstSteps = () => meta.steps.slice(seen.from, seen.to).map((each) => each[0]);
export const sampleSteps = () => seen.samples.map((k) => samples[k].step);

// Middle of a column between two ends, and the column or sample at a place; null beside them.
export const columnMiddle = (t, left, width) => left + ((t - seen.from + 0.5) / (seen.to - seen.from)) * (width - left);

export function columnAt(x, left, width) {
  const t = seen.from + Math.floor(((x - left) / (width - left)) * (seen.to - seen.from));
  return t >= seen.from && t < seen.to ? t : null;
}

export const sampleMiddle = (k, left, width) => left + ((seen.samples.indexOf(k) + 0.5) / seen.samples.length) * (width - left);

export function sampleAt(x, left, width) {
  return seen.samples[Math.floor(((x - left) / (width - left)) * seen.samples.length)] ?? null;
}

// Steps from one place of an axis to another.
export function columnSteps(x0, x1, left, width) {
  const [a, b] = [x0, x1].map((x) => columnAt(clamp(x, left, width - 0.01), left, width));
  return [meta.steps[a][0], meta.steps[b][1]];
}

export function sampleStepsBetween(x0, x1, left, width) {
  return [x0, x1].map((x) => samples[sampleAt(clamp(x, left, width - 0.01), left, width)].step);
}

// First and last step after zooming in or out around a column; nulls for all steps.
export function zoomed(factor, t) {
  const n = Math.max(2, Math.round((seen.to - seen.from) * factor));
  if (n >= T) return [null, null];
  const from = clamp(Math.round(t - n / 2), 0, T - n);
  return [meta.steps[from][0], from + n === T ? null : meta.steps[from + n - 1][1]];
}

// What is selected and what the pointer is on.
//
// `step` is the one that is looked at, null for the newest. `home` is its sample, which is shown
// while the pointer is on no other. Columns: `cell` of the map, `t` of the rms, `seriesAt` of the lines.
// `touched`: who has chosen what to see; 0 nobody yet, 1 a finding, 2 the reader or a link.
export const state = { view: null, colour: "", order: "", layer: 0, step: null, home: 0, sample: 0, cell: null, t: null, seriesAt: null, touched: 0 };
