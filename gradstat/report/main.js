// Puts the parts together; `state` is what is selected and what the pointer is on.

const state = { layer: 0, cell: null, t: null, sample: K - 1 };

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
    item.hidden = i >= shown;
    const [first, last] = finding.steps;
    const texts = [
      ["badge", finding.severity],
      ["what", finding.sentence],
      ["when", `${finding.kind} \u00b7 ${first === last ? `step ${whole(first)}` : `steps ${whole(first)} to ${whole(last)}`}`],
    ];
    for (const [kind, text] of texts) {
      const span = document.createElement("span");
      span.className = kind;
      span.textContent = text;
      item.append(span);
    }
    item.addEventListener("click", () => select(finding.layer, { from: "findings" }));
    return item;
  });
  section.append(...items);
  if (items.length > shown) {
    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    more.textContent = `Show ${items.length - shown} more`;
    more.addEventListener("click", () => {
      for (const item of items) item.hidden = false;
      more.remove();
      redrawSoon();
    });
    section.append(more);
  }
}

function buildFacts() {
  const first = meta.steps[0][0];
  const last = meta.steps[T - 1][1];
  byId("facts").textContent = [
    plural(L, "layer"),
    `${plural(meta.records, "record")}, ${first === last ? "step" : "steps"} ${first === last ? whole(first) : `${whole(first)} to ${whole(last)}`}`,
    meta.bins,
  ].join(" \u00b7 ");
  const [few, many] = [Math.min(...meta.sizes), Math.max(...meta.sizes)];
  const size = few === many ? plural(many, "record") : `${whole(few)} or ${plural(many, "record")}`;
  byId("map-hint").textContent = many === 1
    ? "Colour is the rms of a layer's gradient in one record. The first layer is on top. Click a row to see its distribution."
    : `Thinned: a column is ${size} together, its colour the rms of all their elements. The first layer is on top. Click a row to see its distribution.`;
  const notes = [`Made by gradstat ${meta.version}.`];
  if (many > 1) notes.push(`Lines are the rms of ${size} together, their band the smallest and the largest rms of one record.`);
  if (K < meta.records) notes.push(`Distributions are those of ${whole(K)} of ${plural(meta.records, "record")}, evenly spread, the newest among them.`);
  byId("footer").textContent = notes.join(" ");
}

function start() {
  buildFacts();
  buildFindings(select);
  const over = buildMap(select);
  const rows = buildLayers(select);
  const showDetail = buildDetail(select);

  function select(layer, { from }) {
    if (layer < 0 || layer >= L) return;
    rows[state.layer].classList.remove("selected");
    rows[state.layer].removeAttribute("aria-current");
    state.layer = layer;
    rows[layer].classList.add("selected");
    rows[layer].setAttribute("aria-current", "true");
    over.redraw();
    showDetail();
    // Beside the rest on a wide page, and in view; above the table on a narrow one.
    const beside = getComputedStyle(byId("detail")).position === "sticky";
    if (!beside && from !== "start" && from !== "detail") byId("detail").scrollIntoView({ block: "start" });
  }

  select(meta.findings.length ? meta.findings[0].layer : 0, { from: "start" });
  redrawAll();
}

start();
