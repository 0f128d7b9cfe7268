// One feature, the overview, and what keys do.

const chunks = new Map();
function chunkOf(number) {
  if (!chunks.has(number)) {
    chunks.set(number, readChunk(number));
    if (chunks.size > 12) chunks.delete(chunks.keys().next().value);
  }
  return chunks.get(number);
}
async function readChunk(number) {
  if (document.readyState === "loading") await new Promise((ready) => document.addEventListener("DOMContentLoaded", ready, { once: true }));
  const holder = byId(`chunk-${number}`);
  if (holder.type === "application/json") return JSON.parse(holder.textContent);
  if (typeof DecompressionStream === "undefined") throw new Error("This browser cannot open compressed data; one of 2023 or later can.");
  const bytes = Uint8Array.from(atob(holder.textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

function svg(name, properties, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(properties)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
let charts = 0;
// Bars of equal width; ticks: [place in bars, text].
function barChart({ counts, ticks, title, summary }) {
  const [width, height, left, bottom, top] = [340, 150, 38, 24, 10];
  const most = Math.max(...counts, 1), each = (width - left - 4) / counts.length, id = `chart-${(charts += 1)}`;
  const tall = height - bottom - top;
  const drawn = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": `${id}-t ${id}-d` });
  const [heading, told] = [svg("title", { id: `${id}-t` }), svg("desc", { id: `${id}-d` })];
  heading.textContent = title;
  told.textContent = summary;
  drawn.append(heading, told);
  for (const part of [0.5, 1]) {
    const y = top + tall * (1 - part);
    drawn.append(svg("line", { class: "rule", x1: left, x2: width - 4, y1: y, y2: y }));
    const text = svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" });
    text.textContent = compact.format(Math.round(most * part));
    if (most * part >= 1) drawn.append(text);
  }
  counts.forEach((count, n) => {
    if (!count) return;
    const tallness = Math.max(1.5, (count / most) * tall);
    drawn.append(svg("rect", { class: "bar", x: left + n * each + 0.5, y: top + tall - tallness, width: Math.max(1, each - 1), height: tallness, rx: Math.min(2, each / 4) }));
  });
  drawn.append(svg("line", { class: "axis", x1: left, x2: width - 4, y1: top + tall, y2: top + tall }));
  for (const [at, label] of ticks) {
    const x = left + at * each;
    drawn.append(svg("line", { class: "axis", x1: x, x2: x, y1: top + tall, y2: top + tall + 4 }));
    const text = svg("text", { x, y: height - 7, "text-anchor": at > counts.length - 0.5 ? "end" : "middle" });
    text.textContent = label;
    drawn.append(text);
  }
  return drawn;
}
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

function dataTable(caption, titles, cells) {
  const told = titles.map((_, n) => n).filter((n) => cells.some((row) => !["", "–", null].includes(row[n]))); // columns that say something
  const [headings, rows] = [told.map((n) => titles[n]), cells.map((row) => told.map((n) => row[n]))];
  const numeric = headings.map((_, n) => rows.some((row) => typeof row[n] === "number"));
  const cellOf = (cell, n) => element("td", { class: numeric[n] ? "n" : null, text: typeof cell === "number" ? number(cell) : cell ?? "–" });
  const head = element("tr", {}, ...headings.map((text, n) => element("th", { scope: "col", class: numeric[n] ? "n" : null, text })));
  const body = rows.map((row) => element("tr", {}, ...row.map(cellOf)));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", { class: "unseen", text: caption }), element("thead", {}, head), element("tbody", {}, ...body)));
}
const folded = (text, content) => element("details", {}, element("summary", { text }), content);
function card(title, note, ...content) {
  return element("section", { class: "card" }, element("h3", { text: title }), note ? element("p", { class: "note", text: note }) : null, ...content);
}
const tile = (name, value, more) => element("div", { class: "tile", title: more }, element("dt", { text: name }), element("dd", { text: value }, more ? element("small", { class: "unseen", text: `, ${more}` }) : null));

// -- the parts of a feature -------------------------------------------------------------------------------------------

function histogramCard([edges, counts, tokens]) {
  const active = counts.reduce((sum, count) => sum + count, 0);
  let passed = 0;
  const middle = counts.findIndex((count) => (passed += count) * 2 >= active);
  const summary = `Active on ${whole.format(active)} of ${whole.format(tokens)} tokens (${share(active / tokens)}). Half of its activations are below ${number(edges[middle + 1])}, all between ${number(edges[0])} and ${number(edges.at(-1))}.`;
  const places = counts.length > 4 ? [0, Math.round(counts.length / 3), Math.round((2 * counts.length) / 3), counts.length] : [0, counts.length];
  const rows = counts.map((count, n) => [edges[n], edges[n + 1], count]);
  return card("Activations", `${summary} The axis is logarithmic.`,
    barChart({ counts, ticks: places.map((n) => [n, number(Number(edges[n].toPrecision(2)))]), title: "Histogram of activations", summary }),
    folded("Histogram as a table", dataTable("Histogram of activations", ["from", "to", "tokens"], rows)));
}

function logitsCard(top, bottom) {
  const most = Math.max(...[...top, ...bottom].map((pair) => Math.abs(pair[1] ?? 0)), 1e-9);
  const side = (pairs, name, title) => element("div", { class: name }, element("h4", { text: title }),
    element("ol", { class: "logits" }, ...pairs.map(([token, weight]) => {
      const bar = element("i", {});
      bar.style.width = `${(100 * Math.abs(weight ?? 0)) / most}%`;
      return element("li", {}, tokenElement(token), element("span", { class: "weight", text: `${weight > 0 ? "+" : ""}${number(weight)}` }), element("span", { class: "track", "aria-hidden": "true" }, bar));
    })));
  return card("What it writes", "Tokens whose logits a unit of this feature raises and lowers most.",
    element("div", { class: "ends" }, side(top, "up", "Raises"), side(bottom, "bottom", "Lowers")));
}

let showNumbers = false;
function spansCard(spans) {
  const most = Math.max(...spans.flatMap((span) => span[3].map((value) => Math.abs(value ?? 0))), 1e-9);
  const coloured = spans.some((span) => span[3].length);
  const readout = element("p", { class: "readout", "aria-live": "polite" });
  const rest = coloured ? "Point at a token, or reach it with Tab and the left and right arrow keys, for its activation." : "";
  readout.textContent = rest;
  const tell = (token) => {
    readout.replaceChildren(element("b", { text: `“${token.dataset.text}”` }), ` ${token.dataset.on} · ${Math.round(100 * token.style.getPropertyValue("--a"))} % of the strongest here`);
  };
  const list = element("ol", { class: `spans${showNumbers ? " numbers" : ""}` });
  spans.forEach(([score, row, tokens, values, peak], n) => {
    const line = element("p", { class: "span", dir: "auto" });
    tokens.forEach((token, k) => {
      const value = values[k];
      const shown = element("span", { class: k === peak ? "t peak" : "t", text: visible(k ? token : token.trimStart()) });
      if (value) {
        shown.style.setProperty("--a", Math.min(1, Math.abs(value) / most).toFixed(3));
        shown.dataset.on = number(value);
        shown.dataset.text = visible(token.trim() || token);
        shown.title = `activation ${number(value)}`;
        shown.tabIndex = -1;
        shown.addEventListener("focus", () => tell(shown));
        shown.addEventListener("pointerenter", () => tell(shown));
      }
      line.append(shown);
    });
    const focusable = [...line.querySelectorAll("[data-on]")];
    const start = line.querySelector(".peak[data-on]") || focusable[0];
    if (start) start.tabIndex = 0;
    line.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const at = focusable.indexOf(document.activeElement);
      if (!by || at < 0 || !focusable[at + by]) return;
      event.preventDefault();
      focusable[at].tabIndex = -1;
      focusable[at + by].tabIndex = 0;
      focusable[at + by].focus();
    });
    const strongest = peak >= 0 && tokens[peak] ? `, strongest at “${visible(tokens[peak].trim())}”` : "";
    list.append(element("li", {}, element("div", { class: "score" }, element("span", { class: "unseen", text: `Span ${n + 1}, activation ` }), number(score), element("span", { class: "unseen", text: strongest }), row === null ? null : element("small", { text: `row ${row}` })), line));
  });
  const box = element("input", { type: "checkbox" });
  box.checked = showNumbers;
  box.addEventListener("change", () => { showNumbers = box.checked; list.classList.toggle("numbers", showNumbers); });
  const head = element("div", { class: "card-head" }, element("h3", { text: "Where it is strongest" }), coloured ? element("label", { class: "toggle" }, box, "Numbers at every token") : null);
  const note = `${index.activation ? `Scores: ${visible(index.activation)}. ` : ""}${coloured ? "The strongest token is bold; shade and underline grow with the activation." : ""}`;
  return element("section", { class: "card" }, head, note ? element("p", { class: "note", text: note }) : null, list, coloured ? readout : null);
}

function samplesCard(samples) {
  const prompts = new Map();
  for (const sample of samples) prompts.set(sample[0], [...(prompts.get(sample[0]) || []), sample]);
  const one = ([, text, setting, perplexity]) => element("article", { class: setting ? "sample" : "sample plain" },
    element("header", {}, element("b", { text: visible(setting) || "unsteered" }), perplexity === null ? null : element("span", { text: `perplexity ${number(perplexity)}` })),
    element("p", { dir: "auto", text: visible(text).replaceAll("↵", "\n") }));
  const parts = [...prompts].flatMap(([prompt, rows]) => [
    element("p", { class: "prompt", dir: "auto" }, element("span", { class: "unseen", text: "Prompt: " }), visible(prompt).replaceAll("↵", "\n")),
    element("div", { class: "beside" }, element("div", {}, ...rows.filter((row) => !row[2]).map(one)), element("div", {}, ...rows.filter((row) => row[2]).map(one))),
  ]);
  return card("Steering", "The same prompt continued with this feature changed, by strength, beside the model as it is.", ...parts);
}

function neighboursCard(near) {
  const chip = ([feature, cosine]) => {
    const i = place.get(feature);
    const about = i === undefined ? "" : visible(headOf(i)) || tokensOf(i).slice(0, 4).map((token) => visible(token.trim())).join(" · ");
    const parts = [element("b", { text: `#${feature}` }), about ? element("span", {}, element("bdi", { text: about })) : null, element("i", { text: number(cosine) })];
    return element("li", {}, i === undefined ? element("span", {}, ...parts.filter(Boolean).flatMap((part) => [part, " "])) : element("a", { href: `#feature-${feature}` }, ...parts));
  };
  return card("Neighbours", "Features that write in nearly the same direction, with the cosine of their decoder rows.", element("ul", { class: "chips" }, ...near.map(chip)));
}

function raisedCard(rows) {
  const told = "Its effect on what the model says in some texts, summed over tokens: activation times gradient, or as attribute measured it.";
  const cells = rows.map(([target, effect, token, text]) => [visible(target), effect > 0 ? `+${number(effect)}` : number(effect), visible(token), visible(text)]);
  return card("What it raises", told, dataTable("What it raises", ["target", "effect", "most at", "in the text"], cells));
}

function judgementsCard(judgements, label) {
  const note = label ? `Counts as ${label === "intended" ? "intended by the task" : "not intended by the task"}.` : "";
  return card("Judgement", note, ...judgements.map(([said, reason]) => element("div", {}, element("p", {}, element("span", { class: "badge", text: `judge: ${visible(said) || "no label"}` })), reason ? element("p", { class: "reason", dir: "auto", text: visible(reason).replaceAll("↵", "\n") }) : null)));
}

// Cards in a wide column and a narrow one, or in one column where all are of a kind.
function columnsOf(name, ...sides) {
  const filled = sides.map((cards) => cards.filter(Boolean)).filter((cards) => cards.length);
  if (filled.length < 2) return element("div", {}, ...filled.flat());
  return element("div", { class: name }, ...filled.map((cards) => element("div", {}, ...cards)));
}

async function openFeature(feature, focus) {
  const i = place.get(feature);
  if (i === undefined) return overview(`There is no feature ${feature} on this page.`, focus);
  state.open = i;
  const position = state.order.indexOf(i);
  if (position >= 0) activate(position);
  ui.panes.classList.add("opened");
  ui.detail.setAttribute("aria-busy", "true");
  document.title = `Feature ${feature} · ${index.title}`;
  let found;
  try {
    found = (await chunkOf(Math.floor(i / index.chunk)))[i % index.chunk];
  } catch (error) {
    found = { failure: String(error.message || error) };
  }
  if (state.open !== i) return; // another one was opened meanwhile
  const at = state.order.indexOf(i);
  const heading = element("h2", { id: "opened", tabindex: "-1", text: `Feature ${feature}` });
  const button = (text, told, enabled, action) => element("button", { type: "button", "aria-label": told, disabled: !enabled, onclick: action }, ...text.split("|").map((part) => element("span", { text: part, "aria-hidden": /^[‹›]$/.test(part) ? "true" : null })));
  const explained = nameOf(i) && explanationOf(i) ? explanationOf(i) : headOf(i);
  const tiles = index.columns.filter((column) => column.values[i] !== null).map((column) => tile(column.name, formatted(column, i), column.help));
  const parts = [
    element("div", { class: "crumbs" }, element("div", { class: "buttons" }, backButton(), button("‹| Previous", "Previous feature of the list", at > 0, () => step(-1)), button("Next |›", "Next feature of the list", at >= 0 && at < state.order.length - 1, () => step(1))), element("p", { class: "note", text: at < 0 ? "not in the list as it is filtered" : `${whole.format(at + 1)} of ${whole.format(state.order.length)}` })),
    element("div", { class: "headline" }, heading, nameOf(i) ? element("span", { class: "explanation" }, element("bdi", { text: visible(nameOf(i)) })) : null, badge(i)),
    explained && explained !== nameOf(i) ? element("p", { class: "explanation", dir: "auto", text: visible(explained) }) : null,
    found.verified ? element("p", { class: "note", text: `A second look at the explanation says: ${visible(found.verified)}` }) : null,
    found.failure ? element("p", { class: "note", role: "alert", text: found.failure }) : null,
    tiles.length ? element("dl", { class: "tiles" }, ...tiles) : null,
    columnsOf("columns", [found.spans && spansCard(found.spans), found.samples && samplesCard(found.samples), found.raised && raisedCard(found.raised), found.judgements && judgementsCard(found.judgements, labelOf(i))],
      [found.top && logitsCard(found.top, found.bottom), found.histogram && histogramCard(found.histogram), found.neighbours && neighboursCard(found.neighbours)]),
  ];
  show(parts.filter(Boolean), focus ? heading : null);
}

const backButton = () => element("button", { type: "button", class: "back", onclick: backToList }, element("span", { text: "←", "aria-hidden": "true" }), " Features");

function show(parts, focused) {
  ui.detail.replaceChildren(...parts);
  ui.detail.removeAttribute("aria-busy");
  ui.detail.scrollTop = 0;
  ui.detail.classList.remove("arrived");
  void ui.detail.offsetWidth;
  ui.detail.classList.add("arrived");
  mark();
  focused?.focus({ preventScroll: true });
}

function overview(told, focus) {
  state.open = null;
  document.title = index.title;
  ui.panes.classList.toggle("opened", Boolean(focus));
  const heading = element("h2", { id: "opened", tabindex: "-1", text: "Overview" });
  const labels = { intended: 0, unintended: 0 };
  index.label.forEach((label) => { if (label) labels[label] += 1; });
  const tiles = [tile("Features", whole.format(total))];
  if (index.dead.length) tiles.push(tile("Dead", whole.format(index.dead.filter(Boolean).length), "active on no token"));
  const explained = index.feature.filter((_, i) => explanationOf(i) || nameOf(i)).length;
  if (explained) tiles.push(tile("Explained", whole.format(explained)));
  if (index.label.length) tiles.push(tile("Intended", whole.format(labels.intended)), tile("Not intended", whole.format(labels.unintended)));
  const frequency = columns.get("frequency");
  const keys = [["/", "search"], ["↑ ↓", "move in the list; also Page up, Page down, Home, End"], ["Enter", "open the feature"], ["[ ]", "the feature before, the one after"], ["Esc", "back to the list"]];
  const cards = [
    [frequency && frequencyCard(frequency.values.filter((value) => value > 0))],
    [index.facts.length ? card("What this is", "", element("dl", { class: "keys" }, ...index.facts.flatMap(([name, value]) => [element("dt", { class: "note", text: visible(name) }), element("dd", { text: visible(value) })]))) : null,
      card("Keys", "", element("dl", { class: "keys" }, ...keys.flatMap(([key, what]) => [element("dt", {}, element("kbd", { text: key })), element("dd", { text: what })])))],
  ];
  const rows = index.results.map(([suite, metric, method, value, low, high, n]) => [suite, metric, method || "", value ?? "–", low === null ? "–" : `${number(low)} to ${number(high)}`, n ?? "–"]);
  show([
    element("div", { class: "crumbs" }, element("div", { class: "buttons" }, backButton())),
    element("div", { class: "headline" }, heading),
    told ? element("p", { class: "note", role: "alert", text: told }) : null,
    element("dl", { class: "tiles" }, ...tiles),
    columnsOf("columns even", ...cards),
    rows.length ? card("Measured", "", dataTable("What was measured", ["suite", "metric", "of", "value", "95 % interval", "n"], rows)) : null,
  ].filter(Boolean), focus ? heading : null);
}

function frequencyCard(values) {
  const logs = values.map(Math.log10);
  const [low, bins] = [Math.floor(logs.reduce((a, b) => Math.min(a, b), -2)), 6];
  const counts = new Array(-low * bins).fill(0);
  for (const value of logs) counts[Math.min(counts.length - 1, Math.floor((value - low) * bins))] += 1;
  const sorted = [...values].sort((a, b) => a - b);
  const summary = `Half of the active features fire on fewer than ${share(sorted[Math.floor(sorted.length / 2)] ?? 0)} of tokens; the most frequent one on ${share(sorted.at(-1) ?? 0)}.`;
  const ticks = Array.from({ length: -low + 1 }, (_, n) => [n * bins, `${Number((100 * 10 ** (low + n)).toPrecision(1))} %`]);
  const rows = counts.map((count, n) => [share(10 ** (low + n / bins)), share(10 ** (low + (n + 1) / bins)), count]);
  return card("How often features fire", summary, barChart({ counts, ticks, title: "Features by firing frequency", summary }),
    folded("As a table", dataTable("Features by firing frequency", ["from", "to", "features"], rows)));
}

// -- keys and links ---------------------------------------------------------------------------------------------------

function backToList() {
  if (location.hash && getComputedStyle(ui.list).display !== "none") ui.panes.classList.remove("opened");
  ui.list.focus({ preventScroll: true });
  activate(state.active);
}

function route(focus = true) {
  const asked = /^#feature-(\d+)$/.exec(location.hash);
  if (asked) return openFeature(Number(asked[1]), focus);
  if (location.hash === "#list") return backToList();
  return overview("", focus && location.hash === "#overview");
}

ui.list.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(ui.list.clientHeight / ROW) - 1);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key in moves && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    activate(Math.max(0, Math.min(state.order.length - 1, state.active + moves[event.key])));
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    openAt(state.active);
  }
});
ui.list.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
ui.rows.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (row) openAt(Number(row.dataset.position));
});
ui.search.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "Enter") follow();
  if (event.key === "ArrowDown") { event.preventDefault(); ui.list.focus(); }
  else if (event.key === "Enter") openAt(0);
  else if (event.key === "Escape") { event.stopPropagation(); if (ui.search.value) { ui.search.value = ""; choose(); } else ui.list.focus(); }
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input[type=search], select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    ui.panes.classList.remove("opened");
    ui.search.focus();
    ui.search.select();
  } else if (event.key === "Escape" && !typing) backToList();
  else if (event.key === "[" && !typing) step(-1);
  else if (event.key === "]" && !typing) step(1);
});
let waiting = 0; // what was typed is followed at the next frame, or by the key that comes before it
function follow() {
  if (!waiting) return;
  cancelAnimationFrame(waiting);
  waiting = 0;
  choose();
}
ui.search.addEventListener("input", () => { waiting ||= requestAnimationFrame(follow); });
function showDirection() {
  const told = state.descending ? "Descending order" : "Ascending order";
  ui.direction.firstElementChild.textContent = state.descending ? "↓" : "↑";
  ui.direction.setAttribute("aria-label", told);
  ui.direction.title = told;
}
ui.sort.addEventListener("change", () => { state.descending = SORTS.find((one) => one[0] === ui.sort.value)[2]; showDirection(); choose(); });
ui.direction.addEventListener("click", () => { state.descending = !state.descending; showDirection(); choose(); });
ui.filter.addEventListener("change", choose);
ui.theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme || "") + 1) % names.length]);
});
byId("overview-button").addEventListener("click", () => { if (location.hash === "#overview") overview("", true); else location.hash = "#overview"; });
window.addEventListener("hashchange", () => route());
window.addEventListener("resize", () => requestAnimationFrame(draw));

setTheme(remembered());
byId("facts").textContent = index.facts.map(([name, value]) => visible(`${name}: ${value}`)).join(" · ");
ui.sort.append(...SORTS.map(([key, text]) => element("option", { value: key, text })));
ui.filter.append(...FILTERS.map(([key, text]) => element("option", { value: key, text })));
choose();
route(false);
performance.mark("first-content");
