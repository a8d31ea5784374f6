// The page: what is shown follows from the figures, the methods chosen, and the column sorted by.

const data = JSON.parse(document.getElementById("figures").textContent);
const find = (id) => document.getElementById(id);
const state = { shown: new Set(data.series.keys()), every: false, training: false, column: "loss", descending: false };
const measured = data.rows.filter((row) => row.val_loss !== null);
const names = data.series;
const paperLoss = data.paper ? data.paper.loss : "val";

const number = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const loss = (value) => number(value, 4);
const milliseconds = (seconds) => `${number(1e3 * seconds, 1)} ms`;
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const perplexity = (row) => {
  const value = Math.exp(row[`${paperLoss}_loss`] ?? Infinity);
  return Number.isFinite(value) ? value : null;
};

function short(value, unit = "") {
  const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, letter] = steps.find(([size]) => value >= size) || [1, ""];
  return `${Number((value / size).toPrecision(3))} ${letter}${unit}`.trim();
}

function rate(value) {
  if (value >= 1 && value < 100) return String(Number(value.toPrecision(3)));
  const [digits, power] = value.toExponential().split("e");
  return `${Number(Number(digits).toPrecision(3))}e${Number(power)}`;
}

const spread = (row) => (row.val_std ? `${loss(row.val_loss)} ± ${loss(row.val_std)}` : loss(row.val_loss));
const visible = (rows) => rows.filter((row) => state.shown.has(row.series) && (state.every || row.best));
const range = (values) => (values.length ? [Math.min(...values), Math.max(...values)] : null);

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  if (text !== "") made.textContent = text;
  if (name) made.className = name;
  return made;
}

// The table

const COLUMNS = [
  { key: "label", name: "method", value: (row) => names[row.series], cell: method },
  { key: "loss", name: "validation loss", value: (row) => row.val_loss, cell: lossCell },
  { key: "perplexity", name: paperLoss === "val" ? "perplexity" : "training perplexity", value: perplexity, text: (v) => number(v, 2) },
  { key: "paper", name: "paper", value: (row) => row.paper, text: (v) => number(v, 2), optional: true },
  { key: "state", name: "state", value: (row) => row.state_bytes, text: (v) => short(v, "B") },
  { key: "peak", name: "peak memory", value: (row) => row.peak_bytes, text: (v) => short(v, "B") },
  { key: "own", name: "optimizer step", value: (row) => row.optimizer_s, text: milliseconds },
  { key: "step", name: "whole step", value: (row) => row.step_s, text: milliseconds },
  { key: "speed", name: "tokens/s", value: (row) => row.tokens_per_s, text: (v) => number(v, 0) },
  { key: "options", name: "options", value: (row) => row.options },
].filter((column) => !column.optional || data.rows.some((row) => column.value(row) !== null));

const isText = (column) => column.key === "label" || column.key === "options";

function method(row) {
  const box = element("span", "", "method");
  box.append(swatch(row.series), names[row.series]);
  return box;
}

function lossCell(row) {
  const box = element("span"), got = row.runs.filter((run) => run.val_loss !== null).length;
  box.append(row.val_loss === null ? (row.diverged ? "diverged" : "–") : spread(row));
  if (row.val_loss !== null && got < row.planned) box.append(" ", element("small", `${got} of ${row.planned} seeds`));
  return box;
}

function header() {
  const line = element("tr");
  for (const column of COLUMNS) {
    const cell = element("th", "", isText(column) ? "" : "number"), button = element("button", column.name);
    cell.scope = "col";
    cell.dataset.key = column.key;
    button.type = "button";
    button.addEventListener("click", () => {
      state.descending = state.column === column.key && !state.descending;
      state.column = column.key;
      table();
    });
    cell.append(button);
    line.append(cell);
  }
  find("points").tHead.replaceChildren(line);
}

function table() {
  const column = COLUMNS.find((other) => other.key === state.column), sign = state.descending ? -1 : 1;
  const gone = (value) => value === null || value === undefined;
  const rows = visible(data.rows).sort((left, right) => {
    const [a, b] = [column.value(left), column.value(right)];
    if (gone(a) || gone(b)) return gone(a) - gone(b); // what has no value comes last, whichever way
    return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  });
  for (const cell of find("points").tHead.rows[0].cells)
    cell.setAttribute("aria-sort", cell.dataset.key !== state.column ? "none" : state.descending ? "descending" : "ascending");
  find("points").tBodies[0].replaceChildren(...rows.map(tableRow));
}

function tableRow(row) {
  const line = element("tr", "", state.every && row.best ? "best" : "");
  for (const column of COLUMNS) {
    const first = column.key === "label", value = column.value(row);
    const cell = element(first ? "th" : "td", "", isText(column) ? "" : "number");
    if (first) cell.scope = "row";
    if (column.cell) cell.append(column.cell(row));
    else cell.textContent = value === null || value === undefined ? "–" : column.text ? column.text(value) : value;
    line.append(cell);
  }
  return line;
}

// The rest

function chips() {
  find("chips").replaceChildren(...names.map((name, index) => {
    const chip = element("button");
    chip.type = "button";
    chip.append(swatch(index), name);
    chip.addEventListener("click", () => {
      state.shown.has(index) ? state.shown.delete(index) : state.shown.add(index);
      update();
    });
    return chip;
  }));
}

function failures() {
  find("failures").hidden = !data.failures.length;
  const kinds = ["failed", "diverged", "missing"];
  const sorted = [...data.failures].sort((a, b) => kinds.indexOf(a.kind) - kinds.indexOf(b.kind));
  const counts = kinds.map((kind) => [sorted.filter((item) => item.kind === kind).length, kind]).filter(([count]) => count);
  find("failures-note").textContent = counts.map(([count, kind]) => `${count} ${kind}`).join(", ");
  const lines = sorted.map((item) => {
    const line = element("tr");
    line.append(...[item.run, item.seed, item.kind, item.error].map((value) => element("td", String(value))));
    return line;
  });
  find("failures").querySelector("tbody").replaceChildren(...lines);
}

function provenance() {
  const words = (value) => Object.entries(value).filter(([, text]) => text !== "").map(([name, text]) => `${name} ${text}`).join(", ");
  const facts = [["shared", words(data.shared)], ["seeds", data.seeds.join(", ")], ["device", data.devices.join("; ")]];
  facts.push(["versions", data.versions.map(words).join("; ")]);
  if (data.paper) facts.push(["paper", `${data.paper.source}; its perplexities stand beside our ${paperLoss === "val" ? "validation" : "training"} perplexity`]);
  for (const [name, text] of facts.filter(([, text]) => text)) find("provenance").append(element("dt", name), element("dd", text));
  if (data.command) {
    const cell = element("dd");
    cell.append(element("code", data.command));
    find("provenance").append(element("dt", "command"), cell);
  }
  find("notes").append(...data.notes.map((note) => element("li", note)));
}

function lead() {
  find("title").textContent = data.title;
  const best = measured.filter((row) => row.best).sort((a, b) => a.val_loss - b.val_loss)[0];
  const facts = [`${many(names.length, "method")}, ${many(data.rows.length, "point")}, ${many(data.seeds.length, "seed")}.`];
  if (data.shared.model) facts.push(`Model ${data.shared.model.split("/").pop()}, ${many(data.shared.steps ?? "?", "step")}.`);
  if (best) facts.push(`Lowest validation loss: ${spread(best)} by ${best.label}.`);
  find("lead").textContent = facts.join(" ");
  const seeds = data.seeds.length > 1 ? "the mean over the seeds, the band from the lowest to the highest" : "one seed";
  find("curves-note").textContent = `Validation: ${seeds}.`;
}

function edges() {
  const found = data.rows.filter((row) => row.edge).map((row) => names[row.series]);
  return found.length ? ` At an edge of the rates that were tried: ${found.join(", ")}.` : "";
}

function update() {
  [...find("chips").children].forEach((chip, index) => chip.setAttribute("aria-pressed", state.shown.has(index)));
  find("tip").hidden = true;
  find("table-note").textContent = state.every ? "Every point; the best of each method in bold." : `Each method at its best learning rate.${edges()}`;
  table();
  curves();
  rates();
  states();
}

find("all").addEventListener("click", () => { state.shown = new Set(names.keys()); update(); });
find("none").addEventListener("click", () => { state.shown = new Set(); update(); });
find("every").addEventListener("change", (event) => { state.every = event.target.checked; update(); });
find("training").addEventListener("change", (event) => { state.training = event.target.checked; update(); });
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; update(); } });
document.querySelector(".controls").classList.toggle("many", names.length > NAMED);
lead(); chips(); header(); failures(); provenance(); update();
