// The page of results: a plot whose marks name their rows, and tables that sort and filter. All texts are set as text.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const { data = {}, ...own } = properties;
  const element = Object.assign(document.createElement(tag), own);
  for (const [name, value] of Object.entries(data)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

// ---- tables -------------------------------------------------------------------------------------------------------

const shown = DATA.tables.map((table) => new Set(table.keys.keys())); // the rows that no filter hides
const tables = [...document.querySelectorAll(".rows")].map(prepare);

function prepare(section, number) {
  const { keys, csv } = DATA.tables[number];
  const table = section.querySelector("table");
  const head = table.createTHead();
  head.append(table.rows[0]);
  const lines = [...table.tBodies[0].rows];
  const all = `${lines.length} row${lines.length === 1 ? "" : "s"}`;
  const names = [...head.rows[0].cells].map((cell) => cell.textContent);
  for (const line of lines) for (const cell of line.cells) cell.classList.toggle("long", cell.textContent.length > 60);
  [...head.rows[0].cells].forEach((cell, column) => {
    cell.setAttribute("scope", "col");
    cell.replaceChildren(make("button", { type: "button", textContent: names[column], onclick: () => sort(cell, column) }));
  });
  const count = make("output");
  const search = make("input", { type: "search", oninput: filter });
  const save = make("button", { type: "button", className: "csv", textContent: "Download CSV", onclick: () => download(csv, number) });
  section.querySelector(".table").before(make("div", { className: "choose" }, make("label", {}, "Filter ", search), count, save));

  function sort(cell, column) {
    const isUp = cell.getAttribute("aria-sort") !== "ascending";
    for (const other of head.rows[0].cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const order = [...lines.keys()].sort((a, b) => compare(keys[a][column], keys[b][column], isUp ? 1 : -1) || a - b);
    table.tBodies[0].append(...order.map((i) => lines[i]));
  }

  function filter() {
    const asked = search.value.toLowerCase().trim().replace(/\s+/g, " ");
    lines.forEach((line, i) => {
      const text = [...line.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      line.hidden = !text.replace(/\s+/g, " ").includes(asked);
      shown[number][line.hidden ? "delete" : "add"](i);
    });
    count.textContent = shown[number].size === lines.length ? all : `${shown[number].size} of ${all}`;
    if (number === 0) draw();
  }

  count.textContent = all;
  return { lines, names };
}

// Numbers come before texts, and what is missing comes last in either direction.
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return sign * (typeof a === "number" ? -1 : 1);
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function download(csv, number) {
  const name = `${document.title}${number ? `-${number}` : ""}`.replace(/[^\w.-]+/g, "_").slice(0, 100);
  const link = make("a", { href: URL.createObjectURL(new Blob([csv], { type: "text/csv" })), download: `${name}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ---- the plot -----------------------------------------------------------------------------------------------------

const SHAPES = ["circle", "rect", "triangle", "rectRot", "crossRot", "cross"]; // no divisor with the number of colours
const state = { x: 0, y: 0, active: null, hidden: new Set() }; // `hidden` holds names of series
const placed = []; // where names stand, for those that come after
let plot = null;
let colours = {};

const axes = () => [DATA.chart.x[state.x], DATA.chart.y[state.y]];
const look = (series) => ({
  pointStyle: SHAPES[series % SHAPES.length],
  backgroundColor: DATA.chart.colours[series % DATA.chart.colours.length],
  borderColor: DATA.chart.colours[series % DATA.chart.colours.length],
});
const isDrawn = (i) => {
  const [x, y] = axes();
  return shown[0].has(i) && x.values[i] !== null && y.values[i] !== null && !state.hidden.has(nameOf(i));
};
const nameOf = (i) => (DATA.chart.series[i] < 0 ? "unmerged model" : DATA.chart.names[DATA.chart.series[i]]);
const drawn = () => [...DATA.chart.labels.keys()].filter(isDrawn);

// What is drawn: the rows by series, the lines between them, and in gray what they are to be compared with.
function datasets() {
  const [x, y] = axes();
  const at = (i) => ({ x: x.values[i], y: y.values[i], i });
  const rows = drawn();
  const size = DATA.chart.isNamed ? 6 : 3;
  const mark = { radius: size, hoverRadius: size, borderWidth: 1.5, pointBorderColor: colours.text, isRow: true };
  const found = DATA.chart.names.map((name, series) => ({
    label: name, ...look(series), ...mark, pointBorderWidth: ["cross", "crossRot"].includes(look(series).pointStyle) ? 3 : 1,
    ...(["cross", "crossRot"].includes(look(series).pointStyle) ? { pointBorderColor: look(series).borderColor } : {}),
    data: rows.filter((i) => DATA.chart.series[i] === series).map(at), showLine: DATA.chart.isJoined,
  }));
  found.push({
    label: "unmerged model", ...mark, data: rows.filter((i) => DATA.chart.series[i] < 0).map(at),
    pointStyle: "star", radius: 10, hoverRadius: 10, borderWidth: 2.5, borderColor: colours.text,
  });
  const front = (DATA.chart.fronts[`${x.title}|${y.title}`] ?? []).filter(isDrawn);
  found.push({ label: "front", data: front.map(at), showLine: true, radius: 0, borderColor: colours.quiet, borderWidth: 1.5, order: 1 });
  found.push({
    label: "free bound", data: bounds(), pointStyle: "line", rotation: x.bounds?.some((value) => value !== null) ? 90 : 0,
    radius: 9, hoverRadius: 9, borderWidth: 2, borderColor: colours.quiet, order: 1, isBound: true,
  });
  return [...found, ...levels()];
}

function bounds() {
  if (state.hidden.has("free bound")) return [];
  const [x, y] = axes();
  return drawn().flatMap((i) => {
    const across = x.bounds?.[i] ?? null;
    const up = y.bounds?.[i] ?? null;
    return across === null && up === null ? [] : [{ x: across ?? x.values[i], y: up ?? y.values[i], i }];
  });
}

// The unmerged model as a line, where it is no row: each row has a figure of it, or it has no damage, which has no logarithm.
function levels() {
  const [x, y] = axes();
  const line = { showLine: true, radius: 0, borderColor: colours.text, borderDash: [6, 4], borderWidth: 1.25, order: 2 };
  if (state.hidden.has("unmerged model")) return [];
  const rows = DATA.chart.series.map((series, i) => i).filter((i) => DATA.chart.series[i] < 0);
  if (rows.some((i) => y.values[i] !== null && x.values[i] !== null)) return [];
  const upright = rows.filter((i) => x.values[i] !== null).map((i) => ({
    ...line, label: "unmerged", data: y.limits.map((value) => ({ x: x.values[i], y: value })),
  }));
  if (!y.levels?.some((value) => value !== null)) return upright;
  const series = [...DATA.chart.names.keys()].map((number) => drawn().filter((i) => DATA.chart.series[i] === number));
  const isOne = new Set(y.levels.filter((value) => value !== null)).size === 1;
  if (isOne) return [{ ...line, label: "unmerged", data: x.limits.map((value) => ({ x: value, y: y.levels.find((one) => one !== null) })) }];
  return series.map((own) => ({ ...line, label: "unmerged", data: own.map((i) => ({ x: x.values[i], y: y.levels[i] })) }));
}

function scale(axis, isUp) {
  const [min, max] = axis.limits;
  const narrow = byId("frame").clientWidth < 560;
  return {
    type: axis.isLog ? "logarithmic" : "linear", min, max, reverse: axis.isReversed && !isUp,
    title: { display: true, text: narrow ? wrapped(axis.text, 38) : axis.text, color: colours.text, font: { size: narrow ? 12 : 13 } },
    grid: { color: colours.line }, border: { color: colours.quiet },
    ticks: {
      color: colours.text, maxRotation: 0, autoSkip: true, includeBounds: false, font: { size: 12 },
      ...(axis.ticks ? { stepSize: 1, callback: (value) => (Number.isInteger(value) ? shortened(axis.ticks[value] ?? "") : null) } : {}),
    },
  };
}

function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= width) lines.push("");
    lines[lines.length - 1] += `${lines.at(-1) ? " " : ""}${word}`;
  }
  return lines;
}

const shortened = (text) => (text.length > 22 ? `${text.slice(0, 20)}…` : text);

// Error bars, and dotted lines from a row to its free bound: of all rows while these are few, else of the chosen one.
const marks = {
  id: "marks",
  beforeDatasetsDraw(chart) {
    const [x, y] = axes();
    const pen = chart.ctx;
    const at = (point) => [chart.scales.x.getPixelForValue(point.x), chart.scales.y.getPixelForValue(point.y)];
    pen.save();
    for (const i of drawn()) {
      const series = DATA.chart.series[i];
      pen.strokeStyle = series < 0 ? colours.text : look(series).borderColor;
      for (const [axis, isUp] of [[x, false], [y, true]]) {
        const error = axis.errors?.[i];
        if (!error) continue;
        const [low, high] = [-1, 1].map((sign) => at({ x: x.values[i] + (isUp ? 0 : sign * error), y: y.values[i] + (isUp ? sign * error : 0) }));
        const cap = isUp ? [4, 0] : [0, 4];
        pen.lineWidth = 1.25;
        line(pen, low, high);
        for (const [a, b] of [low, high]) line(pen, [a - cap[0], b - cap[1]], [a + cap[0], b + cap[1]]);
      }
    }
    pen.strokeStyle = colours.quiet;
    pen.setLineDash([2, 3]);
    const some = bounds();
    for (const bound of some) {
      if (some.length <= 12 || bound.i === state.active) line(pen, at({ x: x.values[bound.i], y: y.values[bound.i] }), at(bound));
    }
    pen.restore();
  },
  afterDatasetsDraw(chart) {
    placed.length = 0;
    const spots = spotsOf(chart);
    const front = DATA.chart.fronts[axes().map((axis) => axis.title).join("|")];
    const isNamed = (i) => DATA.chart.isNamed && (DATA.chart.series[i] < 0 || !front || front.includes(i));
    const named = spots.filter(({ i }) => i === state.active || isNamed(i));
    named.sort((a, b) => (b.i === state.active) - (a.i === state.active) || DATA.chart.series[a.i] - DATA.chart.series[b.i]);
    const ticks = bounds().map(({ x, y }) => ({ i: null, x: chart.scales.x.getPixelForValue(x), y: chart.scales.y.getPixelForValue(y) }));
    named.forEach((spot) => name(chart, spot, [...spots, ...ticks]));
    const active = spots.find(({ i }) => i === state.active);
    if (!active) return;
    const pen = chart.ctx;
    pen.save();
    pen.strokeStyle = colours.accent;
    pen.lineWidth = 3;
    pen.beginPath();
    pen.arc(active.x, active.y, 12, 0, 2 * Math.PI);
    pen.stroke();
    pen.restore();
  },
};

function line(pen, from, to) {
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}

function spotsOf(chart) {
  return drawn().map((i) => {
    const [x, y] = axes();
    return { i, x: chart.scales.x.getPixelForValue(x.values[i]), y: chart.scales.y.getPixelForValue(y.values[i]) };
  });
}

// Write a name near its mark and no other, where it covers no mark and no other name; where there is no such place,
// pointing names it.
function name(chart, spot, spots) {
  const pen = chart.ctx;
  const text = shortened(DATA.chart.labels[spot.i]);
  pen.save();
  pen.font = `${spot.i === state.active ? "600 " : ""}12px system-ui, sans-serif`;
  const [width, height] = [pen.measureText(text).width + 4, 15];
  const area = chart.chartArea;
  const places = (spot.i === state.active ? [16, 24] : [10, 16, 24]).flatMap((gap) => [
    [gap * 0.7, -gap * 0.7 - height], [-gap * 0.7 - width, -gap * 0.7 - height], [gap * 0.7, gap * 0.7], [-gap * 0.7 - width, gap * 0.7],
    [gap, -height / 2], [-gap - width, -height / 2], [-width / 2, -gap - height], [-width / 2, gap],
  ]);
  const boxes = places.map(([a, b]) => ({ left: spot.x + a, top: spot.y + b, right: spot.x + a + width, bottom: spot.y + b + height }));
  const away = (box, { x, y }) => Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
  const rivals = spots.filter(({ i, x, y }) => i !== null && Math.hypot(x - spot.x, y - spot.y) > 12);
  const isOwn = (box) => spot.i === state.active || rivals.every((other) => away(box, other) >= away(box, spot));
  const isFree = (box) => isOwn(box) && box.left >= area.left && box.right <= area.right && box.top >= area.top && box.bottom <= area.bottom
    && !placed.some((other) => box.left < other.right && other.left < box.right && box.top < other.bottom && other.top < box.bottom)
    && !spots.some(({ i, x, y }) => i !== spot.i && x > box.left - 7 && x < box.right + 7 && y > box.top - 7 && y < box.bottom + 7);
  const box = boxes.find(isFree);
  if (box) {
    placed.push({ ...box, i: spot.i });
    pen.lineWidth = 3;
    pen.lineJoin = "round";
    pen.strokeStyle = colours.back;
    pen.fillStyle = colours.text;
    pen.textBaseline = "middle";
    pen.strokeText(text, box.left + 2, box.top + height / 2);
    pen.fillText(text, box.left + 2, box.top + height / 2);
  }
  pen.restore();
}

function draw() {
  if (!DATA.chart) return;
  const style = getComputedStyle(document.documentElement);
  colours = Object.fromEntries(["back", "text", "quiet", "line", "accent"].map((key) => [key, style.getPropertyValue(`--${key}`).trim()]));
  const [x, y] = axes();
  const data = { datasets: datasets() };
  const scales = { x: scale(x, false), y: scale(y, true) };
  if (!plot) {
    const options = {
      animation: false, maintainAspectRatio: false, scales, layout: { padding: 6 }, events: ["mousemove", "mouseout", "click", "touchstart"],
      plugins: { legend: { display: false }, tooltip: { enabled: false } },
      onHover: (event) => choose(nearest(event)), onResize: () => setTimeout(draw),
    };
    plot = new Chart(byId("chart"), { type: "scatter", data, options, plugins: [marks] });
  } else {
    plot.data = data;
    plot.options.scales = scales;
    plot.update("none");
  }
  if (state.active !== null && !isDrawn(state.active)) choose(null);
  legend();
  const rows = drawn().length;
  byId("chart").setAttribute("aria-label", `Plot of ${rows} rows: ${y.text}, over ${x.text}. The arrow keys go from mark to mark; the table below holds the same rows.`);
}

function nearest(event) {
  const distance = (spot) => Math.hypot(spot.x - event.x, spot.y - event.y);
  const spots = spotsOf(plot).filter((spot) => distance(spot) < 30);
  return spots.length ? spots.reduce((a, b) => (distance(b) < distance(a) ? b : a)).i : state.active;
}

// Show a row beside the plot and in the table.
function choose(i, isSaid = false) {
  if (i === state.active && byId("row").childElementCount) return;
  state.active = i;
  const { lines, names } = tables[0];
  lines.forEach((tr, at) => tr.classList.toggle("active", at === i));
  const cells = i === null ? [] : [...lines[i].cells].map((cell) => cell.textContent);
  const width = (text = "") => (text.length > 40 ? "whole" : text.length > 14 ? "wide" : "");
  const terms = names.map((name, at) =>
    make("div", { className: width(cells[at]) }, make("dt", { textContent: name }), make("dd", { textContent: cells[at] })),
  );
  byId("row").replaceChildren(
    ...(i === null ? [make("p", { className: "lede", textContent: "No mark is chosen." })] : [make("h3", { textContent: DATA.chart.labels[i] }), make("dl", {}, ...terms)]),
  );
  if (isSaid && i !== null) byId("said").textContent = `${DATA.chart.labels[i]}: ${names.map((name, at) => `${name} ${cells[at]}`).join(", ")}`;
  plot.draw();
}

function legend() {
  const [x, y] = axes();
  const entries = DATA.chart.names.map((name, series) => [name, (pen) => symbol(pen, look(series))]);
  const hasUnmerged = DATA.chart.series.includes(-1) || levels().length || state.hidden.has("unmerged model");
  if (hasUnmerged) entries.push(["unmerged model", (pen) => (drawn().some((i) => DATA.chart.series[i] < 0) ? symbol(pen, { pointStyle: "star", borderColor: colours.text }) : dashes(pen))]);
  if ([...(x.bounds ?? []), ...(y.bounds ?? [])].some((value) => value !== null)) {
    entries.push(["free bound", (pen) => symbol(pen, { pointStyle: "line", borderColor: colours.quiet, rotation: x.bounds?.some((value) => value !== null) ? 90 : 0 })]);
  }
  const focus = document.activeElement?.dataset?.name;
  byId("legend").replaceChildren(...entries.map(([name, paint]) => entry(name, paint)));
  if (focus !== undefined) [...byId("legend").children].find((one) => one.dataset.name === focus)?.focus();
  if (!DATA.chart.isJoined) byId("legend").append(make("span", { className: "lede", textContent: "Gray line: rows that no other beats in both." }));
}

function entry(name, paint) {
  const [size, ratio] = [18, window.devicePixelRatio || 1];
  const canvas = make("canvas", { width: size * ratio, height: size * ratio });
  canvas.style.width = canvas.style.height = `${size}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  paint(pen);
  const words = name === "free bound" ? "free bound: drops as many tokens, at no cost" : name;
  const button = make("button", { type: "button", data: { "aria-pressed": !state.hidden.has(name), "data-name": name } }, canvas, words);
  button.onclick = () => {
    state.hidden[state.hidden.has(name) ? "delete" : "add"](name);
    draw();
  };
  return button;
}

function symbol(pen, { pointStyle, backgroundColor = "transparent", borderColor, rotation = 0 }) {
  const isLine = ["cross", "crossRot", "star", "line"].includes(pointStyle);
  Object.assign(pen, { fillStyle: backgroundColor, strokeStyle: isLine ? borderColor : colours.text, lineWidth: isLine ? 2.5 : 1 });
  Chart.helpers.drawPoint(pen, { pointStyle, rotation, radius: 6, borderWidth: isLine ? 2.5 : 1 }, 9, 9);
}

function dashes(pen) {
  Object.assign(pen, { strokeStyle: colours.text, lineWidth: 1.5 });
  pen.setLineDash([5, 3]);
  line(pen, [0, 9], [18, 9]);
}

function start() {
  for (const axis of ["x", "y"]) {
    const select = byId(axis);
    select.replaceChildren(...DATA.chart[axis].map(({ text }) => make("option", { textContent: text })));
    select.onchange = () => {
      state[axis] = select.selectedIndex;
      draw();
    };
  }
  byId("chart").onkeydown = (event) => {
    if (event.key === "Escape") return choose(null);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    const order = spotsOf(plot).sort((a, b) => a.x - b.x || a.y - b.y).map(({ i }) => i);
    if (!order.length) return;
    const now = order.indexOf(state.active);
    const next = now < 0 ? ([1, -Infinity].includes(step) ? 0 : order.length - 1) : now + step;
    choose(order[Math.min(order.length - 1, Math.max(0, next))], true);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
  choose(null);
}

if (DATA.chart) start();
window.results = { state, shown, placed, spots: () => spotsOf(plot) };
document.documentElement.dataset.ready = "";
