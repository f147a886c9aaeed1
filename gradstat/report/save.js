// Figures as files: a picture as it is on the page, SVG or PNG, and its numbers as CSV.

const TITLE_HEIGHT = 26;

// Buttons in an element of the page.
//   name: of the files. title(): the line over the picture. table(): rows of the CSV, heads first.
//   drawings: one below the other; none for a table.
function buildSave(id, { name, title, table, drawings = [] }) {
  const figure = { title, drawings };
  const kinds = { SVG: () => saveSvg(figure, name), PNG: () => savePng(figure, name), CSV: () => save(new Blob([csvOf(table())], { type: "text/csv" }), name, "csv") };
  const holder = byId(id);
  holder.className = "save";
  for (const [kind, run] of Object.entries(kinds)) {
    if (kind !== "CSV" && !drawings.length) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind;
    button.title = `Save ${name} as ${kind}`;
    button.setAttribute("aria-label", button.title);
    button.addEventListener("click", run);
    holder.append(button);
  }
}

const widthOf = ({ canvas }) => canvas.parentElement.clientWidth;

function sizeOf({ drawings }) {
  const heights = drawings.map(({ height }) => height + 8);
  return [Math.max(...drawings.map(widthOf)) + 24, TITLE_HEIGHT + heights.reduce((a, b) => a + b, 0) + 12];
}

function drawAll(context, { title, drawings }, [width, height]) {
  context.fillStyle = css("--surface");
  context.fillRect(0, 0, width, height);
  type(context, 13, "left", "top");
  context.fillStyle = css("--ink");
  context.fillText(fitted(context, title(), width - 24), 12, 8);
  context.translate(12, TITLE_HEIGHT);
  for (const drawing of drawings) {
    drawing.draw(context, widthOf(drawing), drawing.height);
    context.translate(0, drawing.height + 8);
  }
}

function saveSvg(figure, name) {
  const size = sizeOf(figure);
  const context = new SvgContext(...size);
  drawAll(context, figure, size);
  save(new Blob([String(context)], { type: "image/svg+xml" }), name, "svg");
}

function savePng(figure, name) {
  const size = sizeOf(figure);
  const scale = Math.max(2, window.devicePixelRatio || 1);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = size.map((each) => Math.round(each * scale));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  drawAll(context, figure, size);
  canvas.toBlob((blob) => save(blob, name, "png"));
}

function csvOf(rows) {
  const written = (cell) => {
    if (typeof cell === "number") return Number.isNaN(cell) ? "" : String(cell).replace("Infinity", "inf");
    return /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
  };
  return rows.map((row) => `${row.map(written).join(",")}\r\n`).join("");
}

function save(blob, name, suffix) {
  const link = document.createElement("a");
  const words = `${document.title} ${name}`.replace(/[^\p{L}\p{N}._-]+/gu, "-").replace(/^[.-]+/, "");
  link.download = `${words.slice(0, 120) || name}.${suffix}`;
  link.href = URL.createObjectURL(blob);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
