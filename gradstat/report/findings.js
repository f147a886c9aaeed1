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
    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    more.textContent = `Show ${items.length - SHOWN_FINDINGS} more`;
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

function hint(text) {
  const line = document.createElement("p");
  line.className = "hint";
  line.textContent = text;
  return line;
}

function findingItem(finding, i, select) {
  const item = document.createElement("button");
  item.type = "button";
  item.className = `finding ${finding.severity}`;
  item.classList.toggle("later", i >= SHOWN_FINDINGS && !areAllShown);
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
}
