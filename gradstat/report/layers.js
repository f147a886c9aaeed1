// The table: a row for each layer of a kind with the line of its rms, in any order, filtered by name.

const COLUMNS = [
  { name: "#", width: "52px", wide: "wider", order: (i) => i, text: (i) => String(place[i] + 1) },
  { name: "Layer", left: true, order: (i) => meta.layers[i], text: (i) => meta.layers[i] },
  { name: "Elements", width: "100px", wide: "wider", order: (i) => meta.newest.numel[i], text: (i) => whole(meta.newest.numel[i]) },
  { name: "rms by step, own log scale", width: "28%", left: true, spark: true },
  { name: "rms, newest", width: "104px", order: (i) => meta.newest.rms[i] ?? NaN, text: (i) => number(meta.newest.rms[i]) },
  { name: "Zeros", width: "78px", wide: "wide", order: (i) => zeroShare(i), text: (i) => share(zeroShare(i)) },
  { name: "NaN, inf", width: "84px", wide: "wide", order: (i) => broken[i], text: (i) => whole(broken[i]), bad: (i) => broken[i] > 0 },
];

// Of the whole run.
const broken = meta.layers.map((_, i) => part(arrays.nonfinite, i).reduce((a, b) => a + b, 0));

// What is undefined comes last, whichever way the others go.
function compare(a, b, sign) {
  const [none, other] = [Number.isNaN(a), Number.isNaN(b)];
  if (none || other) return none - other;
  return sign * (a < b ? -1 : a > b ? 1 : 0);
}

function part(array, layer) {
  return array.subarray(layer * T, (layer + 1) * T);
}

function zeroShare(layer) {
  const at = layer * K + K - 1;
  return arrays.sampleFinite[at] ? arrays.sampleZeros[at] / arrays.sampleFinite[at] : NaN;
}

function buildLayers(select) {
  const body = byId("rows");
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) addSpark(entry.target);
    }
  }, { rootMargin: "1500px" });
  const addSpark = (cell) => {
    seen.unobserve(cell);
    if (cell.querySelector("canvas")) return;
    const layer = Number(cell.parentElement.dataset.layer);
    addCanvas(cell.firstChild, 28, (context, width, height) => drawSpark(context, layer, width, height), `rms of ${meta.layers[layer]} by step`).redraw();
  };
  // On paper all rows are seen.
  window.addEventListener("beforeprint", () => body.querySelectorAll("td.spark").forEach(addSpark));
  const makeRow = (i) => {
    const row = document.createElement("tr");
    row.dataset.layer = String(i);
    row.tabIndex = 0;
    for (const column of COLUMNS) {
      const cell = row.insertCell();
      cell.className = [column.left && "text", column.wide, column.bad?.(i) && "bad"].filter(Boolean).join(" ");
      if (column.spark) {
        cell.className = "spark";
        const holder = document.createElement("div");
        cell.append(holder);
        holder.style.height = "28px";
        seen.observe(cell);
      } else {
        const text = document.createElement("bdi");
        text.textContent = column.text(i);
        cell.append(text);
        if (column.left) cell.title = column.text(i);
      }
    }
    row.addEventListener("click", () => select(i, { from: "table" }));
    return row;
  };
  body.addEventListener("keydown", (event) => {
    const row = event.target.closest("tr");
    const move = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (event.key === "Enter" || event.key === " ") select(Number(row.dataset.layer), { from: "table" });
    else if (move) {
      let to = row[move];
      while (to && to.hidden) to = to[move];
      to?.focus();
    } else return;
    event.preventDefault();
  });
  const hover = (event) => {
    const cell = event.target.closest("td.spark");
    if (!cell) return hideTip();
    const layer = Number(cell.parentElement.dataset.layer);
    const canvas = cell.querySelector("canvas");
    if (!canvas) return;
    const box = canvas.getBoundingClientRect();
    const t = Math.floor(((event.clientX - box.left) / box.width) * T);
    if (t >= 0 && t < T) showTip(event, titleOf(layer), cellLines(layer, t));
  };
  body.addEventListener("pointermove", hover);
  body.addEventListener("pointerleave", hideTip);
  const rows = [];  // by layer, those that have been shown
  let sorting = null;
  const filter = () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    let shown = 0;
    for (const layer of state.view.layers) {
      rows[layer].hidden = !meta.layers[layer].toLowerCase().includes(wanted);
      shown += !rows[layer].hidden;
    }
    byId("none").hidden = shown > 0;
  };
  const show = () => {
    const shown = state.view.layers.map((layer) => (rows[layer] ??= makeRow(layer)));
    if (sorting) {
      const key = (row) => sorting.order(Number(row.dataset.layer));
      shown.sort((a, b) => compare(key(a), key(b), sorting.sign));
    }
    body.replaceChildren(...shown);
    filter();
  };
  buildHead((order, sign) => {
    sorting = { order, sign };
    show();
  });
  byId("filter").addEventListener("input", filter);
  return { show, row: (layer) => rows[layer] };
}

function buildHead(sort) {
  const heads = COLUMNS.map((column) => {
    const head = document.createElement("th");
    head.className = [column.left && "text", column.wide].filter(Boolean).join(" ");
    if (column.width) head.style.width = column.width;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column.name;
    button.title = column.name;
    button.style.overflow = "hidden";
    button.style.textOverflow = "ellipsis";
    head.append(button);
    if (!column.order) button.disabled = true;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending";
      for (const other of heads) {
        other.removeAttribute("aria-sort");
        other.classList.remove("sorted");
      }
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      head.classList.add("sorted");
      sort(column.order, down ? 1 : -1);
    });
    return head;
  });
  byId("columns").append(...heads);
}

function drawSpark(context, layer, width, height) {
  const [level, least, most] = [arrays.level, arrays.least, arrays.most].map((array) => part(array, layer));
  const ends = spread([level, least, most], 2);
  const box = { left: 0, top: 3, width, height: height - 6 };
  curve(context, box, ends, level, least, most, part(arrays.nonfinite, layer));
}
