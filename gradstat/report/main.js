// Puts the parts together; `state` is what is selected and what the pointer is on.

// `home` is the sample that is shown while the pointer is on none: the newest, or that of a step.
const state = { view: null, layer: 0, cell: null, t: null, sample: K - 1, home: K - 1 };

// The sample nearest to the step of a finding, or within a column of records.
function sampleNear(step) {
  let nearest = 0;
  for (let k = 1; k < K; k++) {
    if (Math.abs(meta.sampleSteps[k] - step) < Math.abs(meta.sampleSteps[nearest] - step)) nearest = k;
  }
  return nearest;
}

function buildFindings(select) {
  const section = byId("findings");
  if (!meta.findings.length) {
    const none = document.createElement("p");
    none.className = "hint";
    none.textContent = "Nothing stands out in this run.";
    section.append(none);
    return;
  }
  const shown = 6;
  const items = meta.findings.map((finding, i) => {
    const item = document.createElement("button");
    item.type = "button";
    item.className = `finding ${finding.severity}`;
    item.classList.toggle("later", i >= shown);
    const [first, last] = finding.steps;
    const texts = [
      ["badge", finding.severity],
      ["what", isolateNames(finding.sentence)],
      ["when", `${finding.kind} \u00b7 ${first === last ? `step ${whole(first)}` : `steps ${whole(first)} to ${whole(last)}`}`],
    ];
    for (const [kind, text] of texts) {
      const span = document.createElement("span");
      span.className = kind;
      span.textContent = text;
      item.append(span);
    }
    item.addEventListener("click", () => select(finding.layer, { from: "findings", step: finding.at }));
    return item;
  });
  section.append(...items);
  if (items.length > shown) {
    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    more.textContent = `Show ${items.length - shown} more`;
    more.addEventListener("click", () => {
      for (const item of items) item.classList.remove("later");
      more.remove();
      redrawSoon();
    });
    section.append(more);
  }
}

// A control for which kind is shown, where there are several.
function buildKinds(select) {
  const control = byId("kind");
  control.hidden = byKind.length === 1;
  control.append(...meta.nouns.map((noun, kind) => new Option(`${noun[0].toUpperCase()}${noun.slice(1)}s`, kind)));
  control.addEventListener("change", () => {
    // The same layer, or another one of its module.
    const [name, layers] = [meta.layers[state.layer], byKind[control.value]];
    const related = (i) => name.startsWith(`${meta.layers[i]}.`) || meta.layers[i].startsWith(`${name}.`);
    select(layers.find((i) => meta.layers[i] === name) ?? layers.find(related) ?? layers[0], { from: "kind" });
  });
}

function showFacts() {
  const first = meta.steps[0][0];
  const last = meta.steps[T - 1][1];
  byId("facts").textContent = [
    plural(state.view.layers.length, "layer"),
    `${plural(meta.records, "record")}, ${first === last ? "step" : "steps"} ${first === last ? whole(first) : `${whole(first)} to ${whole(last)}`}`,
    meta.bins,
  ].join(" \u00b7 ");
  const [few, many] = [Math.min(...meta.sizes), Math.max(...meta.sizes)];
  const size = few === many ? plural(many, "record") : `${whole(few)} or ${plural(many, "record")}`;
  byId("map-hint").textContent = many === 1
    ? `Colour is the rms of a layer's ${meta.nouns[state.view.kind]} in one record. The first layer is on top. Click a row to see its distribution.`
    : `Thinned: a column is ${size} together, its colour the rms of all their elements. The first layer is on top. Click a row to see its distribution.`;
  const notes = [`Made by gradstat ${meta.version}.`];
  if (many > 1) notes.push(`Lines are the rms of ${size} together, their band the smallest and the largest rms of one record.`);
  if (K < meta.records) notes.push(`Distributions are those of ${whole(K)} of ${plural(meta.records, "record")}, evenly spread, the newest among them.`);
  byId("footer").textContent = notes.join(" ");
}

function start() {
  buildFindings(select);
  buildKinds(select);
  const map = buildMap(select);
  const table = buildLayers(select);
  const showDetail = buildDetail(select);

  function show(kind) {
    state.view = viewOf(kind);
    byId("kind").value = kind;
    showFacts();
    map.show();
    table.show();
  }

  // With a step, or a column of records, that one is shown; otherwise the newest.
  function select(layer, { from, step = null, t = null }) {
    if (layer === undefined) return;
    if (step !== null) t = columnOf(step);
    state.cell = t === null ? null : { layer, t };
    state.home = step !== null ? sampleNear(step) : t !== null ? sampleNear(meta.steps[t][0]) : K - 1;
    const before = table.row(state.layer);
    before.classList.remove("selected");
    before.removeAttribute("aria-current");
    const other = meta.kinds[layer] !== state.view.kind;
    if (other) show(meta.kinds[layer]);
    state.layer = layer;
    table.row(layer).classList.add("selected");
    table.row(layer).setAttribute("aria-current", "true");
    map.mark();
    showDetail();
    if (other) redrawAll();
    // Beside the rest on a wide page, and in view; above the table on a narrow one.
    const beside = getComputedStyle(byId("detail")).position === "sticky";
    if (!beside && !["start", "detail", "kind"].includes(from)) byId("detail").scrollIntoView({ block: "start" });
  }

  const [found] = meta.findings;
  state.layer = found ? found.layer : byKind[0][0];
  show(meta.kinds[state.layer]);
  select(state.layer, { from: "start", step: found ? found.at : null });
  redrawAll();
}

start();
