// The page: a legend that switches runs on and off in all charts. What is off is in the address: #off=0,2
const data = JSON.parse(document.getElementById("data").textContent);
const labels = data.runs.map(run => run.label);
const DASHES = ["none", "6 3", "2 2", "8 2 2 2", "1 3", "12 3"];
const state = {off: new Set(), clock: false, logarithmic: false};
const figures = [];

const lineOf = run => ({color: `c${run % data.colors}`, dash: DASHES[Math.floor(run / data.colors) % DASHES.length]});

function redraw() {
  for (const {figure, chart, axis} of figures) {
    if (figure.closest("details").open) drawChart(figure, chart, state, axis, labels, lineOf);
  }
}

function readAddress() {
  const off = new URLSearchParams(location.hash.slice(1)).get("off") || "";
  state.off = new Set(off.split(",").filter(text => /^\d+$/.test(text)).map(Number));
  for (const button of document.querySelectorAll("#legend button")) {
    button.setAttribute("aria-pressed", String(!state.off.has(Number(button.dataset.run))));
  }
  redraw();
}

function toggle(run) {
  if (!state.off.delete(run)) state.off.add(run);
  const off = [...state.off].sort((a, b) => a - b).join(",");
  history.replaceState(null, "", off ? `#off=${off}` : location.pathname + location.search);
  readAddress();
}

function buildLegend(host) {
  const charted = new Set(data.sections.flatMap(section => section.charts).flatMap(chart => chart.series.map(one => one.run)));
  for (const run of [...charted].sort((a, b) => a - b)) {
    const look = lineOf(run), sample = make("svg", {viewBox: "0 0 22 8", "aria-hidden": "true"},
      make("path", {class: `line ${look.color}`, "stroke-dasharray": look.dash, d: "M0 4H22"}));
    const button = make("button", {type: "button", "data-run": run, title: "show or hide"}, sample, labels[run]);
    button.addEventListener("click", () => toggle(run));
    host.append(button);
  }
  for (const [key, text] of [["clock", "over minutes"], ["logarithmic", "logarithmic"]]) {
    const box = make("input", {type: "checkbox", id: key});
    box.addEventListener("change", () => { state[key] = box.checked; redraw(); });
    host.append(make("label", {for: key}, box, ` ${text}`));
  }
  if (!charted.size) host.remove();
}

function buildCurves(host) {
  const {axis, charts} = data.sections[host.dataset.section];
  for (const group of new Set(charts.map(chart => chart.group))) {
    const grid = make("div", {class: "small"}), details = make("details", {}, make("summary", {}, group), grid);
    details.open = group !== "throughput";
    details.addEventListener("toggle", redraw);
    for (const chart of charts.filter(chart => chart.group === group)) {
      const figure = make("figure", {"data-metric": chart.name, class: chart.series[0].world === undefined ? "" : "worlds"});
      figures.push({figure, chart, axis});
      grid.append(figure);
    }
    host.append(details);
  }
}

buildLegend(document.getElementById("legend"));
document.querySelectorAll(".curves").forEach(buildCurves);
const surfaces = document.getElementById("surfaces");
if (surfaces) drawLosses(surfaces, data);
addEventListener("hashchange", readAddress);
addEventListener("beforeprint", () => document.querySelectorAll(".curves details").forEach(part => { part.open = true; }));
readAddress();
