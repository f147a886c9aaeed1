// What the colours of the map mean in numbers.

function buildLegend() {
  const holder = document.createElement("div");
  holder.style.width = "min(420px, 100%)";
  byId("map-legend").append(holder);
  const drawing = addCanvas(holder, 42, drawScale, "Colour scale");
  return {
    // In a picture that is saved the other colours stand below the scale.
    drawings: [drawing, { canvas: drawing.canvas, height: 16, draw: drawSwatches }],
    show() {
      const [{ scale }, { tick, label }] = [state.view, colourNow()];
      const ends = scale && [scale.low, scale.high].map(tick ?? ((k) => number(2 ** k)));
      holder.hidden = !scale;
      if (scale) describe(drawing.canvas, `Colours from dark to light: ${label}, ${ends[0]} to ${ends[1]}`);
      const swatches = otherColors().map(([text, color]) => {
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.setProperty("--of", color.startsWith("--") ? `var(${color})` : color);
        swatch.textContent = text;
        return swatch;
      });
      byId("map-legend").replaceChildren(holder, ...swatches);
    },
  };
}

// Colours of cells without a magnitude, those that there are.
function otherColors() {
  const { kind, level, shown, nonfinite } = state.view;
  return [
    ["exact", `rgb(${colorAt(viridis, 1).join()})`, shown.includes(Infinity)],
    ["NaN or infinity", "--broken", nonfinite.some((n) => n > 0)],
    ["all zero", "--zero", level.includes(-Infinity)],
    [`no ${meta.nouns[kind]}`, "--sunken", level.some((x, i) => Number.isNaN(x) && !nonfinite[i])],
    ["not measured", "--sunken", shown.some((x, i) => Number.isNaN(x) && Number.isFinite(level[i]) && !nonfinite[i])],
  ].filter((each) => each[2]);
}

function drawSwatches(context) {
  let x = 30;
  for (const [text, color] of otherColors()) {
    context.fillStyle = color.startsWith("--") ? css(color) : color;
    context.fillRect(x, 2, 10, 10);
    type(context, 11, "left", "middle");
    context.fillText(text, x + 15, 7);
    x += context.measureText(text).width + 32;
  }
}

// Powers of two under the colours, and the same in decimals where there is room; or other numbers.
function drawScale(context, width) {
  const { scale } = state.view;
  if (!scale) return;
  const inner = width - 60;
  for (let x = 0; x < inner; x++) {
    context.fillStyle = `rgb(${colorAt(viridis, x / (inner - 1)).join()})`;
    context.fillRect(30 + x, 0, 1, 10);
  }
  type(context, 11, "center", "top");
  let edge = -Infinity;
  const { tick, isWhole } = colourNow();
  for (const k of roundTicks(scale.low, scale.high, 5, !tick || isWhole)) {
    const x = 30 + ((k - scale.low) / (scale.high - scale.low)) * inner;
    const sign = scale.below && k === scale.low ? "\u2264 " : scale.above && k === scale.high ? "\u2265 " : "";
    context.fillText(sign + (tick ?? powerOfTwo)(k), x, 14);
    if (tick) continue;
    const half = context.measureText(number(2 ** k)).width / 2;
    if (x - half < edge + 6) continue;
    edge = x + half;
    context.fillText(number(2 ** k), x, 28);
  }
}
