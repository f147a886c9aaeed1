// Puts the parts together; `state` is what is selected and what the pointer is on.

// `step` is the one that is looked at, null for the newest. `home` is its sample, which is shown
// while the pointer is on no other. Columns: `cell` of the map, `t` of the rms, `seriesAt` of the lines.
const state = { view: null, colour: "", layer: 0, step: null, home: 0, sample: 0, cell: null, t: null, seriesAt: null };
let isTouched = false;  // whether the reader, a link, or a finding has chosen what to see
let hearSelected = () => {};  // called when the reader has selected another layer or step

const map = buildMap(select);
const table = buildLayers(select);
const detail = buildDetail(select);
const seeOtherwise = () => {
  linkChanged();
  showAll();
};
const zoomBar = buildZoom(seeOtherwise);
const colourControl = buildColours(seeOtherwise);

function zoomTo(first, last) {
  zoomBar.to(first, last);
}

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
    plural(state.view.layers.length, "layer"),
    `${plural(meta.records, "record")}, ${first === last ? "step" : "steps"} ${first === last ? whole(first) : `${whole(first)} to ${whole(last)}`}`,
    meta.bins,
  ].join(" \u00b7 ");
  const [few, many] = [Math.min(...meta.sizes), Math.max(...meta.sizes)];
  const size = few === many ? plural(many, "record") : many - few === 1 ? `${whole(few)} or ${plural(many, "record")}` : `up to ${plural(many, "record")}`;
  const noun = meta.nouns[state.view.kind];
  const { hint } = colourNow();
  const colour = hint ? hint(noun) : many === 1 ? `Colour is the rms of a layer's ${noun} in one record.` : `Thinned: a column is ${size} together, its colour the rms of all their elements.`;
  byId("map-hint").textContent = `${colour} The first layer is on top. Click a row to see its distribution; drag to see fewer steps.`;
  const notes = [`Made by gradstat ${meta.version}.`];
  if (many > 1) notes.push(`Lines are the rms of ${size} together, their band the smallest and the largest rms of one record.`);
  if (K < meta.records) notes.push(`Distributions are those of ${whole(K)} of ${plural(meta.records, "record")}, evenly spread, the newest among them.`);
  byId("footer").textContent = notes.join(" ");
}

// Everything that depends on the steps that are seen, the kind, or the numbers.
function showAll() {
  see();
  state.view = viewOf(state.view ? state.view.kind : meta.kinds[state.layer]);
  byId("kind").value = state.view.kind;
  colourControl.show();
  showFacts();
  zoomBar.show();
  map.show();
  detail.show(state.sample);
  redrawAll();
}

// Shows a layer at a step, or at the newest one.
function select(layer, { from, step = null }) {
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
  if (from === "start") return;
  linkChanged();
  if (from === "beside") return;
  hearSelected();
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
  isTouched ||= asked.layer !== undefined || found !== undefined;
  [zoom.first, zoom.last] = [asked.first, asked.last];
  state.colour = asked.colour;
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
function take(told, data) {
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
  if (layer === undefined || (!isTouched && told.findings)) return openView();
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

buildSave("save-map", { name: "map", title: () => `${document.title}: ${colourNow().label} of each ${meta.nouns[state.view.kind]}`, drawings: map.drawings, table: () => cellsTable(state.view.layers) });
buildSave("save-series", { name: "series", title: () => "", table: seriesTable });
const ofLayer = (what) => () => `${titleOf(state.layer)}: ${what()}`;
const { rms, distribution, legend, histogram } = detail.drawings;
buildSave("save-rms", { name: "rms", title: ofLayer(() => "rms by step"), drawings: [rms], table: () => cellsTable([state.layer]) });
buildSave("save-distribution", { name: "distribution", title: ofLayer(() => "distribution by step"), drawings: [distribution, legend], table: () => countsTable(state.layer, seen.samples) });
buildSave("save-histogram", { name: "histogram", title: ofLayer(() => `histogram at step ${whole(samples[state.sample].step)}`), drawings: [histogram], table: () => countsTable(state.layer, [state.sample]) });
buildSave("save-layers", { name: "layers", title: () => "", table: () => layersTable(table.rows()) });

const contents = JSON.parse(byId("meta").textContent);
if (!contents.live) take(contents, byId("data").textContent);
