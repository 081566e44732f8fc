"use strict";
// Line charts in SVG. Text from runs only ever goes through textContent and attributes.
const LEFT = 46, TOP = 8, BOTTOM = 20;
const SMALL = {width: 320, height: 170, right: 8};
const NAME = 9;  // height of a line's name: those of worlds have one

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function format(value) {
  if (value === null || value === undefined) return "not finite";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return String(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(5)));
}

function ticks(low, high, logarithmic) {
  const found = [];
  if (logarithmic) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const stride = Math.max(1, Math.ceil((last - first) / 4));
    for (let power = first; power <= last; power += stride) found.push(10 ** power);
    const inside = found.filter(value => value >= low && value <= high);
    return inside.length > 1 ? inside : [low, high];
  }
  const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
  const stride = unit * [1, 2, 5, 10].find(factor => factor * unit >= rough);
  for (let value = Math.ceil(low / stride) * stride; value <= high + stride * 1e-9; value += stride) {
    found.push(Math.abs(value) < stride * 1e-9 ? 0 : value);
  }
  return found;
}

// The least and the largest of what is shown; null if there is nothing.
function extent(columns, fits) {
  let low = Infinity, high = -Infinity;
  for (const column of columns) for (const value of column) {
    if (value !== null && fits(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  }
  return low > high ? null : [low, high];
}

function widen([low, high], logarithmic) {
  if (logarithmic) return low === high ? [low / 2, high * 2] : [low, high];
  const margin = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
  return [low - margin, high + margin];
}

// Parts of a path, broken where a value cannot be drawn; lone points as dots.
function trace(xs, ys, toX, toY, fits) {
  let path = "", lone = [], length = 0;
  const drawable = place => ys[place] !== null && xs[place] !== null && fits(ys[place]);
  for (let place = 0; place <= ys.length; place++) {
    if (place < ys.length && drawable(place)) {
      path += `${length++ ? "L" : "M"}${toX(xs[place]).toFixed(1)} ${toY(ys[place]).toFixed(1)}`;
    } else {
      if (length === 1) lone.push([toX(xs[place - 1]), toY(ys[place - 1])]);
      length = 0;
    }
  }
  return [path, lone];
}

// Names beside the ends of lines, moved apart where these are close.
function nameLines(svg, ends, edge, bottom) {
  ends.sort((a, b) => a.y - b.y);
  const places = ends.map(end => end.y);
  for (let n = 1; n < places.length; n++) places[n] = Math.max(places[n], places[n - 1] + NAME);
  for (let n = places.length - 1, limit = bottom; n >= 0; n--, limit = places[n + 1] - NAME) places[n] = Math.min(places[n], limit);
  ends.forEach(({y, name, color}, n) => svg.append(make("path", {class: `leader ${color}`, d: `M${edge} ${y}L${edge + 12} ${places[n]}`}),
    make("text", {class: `name ${color}`, x: edge + 14, y: places[n] + 3}, name)));
}

function drawChart(figure, chart, state, axis, labels, lineOf) {
  const named = chart.series[0].world !== undefined;
  const size = named ? {width: 600, height: Math.max(250, NAME * chart.series.length + 40), right: 120} : SMALL;
  const {width, height, right: margin} = size;
  const nameOf = one => one.world ?? labels[one.run];
  const series = chart.series.filter(one => !state.off.has(one.run));
  const xOf = one => state.clock ? one.seconds.map(seconds => seconds === null ? null : seconds / 60) : one.steps;
  const fits = value => !state.logarithmic || value > 0;
  const strange = series.filter(one => one.strange);
  const prefix = `${chart.group}/`;  // which the heading above says
  const caption = make("figcaption", {}, chart.name.startsWith(prefix) ? chart.name.slice(prefix.length) : chart.name);
  const notes = strange.map(one => `${nameOf(one)}: ${one.strange} of ${one.total} not finite`);
  if (notes.length) caption.append(make("span", {class: "note"}, notes.join("; ")));
  const svg = make("svg", {class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${chart.name} over ${axis}: ` +
      series.map(one => `${nameOf(one)} ends at ${format(one.values.at(-1))}`).join(", ")});
  figure.replaceChildren(caption, svg);
  const across = extent(series.map(xOf), () => true), up = extent(series.map(one => one.values), fits);
  if (!across || !up) {
    const reason = series.length ? "no value that can be drawn" : "all of its runs are switched off";
    svg.append(make("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, reason));
    return;
  }
  const [left, right] = across[0] === across[1] ? [across[0] - 1, across[1] + 1] : across;
  const [low, high] = widen(up, state.logarithmic);
  const scale = state.logarithmic ? Math.log10 : value => value;
  const toX = x => LEFT + (x - left) / (right - left) * (width - LEFT - margin);
  const toY = y => height - BOTTOM - (scale(y) - scale(low)) / (scale(high) - scale(low)) * (height - TOP - BOTTOM);
  for (const value of ticks(low, high, state.logarithmic)) {
    svg.append(make("line", {class: "grid", x1: LEFT, x2: width - margin, y1: toY(value), y2: toY(value)}),
      make("text", {x: LEFT - 4, y: toY(value) + 3, "text-anchor": "end"}, format(value)));
  }
  for (const value of ticks(left, right, false)) {
    svg.append(make("text", {x: toX(value), y: height - 6, "text-anchor": "middle"}, format(value)));
  }
  const lookOf = one => lineOf(named ? one.line : one.run), ends = [];
  for (const one of series) {
    const [path, lone] = trace(xOf(one), one.values, toX, toY, fits), look = lookOf(one), last = one.values.at(-1);
    svg.append(make("path", {class: `line ${look.color}`, "stroke-dasharray": look.dash, d: path, "data-run": one.run}));
    for (const [x, y] of lone) svg.append(make("circle", {class: `point ${look.color}`, cx: x, cy: y, r: 2.5}));
    if (named && last !== null && fits(last)) ends.push({y: toY(last), name: one.world, color: look.color});
  }
  nameLines(svg, ends, width - margin, height - BOTTOM);
  watch(figure, svg, series, xOf, state.clock ? "minute" : axis, nameOf, lookOf, [left, right], toX, size);
}

// A cursor with the values at the nearest step of each run.
function watch(figure, svg, series, xOf, axis, nameOf, lookOf, [left, right], toX, {width, height, right: margin}) {
  const cursor = make("line", {class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden"});
  const tip = make("div", {class: "tip", hidden: ""});
  svg.append(cursor);
  figure.append(tip);
  const nearest = (xs, x) => xs.reduce((best, value, place) =>
    value !== null && (best < 0 || Math.abs(value - x) < Math.abs(xs[best] - x)) ? place : best, -1);
  const show = event => {
    const box = svg.getBoundingClientRect();
    const inside = ((event.clientX - box.left) / box.width * width - LEFT) / (width - LEFT - margin);
    const x = left + Math.min(Math.max(inside, 0), 1) * (right - left);
    const found = series.map(one => ({one, xs: xOf(one), place: nearest(xOf(one), x)})).filter(({place}) => place >= 0);
    if (!found.length) return;
    const distance = ({xs, place}) => Math.abs(xs[place] - x);
    const closest = found.reduce((best, other) => distance(other) < distance(best) ? other : best);
    const at = closest.xs[closest.place];
    cursor.setAttribute("x1", toX(at));
    cursor.setAttribute("x2", toX(at));
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(make("div", {}, `${axis} ${format(at)}`), ...found.map(({one, xs, place}) => make("div", {},
      make("b", {class: lookOf(one).color}, format(one.values[place])),
      ` ${nameOf(one)}${xs[place] === at ? "" : ` (at ${format(xs[place])})`}`)));
    tip.hidden = false;
    tip.style.left = inside < 0.5 ? "auto" : "0";
    tip.style.right = inside < 0.5 ? "0" : "auto";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
}
