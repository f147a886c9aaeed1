// What the map's colours show: the rms, or what a narrow format would do, where that was measured.

const RMS = { key: "", label: "rms", title: "Magnitude by layer and step", scale: scaleOf, part: (layer) => part(arrays.level, layer) };

// The choices, the rms first.
function colours() {
  return [RMS, ...(meta.formats ?? []).flatMap((name, f) => [snrOf(name, f), lostOf(name, f)])];
}

const ofFormat = (array, f) => (layer) => part(array, layer * meta.formats.length + f);

const snrOf = (name, f) => ({
  key: `snr ${name}`,
  label: `SNR in ${name}`,
  title: `Signal-to-noise ratio in ${name}`,
  hint: (noun) => `Colour is how much larger a layer's ${noun} is than the error that ${name} would make, in dB; 20 dB is an error of a tenth.`,
  scale: scaleOf,
  part: ofFormat(arrays.snr, f),
  tick: (k) => `${k} dB`,
  isWhole: true,
});

const lostOf = (name, f) => ({
  key: `zero ${name}`,
  label: `to zero in ${name}`,
  title: `Share that ${name} would flush to zero`,
  hint: (noun) => `Colour is the share of a layer's ${noun} that ${name} would flush to zero, of what is not zero already.`,
  scale: () => ({ low: 0, high: 1, below: false, above: false }),
  part: ofFormat(arrays.lost, f),
  tick: (k) => `${Math.round(100 * k)} %`,
});

const colourNow = () => colours().find((each) => each.key === state.colour) ?? RMS;

// What each format would do to a layer in a column, a line each.
function formatLines(layer, t) {
  return (meta.formats ?? []).flatMap((name, f) => {
    const at = (layer * meta.formats.length + f) * capacity + t;
    const [snr, lost] = [arrays.snr[at], arrays.lost[at]];
    if (Number.isNaN(snr)) return [];
    return [`${name}: ${snr === Infinity ? "exact" : `${(Math.abs(snr) < 0.05 ? 0 : snr).toFixed(1)} dB`}${lost ? `, ${share(lost)} to zero` : ""}`];
  });
}

// A control for what the colours show, where there are formats.
function buildColours(changed) {
  const control = byId("colour");
  control.addEventListener("change", () => {
    state.colour = control.value;
    changed();
  });
  return {
    begin() {
      control.parentElement.hidden = colours().length < 2;
      control.replaceChildren(...colours().map(({ key, label }) => new Option(label, key)));
    },
    show() {
      control.value = colourNow().key;
      byId("map-title").textContent = colourNow().title;
    },
  };
}
