// The search page. Everything it asks for lies beside it: no other host is contacted.
const $ = (selector) => document.querySelector(selector);
const TYPING_STOPS_MS = 250, KEPT_ANSWERS = 40, IMAGES_OF_OBJECT = 4;

const state = {
  info: null, index: null, image: null, imageUrl: "", results: [], answer: null, opened: -1, asked: 0, explained: 0,
};
const answers = new Map(); // of text queries, so that the switch of refinement answers at once

// -- asking ----------------------------------------------------------------------------------------------------------

class Problem extends Error {
  constructor(message, fix = "") { super(message); this.fix = fix; }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service does not answer.", "Is it still running?");
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  if (response.status === 401) $("#login").open || $("#login").showModal();
  let said = {};
  try { said = await response.json(); } catch { /* not one of ours: a proxy between, say */ }
  throw new Problem(said.message || `The service answers ${response.status}.`, said.fix);
}

const url = (path, parameters = {}) => {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters))
    for (const one of [value].flat()) if (one !== null && one !== "") query.append(name, one);
  return `${path}?${query}`;
};
const picture = (kind, id) =>
  url(`${kind}/${encodeURIComponent(id)}`, { index: state.index.name, generation: state.index.generation });

// What is searched for, as the page stands.
function query() {
  const where = [...document.querySelectorAll("#filters select")].filter((s) => s.value).map((s) => `${s.name}=${s.value}`);
  const asked = { text: $("#text").value.trim(), index: state.index.name, top: $("#top").value, refine: $("#refine").checked, where };
  if (byObject()) Object.assign(asked, { by: "object", images: IMAGES_OF_OBJECT });
  return state.image && asked.text ? { ...asked, image_weight: $("#weight input").value } : asked;
}
const byObject = () => $("#object").checked && Boolean(state.index.objects);
const withImage = () => state.image
  ? { method: "POST", headers: { "content-type": state.image.type || "application/octet-stream" }, body: state.image } : {};

let typing = 0, running = null;
function searchSoon() { clearTimeout(typing); typing = setTimeout(search, TYPING_STOPS_MS); }

async function search() {
  clearTimeout(typing);
  running?.abort();
  const mine = ++state.asked;
  if (!state.index) return;
  const asked = query();
  remember(asked);
  if (!asked.text && !state.image) return show(null);
  const path = url("search", asked);
  $("#results").setAttribute("aria-busy", "true");
  try {
    running = new AbortController();
    const began = performance.now();
    let answer = state.image ? null : answers.get(path);
    if (!answer) {
      answer = await ask(path, { ...withImage(), signal: running.signal });
      answer.milliseconds = performance.now() - began;
      if (!state.image) keep(path, answer);
    }
    if (mine !== state.asked) return; // a newer search has been asked
    state.index.generation = answer.generation;
    show(answer);
  } catch (error) {
    if (mine === state.asked && error.name !== "AbortError") complain(error);
  } finally {
    if (mine === state.asked) $("#results").setAttribute("aria-busy", "false");
  }
}

function keep(path, answer) {
  answers.set(path, answer);
  if (answers.size > KEPT_ANSWERS) answers.delete(answers.keys().next().value);
}

function remember(asked) {
  const here = new URLSearchParams();
  if (asked.text) here.set("q", asked.text);
  history.replaceState(null, "", here.size ? `?${here}` : location.pathname);
  document.title = asked.text ? `${asked.text} · mmref` : "mmref search";
}

// -- showing ---------------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name in made && name !== "list") made[name] = value; else made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}
const number = (n) => n.toLocaleString("en");
// An object as a result: its best image, in the object's place, with its other images.
const ofObject = ({ rank, rank_before, images: [best, ...others] }) => ({ ...best, rank, rank_before, others });
const captionOf = (result) => result.metadata.caption || result.object_id || result.id;
const gained = (result) => result.rank_before - result.rank;

function movement(result) {
  const up = gained(result);
  if (!up) return null;
  return element("span", { className: up > 0 ? "up moved" : "down moved", title: `rank ${result.rank_before} before refinement` },
    `${up > 0 ? "▲" : "▼"}${number(Math.abs(up))}`);
}

function card(result) {
  const button = element("button", { type: "button", tabIndex: result.rank === 1 ? 0 : -1 },
    element("img", { src: picture("thumbnail", result.id), alt: captionOf(result), loading: "lazy" }),
    element("span", { className: "words" },
      element("span", { className: "numbers" }, element("b", {}, `${result.rank}`), movement(result),
        element("span", { className: "score" }, result.score.toFixed(3))),
      element("span", { className: "caption" }, captionOf(result))),
    result.others?.length ? element("span", { className: "others" }, ...result.others.map((other) =>
      element("img", { src: picture("thumbnail", other.id), alt: "", loading: "lazy" }))) : null);
  button.dataset.id = result.id;
  button.addEventListener("click", () => open(result.rank - 1));
  return element("li", {}, button);
}

function show(answer) {
  const list = $("#results"), before = new Map();
  for (const button of list.querySelectorAll("button")) before.set(button.dataset.id, button.getBoundingClientRect());
  const focused = document.activeElement?.dataset?.id;
  state.answer = answer;
  state.results = answer ? answer.results.map((result) => result.images ? ofObject(result) : result) : [];
  $("#error").hidden = true;
  $("#empty").hidden = Boolean(answer);
  list.replaceChildren(...state.results.map(card));
  for (const button of list.querySelectorAll("button")) {
    if (button.dataset.id === focused) focusCard(state.results.findIndex((r) => r.id === focused));
    glide(button, before.get(button.dataset.id));
  }
  $("#status").textContent = answer ? summary(answer) : `${number(state.index.items)} images in ${state.index.name}`;
}

// A result moves from where it was: the eye follows what refinement changed.
function glide(button, from) {
  if (!from || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const to = button.getBoundingClientRect();
  const [x, y] = [from.left - to.left, from.top - to.top];
  if (x || y) button.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], { duration: 350, easing: "ease-out" });
}

function summary(answer) {
  const moved = answer.results.filter(gained);
  const all = byObject() ? `${number(state.index.objects)} objects` : `${number(answer.items)} images`;
  const parts = [`${answer.results.length} of ${all}, ${Math.round(answer.milliseconds)} ms`];
  if (!answer.results.length) parts[0] = "No image matches these filters";
  else if (!$("#refine").checked) parts.push("not refined");
  else if (!state.index.refinement) parts.push("this model has no refinement");
  else if (!moved.length) parts.push("refinement moved none");
  else parts.push(`refinement moved ${moved.length}, by up to ${number(Math.max(...moved.map((r) => Math.abs(gained(r)))))} places`);
  return parts.join(" · ");
}

function complain(error) {
  $("#error b").textContent = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  $("#error span").textContent = error.fix || "";
  $("#error").hidden = false;
  $("#empty").hidden = true;
  $("#results").replaceChildren();
  $("#status").textContent = "";
  state.results = [];
}

// -- one result ------------------------------------------------------------------------------------------------------

// A result, or another image of it where it is an object.
async function open(at, shown = state.results[at]) {
  const result = state.results[at], mine = ++state.explained;
  if (!result) return;
  state.opened = at;
  $("#detail h2").textContent = captionOf(shown);
  $("#detail figure img").src = picture("image", shown.id);
  $("#detail figure img").alt = captionOf(shown);
  $("#detail figure").style.setProperty("--ratio", shown.width / shown.height);
  $("#previous").disabled = at === 0;
  $("#next").disabled = at === state.results.length - 1;
  $("#images").hidden = !result.others?.length;
  $("#images").replaceChildren(...[result, ...(result.others || [])].map((image, place) => {
    const button = element("button", { type: "button", "aria-label": `Image ${place + 1} of this object`, "aria-pressed": `${image === shown}` },
      element("img", { src: picture("thumbnail", image.id), alt: "" }));
    button.addEventListener("click", () => open(at, image));
    return button;
  }));
  paint(null);
  const why = reasons(shown, shown === result);
  $("#why").replaceChildren(...why, element("p", { className: "faint" }, "Looking closer …"));
  if (!$("#detail").open) { $("#detail").showModal(); $("#detail").focus(); }
  const { text, index, image_weight = null } = query();
  try {
    const found = await ask(url("explain", { text, index, image_weight, id: shown.id }), withImage());
    if (mine !== state.explained) return;
    paint(found.heat);
    $("#why").replaceChildren(...why, ...references(found), ...facts(shown));
  } catch (error) {
    if (mine !== state.explained) return;
    $("#why").replaceChildren(...why,
      element("p", { className: "down", role: "alert" }, `${error.message} ${error.fix || ""}`), ...facts(shown));
  }
}

// `ranked`: whether it stands among the results itself; else it is another image of an object that does.
function reasons(result, ranked) {
  const gain = result.score - result.initial;
  const place = ranked ? `Rank ${result.rank}` : `Image ${result.rank} of this object`;
  const made = [element("h3", {}, ranked ? "Why it is here" : "How near it is"),
    element("p", {}, `${place}: likeness ${result.initial.toFixed(3)}`,
      gain ? ` + ${gain.toFixed(3)} from references = ${result.score.toFixed(3)}.` : ".")];
  if (ranked && gained(result)) made.push(element("p", { className: gained(result) > 0 ? "up" : "down" },
    `Refinement moved ${result.others ? "its object" : "it"} from rank ${number(result.rank_before)} to ${number(result.rank)}.`));
  return made;
}

function references(found) {
  const row = (reference, value) => element("li", {},
    reference.item_id ? element("img", { src: picture("thumbnail", reference.item_id), alt: "" }) : element("span", { className: "none" }),
    element("span", {}, reference.caption || reference.object_id), element("span", { className: "value" }, value));
  const made = [];
  if (found.shared.length) made.push(element("h3", {}, "References that raise it"),
    element("ul", {}, ...found.shared.map((r) => row(r, `+${r.gain.toFixed(4)}`))));
  for (const [name, title] of [["references", "References nearest to both"], ["query_references", "To the query"], ["item_references", "To the image"]])
    if (found[name].length) made.push(element("h3", {}, title),
      element("ul", {}, ...found[name].slice(0, 4).map((r) => row(r, `query ${r.query.toFixed(2)}, image ${r.item.toFixed(2)}`))));
  return made;
}

function facts(result) {
  const pairs = Object.entries({ id: result.id, object: result.object_id, size: `${result.width} × ${result.height}`, ...result.metadata });
  return [element("h3", {}, "About the image"), element("dl", {}, ...pairs.filter(([, value]) => value !== null && value !== undefined)
    .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, `${value}`)]))];
}

// The map of the match: a veil that is thin where the match would lose most.
function paint(heat) {
  const canvas = $("#detail canvas"), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!heat) return;
  const cells = new OffscreenCanvas(heat[0].length, heat.length), small = cells.getContext("2d");
  const most = Math.max(...heat.flat(), 1e-9);
  heat.forEach((row, y) => row.forEach((value, x) => {
    small.fillStyle = `rgb(8 12 24 / ${0.6 * (1 - Math.sqrt(Math.max(0, value / most)))})`;
    small.fillRect(x, y, 1, 1);
  }));
  context.imageSmoothingQuality = "high";
  context.drawImage(cells, 0, 0, canvas.width, canvas.height);
}

// -- images to search with -------------------------------------------------------------------------------------------

function useImage(file) {
  URL.revokeObjectURL(state.imageUrl);
  state.image = state.imageUrl = null;
  const most = state.info?.limits.image_bytes;
  if (file && most && file.size > most) {
    complain(new Problem(`${file.name || "The image"} has ${number(file.size)} bytes.`, `Use an image of at most ${number(most)}.`));
  } else if (file) {
    state.image = file;
    state.imageUrl = URL.createObjectURL(file);
    $("#picture img").src = state.imageUrl;
  }
  $("#picture").hidden = !state.image;
  $("#weight").hidden = !state.image || !$("#text").value.trim();
  if (state.image || !file) search();
}

// -- filters and indexes ---------------------------------------------------------------------------------------------

function choose(index) {
  state.index = index;
  answers.clear();
  $("#grouped").hidden = !index.objects;
  $("#filters").replaceChildren(...index.columns.filter((c) => c.values?.length > 1).map((column) => {
    const options = column.values.map(([value, count]) => element("option", { value: `${value}` }, `${value} (${number(count)})`));
    const select = element("select", { name: column.name }, element("option", { value: "" }, "any"), ...options);
    select.addEventListener("change", search);
    return element("label", {}, `${column.name} `, select);
  }));
}

async function start() {
  try {
    if (location.hash.length > 1) await enter(decodeURIComponent(location.hash.slice(1)));
    state.info = await ask("indexes");
  } catch (error) {
    return complain(error);
  }
  const { indexes } = state.info;
  $("#index").hidden = indexes.length < 2;
  $("#index select").replaceChildren(...indexes.map((i) => element("option", {}, i.name)));
  $("#refine").disabled = indexes.every((i) => !i.refinement);
  $("#error").hidden = true;
  $("#empty").hidden = false;
  choose(indexes[0]);
  $("#text").value ||= new URLSearchParams(location.search).get("q") || "";
  await search();
}

async function enter(token) {
  history.replaceState(null, "", location.pathname);
  await ask("session", { method: "POST", headers: { authorization: `Bearer ${token}` } });
}

// -- keys, drops, clicks ---------------------------------------------------------------------------------------------

function focusCard(at) {
  const cards = [...document.querySelectorAll("#results button")];
  if (!cards.length) return;
  const to = cards[Math.max(0, Math.min(at, cards.length - 1))];
  for (const one of cards) one.tabIndex = one === to ? 0 : -1;
  to.focus();
}

function moveInGrid(key) {
  const cards = [...document.querySelectorAll("#results button")], at = cards.indexOf(document.activeElement);
  if (at < 0) return false;
  const columns = cards.filter((one) => one.getBoundingClientRect().top === cards[0].getBoundingClientRect().top).length;
  if (key === "ArrowUp" && at < columns) $("#text").focus();
  else focusCard(at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key]);
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#login").open) return;
  const { key } = event, inText = document.activeElement === $("#text");
  if ($("#detail").open) {
    if (key === "ArrowLeft") open(state.opened - 1);
    else if (key === "ArrowRight") open(state.opened + 1);
    return;
  }
  if (key === "/" && !inText) { event.preventDefault(); $("#text").focus(); $("#text").select(); }
  else if (key === "r" && !/INPUT|SELECT/.test(document.activeElement.tagName)) $("#refine").click();
  else if (key === "ArrowDown" && inText) { event.preventDefault(); focusCard(0); }
  else if (key.startsWith("Arrow") && moveInGrid(key)) event.preventDefault();
  else if (key === "Escape" && !inText) $("#text").focus();
});

$("#search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("#text").addEventListener("input", () => { $("#weight").hidden = !state.image || !$("#text").value.trim(); searchSoon(); });
$("#refine").addEventListener("change", search);
$("#object").addEventListener("change", search);
$("#top").addEventListener("change", search);
$("#weight input").addEventListener("change", search);
$("#index select").addEventListener("change", () => { choose(state.info.indexes[$("#index select").selectedIndex]); search(); });
$("#file").addEventListener("change", (event) => { if (event.target.files[0]) useImage(event.target.files[0]); event.target.value = ""; });
$("#picture button").addEventListener("click", () => useImage(null));
$("#close").addEventListener("click", () => $("#detail").close());
$("#previous").addEventListener("click", () => open(state.opened - 1));
$("#next").addEventListener("click", () => open(state.opened + 1));
$("#overlay").addEventListener("change", () => { $("#detail canvas").hidden = !$("#overlay").checked; });
$("#detail").addEventListener("click", (event) => { if (event.target === $("#detail")) $("#detail").close(); });
$("#detail").addEventListener("close", () => { state.explained++; focusCard(state.opened); });
$("#login form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = $("#login input");
  try { await enter(field.value); } catch { $("#wrong").hidden = false; return; }
  field.value = "";
  $("#login").close();
  start();
});

let dragged = 0;
addEventListener("dragenter", (event) => { event.preventDefault(); dragged++; $("#drop").hidden = false; });
addEventListener("dragleave", () => { if (--dragged <= 0) { dragged = 0; $("#drop").hidden = true; } });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  $("#drop").hidden = true;
  const [file] = event.dataTransfer.files;
  if (file) useImage(file);
});
addEventListener("paste", (event) => { const [file] = event.clipboardData.files; if (file) useImage(file); });

start();
