// Which steps are seen: all, or those from one to another. Places on an axis of steps.

const zoom = { first: null, last: null };  // null: from the first one on, to the newest
const seen = { from: 0, to: 0, samples: [] };  // columns, and samples, of those steps

function see() {
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

const isZoomed = () => seen.from > 0 || seen.to < T;

// The columns that are seen of one layer or series.
const part = (array, i) => array.subarray(i * capacity + seen.from, i * capacity + seen.to);
const firstSteps = () => meta.steps.slice(seen.from, seen.to).map((each) => each[0]);
const sampleSteps = () => seen.samples.map((k) => samples[k].step);

// Middle of a column between two ends, and the column or sample at a place; null beside them.
const columnMiddle = (t, left, width) => left + ((t - seen.from + 0.5) / (seen.to - seen.from)) * (width - left);

function columnAt(x, left, width) {
  const t = seen.from + Math.floor(((x - left) / (width - left)) * (seen.to - seen.from));
  return t >= seen.from && t < seen.to ? t : null;
}

const sampleMiddle = (k, left, width) => left + ((seen.samples.indexOf(k) + 0.5) / seen.samples.length) * (width - left);

function sampleAt(x, left, width) {
  return seen.samples[Math.floor(((x - left) / (width - left)) * seen.samples.length)] ?? null;
}

// Steps from one place of an axis to another.
function columnSteps(x0, x1, left, width) {
  const [a, b] = [x0, x1].map((x) => columnAt(Math.max(left, Math.min(width - 0.01, x)), left, width));
  return [meta.steps[a][0], meta.steps[b][1]];
}

function sampleStepsBetween(x0, x1, left, width) {
  return [x0, x1].map((x) => samples[sampleAt(Math.max(left, Math.min(width - 0.01, x)), left, width)].step);
}

// First and last step after zooming in or out around a column; nulls for all steps.
function zoomed(factor, t) {
  const n = Math.max(2, Math.round((seen.to - seen.from) * factor));
  if (n >= T) return [null, null];
  const from = Math.max(0, Math.min(T - n, Math.round(t - n / 2)));
  return [meta.steps[from][0], from + n === T ? null : meta.steps[from + n - 1][1]];
}

// Controls of the steps that are seen: numbers, and a button for all of them.
function buildZoom(changed) {
  const [first, last] = [byId("zoom-first"), byId("zoom-last")];
  const to = (a, b) => {
    const newestStep = meta.steps[T - 1][1];
    zoom.first = a === null || a <= meta.steps[0][0] ? null : a;
    zoom.last = b === null || b >= newestStep ? null : b;
    changed();
  };
  const valueOf = (input) => (input.value === "" || !input.validity.valid ? null : Number(input.value));
  for (const input of [first, last]) {
    input.addEventListener("change", () => {
      const [a, b] = [valueOf(first), valueOf(last)];
      if (a !== null && b !== null && a > b) to(b, a);
      else to(a, b);
    });
  }
  byId("zoom-all").addEventListener("click", () => to(null, null));
  return {
    to,
    show() {
      byId("zoom-all").disabled = !isZoomed();
      if (!T) return;
      for (const [input, step] of [[first, meta.steps[seen.from][0]], [last, meta.steps[seen.to - 1][1]]]) {
        if (document.activeElement !== input) input.value = String(step);
      }
    },
  };
}
