// The list of tasks in the report of an evaluation run: filters, and what is drawn when a task is opened.
// Whatever comes from the run's files is set as text or attribute, never as HTML.
"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const LOOKS = {"solved": "good", "found but not submitted": "warn", "not found": "bad", "no candidates": "bad"};
const SIDES = [[1, 5], [6, 10], [11, 15], [16, 20], [21, 30]];
const LINE = "#555555";
const TICKS = [0, 1, 3, 10, 30, 100, 300, 1000];
const control = id => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter(child => child !== null));
  return node;
}
const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const badge = outcome =>
  el("span", {class: `badge ${LOOKS[outcome] || "muted"}`}, `${DATA.outcomes[outcome]} ${outcome}`);

// ---- grids ----

const grids = new WeakMap(); // canvas: what it shows

// The colours differ in hue more than in brightness, so the digits can be shown, and a screen reader gets them always.
function gridFigure(title, text, room, solution = null) {
  const rows = text.split("/");
  const size = `${plural(rows.length, "row")}, ${plural(rows[0].length, "column")}`;
  const canvas = el("canvas", {role: "img", "aria-label": `${title}, ${size}: ${rows.join(", ")}`});
  const wanted = solution && solution.split("/");
  const alike = wanted && wanted.length === rows.length && wanted[0].length === rows[0].length;
  grids.set(canvas, {rows, room, wanted: alike ? wanted : null});
  draw(canvas);
  return el("figure", {}, title ? el("figcaption", {}, `${title}, ${rows.length} × ${rows[0].length}`) : null,
            el("div", {class: "scroll"}, canvas));
}

function draw(canvas) {
  const {rows, room, wanted} = grids.get(canvas);
  const [height, width] = [rows.length, rows[0].length];
  const digits = control("digits").checked;
  const fitting = Math.floor(room / Math.max(height, width));
  const cell = Math.min(Math.max(fitting, digits ? 12 : 5), 24);
  const scale = Math.max(Math.round(window.devicePixelRatio), 1);
  canvas.width = (width * cell + 1) * scale;
  canvas.height = (height * cell + 1) * scale;
  canvas.style.width = `${width * cell + 1}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = LINE;
  pen.fillRect(0, 0, width * cell + 1, height * cell + 1);
  pen.font = `${Math.round(cell * 0.7)}px ui-monospace, "DejaVu Sans Mono", monospace`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  rows.forEach((row, y) => [...row].forEach((digit, x) => {
    pen.fillStyle = DATA.colours[digit];
    pen.fillRect(x * cell + 1, y * cell + 1, cell - 1, cell - 1);
    if (control("marks").checked && wanted && wanted[y][x] !== digit) mark(pen, x * cell + 1, y * cell + 1, cell - 1);
    if (digits) {
      pen.fillStyle = DATA.bright.includes(Number(digit)) ? "black" : "white";
      pen.fillText(digit, x * cell + 1 + (cell - 1) / 2, y * cell + 1.5 + (cell - 1) / 2);
    }
  }));
}

// A black and a white frame, one of which is seen on every colour.
function mark(pen, x, y, side) {
  for (const [colour, inset] of [["black", 0.5], ["white", 1.5]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = 1;
    pen.strokeRect(x + inset, y + inset, side - 2 * inset, side - 2 * inset);
  }
}

// ---- NLL per view ----

const level = nll => Math.log1p(Math.max(nll, 0));

// The searched views from the left, then those that only scored: a bar where the candidate was scored, a diamond where
// the search found it. All candidates of a test input share the scale, which is logarithmic.
function chart(candidate, input, top) {
  const [left, width, height] = [24, 216, 64];
  const places = viewPlaces(candidate, input);
  const step = width / places.length;
  const x = new Map(places.map((view, i) => [view, left + (i + 0.5) * step]));
  const y = nll => 6 + height * (1 - level(nll) / level(top));
  const picture = svg("svg", {viewBox: `0 0 ${left + width + 4} ${height + 12}`, class: "chart", role: "img",
                              "aria-label": chartWords(candidate)});
  for (const tick of TICKS.filter(value => value <= top)) {
    picture.append(svg("line", {class: "axis", x1: left, x2: left + width, y1: y(tick), y2: y(tick)}),
                   svg("text", {x: left - 4, y: y(tick) + 3, "text-anchor": "end"}, `${tick}`));
  }
  const half = Math.min(0.35 * step, 5);
  for (const [view, nll] of candidate.scored) {
    picture.append(svg("rect", {class: "scored", x: x.get(view) - half, width: 2 * half, y: y(nll),
                                height: y(0) - y(nll)}, svg("title", {}, tip("scored", view, nll, input))));
  }
  if (DATA.min_prob !== null) {
    const limit = y(-Math.log(DATA.min_prob));
    picture.append(svg("line", {class: "threshold", x1: left, x2: left + width, y1: limit, y2: limit}));
  }
  for (const [view, nll] of candidate.found) {
    const points = [[0, -4], [4, 0], [0, 4], [-4, 0]].map(([a, b]) => `${x.get(view) + a},${y(nll) + b}`).join(" ");
    picture.append(svg("polygon", {class: "found", points}, svg("title", {}, tip("found", view, nll, input))));
  }
  return picture;
}

const tip = (what, view, nll, input) => `${what} in view ${input.views[view]}: NLL ${nll}`;

function viewPlaces(candidate, input) {
  const searched = Array.from({length: input.searched}, (_, i) => i);
  return [...searched, ...candidate.scored.map(([view]) => view).filter(view => view >= input.searched)];
}

function chartWords(candidate) {
  const words = (what, entries) => {
    const nlls = entries.map(([, nll]) => nll);
    const mean = nlls.reduce((sum, nll) => sum + nll, 0) / nlls.length;
    const range = `NLL ${Math.min(...nlls)} to ${Math.max(...nlls)}, mean ${mean.toFixed(2)}`;
    return nlls.length ? `${what} in ${plural(nlls.length, "view")}: ${range}` : `${what} in no view`;
  };
  return `${words("Found by the search", candidate.found)}. ${words("Scored", candidate.scored)}.`;
}

function numbers(candidate, input) {
  const [found, scored] = [new Map(candidate.found), new Map(candidate.scored)];
  const rows = viewPlaces(candidate, input).map(view => el("tr", {},
    el("th", {scope: "row"}, el("code", {}, input.views[view])),
    ...[found, scored].map(nlls => el("td", {class: "value"}, nlls.has(view) ? `${nlls.get(view)}` : "-"))));
  return el("table", {}, el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "view"),
    ...["found", "scored"].map(name => el("th", {scope: "col", class: "value"}, name)))), el("tbody", {}, ...rows));
}

function legend(input) {
  const item = (text, mark) => el("span", {}, svg("svg", {viewBox: "0 0 12 10", "aria-hidden": "true"}, mark), text);
  return el("p", {class: "legend"}, "NLL per view, lower is better:",
    item("scored in this view", svg("rect", {class: "scored", x: 3, y: 0, width: 6, height: 10})),
    item("found by the search of this view", svg("polygon", {class: "found", points: "6,0 11,5 6,10 1,5"})),
    DATA.min_prob === null ? null : item(`the search's threshold, ${DATA.min_prob} probability`,
      svg("line", {class: "threshold", x1: 0, x2: 12, y1: 5, y2: 5})),
    input.views.length > input.searched ? " Views that only scored stand at the right." : null);
}

// ---- one task ----

function difference(text, solution) {
  const [rows, wanted] = [text.split("/"), solution.split("/")];
  if (rows.length !== wanted.length || rows[0].length !== wanted[0].length) {
    return `Other size than the solution: ${rows.length} × ${rows[0].length}`;
  }
  const cells = wanted.join("");
  const wrong = [...rows.join("")].filter((digit, i) => digit !== cells[i]).length;
  return `Differs from the solution in ${wrong} of ${cells.length} cells`;
}

function candidateCard(candidate, place, input, top) {
  const correct = candidate.grid === input.solution;
  const name = place < 2 ? `Attempt ${place + 1}` : `Candidate ${place + 1}`;
  const lazy = el("details", {}, el("summary", {}, "Numbers and views"));
  lazy.addEventListener("toggle", () => lazy.children[1] || lazy.append(numbers(candidate, input)));
  return el("li", {class: `candidate${correct ? " correct" : ""}`},
    el("h4", {}, name, correct ? el("span", {class: "good"}, " ✓ correct") : null),
    gridFigure("", candidate.grid, 210, input.solution),
    el("p", {}, el("code", {}, input.rule), el("b", {}, ` ${candidate.score}`)),
    el("p", {}, `Found in ${candidate.found.length} of ${plural(input.searched, "view")}`),
    correct || input.solution === null ? null : el("p", {class: "muted"}, difference(candidate.grid, input.solution)),
    chart(candidate, input, top), lazy);
}

function inputPart(input, i, count) {
  const name = count > 1 ? `Test input ${i + 1} of ${count}` : "Test input";
  const nlls = input.candidates.flatMap(one => [...one.found, ...one.scored].map(([, nll]) => nll));
  const top = Math.max(3, ...nlls);
  const cards = input.candidates.map((candidate, place) => candidateCard(candidate, place, input, top));
  return [
    el("h3", {}, `${name} `, badge(input.outcome)), el("p", {}, input.why),
    el("div", {class: "grids"}, gridFigure("query", input.query, 260),
       input.solution === null ? null : gridFigure("solution", input.solution, 260)),
    ...(cards.length ? [el("h3", {}, `${plural(cards.length, "candidate")}, best first`), legend(input),
                        el("ol", {class: "candidates"}, ...cards)] : [])];
}

function taskBody(task) {
  const note = task.note ? [el("p", {class: "muted"}, task.note)] : [];
  if (!task.inputs) return note;
  const pairs = task.pairs.map(([input, output], i) => el("div", {class: "pair"},
    gridFigure(`pair ${i + 1}, input`, input, 180), el("span", {"aria-hidden": "true"}, "→"),
    gridFigure("output", output, 180)));
  return [el("h3", {}, plural(pairs.length, "demonstration pair")), el("div", {class: "grids"}, ...pairs),
          ...task.inputs.flatMap((input, i) => inputPart(input, i, task.inputs.length)),
          el("p", {class: "muted"}, `${task.tokens.toLocaleString("en")} prompt tokens; ${task.seconds} s since the ` +
             "task before was finished (tasks may run side by side)"), ...note];
}

// ---- the list ----

function entry(task) {
  const inputs = task.inputs || [];
  const sizes = inputs.map(input => input.size).filter(size => size);
  const largest = sizes.sort((a, b) => b[0] * b[1] - a[0] * a[1])[0];
  const candidates = inputs.reduce((sum, input) => sum + input.candidates.length, 0);
  const badges = task.inputs ? inputs.map(input => badge(input.outcome)) : [badge("not finished")];
  const body = el("div", {class: "body"});
  const details = el("details", {}, el("summary", {}, el("span", {class: "task"}, task.name),
    el("span", {class: "outcomes"}, ...badges),
    el("span", {class: "number"}, largest ? `${largest[0]} × ${largest[1]}` : ""),
    el("span", {class: "number"}, task.inputs ? plural(candidates, "candidate") : ""),
    el("span", {class: "number"}, task.inputs ? `${task.seconds.toFixed(1)} s` : "")), body);
  details.addEventListener("toggle", () => body.replaceChildren(...(details.open ? taskBody(task) : [])));
  return {item: el("li", {}, details), name: task.name, candidates, seconds: task.seconds ?? -1,
          outcomes: task.inputs ? inputs.map(input => input.outcome) : ["not finished"],
          size: largest ? largest[0] * largest[1] : -1, sides: sizes.map(size => Math.max(...size))};
}

const entries = DATA.tasks.map(entry);

function fits(one) {
  const [name, outcome, side] = ["name", "outcome", "side"].map(id => control(id).value);
  const inSide = ([low, high]) => one.sides.some(value => low <= value && value <= high);
  return one.name.toLowerCase().includes(name.trim().toLowerCase()) && (!outcome || one.outcomes.includes(outcome)) &&
    (!side || (side === "unknown" ? !one.sides.length : inSide(SIDES[side])));
}

function update() {
  const by = control("sort").value;
  const sign = control("descending").checked ? -1 : 1;
  const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const shown = entries.filter(fits).sort((a, b) => sign * order(a[by], b[by]) || order(a.name, b.name));
  control("list").replaceChildren(...shown.map(one => one.item));
  control("count").textContent = `${shown.length} of ${plural(entries.length, "task")} shown` +
    (shown.length ? "" : ": no task fits these filters");
}

function option(select, value, text, there) {
  if (there) control(select).append(el("option", {value}, text));
}

for (const [outcome, sign] of Object.entries(DATA.outcomes)) {
  const count = entries.filter(one => one.outcomes.includes(outcome)).length;
  option("outcome", outcome, `${sign} ${outcome} (${plural(count, "task")})`, count);
}
SIDES.forEach(([low, high], i) =>
  option("side", i, `${low} to ${high}`, entries.some(one => one.sides.some(side => low <= side && side <= high))));
option("side", "unknown", "unknown", entries.some(one => !one.sides.length));

for (const id of ["name", "outcome", "side", "sort", "descending"]) control(id).addEventListener("input", update);
for (const id of ["digits", "marks"]) {
  control(id).addEventListener("input", () => document.querySelectorAll("canvas").forEach(draw));
}
control("filters").addEventListener("submit", event => event.preventDefault());
control("filters").addEventListener("reset", () => setTimeout(() => {
  update();
  document.querySelectorAll("canvas").forEach(draw);
}));
update();
control("tasks").hidden = false;
})();
