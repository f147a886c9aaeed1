// The table: a row for each layer of a kind with the line of its rms, in any order, filtered by name.

import { byId, clamp, make, number, share, whole } from "./text.js";
import { arrays, columnAt, K, meta, newest, nounOf, part, place, samples, state, titleOf, wholePart } from "./run.js";
import { addCanvas, curve, removeCanvas, spread } from "./canvas.js";
import { hideTip, showTip } from "./pointing.js";
import { cellLines } from "./map.js";
import { NAMES } from "./detail.js";

const COLUMNS = [
  { name: "#", width: "52px", wide: "wider", order: (i) => place[i], text: (i) => String(place[i] + 1) },
  { name: "Name", left: true, order: (i) => meta.layers[i], text: (i) => meta.layers[i] },
  { name: "Elements", width: "100px", wide: "wider", order: (i) => newest("numel", i), text: (i) => whole(newest("numel", i)) },
  { name: "rms by step, own log scale", width: "28%", left: true, spark: true },
  { name: "rms, newest", width: "104px", order: (i) => newest("rms", i), text: (i) => number(newest("rms", i)) },
  { name: "Zeros", width: "78px", wide: "wide", order: (i) => zeroShare(i), text: (i) => share(zeroShare(i)) },
  { name: "NaN, inf", width: "84px", wide: "wide", order: (i) => broken(i), text: (i) => whole(broken(i)), bad: (i) => broken(i) > 0 },
];

// NaN and infinite elements of the whole run.
const broken = (layer) => wholePart(arrays.nonfinite, layer).reduce((a, b) => a + b, 0);

// What is undefined comes last, whichever way the rest is sorted.
function compare(a, b, sign) {
  const [none, other] = [Number.isNaN(a), Number.isNaN(b)];
  if (none || other) return none - other;
  return sign * (a < b ? -1 : a > b ? 1 : 0);
}

function zeroShare(layer) {
  const { finite, zeros } = samples[K - 1];
  return finite[layer] ? zeros[layer] / finite[layer] : NaN;
}

export function buildLayers(select, changed) {
  const body = byId("rows");
  const sparks = new Map();  // drawings by layer, of rows that have been seen
  let rows = [];  // by layer, those that have been shown
  let sorting = null;  // name of a column, and sign
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) addSpark(entry.target);
    }
  }, { rootMargin: "1500px" });
  const addSpark = (cell) => {
    observer.unobserve(cell);
    if (cell.querySelector("canvas")) return;
    const layer = Number(cell.parentElement.dataset.layer);
    const spark = addCanvas(cell.firstChild, 28, (context, width, height) => drawSpark(context, layer, width, height), `rms of ${meta.layers[layer]} by step`);
    sparks.set(layer, spark);
    spark.redraw();
  };
  // On paper all rows are seen.
  window.addEventListener("beforeprint", () => body.querySelectorAll("td.spark").forEach(addSpark));
  const makeRow = (i) => {
    const row = make("tr", { tabIndex: -1 });
    row.dataset.layer = String(i);
    for (const column of COLUMNS) {
      const cell = row.insertCell();
      if (column.spark) {
        cell.className = "spark";
        const holder = make("div");
        cell.append(holder);
        holder.style.height = "28px";
        observer.observe(cell);
      } else {
        cell.append(make("bdi"));
        if (column.left) cell.title = column.text(i);
      }
    }
    row.addEventListener("click", () => select(i, { from: "table" }));
    fill(row, i);
    return row;
  };
  const fill = (row, i) => COLUMNS.forEach((column, at) => {
    if (column.spark) return;
    const [cell, text] = [row.cells[at], column.text(i)];
    const name = [column.left && "text", column.wide, column.bad?.(i) && "bad"].filter(Boolean).join(" ");
    if (cell.className !== name) cell.className = name;
    if (cell.firstChild.textContent === text) return;
    if (column.left) cell.firstChild.replaceChildren(...breakable(text));
    else cell.firstChild.textContent = text;
  });
  body.addEventListener("keydown", (event) => {
    const row = event.target.closest("tr");
    const all = [...body.rows].filter((each) => !each.hidden);
    const to = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") select(Number(row.dataset.layer), { from: "table" });
    else if (to) focus(all[clamp(all.indexOf(row) + to, 0, all.length - 1)]);
    else return;
    event.preventDefault();
  });
  // Tab comes to one row of the table, arrow keys to the others.
  const focus = (row, move = true) => {
    for (const other of body.querySelectorAll("tr[tabindex='0']")) other.tabIndex = -1;
    row.tabIndex = 0;
    if (move) row.focus();
  };
  const reachable = () => {
    const [row] = [...body.querySelectorAll("tr[tabindex='0']:not([hidden])"), ...body.querySelectorAll("tr.selected:not([hidden])"), ...body.querySelectorAll("tr:not([hidden])")];
    if (row) focus(row, false);
  };
  body.addEventListener("pointermove", (event) => {
    const cell = event.target.closest("td.spark");
    const canvas = cell?.querySelector("canvas");
    if (!canvas) return hideTip();
    const layer = Number(cell.parentElement.dataset.layer);
    const t = columnAt(event.clientX - canvas.getBoundingClientRect().left, 0, canvas.clientWidth);
    if (t !== null) showTip(event.clientX, event.clientY, titleOf(layer), cellLines(layer, t));
  });
  body.addEventListener("pointerleave", hideTip);
  const filter = () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    let shown = 0;
    for (const layer of state.view.layers) {
      rows[layer].hidden = !meta.layers[layer].toLowerCase().includes(wanted);
      shown += !rows[layer].hidden;
    }
    byId("none").hidden = shown > 0;
    reachable();
  };
  const show = () => {
    const shown = state.view.layers.map((layer) => (rows[layer] ??= makeRow(layer)));
    if (sorting) {
      const { order } = COLUMNS.find((each) => each.name === sorting.name);
      const key = (row) => order(Number(row.dataset.layer));
      shown.sort((a, b) => compare(key(a), key(b), sorting.sign));
    }
    body.replaceChildren(...shown);
    filter();
  };
  const head = buildHead((name, sign) => {
    sorting = { name, sign };
    show();
    changed();
  });
  byId("filter").addEventListener("input", () => {
    filter();
    changed();
  });
  byId("filter").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !byId("filter").value) return;
    byId("filter").value = "";
    filter();
    changed();
    event.stopPropagation();
  });
  return {
    show,
    // Writes the numbers that have changed; rows stay where they are.
    update() {
      for (const layer of state.view.layers) fill(rows[layer], layer);
    },
    // Forgets the rows, which are of other layers now.
    begin() {
      for (const spark of sparks.values()) removeCanvas(spark);
      sparks.clear();
      rows = [];
    },
    select(layer) {
      for (const row of body.querySelectorAll("tr.selected")) {
        row.classList.remove("selected");
        row.removeAttribute("aria-current");
      }
      rows[layer].classList.add("selected");
      rows[layer].setAttribute("aria-current", "true");
      if (!rows[layer].hidden) focus(rows[layer], false);
    },
    sorting: () => sorting,
    sort(name, sign) {
      if (COLUMNS.some((each) => each.order && each.name === name)) head(name, sign);
    },
    filter(text) {
      byId("filter").value = text;
      filter();
    },
    rows: () => [...body.rows].filter((row) => !row.hidden).map((row) => Number(row.dataset.layer)),
  };
}

function buildHead(sort) {
  const heads = COLUMNS.map((column) => {
    const head = make("th", { scope: "col", className: [column.left && "text", column.wide].filter(Boolean).join(" ") });
    if (column.width) head.style.width = column.width;
    const label = make(column.order ? "button" : "span", { textContent: column.name, title: column.name });
    if (column.order) label.type = "button";
    head.append(label);
    label.addEventListener("click", () => {
      if (column.order) by(column.name, head.getAttribute("aria-sort") === "descending" ? 1 : -1);
    });
    return head;
  });
  const by = (name, sign) => {
    COLUMNS.forEach((column, at) => {
      heads[at].classList.toggle("sorted", column.name === name);
      if (column.name === name) heads[at].setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
      else heads[at].removeAttribute("aria-sort");
    });
    sort(name, sign);
  };
  byId("columns").append(...heads);
  return by;
}

function drawSpark(context, layer, width, height) {
  const [level, least, most] = [arrays.level, arrays.least, arrays.most].map((array) => part(array, layer));
  const ends = spread([level, least, most], 2);
  const box = { left: 0, top: 3, width, height: height - 6 };
  curve(context, box, ends, level, least, most, part(arrays.nonfinite, layer));
}

// The newest numbers of the rows that are shown, in their order.
export function layersTable(layers) {
  const names = NAMES.filter(([name]) => newest(name, 0) !== undefined);
  const rows = [["layer", "kind", "step", ...names.map((each) => each[1]), "NaN or infinite in all records"]];
  for (const layer of layers) {
    const values = names.map(([name, , noun]) => (noun && noun !== nounOf(layer) ? NaN : newest(name, layer)));
    rows.push([meta.layers[layer], nounOf(layer), samples[K - 1].step, ...values, broken(layer)]);
  }
  return rows;
}

// A name that may go on in another line after each of its parts.
function breakable(name) {
  const parts = name.match(/[^./]+[./]*|[./]+/g) ?? [];
  return parts.flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}
