"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const state = { run: 0, place: 0, measure: "load", only: null };
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = $("#tip");

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "style") element.style.cssText = value;
    else if (key === "on") for (const [name, work] of Object.entries(value)) element.addEventListener(name, work);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function showTip(event, text) {
  tip.textContent = text;
  tip.style.display = text ? "block" : "none";
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18) + "px";
}
const hideTip = () => { tip.style.display = "none"; };

const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
const dark = () => document.documentElement.dataset.theme === "dark";
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const between = (one, other, share) => one.map((value, at) => Math.round(value + (other[at] - value) * share));

// Relative load: below the mean towards blue, above it towards orange; 0 is the end of the scale.
function loadColour(value) {
  const middle = dark() ? [42, 48, 56] : [242, 243, 245];
  if (value <= 0) return dark() ? [96, 165, 250] : [9, 60, 130];
  const power = Math.max(-3, Math.min(3, Math.log2(value))) / 3;
  const end = power < 0 ? (dark() ? [70, 130, 205] : [33, 102, 172]) : (dark() ? [244, 150, 70] : [214, 96, 20]);
  return between(middle, end, Math.sqrt(Math.abs(power)));
}

function paint(canvas, width, height, colourOf) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let at = 0; at < width * height; at++) {
    const [red, green, blue] = colourOf(at % width, Math.floor(at / width));
    image.data.set([red, green, blue, 255], 4 * at);
  }
  context.putImageData(image, 0, 0);
}

function cellAt(event, canvas) {
  const box = canvas.getBoundingClientRect();
  const inside = (value, size) => Math.max(0, Math.min(size - 1, Math.floor(value)));
  return [inside((event.clientX - box.left) / box.width * canvas.width, canvas.width),
          inside((event.clientY - box.top) / box.height * canvas.height, canvas.height)];
}

function drawHeat(root, run) {
  const heat = run.heat, box = $(".heat-grid", root);
  if (!heat || !box) return;
  const maps = heat[state.measure].length ? heat[state.measure] : heat.load;
  box.replaceChildren(...run.layers.map((layer, place) => {
    const values = bytes(maps[place]), width = heat.steps.length, canvas = make("canvas");
    paint(canvas, width, run.experts, (x, y) => loadColour(values[y * width + x] / heat.unit));
    canvas.style.height = Math.max(110, Math.min(18 * run.experts, 256)) + "px";
    canvas.addEventListener("mousemove", (event) => {
      const [x, y] = cellAt(event, canvas), value = values[y * width + x] / heat.unit;
      showTip(event, `layer ${layer}, expert ${y}\nstep ${heat.steps[x]}: ${value >= 7.96 ? "8 or more" : value.toFixed(2)} × the mean`);
    });
    canvas.addEventListener("mouseleave", hideTip);
    return make("div", { class: "heat" }, make("h3", {}, `layer ${layer}`),
      make("div", { class: "ys" }, make("span", {}, "0"), make("span", {}, String(run.experts - 1))), canvas,
      make("div", { class: "xs" }, make("span", {}, `step ${heat.steps[0]}`), make("span", {}, String(heat.steps.at(-1)))));
  }));
  const stops = [0, 0.125, 0.25, 0.5, 1, 2, 4, 8].map((value) => `rgb(${loadColour(value)})`);
  $(".scale i", root).style.background = `linear-gradient(90deg, ${stops})`;
}

const percent = (part, whole) => (100 * part / Math.max(whole, 1)).toFixed(0) + " %";
const chip = (label, note, title) => make("span", { class: "chip", title }, make("b", {}, label), make("small", {}, note));

function drawCard(run, card, expert) {
  const parts = [make("header", {}, make("b", {}, `Expert ${expert}`), make("span", {}, card.tokens
    ? `${card.load.toFixed(2)} × mean load · gate ${card.gate.toFixed(2)} · loss ${card.loss.toFixed(2)}` : "gets nothing")),
    make("div", { class: "meter" }, make("i", { style: `width:${Math.min(50 * card.load, 100)}%` }))];
  if (!card.tokens) return make("article", { class: "card", style: `--c:${run.colours[expert]}` }, ...parts);
  if (card.images) {
    const total = card.classes.reduce((sum, count) => sum + count, 0);
    const order = card.classes.map((count, label) => [count, label]).filter(([count]) => count).sort((a, b) => b[0] - a[0]);
    parts.push(make("div", { class: "what" }, "classes"),
      make("div", { class: "chips" }, ...order.slice(0, 10).map(([count, label]) => chip(run.data.classes[label], percent(count, total), `${count} rows`))));
    parts.push(make("div", { class: "what" }, "taken most surely"), make("div", { class: "pictures" }, ...card.images.map((image) => {
      const pixels = bytes(image), canvas = make("canvas"), [height, width] = run.data.side;
      paint(canvas, width, height, (x, y) => Array(3).fill(pixels[y * width + x]));
      return canvas;
    })));
  } else {
    const all = card.tokens;
    parts.push(make("div", { class: "what" }, "most frequent, % of the expert's tokens"),
      make("div", { class: "chips" }, ...card.frequent.map(([label, count, total]) => chip(label, percent(count, all), `${count} of ${total} occurrences`))));
    parts.push(make("div", { class: "what" }, "most exclusive, % of the token's places"),
      make("div", { class: "chips" }, ...(card.exclusive.length ? card.exclusive.map(([label, count, total, pmi]) =>
        chip(label, percent(count, total), `${count} of ${total} occurrences, mutual information ${pmi} bits`)) : [make("span", { class: "note" }, "none")])));
    if (card.contexts.length) parts.push(make("div", { class: "what" }, "where the gate was largest"));
    for (const [before, here, after, gate] of card.contexts) {
      parts.push(make("div", { class: "context mono", title: `gate ${gate}` }, make("span", {}, before), make("mark", {}, here), make("span", {}, after)));
    }
  }
  return make("article", { class: "card", style: `--c:${run.colours[expert]}` }, ...parts);
}

function drawCards(root, run) {
  const box = $(".cards", root);
  if (!box) return;
  box.style.setProperty("--card-width", run.experts > 16 ? "285px" : "370px");
  const cards = run.data.cards[state.place], order = cards.map((_, expert) => expert);
  const by = $(".sort", root)?.value ?? "index";
  if (by !== "index") order.sort((a, b) => (cards[b][by] ?? -1) - (cards[a][by] ?? -1));
  box.replaceChildren(...order.map((expert) => drawCard(run, cards[expert], expert)));
}

const alpha = (hex, share) => hex + Math.round(255 * share).toString(16).padStart(2, "0");

function colourText(root, run) {
  const text = run.data?.text, box = $(".text", root);
  if (!text || !box) return;
  if (!box.childElementCount) {
    box.append(...text.pieces.map((piece, at) => make("span", { "data-at": at }, piece)));
    box.addEventListener("mousemove", (event) => {
      const at = event.target.dataset?.at;
      if (at === undefined) return hideTip();
      const chosen = text.choices[state.place][at], gates = text.gates[state.place][at];
      const lines = chosen.map((expert, rank) => expert < 0 ? "" : `expert ${expert}, gate ${(gates[rank] / 100).toFixed(2)}`).filter(Boolean);
      showTip(event, `${lines.join("\n") || "no expert"}\nloss of the next token ${(text.loss[at] / 100).toFixed(2)}`);
    });
    box.addEventListener("mouseleave", hideTip);
  }
  const choices = text.choices[state.place], share = dark() ? 0.5 : 0.42;
  $$("span", box).forEach((span, at) => {
    const expert = choices[at][0], off = state.only !== null && state.only !== expert;
    span.style.background = expert < 0 || off ? "none" : alpha(run.colours[expert], share);
    span.style.opacity = off ? 0.45 : 1;
  });
  $(".key", root).replaceChildren(...run.colours.map((colour, expert) => make("button", {
    type: "button", style: `--c:${colour}`, class: state.only !== null && state.only !== expert ? "off" : "",
    on: { click: () => { state.only = state.only === expert ? null : expert; colourText(root, run); } },
  }, String(expert))));
}

function drawPairs(root, run) {
  const canvas = $(".pairs canvas", root);
  if (!canvas) return;
  const counts = run.data.coactivation[state.place], size = run.experts;
  const own = counts.map((row, expert) => row[expert]), lift = (x, y) => run.data.lift[state.place][y][x];
  paint(canvas, size, size, (x, y) => x === y ? (dark() ? [26, 31, 38] : [255, 255, 255]) : loadColour(lift(x, y)));
  canvas.style.aspectRatio = "1";
  canvas.onmousemove = (event) => {
    const [x, y] = cellAt(event, canvas);
    showTip(event, x === y ? `expert ${x}: ${own[x]} tokens` : `experts ${y} and ${x}: ${counts[y][x]} tokens, ${lift(x, y).toFixed(2)} × what their loads explain`);
  };
  canvas.onmouseleave = hideTip;
  const order = [];
  for (let y = 0; y < size; y++) for (let x = 0; x < y; x++) order.push([counts[y][x], y, x]);
  order.sort((a, b) => b[0] - a[0]);
  const swatch = (expert) => make("span", { class: "swatch", style: `--c:${run.colours[expert]}` }, String(expert));
  $(".pairs tbody", root).replaceChildren(...order.slice(0, 10).map(([count, y, x]) => make("tr", {},
    make("td", {}, swatch(x), swatch(y)), make("td", {}, count.toLocaleString("en")), make("td", {}, lift(x, y).toFixed(2) + " ×"))));
}

function render() {
  $$(".run").forEach((root) => { root.hidden = Number(root.dataset.run) !== state.run; });
  const run = DATA.runs[state.run], root = $(`.run[data-run="${state.run}"]`);
  state.place = Math.max(0, Math.min(state.place, run.layers.length - 1));
  $("#layers")?.replaceChildren(...run.layers.map((layer, place) => make("button", {
    type: "button", "aria-pressed": String(place === state.place), on: { click: () => choose({ place }) } }, String(layer))));
  $$(".of-layers").forEach((element) => { element.hidden = !run.data; });
  $$("#runs button").forEach((button, at) => button.setAttribute("aria-pressed", String(at === state.run)));
  $$(".layer-name").forEach((element) => { element.textContent = run.layers.length ? `layer ${run.layers[state.place]}` : ""; });
  drawHeat(root, run);
  if (!run.data) return;
  drawCards(root, run);
  colourText(root, run);
  if (run.data.coactivation.length) drawPairs(root, run);
}

function choose(change) {
  Object.assign(state, { only: null }, change);
  const run = DATA.runs[state.run], words = [];
  if (run.layers.length) words.push(`layer=${run.layers[Math.min(state.place, run.layers.length - 1)]}`);
  if (DATA.runs.length > 1) words.push(`run=${state.run}`);
  history.replaceState(null, "", "#" + words.join("&"));
  render();
}

function readHash() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (!words.has("layer") && !words.has("run")) return false;
  state.run = Math.max(0, Math.min(Number(words.get("run")) || 0, DATA.runs.length - 1));
  const place = DATA.runs[state.run].layers.indexOf(Number(words.get("layer")));
  state.place = Math.max(place, 0);
  return true;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  render();
}

$$("figure[data-chart]").forEach((figure) => {
  const chart = DATA.charts[figure.dataset.chart], svg = $("svg", figure), hair = $(".hair", svg);
  if (!hair) return;
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const nearest = (places) => places.reduce((best, place, at) => Math.abs(place - x) < Math.abs(places[best] - x) ? at : best, 0);
    const found = chart.curves.map((curve) => { const at = nearest(curve.px); return { at, curve, distance: Math.abs(curve.px[at] - x) }; });
    const closest = found.reduce((one, other) => (other.distance < one.distance ? other : one));
    hair.setAttribute("x1", closest.curve.px[closest.at]);
    hair.setAttribute("x2", closest.curve.px[closest.at]);
    showTip(event, `${chart.label} ${closest.curve.x[closest.at]}\n` + found.slice(0, 14).map(({ curve, at }) => `${curve.name}: ${curve.y[at]}`).join("\n"));
  });
  svg.addEventListener("mouseleave", () => { hideTip(); hair.setAttribute("x1", -9); hair.setAttribute("x2", -9); });
});
$$(".measure").forEach((box) => $$("button", box).forEach((button) => button.addEventListener("click", () => {
  state.measure = button.dataset.measure;
  $$(".measure button").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.measure === state.measure)));
  render();
})));
$$(".sort").forEach((select) => select.addEventListener("change", render));
$$("#runs button").forEach((button, at) => button.addEventListener("click", () => choose({ run: at })));
$("#theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
$$("nav a").forEach((link) => link.addEventListener("click", (event) => {
  const section = $(`.run:not([hidden]) section[data-name="${link.hash.slice(1)}"]`);
  if (!section) return;
  event.preventDefault();
  section.scrollIntoView();
}));
addEventListener("hashchange", () => { if (readHash()) render(); });
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const layers = DATA.runs[state.run].layers, digit = layers.indexOf(Number(event.key));
  if (event.key === "ArrowLeft") choose({ place: Math.max(state.place - 1, 0) });
  else if (event.key === "ArrowRight") choose({ place: Math.min(state.place + 1, layers.length - 1) });
  else if (/^\d$/.test(event.key) && digit >= 0) choose({ place: digit });
});
readHash();
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
