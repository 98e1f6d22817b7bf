// The explorer's page: draws the groups of a photo block by block. All texts are set as text, none as markup.
// A token is named by its place, the number of the input token that leads its group; protected tokens come first.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const state = { image: 0, block: DATA.depth, left: [0, 0], right: null, look: "groups", token: null };
let hovered = null; // the patch under the pointer or the keyboard's cursor, by place

// ---- what happened ------------------------------------------------------------------------------------------------

const runOf = (side) => DATA.methods[state[side][0]].amounts[state[side][1]].runs[state.image];
const patchesOf = (image) => image.patches;
const nameOf = (side) => `${DATA.methods[state[side][0]].name}, r = ${DATA.methods[state[side][0]].amounts[state[side][1]].label}`;

// After `block` blocks, for every place of the input the place of the token that leads its group; -1 where dropped.
function leads(run, block) {
  run.cache ??= [Int32Array.from({ length: run.tokens[0] }, (_, place) => place)];
  while (run.cache.length <= block) {
    const step = run.blocks[run.cache.length - 1];
    const last = run.cache[run.cache.length - 1];
    if (step.lead) {
      run.cache.push(Int32Array.from(step.lead));
      continue;
    }
    const moved = new Map(step.gone.map((place, i) => [place, step.into[i]]));
    run.cache.push(last.map((lead) => (moved.has(lead) ? moved.get(lead) : lead)));
  }
  return run.cache[block];
}

// All merges of the group that a token ends in after all blocks, in their order, each with the block it was in.
function genealogy(run, place) {
  const found = new Map();
  let lead = place;
  run.blocks.forEach((step, block) => {
    if (step.lead) return; // a mixture: nothing is known of who went where
    step.gone.forEach((gone, i) => {
      const merge = { block: block + 1, gone, into: step.into[i], similarity: step.similarity[i] };
      const at = merge.into < 0 ? gone : merge.into;
      const before = at === gone ? [] : found.get(gone) ?? [];
      if (at !== gone) found.delete(gone);
      found.set(at, [...(found.get(at) ?? []), ...before, merge]);
      if (gone === lead) lead = at;
    });
  });
  return (found.get(lead) ?? []).sort((a, b) => a.block - b.block);
}

// ---- words --------------------------------------------------------------------------------------------------------

const number = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));
const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share < 0.1 ? 1 : 0)} %`;

function where(place) {
  const image = DATA.images[state.image];
  const patch = place - DATA.prefix;
  if (patch < 0 || patch >= patchesOf(image)) return `token ${place}`;
  return `row ${Math.floor(patch / image.grid[1]) + 1}, column ${(patch % image.grid[1]) + 1}`;
}

// What stands below a picture and in every saved one: the answer and its change, tokens, MACs, time.
function captions(side, block) {
  const [method, at] = state[side];
  const amount = DATA.methods[method].amounts[at];
  const run = amount.runs[state.image];
  const plain = DATA.methods[method].amounts[0];
  const before = plain.runs[state.image];
  const [answer, change, changed] = answers(run, before, at === 0);
  const share = run.macs / before.macs;
  const speed = plain.ms / amount.ms;
  return {
    answer,
    change,
    changed,
    rows: [
      ["Tokens", `${run.tokens[block]} of ${run.tokens[0]}${block < DATA.depth ? `, ${run.tokens[DATA.depth]} in the end` : ""}`],
      ["MACs", `${number(run.macs / 1e9)} G${at ? `, ${percent(share)} of unmerged` : ""}`],
      ["Time", `${number(amount.ms)} ms an image${at ? `, ${speed.toFixed(2)} times as fast` : ""}, measured`],
    ],
  };
}

function answers(run, before, isPlain) {
  if (run.odd) {
    const said = before.odd ? "So does the unmerged one" : "The unmerged one is finite";
    return [`The answer holds ${run.odd}`, isPlain ? "" : said, !before.odd];
  }
  if (before.odd && !run.top) return ["Nothing to compare with", `The unmerged answer holds ${before.odd}`, true];
  if (run.cosine !== undefined) {
    const same = isPlain ? "The unmerged answer" : `Cosine ${run.cosine.toFixed(4)} to the unmerged answer`;
    return [same, isPlain ? "no classes: answers are compared as vectors" : `angle ${angle(run.cosine)}`, false];
  }
  const [name, share] = run.top[0];
  const said = `${name}, ${percent(share)}`;
  if (isPlain) return [said, run.top.slice(1).map(([other, part]) => `${other} ${percent(part)}`).join(", then "), false];
  if (before.odd) return [said, `Changed: the unmerged answer holds ${before.odd}`, true];
  const [old, was] = before.top[0];
  if (old !== name) return [said, `Changed: it was ${old}, ${percent(was)}`, true];
  return [said, `Same class as unmerged, ${percent(was)} there`, false];
}

const angle = (cosine) => `${((180 * Math.acos(Math.min(1, cosine))) / Math.PI).toFixed(1)} degrees`;

// ---- drawing ------------------------------------------------------------------------------------------------------

// The mean colour of every patch of a photo, as [r, g, b].
function patchColours(image) {
  if (image.colours) return image.colours;
  const [rows, columns] = image.grid;
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image.picture, 0, 0);
  image.colours = [];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const [left, top] = [Math.round((column * image.width) / columns), Math.round((row * image.height) / rows)];
      const right = Math.max(left + 1, Math.round(((column + 1) * image.width) / columns));
      const bottom = Math.max(top + 1, Math.round(((row + 1) * image.height) / rows));
      const { data } = pen.getImageData(left, top, right - left, bottom - top);
      const sum = [0, 0, 0];
      for (let i = 0; i < data.length; i += 4) for (let c = 0; c < 3; c++) sum[c] += data[i + c];
      image.colours.push(sum.map((value) => value / (data.length / 4)));
    }
  }
  return image.colours;
}

// Groups of patches after a block: for every lead its patches.
function groupsOf(image, lead) {
  const groups = new Map();
  for (let patch = 0; patch < patchesOf(image); patch++) {
    const name = lead[patch + DATA.prefix];
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(patch);
  }
  return groups;
}

function colourOf(image, name, members) {
  if (!image.onPhoto) return `hsl(${(name * 137.508) % 360} 45% ${45 + ((name * 7) % 5) * 7}%)`;
  const colours = members.map((patch) => patchColours(image)[patch]);
  return `rgb(${[0, 1, 2].map((c) => Math.round(colours.reduce((sum, one) => sum + one[c], 0) / colours.length)).join(" ")})`;
}

// Draw the groups of a side after a block into a box, of which (0, 0) is the left upper corner.
function drawGroups(pen, side, block, width, height, unit) {
  const image = DATA.images[state.image];
  const lead = leads(runOf(side), block);
  const groups = groupsOf(image, lead);
  const box = (patch) => {
    const [row, column] = [Math.floor(patch / image.grid[1]), patch % image.grid[1]];
    const [left, top] = [(column * width) / image.grid[1], (row * height) / image.grid[0]];
    return [left, top, width / image.grid[1], height / image.grid[0]];
  };
  const fill = (patches) => {
    pen.beginPath();
    patches.forEach((patch) => pen.rect(...box(patch)));
    pen.fill();
  };
  pen.imageSmoothingEnabled = image.width >= 128;
  if (image.onPhoto) pen.drawImage(image.picture, 0, 0, width, height);
  else {
    pen.fillStyle = "#8d949e";
    pen.fillRect(0, 0, width, height);
  }
  for (const [name, members] of groups) {
    if (name < 0) {
      pen.fillStyle = "#000";
      fill(members);
    } else if (members.length > 1 && state.look === "groups") {
      pen.fillStyle = pen.strokeStyle = colourOf(image, name, members);
      pen.lineWidth = unit; // closes the seams between cells
      fill(members);
      members.forEach((patch) => pen.strokeRect(...box(patch)));
    }
  }
  edges(pen, image, box, (a, b) => lead[a + DATA.prefix] !== lead[b + DATA.prefix], (patch) => {
    const members = groups.get(lead[patch + DATA.prefix]);
    return members.length > 1 || !image.onPhoto;
  });
  strokeTwice(pen, "rgb(0 0 0 / 0.75)", 2.6 * unit, "rgb(255 255 255 / 0.95)", 1.1 * unit);
  const shown = state.token ?? hovered;
  if (shown !== null) light(pen, image, lead, shown, box, fill, unit);
  if (state.token !== null) links(pen, side, block, box, unit);
  if (hovered !== null && hovered !== state.token) {
    pen.beginPath();
    pen.rect(...box(hovered - DATA.prefix));
    strokeTwice(pen, "#000", 3 * unit, "#fff", 1.5 * unit);
  }
}

// Make a path of the sides between patches that `differ` and of which one is `drawn`.
function edges(pen, image, box, differ, drawn) {
  const [rows, columns] = image.grid;
  pen.beginPath();
  for (let patch = 0; patch < patchesOf(image); patch++) {
    const [left, top, width, height] = box(patch);
    const [column, row] = [patch % columns, Math.floor(patch / columns)];
    const right = column + 1 < columns && patch + 1 < patchesOf(image) ? patch + 1 : null;
    const below = row + 1 < rows && patch + columns < patchesOf(image) ? patch + columns : null;
    if (right !== null && differ(patch, right) && (drawn(patch) || drawn(right))) {
      pen.moveTo(left + width, top);
      pen.lineTo(left + width, top + height);
    }
    if (below !== null && differ(patch, below) && (drawn(patch) || drawn(below))) {
      pen.moveTo(left, top + height);
      pen.lineTo(left + width, top + height);
    }
  }
}

function strokeTwice(pen, under, wide, over, narrow) {
  pen.lineCap = "square";
  for (const [style, width] of [[under, wide], [over, narrow]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.stroke();
  }
}

// Darken all but the group of a token, and outline it: seen without colours too.
function light(pen, image, lead, token, box, fill, unit) {
  const name = lead[token];
  const isIn = (patch) => (name < 0 ? patch === token - DATA.prefix : lead[patch + DATA.prefix] === name);
  const all = Array.from({ length: patchesOf(image) }, (_, patch) => patch);
  pen.fillStyle = "rgb(0 0 0 / 0.5)";
  fill(all.filter((patch) => !isIn(patch)));
  edges(pen, image, box, (a, b) => isIn(a) !== isIn(b), () => true);
  for (const patch of all.filter(isIn)) {
    const [left, top, width, height] = box(patch);
    const [column, row] = [patch % image.grid[1], Math.floor(patch / image.grid[1])];
    if (column === 0) pen.rect(left, top, 0, height);
    if (row === 0) pen.rect(left, top, width, 0);
    if (column === image.grid[1] - 1) pen.rect(left + width, top, 0, height);
    if (row === image.grid[0] - 1) pen.rect(left, top + height, width, 0);
  }
  strokeTwice(pen, "#000", 6 * unit, "#ffd400", 3 * unit);
}

// Draw the genealogy of the chosen token up to a block: an arrow from what was merged to what it was merged into.
function links(pen, side, block, box, unit) {
  const centre = (place) => {
    const [left, top, width, height] = box(place - DATA.prefix);
    return [left + width / 2, top + height / 2];
  };
  pen.beginPath();
  for (const { block: when, gone, into } of genealogy(runOf(side), state.token)) {
    if (when > block || into < DATA.prefix || !isTogether(side, block, gone)) continue;
    const [[x, y], [toX, toY]] = [centre(gone), centre(into)];
    const turn = Math.atan2(toY - y, toX - x);
    pen.moveTo(x, y);
    pen.lineTo(toX, toY);
    for (const side of [-0.5, 0.5]) {
      pen.moveTo(toX, toY);
      pen.lineTo(toX - 8 * unit * Math.cos(turn + side), toY - 8 * unit * Math.sin(turn + side));
    }
  }
  strokeTwice(pen, "rgb(0 0 0 / 0.8)", 2.8 * unit, "#fff", 1.2 * unit);
  const [x, y] = centre(state.token);
  pen.beginPath();
  pen.arc(x, y, 4 * unit, 0, 2 * Math.PI);
  pen.fillStyle = "#ffd400";
  pen.fill();
  strokeTwice(pen, "#000", 1.5 * unit, "#000", 1.5 * unit);
}

// Whether a token is in the group of the chosen one after a block.
function isTogether(side, block, place) {
  const lead = leads(runOf(side), block);
  return lead[state.token] >= 0 ? lead[place] === lead[state.token] : place === state.token;
}

// ---- the page -----------------------------------------------------------------------------------------------------

function make(kind, options = {}, ...children) {
  const { data, ...rest } = options;
  const element = Object.assign(document.createElement(kind), rest);
  for (const [name, value] of Object.entries(data ?? {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const panels = {};

function buildPanel(side) {
  const method = make("select", { id: `${side}-method` }, ...DATA.methods.map(({ name }, value) => make("option", { value, textContent: name })));
  const amount = make("input", { type: "range", id: `${side}-r`, min: 0, step: 1 });
  const said = make("output", { id: `${side}-r-said` });
  const canvas = make("canvas", { id: `${side}-picture`, tabIndex: 0, data: { role: "application" } });
  const [answer, change, rows] = [make("p", { className: "answer" }), make("p", { className: "change" }), make("dl")];
  const labels = [make("label", {}, "Method ", method), make("label", {}, "r ", amount, said)];
  const caption = make("figcaption", {}, answer, change, rows);
  const panel = make("figure", { className: "panel", id: side }, make("div", { className: "choose" }, ...labels), canvas, caption);
  panels[side] = { panel, method, amount, said, canvas, answer, change, rows };
  method.addEventListener("change", () => {
    const last = DATA.methods[+method.value].amounts.length - 1;
    change_({ [side]: [+method.value, Math.min(state[side][1], last)] });
  });
  amount.addEventListener("input", () => change_({ [side]: [state[side][0], +amount.value] }));
  canvas.addEventListener("pointermove", (event) => hover(placeAt(canvas, event)));
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("blur", () => hover(null));
  canvas.addEventListener("click", (event) => pick(placeAt(canvas, event)));
  canvas.addEventListener("keydown", (event) => onPicture(event));
  return panel;
}

function placeAt(canvas, event) {
  const { grid } = DATA.images[state.image];
  const { left, top, width, height } = canvas.getBoundingClientRect();
  const within = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value * count)));
  const column = within((event.clientX - left) / width, grid[1]);
  const patch = within((event.clientY - top) / height, grid[0]) * grid[1] + column;
  return Math.min(patch, patchesOf(DATA.images[state.image]) - 1) + DATA.prefix;
}

function hover(place) {
  if (place === hovered) return;
  hovered = place;
  draw();
  byId("said").textContent = place === null ? "" : SIDES.filter((side) => state[side]).map((side) => sizeSaid(side, place)).join("; ");
}

function sizeSaid(side, place) {
  const lead = leads(runOf(side), state.block);
  const count = lead.filter((name) => name === lead[place]).length;
  const what = lead[place] < 0 ? "dropped" : count > 1 ? `one of ${count} patches in a group` : "a token of its own";
  return `${nameOf(side)}: ${where(place)} is ${what}`;
}

function pick(place) {
  change_({ token: place === state.token ? null : place });
}

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

function onPicture(event) {
  const { grid } = DATA.images[state.image];
  if (event.key === "Enter" || event.key === " ") pick(hovered ?? state.token ?? DATA.prefix);
  else if (event.key in ARROWS) {
    const patch = (hovered ?? state.token ?? DATA.prefix) - DATA.prefix;
    const [down, across] = hovered === null && state.token === null ? [0, 0] : ARROWS[event.key];
    const row = Math.min(grid[0] - 1, Math.max(0, Math.floor(patch / grid[1]) + down));
    const column = Math.min(grid[1] - 1, Math.max(0, (patch % grid[1]) + across));
    hover(Math.min(row * grid[1] + column, patchesOf(DATA.images[state.image]) - 1) + DATA.prefix);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

function onPage(event) {
  if (event.key === "Escape") {
    hovered = null;
    change_({ token: null });
  }
  if (!(event.key in ARROWS) || event.ctrlKey || event.altKey || event.metaKey || document.activeElement !== document.body) return;
  const [down, across] = ARROWS[event.key];
  const last = DATA.methods[state.left[0]].amounts.length - 1;
  const amount = Math.min(last, Math.max(0, state.left[1] - down));
  change_({ block: Math.min(DATA.depth, Math.max(0, state.block + across)), left: [state.left[0], amount] });
  event.preventDefault();
}

function change_(values) {
  Object.assign(state, values);
  history.replaceState(null, "", `#${asHash()}`);
  show();
}

function show() {
  const image = DATA.images[state.image];
  byId("block").max = DATA.depth;
  byId("block").value = state.block;
  byId("block-said").textContent = `${state.block} of ${DATA.depth}`;
  byId("look").value = state.look;
  byId("both").checked = state.right !== null;
  [...byId("images").children].forEach((button, at) => button.setAttribute("aria-pressed", at === state.image));
  for (const part of ["panels", "family"]) byId(part).classList.toggle("both", state.right !== null);
  panels.right.panel.hidden = state.right === null;
  for (const side of SIDES.filter((side) => state[side])) showSide(side, image);
  showFamily();
  draw();
}

function showSide(side, image) {
  const { method, amount, said, canvas, answer, change, rows } = panels[side];
  const { amounts } = DATA.methods[state[side][0]];
  method.value = state[side][0];
  amount.max = amounts.length - 1;
  amount.value = state[side][1];
  said.textContent = amount.ariaValueText = amounts[state[side][1]].label;
  const words = captions(side, state.block);
  answer.textContent = words.answer;
  change.textContent = words.change;
  change.classList.toggle("changed", words.changed);
  rows.replaceChildren(...words.rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
  const on = image.onPhoto ? "" : " (drawn as a sheet of cells, this model has no grid)";
  canvas.setAttribute("aria-label", `${image.name} in groups${on}: ${nameOf(side)}, after block ${state.block}. ${words.answer}. ${words.rows[0].join(" ")}`);
}

function showFamily() {
  byId("family").replaceChildren(...(state.token === null ? [] : SIDES.filter((side) => state[side]).map(familyOf)));
}

function familyOf(side) {
  const run = runOf(side);
  const merges = genealogy(run, state.token);
  const isMixed = run.blocks.some((step) => step.lead);
  const says = ({ block, gone, into, similarity }) =>
    into < 0 ? `Block ${block}: ${where(gone)} was dropped` : `Block ${block}: ${where(gone)} went into ${where(into)}${similarity === null ? "" : `, similarity ${similarity.toFixed(2)}`}`;
  const isNow = (merge) => merge.block <= state.block && isTogether(side, state.block, merge.gone);
  const none = isMixed ? "This method mixes tokens: a token left holds parts of many, and there are no pairs." : "It stays a token of its own in every block.";
  const listOf = (title, some, className) => some.length ? [
    make("h3", { textContent: title }),
    make("ol", { className, tabIndex: 0, data: { "aria-label": `${title}, ${nameOf(side)}` } }, ...some.map((merge) => make("li", { textContent: says(merge) }))),
  ] : [];
  const now = listOf(`In its group after block ${state.block}`, merges.filter(isNow), "now");
  const later = listOf("What its group takes in later", merges.filter((merge) => !isNow(merge)), "later");
  const list = merges.length ? [...now, ...later] : [make("p", { textContent: none })];
  return make("div", {}, make("h2", { textContent: `${nameOf(side)}: who merged with ${where(state.token)}` }), ...list);
}

function draw() {
  const image = DATA.images[state.image];
  for (const side of SIDES.filter((side) => state[side])) {
    const { canvas } = panels[side];
    const scale = Math.min(2, window.devicePixelRatio || 1);
    const width = Math.max(1, Math.round((canvas.clientWidth || 320) * scale));
    const height = Math.round((width * image.height) / image.width);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    drawGroups(canvas.getContext("2d"), side, state.block, width, height, scale);
  }
}

// ---- the state in the address -------------------------------------------------------------------------------------

const textOf = ([method, amount]) => `${DATA.methods[method].name}@${DATA.methods[method].amounts[amount].label}`;

function asHash() {
  const found = { image: state.image + 1, block: state.block, left: textOf(state.left), look: state.look };
  if (state.right) found.right = textOf(state.right);
  if (state.token !== null) found.token = state.token;
  return new URLSearchParams(found).toString();
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const whole = (name, least, most) => {
    const value = given.has(name) && /^\d+$/.test(given.get(name)) ? +given.get(name) : null;
    return value !== null && value >= least && value <= most ? value : null;
  };
  const side = (name) => {
    const all = DATA.methods.flatMap(({ amounts }, method) => amounts.map((_, amount) => [method, amount]));
    return all.find((one) => textOf(one) === given.get(name)) ?? null;
  };
  state.image = (whole("image", 1, DATA.images.length) ?? 1) - 1;
  state.block = whole("block", 0, DATA.depth) ?? DATA.depth;
  const first = [0, Math.min(1, DATA.methods[0].amounts.length - 1)];
  const isNew = !given.has("left");
  state.left = side("left") ?? first;
  state.right = side("right") ?? (isNew ? secondOf() : null);
  state.look = given.get("look") === "photo" ? "photo" : "groups";
  state.token = whole("token", DATA.prefix, DATA.prefix + patchesOf(DATA.images[state.image]) - 1);
}

// What stands beside the first at the start: the next method at the same r, else the largest r.
function secondOf() {
  if (DATA.methods.length > 1) return [1, Math.min(1, DATA.methods[1].amounts.length - 1)];
  const last = DATA.methods[0].amounts.length - 1;
  return last > 1 ? [0, last] : null;
}

// ---- saving -------------------------------------------------------------------------------------------------------

// The present view as one picture: pictures with what stands below them.
function frame(block) {
  const image = DATA.images[state.image];
  const sides = SIDES.filter((side) => state[side]);
  const [gap, line, wide] = [16, 20, 400];
  const high = Math.round((wide * image.height) / image.width);
  const canvas = make("canvas", { width: sides.length * (wide + gap) + gap, height: high + 7 * line + 2 * gap });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const look = getComputedStyle(document.body);
  pen.fillStyle = look.backgroundColor;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  sides.forEach((side, at) => {
    const words = captions(side, block);
    const lines = [`${nameOf(side)}, after block ${block} of ${DATA.depth}`, words.answer, words.change, ...words.rows.map((row) => row.join(": "))];
    pen.save();
    pen.translate(gap + at * (wide + gap), gap + line);
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, wide, high);
    pen.clip();
    drawGroups(pen, side, block, wide, high, 1);
    pen.restore();
    pen.fillStyle = look.color;
    pen.textBaseline = "alphabetic";
    lines.forEach((text, row) => {
      pen.font = `${row < 2 ? "600 " : ""}13px system-ui, sans-serif`;
      pen.fillText(text, 0, row ? high + (row + 0.2) * line : -7, wide);
    });
    pen.restore();
  });
  pen.fillStyle = look.color;
  pen.font = "11px system-ui, sans-serif";
  pen.fillText(`${image.name} · ${DATA.model}`, gap, canvas.height - gap / 2 - 2, canvas.width - 2 * gap);
  return canvas;
}

function download(blob, suffix) {
  const name = DATA.images[state.image].name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}_-]+/gu, "_");
  const link = make("a", { href: URL.createObjectURL(blob), download: `${name || "tokens"}.${suffix}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const pause = () => new Promise((done) => setTimeout(done));

async function saveGif() {
  const gif = gifenc.GIFEncoder();
  for (let block = 0; block <= DATA.depth; block++) {
    byId("gif").textContent = `Block ${block} of ${DATA.depth}`;
    await pause();
    const canvas = frame(block);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const some = new Uint32Array(data.buffer).filter((_, i) => i % 7 === 0); // enough to choose colours by, and fast
    const palette = gifenc.quantize(new Uint8Array(some.buffer), 256);
    const delay = block === DATA.depth ? 2500 : 500;
    gif.writeFrame(gifenc.applyPalette(data, palette), canvas.width, canvas.height, { palette, delay, repeat: 0 });
  }
  gif.finish();
  download(new Blob([gif.bytes()], { type: "image/gif" }), "gif");
}

async function busy(button, work) {
  const label = button.textContent;
  button.disabled = true;
  try {
    await work();
  } finally {
    button.disabled = false;
    button.textContent = label;
  }
}

// ---- start --------------------------------------------------------------------------------------------------------

async function start() {
  await Promise.all(DATA.images.map((image) => {
    image.picture = make("img", { alt: image.name, src: image.source });
    return image.picture.decode();
  }));
  byId("images").append(...DATA.images.map((image, at) => {
    const button = make("button", { type: "button", title: image.name }, image.picture);
    button.addEventListener("click", () => change_({ image: at, token: null }));
    return button;
  }));
  byId("images").hidden = DATA.images.length < 2;
  byId("panels").append(...SIDES.map(buildPanel));
  byId("block").addEventListener("input", (event) => change_({ block: +event.target.value }));
  byId("look").addEventListener("change", (event) => change_({ look: event.target.value }));
  byId("both").addEventListener("change", (event) => change_({ right: event.target.checked ? secondOf() ?? [...state.left] : null }));
  byId("png").addEventListener("click", () => busy(byId("png"), async () => {
    download(await new Promise((done) => frame(state.block).toBlob(done, "image/png")), "png");
  }));
  byId("gif").addEventListener("click", () => busy(byId("gif"), saveGif));
  document.addEventListener("keydown", onPage);
  window.addEventListener("hashchange", () => {
    readHash();
    show();
  });
  new ResizeObserver(draw).observe(byId("panels"));
  readHash();
  show();
  document.documentElement.setAttribute("data-ready", "");
}

// for the console, and for tests
globalThis.explorer = { DATA, state, leads, genealogy, runOf };
start();
