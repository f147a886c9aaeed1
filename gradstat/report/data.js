// What the page holds: `meta` in JSON, arrays in base64 that `meta.arrays` describes, and how
// numbers are written. T columns of records, K sampled records; a layer is the index of a row, and
// each row is of a kind.

const byId = (id) => document.getElementById(id);
const meta = JSON.parse(byId("meta").textContent);
const T = meta.steps.length;
const K = meta.sampleSteps.length;

const arrays = (() => {
  const text = atob(byId("data").textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const types = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
  const found = {};
  for (const [name, [type, offset, length]] of Object.entries(meta.arrays)) {
    found[name] = new types[type](bytes.buffer, offset, length);
  }
  return found;
})();

// The layers of each kind, and which of its kind a layer is.
const byKind = meta.nouns.map((_, kind) => meta.order.filter((layer) => meta.kinds[layer] === kind));
const place = [];
for (const layers of byKind) layers.forEach((layer, i) => { place[layer] = i; });

// Text around a name that is written from right to left keeps its own direction.
const rightToLeft = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;
const isolated = (name) => (rightToLeft.test(name) ? `\u2068${name}\u2069` : name);

function isolateNames(text) {
  if (!rightToLeft.test(text)) return text;
  const names = [...new Set(meta.layers)].filter((name) => rightToLeft.test(name) && text.includes(name));
  return names.reduce((isolating, name) => isolating.replaceAll(name, isolated(name)), text);
}

const nounOf = (layer) => meta.nouns[meta.kinds[layer]];
const titleOf = (layer) => isolated(meta.layers[layer]) + (nounOf(layer) === "gradient" ? "" : `\u00a0\u00b7 ${nounOf(layer)}`);

// Where each layer's histograms begin in `arrays.counts`.
const countStarts = [0];
for (const rows of meta.rows) countStarts.push(countStarts[countStarts.length - 1] + K * rows);

function countAt(layer, sample, row) {
  return arrays.counts[countStarts[layer] + sample * meta.rows[layer] + row];
}

// Lower and upper end of a row of a sample's histogram: log2 |value|, or value.
function rowEnds(layer, sample, row) {
  if (meta.log2) return [meta.first[layer] + row - 127, meta.first[layer] + row - 126];
  const at = 2 * (layer * K + sample);
  const [low, high] = [arrays.sampleEdges[at], arrays.sampleEdges[at + 1]];
  return [low + ((high - low) * row) / meta.rows[layer], low + ((high - low) * (row + 1)) / meta.rows[layer]];
}

function number(x) {
  if (x === null || Number.isNaN(x)) return "\u2013";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e-3 && size < 1e4 ? x.toPrecision(3) : x.toExponential(2);
  return text.replace("-", "\u2212").replace("e-", "e\u2212").replace("e+", "e");
}

// Of a round number, no more digits than it has.
function short(x) {
  const [rounded, size] = [Number(x.toPrecision(6)), Math.abs(x)];
  const text = x === 0 || (size >= 1e-3 && size < 1e5) ? String(rounded) : rounded.toExponential();
  return text.replaceAll("-", "\u2212").replace("e+", "e");
}

const whole = (n) => n.toLocaleString("en-US");

function share(x) {
  if (Number.isNaN(x)) return "\u2013";
  const percent = 100 * x;
  if (percent === 0 || percent === 100) return `${percent} %`;
  if (percent < 0.01) return "< 0.01 %";
  if (percent > 99.9) return "> 99.9 %";
  return `${percent.toPrecision(percent < 1 ? 1 : percent < 10 ? 2 : 3)} %`;
}

const plural = (n, what) => `${whole(n)} ${what}${n === 1 ? "" : "s"}`;

function powerOfTwo(k) {
  const digits = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";
  return "2" + String(k).replace(/\d/g, (d) => digits[d]).replace("-", "\u207b");
}

// A magnitude that is known by its log2.
function magnitude(level) {
  if (Number.isNaN(level)) return "\u2013";
  if (level === -Infinity) return "0";
  return `${number(2 ** level)} (2^${level.toFixed(1).replace("-", "\u2212")})`;
}

function stepsOf(column) {
  const [first, last] = meta.steps[column];
  return first === last
    ? `step ${whole(first)}`
    : `steps ${whole(first)} to ${whole(last)}, ${plural(meta.sizes[column], "record")} together`;
}
