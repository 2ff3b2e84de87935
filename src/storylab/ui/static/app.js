"use strict";
// Every text of a run reaches the page as text, never as markup.

const COLORS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d1f", "#7f7f7f"];
const MOST_CHOSEN = COLORS.length;
const POLL = 2500;
const find = id => document.getElementById(id);

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Answers of the server; one that has not changed comes from the browser's memory.
async function ask(path) {
  const response = await fetch(path);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

const whole = n => n == null ? "" : Math.round(n).toLocaleString("en");
const digits = (n, count) => n == null ? "" : n.toFixed(count);
function duration(seconds) {
  if (seconds == null) return "";
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  return s < 3600 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;
}

const COLUMNS = [
  ["run", row => row.name, row => row.name],
  ["arm", row => row.arm, row => row.arm],
  ["state", row => row.state, row => row.state],
  ["iteration", row => row.iteration, row => row.iteration == null ? "" : `${whole(row.iteration)}/${whole(row.iterations)}`],
  ["left", row => row.seconds_left, row => duration(row.seconds_left)],
  ["parameters", row => row.parameters, row => whole(row.parameters)],
  ["tokens", row => row.tokens, row => whole(row.tokens)],
  ["val loss", row => row.loss, row => digits(row.loss, 4)],
  ["tok/s", row => row.speed, row => whole(row.speed)],
  ["GB", row => row.memory, row => row.memory == null ? "" : digits(row.memory / 1e9, 2)],
  ["started", row => row.started, row => row.started.slice(0, 16).replace("T", " ")],
];
const NUMBERS = new Set(["iteration", "left", "parameters", "tokens", "val loss", "tok/s", "GB"]);

const page = { runs: [], sort: 10, up: false, chosen: new Map(), curves: new Map(), details: new Map() };

// The address holds the choice, so that it can be kept and sent.
function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of given.getAll("run").slice(0, MOST_CHOSEN)) choose(name, true);
  find("filter").value = given.get("filter") ?? "";
  page.wantedState = given.get("state") ?? "";
}
function toAddress() {
  const now = new URLSearchParams();
  for (const name of page.chosen.keys()) now.append("run", name);
  if (find("filter").value) now.set("filter", find("filter").value);
  if (find("state").value) now.set("state", find("state").value);
  history.replaceState(null, "", now.size ? `#${now}` : location.pathname);
}

function choose(name, chosen) {
  if (!chosen) page.chosen.delete(name);
  else if (page.chosen.size < MOST_CHOSEN) {
    const taken = new Set(page.chosen.values());
    page.chosen.set(name, COLORS.find(color => !taken.has(color)));
  }
}

function heading([name], i) {
  const arrow = page.sort === i ? (page.up ? " \u2191" : " \u2193") : "";
  const button = make("button", { type: "button", onclick() {
    page.up = page.sort === i ? !page.up : true;
    page.sort = i;
    showRuns();
  } }, name + arrow);
  return make("th", { ariaSort: page.sort === i ? (page.up ? "ascending" : "descending") : "none" }, button);
}

function showRuns() {
  const text = find("filter").value.toLowerCase(), state = find("state").value;
  const [, key] = COLUMNS[page.sort];
  const rows = page.runs.filter(row => `${row.name} ${row.arm}`.toLowerCase().includes(text) && (!state || row.state === state));
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x == null || y == null) return (x == null) - (y == null);
    return (x < y ? -1 : x > y ? 1 : 0) * (page.up ? 1 : -1);
  });
  const table = find("runs");
  table.tHead.replaceChildren(make("tr", {}, ...COLUMNS.map(heading)));
  table.tBodies[0].replaceChildren(...rows.map(runRow));
  find("count").textContent = `${rows.length} of ${page.runs.length} runs` + (page.chosen.size ? `, ${page.chosen.size} chosen` : "");
  find("clear").hidden = page.chosen.size === 0;
}

function runRow(row) {
  const chosen = page.chosen.has(row.name);
  const cells = COLUMNS.map(([name, , shown], i) => {
    const cell = make("td", { className: NUMBERS.has(name) ? "number" : "" });
    if (i) cell.append(shown(row));
    else {
      const box = make("input", { type: "checkbox", checked: chosen, disabled: !chosen && page.chosen.size >= MOST_CHOSEN, onchange() {
        choose(row.name, box.checked);
        toAddress();
        showRuns();
        showChosen();
      } });
      cell.append(make("label", {}, box, " ", row.name));
    }
    if (name === "state") cell.className = row.state;
    return cell;
  });
  const line = make("tr", { className: chosen ? "chosen" : "" }, ...cells);
  if (row.fault) line.title = row.fault;
  return line;
}

function showStates() {
  const select = find("state"), before = page.wantedState ?? select.value;
  const states = [...new Set(page.runs.map(row => row.state))].sort();
  if (before && !states.includes(before)) states.push(before);
  select.replaceChildren(make("option", { value: "" }, "any state"), ...states.map(name => make("option", { value: name }, name)));
  select.value = before;
  page.wantedState = undefined;
}

function showExperiments(experiments) {
  const part = find("experiments");
  part.hidden = experiments.length === 0;
  part.querySelector("tbody").replaceChildren(...experiments.map(one => make("tr", {},
    make("td", {}, one.fault ? one.name : make("a", { href: `/experiments/${encodeURIComponent(one.name)}` }, one.name)),
    make("td", {}, one.fault || one.title),
    make("td", { className: "number" }, one.fault ? "damaged" : `${one.done}/${one.planned}`))));
}

// Figures

function theme() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--dim").trim(), line = style.getPropertyValue("--line").trim();
  const axis = { labelColor: text, titleColor: text, gridColor: line, domainColor: line, tickColor: line };
  return { axis, legend: { labelColor: text, titleColor: text }, view: { stroke: line } };
}

const FIGURES = [
  ["Validation loss along the run", "nats per token", curve => points(curve, curve.evaluated, curve.validation_losses), true],
  ["Training loss", "nats per token", curve => points(curve, curve.iterations, curve.losses), true],
  ["Speed", "tokens per second", curve => points(curve, curve.iterations, curve.speeds), false],
  ["Learning rate", "learning rate", curve => points(curve, curve.iterations, curve.learning_rates), false],
];

// Seconds of training up to an iteration follow from the speeds up to there.
function secondsOf(curve) {
  let before = -1, total = 0;
  const known = curve.iterations.map((iteration, i) => {
    total += (iteration - before) * curve.tokens_per_iteration / curve.speeds[i];
    before = iteration;
    return total;
  });
  return iteration => {
    const at = curve.iterations.findIndex(i => i >= iteration - 1);
    return known.length ? known[at < 0 ? known.length - 1 : at] : 0;
  };
}

function points(curve, iterations, values) {
  const axis = find("axis").value, seconds = secondsOf(curve);
  const x = { iteration: n => n, tokens: n => n * curve.tokens_per_iteration, seconds }[axis];
  return iterations.map((n, i) => ({ run: curve.name, x: x(n), y: values[i] })).filter(p => p.y !== null);
}

let library = null;
function drawing() {
  library ??= new Promise((resolve, reject) => document.head.append(
    make("script", { src: "/figures.js", onload: resolve, onerror: () => reject(new Error("the figures' script did not load")) })));
  return library;
}

async function showFigures() {
  await drawing();
  const curves = [...page.chosen.keys()].map(name => page.curves.get(name)).filter(Boolean);
  const parts = find("figures");
  const log = find("scale").value === "log";
  for (const [caption, unit, of, isLoss] of FIGURES) {
    let figure = [...parts.children].find(one => one.dataset.caption === caption);
    if (!figure) {
      figure = make("figure", {}, make("figcaption", {}, caption), make("div", { className: "plot" }));
      figure.dataset.caption = caption;
      parts.append(figure);
    }
    const values = curves.flatMap(of);
    const spec = {
      width: "container", height: 220, data: { values }, background: null,
      mark: { type: "line", point: values.length < 60, clip: true, strokeWidth: 1.5 },
      encoding: {
        x: { field: "x", type: "quantitative", title: find("axis").selectedOptions[0].textContent, axis: { format: find("axis").value === "tokens" ? "~s" : "," } },
        y: { field: "y", type: "quantitative", title: unit, scale: { zero: !isLoss, type: isLoss && log ? "log" : "linear" } },
        color: { field: "run", type: "nominal", legend: null, scale: { domain: [...page.chosen.keys()], range: [...page.chosen.values()] } },
        tooltip: [{ field: "run" }, { field: "x", format: ",.0f" }, { field: "y", format: ".5~g" }],
      },
    };
    await vegaEmbed(figure.querySelector(".plot"), spec, { actions: false, renderer: "svg", config: theme() });
  }
}

// Chosen runs

function table(headings, rows) {
  return make("table", {},
    make("thead", {}, make("tr", {}, ...headings.map(name => make("th", {}, name)))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map(cell => make("td", {}, cell))))));
}

function runHeading(name) {
  const mark = make("span", { className: "mark" });
  mark.style.background = page.chosen.get(name);
  const arm = page.runs.find(row => row.name === name)?.arm;
  return make("span", { title: name }, mark, arm || name);
}

function showDetails() {
  const details = [...page.chosen.keys()].map(name => page.details.get(name)).filter(Boolean);
  const shown = value => typeof value === "string" ? value : JSON.stringify(value) ?? "";
  const fields = [...new Set(details.flatMap(one => Object.keys(one.config)))];
  const differing = fields.filter(field => new Set(details.map(one => shown(one.config[field]))).size > 1);
  const heads = () => details.map(one => runHeading(one.name));
  find("configs").replaceChildren(differing.length
    ? table(["field", ...heads()], differing.map(field => [field, ...details.map(one => shown(one.config[field]))]))
    : make("p", { className: "dim" }, details.length > 1 ? "The same config." : "Choose a second run to see where they differ."));
  const names = [...new Set(details.flatMap(one => one.facts.map(([name]) => name)))];
  find("facts").replaceChildren(table(["", ...heads()],
    names.map(name => [name, ...details.map(one => (one.facts.find(fact => fact[0] === name) ?? ["", ""])[1])])));
  const prompts = [...new Set(details.flatMap(one => one.samples.map(sample => sample.prompt)))];
  find("stories").replaceChildren(...prompts.flatMap(prompt => [
    make("p", {}, "Prompt: ", make("b", {}, prompt)),
    make("div", { className: "samples" }, ...details.map(one => make("div", { className: "sample" },
      make("b", {}, runHeading(one.name)), (one.samples.find(sample => sample.prompt === prompt) ?? { text: "not sampled" }).text)))]));
  if (!prompts.length) find("stories").replaceChildren(make("p", { className: "dim" }, "Runs write their stories when they end."));
}

// Fetch what is missing or grows: an ended run stays as it is.
async function fetchChosen() {
  const states = new Map(page.runs.map(row => [row.name, `${row.state} ${row.iteration}`]));
  let changed = false;
  for (const name of page.chosen.keys()) {
    const state = states.get(name);
    if (page.curves.get(name)?.state === state) continue;
    try {
      const [curve, detail] = await Promise.all(["curves", "runs"].map(kind => ask(`/api/${kind}/${encodeURIComponent(name)}`)));
      page.curves.set(name, { ...curve, state });
      page.details.set(name, detail);
    } catch (error) {
      page.curves.set(name, { name, state, iterations: [], losses: [], speeds: [], learning_rates: [], evaluated: [], validation_losses: [] });
      page.details.set(name, { name, config: {}, facts: [["fault", error.message]], samples: [] });
    }
    changed = true;
  }
  return changed;
}

let drawn = Promise.resolve();
function showChosen() {
  find("chosen").hidden = page.chosen.size === 0;
  if (page.chosen.size) drawn = drawn.then(fetchChosen).then(showDetails).then(showFigures).catch(fault);
}

function fault(error) {
  find("fault").textContent = error instanceof TypeError ? "The server does not answer: start `storylab ui` again." : error.message;
  find("fault").hidden = false;
}

async function refresh() {
  try {
    const overview = await ask("/api/overview");
    const before = JSON.stringify(page.runs);
    page.runs = overview.runs;
    const training = page.runs.filter(row => row.state === "training").length;
    find("folder").textContent = `${overview.folder}: ${page.runs.length} runs, ${training} in progress`;
    document.title = training ? `storylab (${training} in progress)` : "storylab";
    find("fault").hidden = true;
    showExperiments(overview.experiments);
    if (JSON.stringify(page.runs) !== before) {
      showStates();
      showRuns();
      if (page.chosen.size && await fetchChosen()) showChosen();
    }
  } catch (error) { fault(error); }
  setTimeout(refresh, document.hidden ? 4 * POLL : POLL);
}

find("filter").oninput = () => { toAddress(); showRuns(); };
find("state").onchange = () => { toAddress(); showRuns(); };
find("clear").onclick = () => { page.chosen.clear(); toAddress(); showRuns(); showChosen(); };
for (const id of ["axis", "scale"]) find(id).onchange = showChosen;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showChosen);
fromAddress();
refresh().then(showChosen);
