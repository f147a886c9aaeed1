// Figures as files: a picture as it is on the page, SVG or PNG, and its numbers as CSV.

import { byId, make } from "./text.js";
import { css, fitted, type } from "./canvas.js";

const TITLE_HEIGHT = 26;

// Buttons in an element of the page.
//   name: of the files. title(): the line over the picture. table(): rows of the CSV, heads first.
//   drawings: one below the other; none for a table.
export function buildSave(id, { name, title, table, drawings = [] }) {
  const figure = { title, drawings };
  const kinds = { SVG: () => saveSvg(figure, name), PNG: () => savePng(figure, name), CSV: () => save(new Blob([csvOf(table())], { type: "text/csv" }), name, "csv") };
  const holder = byId(id);
  holder.className = "save";
  for (const [kind, run] of Object.entries(kinds)) {
    if (kind !== "CSV" && !drawings.length) continue;
    const button = make("button", { type: "button", textContent: kind, title: `Save ${name} as ${kind}` });
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
  const [width, height] = size.map((each) => Math.round(each * scale));
  const canvas = make("canvas", { width, height });
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
  const words = `${document.title} ${name}`.replace(/[^\p{L}\p{N}._-]+/gu, "-").replace(/^[.-]+/, "");
  const link = make("a", { download: `${words.slice(0, 120) || name}.${suffix}`, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// The part of a canvas's context that the figures draw with, making an SVG.

const SIZE_OF_TEXT = make("canvas").getContext("2d");

class SvgContext {
  constructor(width, height) {
    Object.assign(this, { width, height, parts: [], path: [], left: 0, top: 0, fillStyle: "#000", strokeStyle: "#000", lineWidth: 1, lineJoin: "miter", font: "10px sans-serif", textAlign: "left", textBaseline: "alphabetic", imageSmoothingEnabled: true });
  }

  translate(x, y) {
    this.left += x;
    this.top += y;
  }

  fillRect(x, y, width, height) {
    this.add("rect", { x: this.left + x, y: this.top + y, width: Math.max(0, width), height: Math.max(0, height), ...paintOf("fill", this.fillStyle) });
  }

  strokeRect(x, y, width, height) {
    this.add("rect", { x: this.left + x, y: this.top + y, width, height, fill: "none", ...this.stroked() });
  }

  beginPath() {
    this.path = [];
  }

  moveTo(x, y) {
    this.path.push(`M${hundredths(this.left + x)} ${hundredths(this.top + y)}`);
  }

  lineTo(x, y) {
    this.path.push(`L${hundredths(this.left + x)} ${hundredths(this.top + y)}`);
  }

  stroke() {
    if (this.path.length) this.add("path", { d: this.path.join(""), fill: "none", "stroke-linejoin": this.lineJoin, ...this.stroked() });
  }

  fill() {
    if (this.path.length) this.add("path", { d: this.path.join(""), ...paintOf("fill", this.fillStyle) });
  }

  measureText(text) {
    SIZE_OF_TEXT.font = this.font;
    return SIZE_OF_TEXT.measureText(text);
  }

  fillText(text, x, y) {
    const size = parseFloat(this.font);
    const down = { top: 0.8, middle: 0.35, bottom: -0.2 }[this.textBaseline] ?? 0;
    const anchor = { center: "middle", right: "end" }[this.textAlign] ?? "start";
    this.add("text", { x: this.left + x, y: this.top + y + down * size, "font-size": size, "text-anchor": anchor, ...paintOf("fill", this.fillStyle) }, text);
  }

  drawImage(image, fromX, fromY, columns, rows, x, y, width, height) {
    const part = make("canvas", { width: columns, height: rows });
    part.getContext("2d").drawImage(image, fromX, fromY, columns, rows, 0, 0, columns, rows);
    const style = "image-rendering: pixelated";
    this.add("image", { x: this.left + x, y: this.top + y, width, height, href: part.toDataURL(), preserveAspectRatio: "none", style });
  }

  stroked() {
    return { ...paintOf("stroke", this.strokeStyle), "stroke-width": this.lineWidth };
  }

  add(name, attributes, text = "") {
    const written = Object.entries(attributes).map(([key, value]) => ` ${key}="${inXml(typeof value === "number" ? hundredths(value) : value)}"`);
    this.parts.push(`<${name}${written.join("")}>${inXml(text)}</${name}>`);
  }

  toString() {
    const [width, height] = [this.width, this.height].map(Math.ceil);
    const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif">`;
    return [head, ...this.parts, "</svg>", ""].join("\n");
  }
}

const hundredths = (x) => String(Math.round(100 * x) / 100);
const inXml = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

// A colour and its opacity apart, since older readers know no other way.
function paintOf(what, color) {
  const found = /^rgba\((.*),([^,]*)\)$/.exec(color);
  return found ? { [what]: `rgb(${found[1]})`, [`${what}-opacity`]: found[2].trim() } : { [what]: color };
}
