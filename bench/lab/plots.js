// The three charts of the page: what is drawn of which rows.

const NAMED = 12; // more names would cover the chart

function curves() {
  const rows = visible(measured);
  const late = (values) => (values.length > 2 ? values.slice(1) : values);
  const losses = rows.flatMap((row) => [...late(row.curve.high), ...late(row.curve.low)]).filter((loss) => loss !== null);
  chart(find("curves"), {
    label: "Loss by tokens. Arrow keys walk through the validations.",
    x: { range: range(rows.flatMap((row) => (state.training ? [0, ...row.curve.tokens] : row.curve.tokens))), name: "tokens", format: (v) => short(v) },
    y: { range: losses.length ? widen(range(losses), 0.05) : null, format: (v) => number(v, 2) },
    draw: (layer, x, y) => rows.flatMap((row) => curve(layer, row, x, y)),
  });
}

/** Lists without the places at which one of them has no value. */
function finite(...lists) {
  const kept = [...lists[0].keys()].filter((index) => lists.every((list) => list[index] !== null));
  return lists.map((list) => kept.map((index) => list[index]));
}

function curve(layer, row, x, y) {
  // A loss that was not finite is null, and is left out.
  const [tokens, mean, low, high] = finite(row.curve.tokens, row.curve.loss, row.curve.low, row.curve.high);
  const [train_tokens, train_loss] = finite(row.curve.train_tokens, row.curve.train_loss), colour = paint(row.series);
  const xs = tokens.map(x), ys = mean.map(y);
  if (state.training) svg("path", { d: path(train_tokens.map(x), train_loss.map(y)), class: "train", stroke: colour }, layer);
  const band = path([...xs, ...[...xs].reverse()], [...high.map(y), ...low.map(y).reverse()]);
  svg("path", { d: `${band}z`, class: "band", fill: colour }, layer);
  const style = { class: row.best ? "line" : "line faint", stroke: colour, "stroke-dasharray": dash(row.series) };
  svg("path", { d: path(xs, ys), ...style }, layer);
  const last = tokens.length - 1;
  tokens.forEach((_, index) => mark(layer, row.series, xs[index], ys[index], row.best ? (index === last ? 1 : 0.75) : 0.5));
  return tokens.map((count, index) => ({
    x: xs[index], y: ys[index], title: row.label,
    lines: [`${short(count)} tokens`, `loss ${loss(mean[index])}`, ...(low[index] < high[index] ? [`seeds ${loss(low[index])} to ${loss(high[index])}`] : [])],
  }));
}

function rates() {
  const rows = data.rows.filter((row) => state.shown.has(row.series) && row.lr);
  const losses = rows.filter((row) => row.val_loss !== null).map((row) => row.val_loss);
  const seen = range(rows.map((row) => row.lr));
  chart(find("rates"), {
    label: "Loss by learning rate. Arrow keys walk through the points.",
    x: { range: losses.length ? widen(seen, 0.05, true) : null, log: true, name: "learning rate", format: rate },
    y: { range: losses.length ? lossRange(losses) : null, format: (v) => number(v, 2) },
    draw: (layer, x, y, box) => names.flatMap((_, index) => rateLine(layer, rows.filter((row) => row.series === index), x, y, box)),
  });
}

function rateLine(layer, rows, x, y, box) {
  const sorted = [...rows].sort((a, b) => a.lr - b.lr), index = sorted.length ? sorted[0].series : 0;
  const height = (value) => Math.max(box.top, y(value));
  const good = sorted.filter((row) => row.val_loss !== null && !row.diverged);
  const style = { class: "line", stroke: paint(index), "stroke-dasharray": dash(index) };
  if (good.length) svg("path", { d: path(good.map((row) => x(row.lr)), good.map((row) => height(row.val_loss))), ...style }, layer);
  return sorted.filter((row) => row.val_loss !== null || row.diverged).map((row) => {
    const px = x(row.lr), py = row.diverged ? box.top : height(row.val_loss);
    if (row.val_std && !row.diverged)
      svg("line", { x1: px, x2: px, y1: height(row.val_loss - row.val_std), y2: height(row.val_loss + row.val_std), class: "error", stroke: paint(index) }, layer);
    if (row.diverged) svg("text", { x: px, y: py + 6, "text-anchor": "middle", style: `fill: ${paint(index)}` }, layer).textContent = "×";
    else mark(layer, index, px, py, row.best ? 1.25 : 0.85);
    const result = row.diverged ? `${row.diverged} of ${row.planned} seeds diverged` : `loss ${spread(row)}`;
    return { x: px, y: py, title: names[index], lines: [`learning rate ${rate(row.lr)}`, result] };
  });
}

function states() {
  const rows = measured.filter((row) => row.best && state.shown.has(row.series));
  const bytes = range(rows.map((row) => row.state_bytes).filter((size) => size > 0)) ?? (rows.length ? [1, 1000] : null);
  chart(find("states"), {
    label: "Best loss by bytes of optimizer state. Arrow keys walk through the methods.",
    x: { range: bytes && widen(bytes, 0.14, true), log: true, name: "optimizer state", format: (v) => short(v, "B") },
    y: { range: rows.length ? lossRange(rows.map((row) => row.val_loss)) : null, format: (v) => number(v, 2) },
    draw: (layer, x, y, box) => front(layer, rows, x, y, box),
  });
}

function front(layer, rows, x, y, box) {
  const sorted = [...rows].sort((a, b) => a.state_bytes - b.state_bytes || a.val_loss - b.val_loss);
  let lowest = Infinity, line = "";
  for (const row of sorted.filter((row) => row.val_loss < lowest && (lowest = row.val_loss))) {
    line += `${line ? `H${x(row.state_bytes)}V` : `M${x(row.state_bytes)},`}${y(row.val_loss)}`;
  }
  svg("path", { d: `${line}H${box.right}`, class: "front" }, layer);
  if (rows.length <= NAMED) labels(layer, rows, x, y, box);
  return sorted.map((row) => {
    const px = x(row.state_bytes), py = y(row.val_loss);
    mark(layer, row.series, px, py, 1.3);
    return { x: px, y: py, title: row.label, lines: [`state ${short(row.state_bytes, "B")}`, `loss ${spread(row)}`] };
  });
}

/** Names beside their marks, a line's distance from each other and inside the chart. */
function labels(layer, rows, x, y, box) {
  const sorted = [...rows].sort((a, b) => b.val_loss - a.val_loss), places = [];
  for (const row of sorted) places.push(Math.max((places.at(-1) ?? -Infinity) + 14, y(row.val_loss)));
  for (let index = places.length - 1, limit = box.bottom - 6; index >= 0; index--, limit -= 14)
    places[index] = limit = Math.min(limit, places[index]);
  sorted.forEach((row, index) => {
    const left = x(row.state_bytes) > (box.left + box.right) / 2;
    const place = { x: x(row.state_bytes) + (left ? -10 : 10), y: places[index] + 4, "text-anchor": left ? "end" : "start" };
    svg("text", { ...place, class: "name" }, layer).textContent = names[row.series];
  });
}
