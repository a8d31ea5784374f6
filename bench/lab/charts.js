"use strict";
// Charts: scales with round ticks, marks told apart by colour, shape and dash, and the nearest point under the pointer.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.8L4.6,3.6H-4.6z", "M0,-5L5,0L0,5L-5,0z",
  "M0,4.8L4.6,-3.6H-4.6z", "M-1.6,-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z", "M0,-5L4.8,-1.5L3,4H-3L-4.8,-1.5z",
];
const DASHES = ["", "7 4", "2 4"];
const SHOWN_TICKS = { x: 90, y: 52 };

const paint = (index) => `var(--c${index % 8})`;
const dash = (index) => DASHES[Math.floor(index / 8) % DASHES.length];

function svg(tag, attributes = {}, parent = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.append(element);
  return element;
}

function mark(parent, index, x, y, size = 1) {
  const place = `translate(${x} ${y}) scale(${size})`;
  return svg("path", { d: SHAPES[index % SHAPES.length], transform: place, fill: paint(index) }, parent);
}

/** A short line with the mark of a series, for its chip and its rows. */
function swatch(index) {
  const box = svg("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" });
  const line = { x1: 0, x2: 26, y1: 7, y2: 7, stroke: paint(index), "stroke-width": 2, "stroke-dasharray": dash(index) };
  svg("line", line, box);
  mark(box, index, 13, 7);
  return box;
}

/** Round values that lie in [low, high], about `count` of them; of a logarithmic range 1, 2 and 5 of every decade. */
function ticks(low, high, count, log) {
  if (!Number.isFinite(low) || !Number.isFinite(high) || (log && low <= 0)) return [];
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    const whole = inside.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9);
    return inside.length > count && whole.length > 1 ? whole : inside;
  }
  const rough = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((digit) => digit * power >= rough) * power;
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

function scale(low, high, start, end, log = false) {
  const [a, b] = log ? [Math.log(low), Math.log(high)] : [low, high];
  // A logarithm has no place for a value of 0: it stands at the edge.
  const at = (value) => log && value <= 0 ? start : start + (((log ? Math.log(value) : value) - a) / (b - a || 1)) * (end - start);
  return Object.assign(at, { low, high, start, end, log });
}

/** Widen a range by a share on both sides, so that no mark touches the edge. */
function widen([low, high], share, log = false) {
  if (log) {
    const factor = Math.max((high / low) ** share, 1.15);
    return [low / factor, high * factor];
  }
  const margin = (high - low) * share || Math.abs(high) * 0.02 || 1;
  return [low - margin, high + margin];
}

/** Losses of runs that went wrong would flatten all others: they are drawn at the upper edge. */
function lossRange(losses) {
  const sorted = [...losses].sort((a, b) => a - b);
  const low = sorted[0], middle = sorted[Math.floor(sorted.length / 2)], high = sorted[sorted.length - 1];
  return widen([low, Math.min(high, middle + 4 * Math.max(middle - low, 0.02 * Math.abs(low)))], 0.07);
}

/**
 * Draw one chart into an element, to its width.
 * `spec` has x and y (range, log, name, format), and draw(layer, x, y), which returns the points that can be pointed at:
 * {x, y, series, title, lines}.
 */
function chart(holder, spec) {
  holder.replaceChildren();
  const width = Math.max(260, holder.clientWidth), height = Math.round(Math.min(400, Math.max(250, width * 0.5)));
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "group", "aria-label": spec.label }, null);
  holder.append(root);
  if (!spec.x.range) {
    svg("text", { x: width / 2, y: height / 2, class: "empty" }, root).textContent = "Nothing to show.";
    return;
  }
  const box = { left: 52, right: width - 14, top: 12, bottom: height - 44 };
  const x = scale(...spec.x.range, box.left, box.right, spec.x.log);
  const y = scale(...spec.y.range, box.bottom, box.top);
  axes(root, box, x, y, spec);
  const clip = `clip-${holder.id}`;
  svg("rect", { x: box.left - 8, y: box.top - 8, width: box.right - box.left + 20, height: box.bottom - box.top + 8 },
    svg("clipPath", { id: clip }, root));
  const layer = svg("g", { "clip-path": `url(#${clip})` }, root);
  const points = spec.draw(layer, x, y, box);
  follow(root, layer, points);
}

function axes(root, box, x, y, spec) {
  for (const value of ticks(y.low, y.high, (box.bottom - box.top) / SHOWN_TICKS.y, false)) {
    svg("line", { x1: box.left, x2: box.right, y1: y(value), y2: y(value), class: "gridline" }, root);
    svg("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, root).textContent = spec.y.format(value);
  }
  for (const value of ticks(x.low, x.high, (box.right - box.left) / SHOWN_TICKS.x, x.log)) {
    svg("line", { x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 5, class: "axis" }, root);
    svg("text", { x: x(value), y: box.bottom + 19, "text-anchor": "middle" }, root).textContent = spec.x.format(value);
  }
  svg("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }, root);
  svg("text", { x: box.right, y: box.bottom + 38, "text-anchor": "end" }, root).textContent = spec.x.name;
}

/** Show the point nearest to the pointer, or the next one by the arrow keys. */
function follow(root, layer, points) {
  const halo = svg("circle", { r: 8, class: "halo", visibility: "hidden" }, layer);
  let current = -1;
  const show = (index) => {
    current = index;
    const point = points[index];
    halo.setAttribute("cx", point.x);
    halo.setAttribute("cy", point.y);
    halo.setAttribute("visibility", "visible");
    const area = root.getBoundingClientRect(), ratio = area.width / root.viewBox.baseVal.width;
    tip(point, area.left + point.x * ratio, area.top + point.y * ratio);
  };
  const hide = () => {
    halo.setAttribute("visibility", "hidden");
    document.getElementById("tip").hidden = true;
  };
  const nearest = (event) => {
    if (!points.length) return;
    const area = root.getBoundingClientRect(), ratio = root.viewBox.baseVal.width / area.width;
    const px = (event.clientX - area.left) * ratio, py = (event.clientY - area.top) * ratio;
    const far = (point) => (point.x - px) ** 2 + (point.y - py) ** 2;
    show(points.reduce((best, point, index) => (far(point) < far(points[best]) ? index : best), 0));
  };
  root.addEventListener("pointermove", nearest);
  root.addEventListener("pointerdown", nearest);
  root.addEventListener("pointerleave", hide);
  root.addEventListener("blur", hide);
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !points.length) return;
    event.preventDefault();
    show((current + step + points.length) % points.length);
  });
}

function tip(point, x, y) {
  const box = document.getElementById("tip"), title = document.createElement("b");
  title.textContent = point.title;
  box.replaceChildren(title, ...point.lines.flatMap((line, index) => (index ? [document.createElement("br"), line] : [line])));
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  box.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  box.style.top = `${Math.max(8, y - height - 14 < 8 ? y + 18 : y - height - 14)}px`;
}

const path = (xs, ys) => xs.map((x, index) => `${index ? "L" : "M"}${x.toFixed(1)},${ys[index].toFixed(1)}`).join("");
