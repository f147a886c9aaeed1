// Pointing at a place of a figure, with the pointer or the keys; the tip gives its numbers.

import { byId, clamp, make } from "./text.js";
import { isZoomed, meta, seen, T, zoom, zoomed } from "./run.js";

const tip = byId("tip");
const forgets = [];

export function showTip(x, y, title, lines) {
  const rows = lines.map((text) => make("div", { textContent: text }));
  tip.replaceChildren(make("b", { textContent: title }), ...rows);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const right = x + 16 + box.width > window.innerWidth - 8;
  tip.style.left = `${Math.max(8, right ? x - 16 - box.width : x + 16)}px`;
  tip.style.top = `${clamp(y + 14, 8, window.innerHeight - box.height - 8)}px`;
}

export function hideTip() {
  tip.hidden = true;
}

// Makes a canvas a figure that can be pointed at and moved in.
//   at(x, y): the place there in CSS pixels, or null.
//   show(place): marks it, or none for null, and gives the tip's title and lines.
//   move(place, dx, dy): the place beside it, from null the first one to be on.
//   where(place): its x and y. choose(place): it is clicked, or Enter is pressed.
//   between(x0, x1): the steps of a stretch, to see nothing else. column(place): to see it nearer.
export function addFigure(canvas, { at, show, move, where, choose = () => {}, between = null, column = null }) {
  let [held, start, isDragged] = [null, null, false];
  const position = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const clear = () => {
    held = null;
    canvas.removeAttribute("aria-valuetext");
    hideTip();
    show(null);
  };
  const tell = (place, x, y) => {
    const told = show(place);
    if (!told) return hideTip();
    canvas.setAttribute("aria-valuetext", told.flat().join(", "));
    showTip(x, y, ...told);
  };
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "slider");
  canvas.setAttribute("aria-valuenow", "0");
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = position(event);
    if (start !== null && Math.abs(x - start) > 5) isDragged = true;
    if (start !== null && isDragged) return showBand(canvas, start, x);
    const place = at(x, y);
    if (place === null) clear();
    else tell(place, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => {
    if (document.activeElement !== canvas || held === null) clear();
  });
  canvas.addEventListener("pointerdown", (event) => {
    isDragged = false;
    if (!between || event.button !== 0) return;
    [start] = position(event);
    canvas.setPointerCapture(event.pointerId);
  });
  const stop = () => {
    start = null;
    hideBand();
  };
  canvas.addEventListener("pointerup", (event) => {
    if (isDragged && start !== null) {
      clear();
      zoomTo(...between(...[start, position(event)[0]].sort((a, b) => a - b)));
    }
    stop();
  });
  canvas.addEventListener("pointercancel", stop);
  canvas.addEventListener("click", (event) => {
    const place = isDragged ? null : at(...position(event));
    if (place !== null) choose(place);
  });
  canvas.addEventListener("blur", clear);
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [-10, 0], PageDown: [10, 0], Home: [-Infinity, 0], End: [Infinity, 0] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (by) {
      const place = held === null ? move(null, 0, 0) : move(held, ...by);
      if (place === null) return;
      held = place;
      const [box, [x, y]] = [canvas.getBoundingClientRect(), where(place)];
      tell(place, box.left + x, box.top + y);
    } else if (event.key === "Enter" || event.key === " ") {
      if (held !== null) choose(held);
    } else if (column && ["+", "=", "-"].includes(event.key)) {
      const t = column(held ?? move(null, 0, 0));
      clear();
      zoomTo(...zoomed(event.key === "-" ? 2 : 0.5, t));
    } else if (event.key === "Escape" && (start !== null || held !== null || !tip.hidden)) {
      start = null;
      hideBand();
      clear();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  forgets.push(() => { held = null; });
}

// The places of figures change when a run begins anew or is thinned.
export function forgetPlaces() {
  for (const forget of forgets) forget();
  hideTip();
}

const band = byId("band");

function showBand(canvas, x0, x1) {
  const box = canvas.getBoundingClientRect();
  hideTip();
  band.hidden = false;
  Object.assign(band.style, {
    left: `${box.left + Math.min(x0, x1)}px`, top: `${box.top}px`,
    width: `${Math.abs(x1 - x0)}px`, height: `${box.height}px`,
  });
}

function hideBand() {
  band.hidden = true;
}

// Shows the steps from one to another; null for the first or the newest one.
export let zoomTo = () => {};

// Controls of the steps that are seen: numbers, and a button for all of them.
export function buildZoom(changed) {
  const [first, last] = [byId("zoom-first"), byId("zoom-last")];
  zoomTo = (a, b) => {
    const newestStep = meta.steps[T - 1][1];
    zoom.first = a === null || a <= meta.steps[0][0] ? null : a;
    zoom.last = b === null || b >= newestStep ? null : b;
    changed();
  };
  const valueOf = (input) => (input.value === "" || !input.validity.valid ? null : Number(input.value));
  for (const input of [first, last]) {
    input.addEventListener("change", () => {
      const [a, b] = [valueOf(first), valueOf(last)];
      if (a !== null && b !== null && a > b) zoomTo(b, a);
      else zoomTo(a, b);
    });
  }
  byId("zoom-all").addEventListener("click", () => zoomTo(null, null));
  return {
    show() {
      byId("zoom-all").disabled = !isZoomed();
      if (!T) return;
      for (const [input, step] of [[first, meta.steps[seen.from][0]], [last, meta.steps[seen.to - 1][1]]]) {
        if (document.activeElement !== input) input.value = String(step);
      }
    },
  };
}
