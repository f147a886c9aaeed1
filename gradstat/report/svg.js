// The part of a canvas's context that the figures draw with, making an SVG.

const SIZE_OF_TEXT = document.createElement("canvas").getContext("2d");

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
    this.path.push(`M${rounded(this.left + x)} ${rounded(this.top + y)}`);
  }

  lineTo(x, y) {
    this.path.push(`L${rounded(this.left + x)} ${rounded(this.top + y)}`);
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

  drawImage(image, x, y, width, height) {
    const style = "image-rendering: pixelated";
    this.add("image", { x: this.left + x, y: this.top + y, width, height, href: image.toDataURL(), preserveAspectRatio: "none", style });
  }

  stroked() {
    return { ...paintOf("stroke", this.strokeStyle), "stroke-width": this.lineWidth };
  }

  add(name, attributes, text = "") {
    const written = Object.entries(attributes).map(([key, value]) => ` ${key}="${inXml(typeof value === "number" ? rounded(value) : value)}"`);
    this.parts.push(`<${name}${written.join("")}>${inXml(text)}</${name}>`);
  }

  toString() {
    const [width, height] = [this.width, this.height].map(Math.ceil);
    const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif">`;
    return [head, ...this.parts, "</svg>", ""].join("\n");
  }
}

const rounded = (x) => String(Math.round(100 * x) / 100);
const inXml = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

// A colour and its opacity apart, since older readers know no other way.
function paintOf(what, color) {
  const found = /^rgba\((.*),([^,]*)\)$/.exec(color);
  return found ? { [what]: `rgb(${found[1]})`, [`${what}-opacity`]: found[2].trim() } : { [what]: color };
}
