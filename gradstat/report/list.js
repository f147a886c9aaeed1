// The list of runs, which follows the directory that they are in, and those side by side.

import { ago, byId, make } from "./text.js";

const POLL_MS = 2000;
const rows = new Map();  // by number
const frames = new Map();

const here = crypto.randomUUID();  // names this page to its frames, which select together

let atFirst = [];  // those side by side while none was ticked

// The runs side by side are in the page's address, so that a link has them.
function chosen() {
  const asked = /^#show=([\d,]*)$/.exec(location.hash);
  return asked ? [...new Set(asked[1].split(",").filter(Boolean).map(Number))] : atFirst;
}

function choose(number, isChosen) {
  const others = chosen().filter((each) => each !== number);
  history.replaceState(null, "", `#show=${[...others, ...(isChosen ? [number] : [])].join()}`);
  showFrames();
}

function showFrames() {
  const wanted = chosen().filter((number) => rows.has(number));
  for (const [number, frame] of frames) {
    if (wanted.includes(number)) continue;
    frame.remove();
    frames.delete(number);
  }
  for (const number of wanted) {
    rows.get(number).querySelector("input").checked = true;
    if (frames.has(number)) continue;
    const title = rows.get(number).querySelector("a").textContent;
    const frame = make("iframe", { src: `/run/${number}/?beside=${here}`, title });
    frames.set(number, frame);
    byId("frames").append(frame);
  }
  for (const [number, row] of rows) row.querySelector("input").checked = wanted.includes(number);
}

function makeRow({ number, name }) {
  const [row, box] = [make("tr"), make("input", { type: "checkbox" })];
  box.setAttribute("aria-label", `${name} side by side`);
  box.addEventListener("change", () => choose(number, box.checked));
  const link = make("a", { href: `/run/${number}/`, textContent: name });
  const cells = [0, 1, 2, 3].map(() => row.insertCell());
  cells[0].className = cells[1].className = "text";
  cells[0].append(box);
  cells[1].append(make("bdi", {}, link));
  return row;
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toPrecision(3)} MB`;
}

function show(runs) {
  for (const number of rows.keys()) {
    if (!runs.some((run) => run.number === number)) rows.delete(number);
  }
  const order = runs.map((run) => {
    if (!rows.has(run.number)) rows.set(run.number, makeRow(run));
    const row = rows.get(run.number);
    row.querySelector("a").textContent = run.name;
    row.cells[2].textContent = run.quiet === null ? "not yet" : `${ago(run.quiet)} ago`;
    row.cells[3].textContent = size(run.bytes);
    return row;
  });
  // A row that is in its place is not moved, so that it keeps the focus.
  order.forEach((row, i) => {
    if (byId("runs").rows[i] !== row) byId("runs").insertBefore(row, byId("runs").rows[i] ?? null);
  });
  while (byId("runs").rows.length > order.length) byId("runs").lastElementChild.remove();
  byId("none").hidden = runs.length > 0;
  byId("facts").textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}. A click on one opens it; two or more that are ticked are shown side by side, and what is selected in one is in the others.`;
  showFrames();
}

async function poll() {
  let [told, problem] = [null, "The server has stopped."];
  try {
    const reply = await fetch("/list", { cache: "no-store" });
    if (reply.ok) told = await reply.json();
    else problem = await reply.text();
  } catch {
    // The server has ended.
  }
  setTimeout(poll, POLL_MS);
  byId("stopped").hidden = told !== null;
  byId("stopped").textContent = told ? "" : problem;
  if (told?.single) location.reload();
  else if (told) {
    atFirst = told.show;
    show(told.runs);
  }
}

window.addEventListener("hashchange", showFrames);
poll();
