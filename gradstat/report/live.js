// The page of a run that is written: asks the server each second for what is new.

import { ago, byId, whole } from "./text.js";
import { byKind, meta, nounOf, state, T } from "./run.js";
import { redrawSoon } from "./canvas.js";
import { margin } from "./map.js";
import { contents, layerNamed, select, selectListeners, take } from "./main.js";

const POLL_MS = 1000;
const QUIET_S = 30;

// Calls take(told) with each answer that holds something new.
function follow(address, take) {
  let [version, path] = [0, null];
  const poll = async () => {
    let [told, problem] = [null, "The server has stopped"];
    try {
      const reply = await fetch(`${address}?since=${version}`, { cache: "no-store" });
      if (reply.ok) told = await reply.json();
      else problem = `The server answers ${reply.status} ${reply.statusText}`;
    } catch {
      // The server has ended, or has not begun again.
    }
    if (told && !told.single && location.pathname === "/") location.reload();
    setTimeout(poll, told?.behind ? 0 : told ? POLL_MS : 2 * POLL_MS);
    if (!told) return showLive("stopped", `${problem}; this is what it had.`);
    // A server that was started again may have other runs.
    path ??= told.path;
    if (told.path !== path) return showLive("stopped", "Another run has this address now; this is what was here.");
    if (told.arrays) take(told);
    version = told.version;
    showLive(...liveState(told));
  };
  poll();
}

function liveState({ state, behind, quiet, path }) {
  const last = T ? `, step ${whole(meta.steps[T - 1][1])}` : "";
  if (state === "waiting") return ["waiting", `Waiting for the run: ${path} is not there yet.`];
  if (state === "gone") return ["stopped", "The run is no longer there; this is what it had."];
  if (state !== "there") return ["stopped", `The run ${state}`];
  if (behind) return ["waiting", `Reading${last} \u2026`];
  if (!meta.records) return ["waiting", "Waiting for the run's first record."];
  return [quiet < QUIET_S ? "live" : "quiet", `${quiet < QUIET_S ? "Live" : "Quiet"}${last}, ${ago(quiet)} ago`];
}

function showLive(state, text) {
  const line = byId("live");
  line.hidden = false;
  line.querySelector("span").textContent = text;
  if (line.className === state) return;
  line.className = state;
  // Read out when the state changes, not each second.
  byId("live-state").textContent = text;
}

// Pages side by side show the same row and step where they have them, at least the same kind, and
// leave as much room for names. A page that opens follows the one where the reader has chosen
// something, or else one that shows a finding; of two, the one whose address comes first.
if (window.parent !== window) {
  document.body.classList.add("beside");
  const besides = new BroadcastChannel(`gradstat ${new URLSearchParams(location.search).get("beside")}`);
  const tell = (asks) => besides.postMessage({
    layer: meta.layers[state.layer], noun: nounOf(state.layer), step: state.step,
    margin: margin.own, touched: state.touched, address: location.pathname, asks,
  });
  selectListeners.push((from) => tell(from === "start"));
  besides.addEventListener("message", ({ data: told }) => {
    if (told.margin > margin.beside) {
      margin.beside = told.margin;
      redrawSoon();
    }
    if (!T) return;
    const leads = told.touched > state.touched || (told.touched === state.touched && told.address < location.pathname);
    if (told.asks && !leads) return tell(false);
    // An answer may have been sent before this page opened on what was found.
    if (told.touched < state.touched) return;
    const [same] = byKind[meta.nouns.indexOf(told.noun)] ?? [];
    const layer = layerNamed(told.layer, told.noun) ?? same;
    if (layer === undefined) return;
    state.touched = Math.max(state.touched, told.touched);
    select(layer, { from: "beside", step: told.step });
  });
}

byId("empty").hidden = false;
follow(contents.live, (told) => take(told, told.data));
