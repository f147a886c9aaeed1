// Numbers as the page writes them, and its elements.

export const byId = (id) => document.getElementById(id);

// A new element with some properties and what is in it.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The last of n numbers from 0 on of which something holds, as of all before it; 0 if of none.
export function lastWhere(n, holds) {
  let [low, high] = [0, n - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (holds(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

export const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

export function number(x) {
  if (x === null || Number.isNaN(x)) return "\u2013";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e-3 && size < 1e4 ? x.toPrecision(3) : x.toExponential(2);
  return text.replace("-", "\u2212").replace("e-", "e\u2212").replace("e+", "e");
}

// A round number with no more digits than it needs.
export function short(x) {
  const [near, size] = [Number(x.toPrecision(6)), Math.abs(x)];
  const text = x === 0 || (size >= 1e-3 && size < 1e5) ? String(near) : near.toExponential();
  return text.replaceAll("-", "\u2212").replace("e+", "e");
}

export const whole = (n) => n.toLocaleString("en-US");

// Three digits, those of thousands without a power.
export const rounded = (x) => (Math.abs(x) >= 1000 && Math.abs(x) < 1e6 ? whole(Number(x.toPrecision(3))) : number(x));

export function share(x) {
  if (Number.isNaN(x)) return "\u2013";
  const percent = 100 * x;
  if (percent === 0 || percent === 100) return `${percent} %`;
  if (percent < 0.01) return "< 0.01 %";
  if (percent > 99.9) return "> 99.9 %";
  return `${percent.toPrecision(percent < 1 ? 1 : percent < 10 ? 2 : 3)} %`;
}

export const plural = (n, what) => `${whole(n)} ${what}${n === 1 ? "" : "s"}`;

export const powerOfTwo = (k) => `2^${String(k).replace("-", "\u2212")}`;

// A magnitude that is known by its log2.
export function magnitude(level) {
  if (Number.isNaN(level)) return "\u2013";
  if (level === -Infinity) return "0";
  return `${number(2 ** level)} (${powerOfTwo(level.toFixed(1))})`;
}

// How long ago, in a few letters.
export function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}
