// The view in the page's address, after "#": whoever opens the link sees the same.

let linkTimer = 0;

// Called after each change that the reader makes.
function linkChanged() {
  isTouched = true;
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
  if (byId("filter").value) view.set("filter", byId("filter").value);
  const sorting = table.sorting();
  if (sorting) view.set("sort", `${sorting.sign < 0 ? "-" : ""}${sorting.name}`);
  return view;
}

// What a link asks for, of this run; what the run does not have is left out.
function readLink() {
  const view = new URLSearchParams(location.hash.slice(1));
  const whole = (text) => (/^\d{1,15}$/.test(text ?? "") ? Number(text) : null);
  const [first, last] = (view.get("steps") ?? "").split("-").map(whole);
  const sort = view.get("sort") ?? "";
  return {
    layer: layerNamed(view.get("layer"), view.get("kind")),
    step: whole(view.get("step")),
    first: first ?? null,
    last: last ?? null,
    colour: view.get("colour") ?? "",
    filter: view.get("filter") ?? "",
    sort: sort && [sort.replace(/^-/, ""), sort.startsWith("-") ? -1 : 1],
  };
}

// The layer of a name and a noun, or of the name alone; undefined where there is none.
function layerNamed(name, noun) {
  const found = meta.order.filter((layer) => meta.layers[layer] === name);
  return found.find((layer) => nounOf(layer) === noun) ?? found[0];
}
