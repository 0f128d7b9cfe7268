"use strict";
// The list: search, sort, filter, and a virtual list that holds the visible rows only. dashboard_feature.js follows.
// Texts reach the page through textContent; no string is ever read as HTML.

const byId = (id) => document.getElementById(id);
const index = JSON.parse(byId("index").textContent);
const total = index.feature.length;
const ROW = 62; // px, --row of the style sheet
const AROUND = 8; // rows that are made above and below the visible ones
const ui = {
  panes: byId("panes"), list: byId("list"), rows: byId("rows"), detail: byId("detail"), search: byId("search"),
  sort: byId("sort"), filter: byId("filter"), direction: byId("direction"), count: byId("count"), theme: byId("theme"),
};
const state = { order: [], active: 0, open: null, descending: false, made: new Map() };
const place = new Map(index.feature.map((feature, i) => [feature, i]));
const columns = new Map(index.columns.map((column) => [column.key, column]));

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "text") made.textContent = wellFormed(value);
    else if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : wellFormed(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function wellFormed(text) {
  return String(text).replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
}

// Characters that cannot be seen, or that would move what stands around them, are shown by name.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
function visible(text) {
  return wellFormed(text).replace(UNSEEN, (character) => {
    const code = character.charCodeAt(0);
    if (character === "\n") return "↵";
    if (character === "\t") return "⇥";
    if (code < 32) return String.fromCharCode(0x2400 + code);
    if (code === 127) return "\u2421";
    return `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

function tokenElement(text) {
  const shown = element("bdi", { class: "token" });
  const spaces = /^ +/.exec(text)?.[0].length ?? 0;
  if (spaces) shown.append(element("span", { class: "mark", text: "␣".repeat(spaces), "aria-hidden": "true" }));
  const rest = visible(text.slice(spaces));
  shown.append(rest || element("span", { class: "mark", text: spaces ? "" : "(empty)" }));
  return shown;
}

const whole = new Intl.NumberFormat("en");
function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(2).replaceAll("-", "−");
  return Number(size >= 1000 ? value.toFixed(0) : value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }).replace("-", "−");
}
function share(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "never";
  const percent = value * 100;
  return `${percent >= 10 ? percent.toFixed(0) : percent >= 0.01 ? Number(percent.toPrecision(2)) : percent.toExponential(1)}\u00a0%`;
}
const formatted = (column, i) => (column.kind === "share" ? share : number)(column.values[i]);

const nameOf = (i) => index.name[i] || "";
const explanationOf = (i) => index.explanation[i] || "";
const labelOf = (i) => index.label[i] || "";
const tokensOf = (i) => index.tokens[i] || [];
const deadAt = (i) => index.dead.length > 0 && index.dead[i] === 1;
const headOf = (i) => nameOf(i) || explanationOf(i) || "";

function badge(i) {
  const label = labelOf(i);
  if (label) return element("span", { class: `badge ${label}` }, element("span", { text: label === "intended" ? "✓" : "✕", "aria-hidden": "true" }), label);
  return deadAt(i) ? element("span", { class: "badge dead", text: "dead" }) : null;
}

// -- search, sort, filter ---------------------------------------------------------------------------------------------

let haystack = null; // made at the first search: lower-case text of each feature
function texts() {
  haystack ??= index.feature.map((_, i) => `${nameOf(i)}\n${explanationOf(i)}\n${tokensOf(i).join("\n")}`.toLowerCase());
  return haystack;
}

const FILTERS = [
  ["all", "all features", () => true, true],
  ["alive", "active ones", (i) => !deadAt(i), index.dead.length > 0],
  ["dead", "dead ones", deadAt, index.dead.length > 0],
  ["intended", "intended", (i) => labelOf(i) === "intended", index.label.length > 0],
  ["unintended", "not intended", (i) => labelOf(i) === "unintended", index.label.length > 0],
  ["unlabelled", "not judged", (i) => !labelOf(i), index.label.length > 0],
  ["explained", "explained", (i) => Boolean(headOf(i)), index.explanation.length > 0 || index.name.length > 0],
  ["steered", "with steering samples", (i) => index.samples[i] === 1, index.samples.length > 0],
].filter((filter) => filter[3]);

const SORTS = [
  ["feature", "number", false, (i) => index.feature[i]],
  ...index.columns.map((column) => [column.key, column.name.toLowerCase().replace(/^auroc/, "AUROC"), true, (i) => column.values[i]]),
  ...(index.label.length ? [["label", "label", false, (i) => ({ unintended: 0, intended: 1 })[labelOf(i)] ?? null]] : []),
  ...(index.explanation.length || index.name.length ? [["text", "name", false, (i) => headOf(i).toLowerCase() || null]] : []),
];

function choose() {
  const words = ui.search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const filter = FILTERS.find((one) => one[0] === ui.filter.value) || FILTERS[0];
  const key = (SORTS.find((one) => one[0] === ui.sort.value) || SORTS[0])[3];
  const where = words.length ? texts() : null;
  const found = [];
  for (let i = 0; i < total; i += 1) {
    if (!filter[2](i)) continue;
    const own = String(index.feature[i]);
    if (words.every((word) => where[i].includes(word) || own === word.replace(/^#/, ""))) found.push(i);
  }
  const sign = state.descending ? -1 : 1;
  const keys = found.map(key);
  state.order = found.map((_, n) => n).sort((a, b) => {
    const x = keys[a], y = keys[b];
    if (x === null || y === null) return (x === null) - (y === null) || a - b; // unknown ones come last either way
    return x < y ? -sign : x > y ? sign : a - b;
  }).map((n) => found[n]);
  state.active = Math.max(0, state.open === null ? 0 : state.order.indexOf(state.open));
  ui.count.textContent = found.length === total ? `${whole.format(total)} features` : `${whole.format(found.length)} of ${whole.format(total)} features`;
  ui.rows.style.height = `${found.length * ROW}px`;
  ui.list.scrollTop = Math.max(0, state.active * ROW - ui.list.clientHeight / 2);
  clearRows();
  draw();
}

// -- the virtual list -------------------------------------------------------------------------------------------------

function clearRows() {
  state.made.clear();
  ui.rows.replaceChildren();
  if (!state.order.length) ui.rows.append(element("p", { class: "none", text: "No feature fits. Try fewer words, or show all features." }));
}

function draw() {
  const first = Math.max(0, Math.floor(ui.list.scrollTop / ROW) - AROUND);
  const stop = Math.min(state.order.length, Math.ceil((ui.list.scrollTop + (ui.list.clientHeight || 800)) / ROW) + AROUND);
  for (const [position, row] of state.made) {
    if (position < first || position >= stop) { row.remove(); state.made.delete(position); }
  }
  const fresh = document.createDocumentFragment();
  for (let position = first; position < stop; position += 1) {
    if (state.made.has(position)) continue;
    const row = makeRow(position);
    state.made.set(position, row);
    fresh.append(row);
  }
  ui.rows.append(fresh);
  mark();
}

function makeRow(position) {
  const i = state.order[position];
  const feature = index.feature[i];
  const head = headOf(i);
  const tokens = tokensOf(i).map((token) => visible(token.trim() || token)).join(" · ");
  const column = columns.get(ui.sort.value) || columns.get("frequency") || index.columns[0];
  const row = element(
    "div",
    { class: "row", role: "option", id: `option-${feature}`, "aria-setsize": state.order.length, "aria-posinset": position + 1, "data-position": position },
    element("div", { class: "what" }, element("span", { class: "number", text: `#${feature}` }), element("bdi", { text: visible(head || tokens || "no explanation") })),
    element("div", { class: "aside" }, badge(i)),
    element("div", { class: "more" }, element("bdi", { text: (head && tokens) || (deadAt(i) ? "active on no token" : head ? "" : "no explanation; the tokens that it raises") })),
    element("div", { class: "aside", text: column ? formatted(column, i) : "", title: column ? column.name : null }),
  );
  row.style.transform = `translateY(${position * ROW}px)`;
  return row;
}

function mark() {
  for (const [position, row] of state.made) {
    row.classList.toggle("active", position === state.active);
    row.setAttribute("aria-selected", String(state.order[position] === state.open));
  }
  const i = state.order[state.active];
  if (i === undefined || !state.made.has(state.active)) ui.list.removeAttribute("aria-activedescendant");
  else ui.list.setAttribute("aria-activedescendant", `option-${index.feature[i]}`);
}

function activate(position) {
  if (!state.order.length) return;
  state.active = Math.min(state.order.length - 1, Math.max(0, position));
  const top = state.active * ROW;
  if (top < ui.list.scrollTop) ui.list.scrollTop = top;
  else if (top + ROW > ui.list.scrollTop + ui.list.clientHeight) ui.list.scrollTop = top + ROW - ui.list.clientHeight;
  draw();
}

function openAt(position) {
  const i = state.order[position];
  if (i === undefined) return;
  state.active = position;
  go(`#feature-${index.feature[i]}`);
}

function go(hash) {
  if (location.hash === hash) route();
  else location.hash = hash;
}

function step(by) {
  const at = state.order.indexOf(state.open);
  openAt(Math.min(state.order.length - 1, Math.max(0, (at < 0 ? state.active : at) + by)));
}

// -- theme ------------------------------------------------------------------------------------------------------------

const THEMES = { "": ["◐", "as the system has them"], light: ["☀", "light"], dark: ["☾", "dark"] };
function remembered() {
  try { return localStorage.getItem("theme") || ""; } catch { return ""; } // a page of a file may not be allowed to
}
function setTheme(theme) {
  const [sign, told] = THEMES[theme] || THEMES[""];
  if (theme in THEMES && theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme-sign").textContent = sign;
  ui.theme.setAttribute("aria-label", `Colours: ${told}`);
  ui.theme.title = `Colours: ${told}`;
  try { localStorage.setItem("theme", theme); } catch { /* it lasts as long as the page */ }
}
