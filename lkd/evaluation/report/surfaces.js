// Heat maps of losses over the confidence of student (across) and teacher (up).
const DIVERGING = [[33, 102, 172], [247, 247, 247], [178, 24, 43]];
const SEQUENTIAL = [[68, 1, 84], [33, 145, 140], [253, 231, 37]];

function colorAt(stops, part) {
  const place = Math.min(Math.max(part, 0), 1) * 2, index = Math.min(Math.floor(place), 1);
  return stops[index].map((from, channel) => Math.round(from + (place - index) * (stops[index + 1][channel] - from)));
}

function paint(canvas, frame, points, stops, [low, high]) {
  canvas.width = canvas.height = points;
  const context = canvas.getContext("2d"), image = context.createImageData(points, points);
  frame.forEach((value, place) => {
    const row = points - 1 - Math.floor(place / points), target = 4 * (row * points + place % points);
    const color = value === null ? [128, 128, 128] : colorAt(stops, (value - low) / (high - low || 1));
    image.data.set([...color, 255], target);
  });
  context.putImageData(image, 0, 0);
}

// One range for all panels of a title, so that losses can be compared; gradients are centred on zero.
function rangeOf(losses, title) {
  const values = losses.flatMap(loss => loss.panels[title] || []).flat().filter(value => value !== null);
  if (!title.startsWith("gradient")) return title.startsWith("weight") ? [0, 1] : [1, values.reduce((a, b) => Math.max(a, b), 1)];
  const bound = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
  return [-bound, bound];
}

function drawSurface(title, frames, range, points, slider, progress) {
  const stops = title.startsWith("gradient") ? DIVERGING : SEQUENTIAL, canvas = make("canvas", {role: "img", "aria-label": title});
  const caption = make("figcaption", {}, title), readout = make("span", {class: "note"});
  const scale = make("div", {class: "scale"});
  scale.style.background = `linear-gradient(to right, ${stops.map(color => `rgb(${color})`).join(", ")})`;
  caption.append(readout);
  const frame = () => frames[frames.length > 1 ? Number(slider.value) : 0];
  const rest = () => { readout.textContent = frames.length > 1 ? `at progress ${progress[slider.value]}` : "at any progress"; };
  const redraw = () => { paint(canvas, frame(), points, stops, range); rest(); };
  slider.addEventListener("input", redraw);
  canvas.addEventListener("pointermove", event => {
    const box = canvas.getBoundingClientRect();
    const cell = (part) => Math.min(Math.max(Math.floor(part * points), 0), points - 1);
    const across = cell((event.clientX - box.left) / box.width), up = cell((box.bottom - event.clientY) / box.height);
    const chance = place => (0.01 + 0.98 * place / (points - 1)).toFixed(2);
    readout.textContent = `${format(frame()[up * points + across])} (student ${chance(across)}, teacher ${chance(up)})`;
  });
  canvas.addEventListener("pointerleave", rest);
  redraw();
  return make("figure", {}, caption, canvas, scale,
    make("div", {class: "ends"}, make("span", {}, format(range[0])), make("span", {}, format(range[1]))));
}

function drawLosses(host, {losses, points, progress}) {
  const drawn = losses.filter(loss => !loss.note), last = progress.length - 1;
  const slider = make("input", {type: "range", min: 0, max: last, step: 1, value: Math.floor(last / 2), id: "progress"});
  const label = make("label", {class: "controls", for: "progress"}, "progress of the training, 0 to 1: ", slider);
  if (drawn.length) {
    host.append(make("p", {}, "How a loss pushes the student's logit of the label (negative, blue: up), by the probability that " +
      "the student (across, 0.01 to 0.99) and the teacher (upwards) give to the label, of 10 classes. The colours mean the same in all."));
    if (drawn.some(loss => Object.values(loss.panels).some(frames => frames.length > 1))) host.append(label);
  }
  host.append(make("div", {class: "losses"}, ...losses.map(loss => {
    const panels = Object.entries(loss.panels).map(([title, frames]) =>
      drawSurface(title, frames, rangeOf(drawn, title), points, slider, progress));
    return make("div", {}, make("h3", {}, loss.name), make("p", {class: "note"}, loss.runs.join(", ")),
      ...(loss.trust ? [make("p", {class: "note"}, loss.trust)] : []),
      loss.note ? make("p", {}, loss.note) : make("div", {class: "surfaces"}, ...panels));
  })));
}
