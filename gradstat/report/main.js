// Puts the parts together.

import { byId, make, plural, whole } from "./text.js";
import { aRow, byKind, isolateNames, isZoomed, K, meta, nounOf, receive, sampleNear, samples, see, seen, state, T, titleOf, zoom } from "./run.js";
import { redrawAll, redrawSoon } from "./canvas.js";
import { buildSave } from "./save.js";
import { buildZoom, forgetPlaces, zoomTo } from "./pointing.js";
import { seriesTable } from "./series.js";
import { buildColours, buildMap, cellsTable, colourNow, RMS, viewOf } from "./map.js";
import { buildDetail, countsTable } from "./detail.js";
import { buildLayers, layersTable } from "./layers.js";

// The findings, the worst first; a click on one leads to its layer and step.

const SHOWN_FINDINGS = 6;
let areAllShown = false;

function showFindings(select) {
  const section = byId("findings");
  const focused = [...section.querySelectorAll("button")].indexOf(document.activeElement);
  const add = (...items) => byId("findings-of").before(...items);
  for (const old of section.querySelectorAll(":scope > :not(h2, #findings-of)")) old.remove();
  if (meta.findings === null) return void add(hint("Looking for findings \u2026"));
  if (!meta.findings.length) add(hint("Nothing stands out in this run."));
  const items = meta.findings.map((finding, i) => findingItem(finding, i, select));
  add(...items);
  if (items.length > SHOWN_FINDINGS && !areAllShown) {
    const more = make("button", { type: "button", className: "more", textContent: `Show ${items.length - SHOWN_FINDINGS} more` });
    more.addEventListener("click", () => {
      areAllShown = true;
      for (const item of items) item.classList.remove("later");
      items[SHOWN_FINDINGS].focus();
      more.remove();
      redrawSoon();
    });
    add(more);
  }
  if (focused >= 0) section.querySelectorAll("button")[focused]?.focus({ preventScroll: true });
}

// While a run is written, findings come later than records.
function showFindingsOf() {
  const line = byId("findings-of");
  line.hidden = !meta.findings || meta.findingsOf >= meta.records;
  line.textContent = `In the first ${plural(meta.findingsOf ?? 0, "record")}.`;
}

const hint = (text) => make("p", { className: "hint", textContent: text });

function findingItem(finding, i, select) {
  const item = make("button", { type: "button", className: `finding ${finding.severity}` });
  item.classList.toggle("later", i >= SHOWN_FINDINGS && !areAllShown);
  const [first, last] = finding.steps;
  const texts = [
    ["badge", finding.severity],
    ["what", isolateNames(finding.sentence)],
    ["when", `${finding.kind} \u00b7 ${first === last ? `step ${whole(first)}` : `steps ${whole(first)} to ${whole(last)}`}`],
  ];
  item.append(...texts.map(([kind, text]) => make("span", { className: kind, textContent: text })));
  item.addEventListener("click", () => select(finding.layer, { from: "findings", step: finding.at }));
  return item;
}

// The view in the page's address, after "#": whoever opens the link sees the same.

let linkTimer = 0;

// Called after each change that the reader makes.
function linkChanged() {
  state.touched = 2;
  writeLink();
}

function writeLink() {
  clearTimeout(linkTimer);
  linkTimer = setTimeout(() => {
    try {
      history.replaceState(null, "", `#${linkOf()}`);
    } catch {
      // A page that another one holds as text has no address of its own.
    }
  }, 100);
}

function linkOf() {
  const view = new URLSearchParams();
  view.set("layer", meta.layers[state.layer]);
  if (byKind.length > 1) view.set("kind", nounOf(state.layer));
  if (state.step !== null) view.set("step", state.step);
  if (zoom.first !== null || zoom.last !== null) view.set("steps", `${zoom.first ?? ""}-${zoom.last ?? ""}`);
  if (colourNow() !== RMS) view.set("colour", state.colour);
  if (state.order) view.set("order", state.order);
  if (byId("filter").value) view.set("filter", byId("filter").value);
  const sorting = table.sorting();
  if (sorting) view.set("sort", `${sorting.sign < 0 ? "-" : ""}${sorting.name}`);
  return view;
}

// What a link asks for, of this run; what the run does not have is left out.
function readLink() {
  const view = new URLSearchParams(location.hash.slice(1));
  const asked = (text) => (/^\d{1,15}$/.test(text ?? "") ? Number(text) : null);
  const [first, last] = (view.get("steps") ?? "").split("-").map(asked);
  const sort = view.get("sort") ?? "";
  return {
    layer: layerNamed(view.get("layer"), view.get("kind")),
    step: asked(view.get("step")),
    first: first ?? null,
    last: last ?? null,
    colour: view.get("colour") ?? "",
    order: ["depth", "role"].includes(view.get("order")) ? view.get("order") : "",
    filter: view.get("filter") ?? "",
    sort: sort && [sort.replace(/^-/, ""), sort.startsWith("-") ? -1 : 1],
  };
}

// The layer of a name and a noun, or of the name alone; undefined where there is none.
export function layerNamed(name, noun) {
  const found = meta.order.filter((layer) => meta.layers[layer] === name);
  return found.find((layer) => nounOf(layer) === noun) ?? found[0];
}

const map = buildMap(select);
const table = buildLayers(select, linkChanged);
const detail = buildDetail(select);
const seeOtherwise = () => {
  linkChanged();
  showAll();
};
const zoomBar = buildZoom(seeOtherwise);
const colourControl = buildColours(seeOtherwise);

// A control for which kind is shown, where there are several.
function showKinds() {
  const control = byId("kind");
  control.parentElement.hidden = byKind.length < 2;
  control.replaceChildren(...meta.nouns.map((noun, kind) => new Option(`${noun[0].toUpperCase()}${noun.slice(1)}s`, kind)));
}

byId("kind").addEventListener("change", () => {
  // The same layer, or another one of its module.
  const [name, layers] = [meta.layers[state.layer], byKind[byId("kind").value]];
  const related = (i) => name.startsWith(`${meta.layers[i]}.`) || meta.layers[i].startsWith(`${name}.`);
  select(layers.find((i) => meta.layers[i] === name) ?? layers.find(related) ?? layers[0], { from: "kind", step: state.step });
});

function showFacts() {
  const [first, last] = [meta.steps[0][0], meta.steps[T - 1][1]];
  byId("facts").textContent = [
    plural(state.view.layers.length, meta.owners[state.view.kind]),
    `${plural(meta.records, "record")}, ${first === last ? "step" : "steps"} ${first === last ? whole(first) : `${whole(first)} to ${whole(last)}`}`,
    meta.bins,
  ].join(" \u00b7 ");
  const [few, many] = [Math.min(...meta.sizes), Math.max(...meta.sizes)];
  const size = few === many ? plural(many, "record") : many - few === 1 ? `${whole(few)} or ${plural(many, "record")}` : `up to ${plural(many, "record")}`;
  const { groups, kind } = state.view;
  const { hint } = colourNow();
  const colour = hint ? hint(aRow(kind)) : many === 1 ? `Colour is the rms of ${aRow(kind)} in one record.` : `Thinned: a column is ${size} together, its colour the rms of all their elements.`;
  const order = groups.length > 1 ? "Rows with the same role are together, of each the one nearest to the input on top." : `The ${meta.owners[kind]} nearest to the input is on top.`;
  byId("map-hint").textContent = `${colour} ${order} Click a row to see its distribution; drag to see fewer steps.`;
  const notes = [`Made by gradstat ${meta.version}.`];
  if (many > 1) notes.push(`Lines are the rms of ${size} together, their band the smallest and the largest rms of one record.`);
  if (K < meta.records) notes.push(`Distributions are those of ${whole(K)} of ${plural(meta.records, "record")}: evenly spread ones, the newest, and those that findings name.`);
  byId("footer").textContent = notes.join(" ");
}

// Everything that depends on the steps that are seen, the kind, or the numbers.
function showAll() {
  see();
  state.view = viewOf(state.view ? state.view.kind : meta.kinds[state.layer]);
  const owners = `${meta.owners[state.view.kind]}s`;
  byId("layers-title").textContent = owners[0].toUpperCase() + owners.slice(1);
  byId("kind").value = state.view.kind;
  colourControl.show();
  showFacts();
  zoomBar.show();
  map.show();
  detail.show(state.sample);
  redrawAll();
}

// Called when the reader has selected another layer or step.
export const selectListeners = [];

// Shows a layer at a step, or at the newest one.
export function select(layer, { from, step = null }) {
  if (layer === undefined) return;
  const isOther = meta.kinds[layer] !== state.view.kind;
  Object.assign(state, { layer, step, cell: null });
  state.sample = state.home = step === null ? K - 1 : sampleNear(step);
  if (isOther) {
    state.view = viewOf(meta.kinds[layer]);
    table.show();
    showAll();
  }
  table.select(layer);
  map.mark();
  if (!isOther) detail.show(state.home);
  if (from === "beside") {
    // A link that nobody has chosen would keep this page from what is found later.
    if (state.touched === 2) writeLink();
    return;
  }
  if (from !== "start") linkChanged(); // before those who hear of it tell who has chosen
  for (const hear of selectListeners) hear(from);
  if (from === "start") return;
  // Beside the rest on a wide page, and in view; above the table on a narrow one.
  const beside = getComputedStyle(byId("detail")).position === "sticky";
  if (!beside && !["detail", "kind"].includes(from)) byId("detail").scrollIntoView({ block: "start" });
}

// What a link asks for; otherwise the first finding, or the first layer.
function openView() {
  if (!T) return;
  const asked = readLink();
  // While a run is written, the page opens on a finding only if it is more than a note.
  const found = meta.findings?.find(({ severity }) => !contents.live || severity !== "note");
  state.touched = Math.max(state.touched, asked.layer !== undefined ? 2 : found !== undefined ? 1 : 0);
  [zoom.first, zoom.last] = [asked.first, asked.last];
  [state.colour, state.order] = [asked.colour, asked.order];
  state.layer = asked.layer ?? found?.layer ?? byKind[0][0];
  const step = asked.layer === undefined ? found?.at ?? null : asked.step;
  see();
  state.view = viewOf(meta.kinds[state.layer]);
  state.sample = state.home = 0;
  table.show();
  select(state.layer, { from: "start", step });
  showAll();
  table.filter(asked.filter);
  if (asked.sort) table.sort(...asked.sort);
}

window.addEventListener("hashchange", openView);

// Takes a whole run, or what is new of it; the reader's place stays.
export function take(told, data) {
  const before = T ? { layer: meta.layers[state.layer], noun: nounOf(state.layer), sample: state.sample === state.home ? null : samples[state.sample].step } : null;
  receive(told, data);
  byId("empty").hidden = T > 0;
  document.querySelector("main").hidden = T === 0;
  if (!T) return;
  if (told.head) {
    table.begin();
    showKinds();
    colourControl.begin();
    forgetPlaces();
    Object.assign(state, { cell: null, t: null, seriesAt: null });
  }
  if (told.findings !== undefined || told.head) showFindings(select);
  showFindingsOf();
  const layer = before ? layerNamed(before.layer, before.noun) : undefined;
  if (layer === undefined || (!state.touched && told.findings)) return openView();
  state.layer = layer;
  state.home = state.step === null ? K - 1 : sampleNear(state.step);
  state.sample = before.sample === null ? state.home : sampleNear(before.sample);
  if (told.head) {
    see();
    state.view = viewOf(meta.kinds[layer]);
    table.show();
    table.select(layer);
  } else table.update();
  showAll();
}

// Escape goes back: from a stretch of steps to all of them.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && T && isZoomed()) zoomTo(null, null);
});

buildSave("save-map", { name: "map", title: () => `${document.title}: ${colourNow().of(aRow(state.view.kind))}`, drawings: map.drawings, table: () => cellsTable(state.view.layers) });
buildSave("save-series", { name: "series", title: () => "", table: seriesTable });
const ofLayer = (what) => () => `${titleOf(state.layer)}: ${what()}`;
buildSave("save-rms", { name: "rms", title: ofLayer(() => "rms by step"), drawings: [detail.drawings.rms], table: () => cellsTable([state.layer]) });
buildSave("save-distribution", { name: "distribution", title: ofLayer(() => "distribution by step"), drawings: [detail.drawings.distribution, detail.drawings.legend], table: () => countsTable(state.layer, seen.samples) });
buildSave("save-histogram", { name: "histogram", title: ofLayer(() => `histogram at step ${whole(samples[state.sample].step)}`), drawings: [detail.drawings.histogram], table: () => countsTable(state.layer, [state.sample]) });
buildSave("save-layers", { name: "layers", title: () => "", table: () => layersTable(table.rows()) });

export const contents = JSON.parse(byId("meta").textContent);
if (!contents.live) take(contents, byId("data").textContent);
