// The search page. Everything it asks for lies beside it: no other host is contacted.
import { $, Problem, ask, captionOf, element, gained, lastPart, number, picture, put, readable, sentence, state, url, withImage } from "./common.js";
import * as address from "./address.js";
import * as detail from "./detail.js";
import { apply, conditions, controls } from "./filters.js";
import * as judge from "./judge.js";

const TYPING_STOPS_MS = 250, KEPT_ANSWERS = 40, IMAGES_OF_OBJECT = 4;
const AGAIN_MS = 2000, AGAIN_AT_MOST_MS = 30_000; // between looks whether the service is back
const SHORT = 40; // letters of what tells cards apart

const answers = new Map(); // of text queries, so that the switch of refinement answers at once

// -- asking ----------------------------------------------------------------------------------------------------------

// What is searched for, as the page stands.
function query() {
  const where = conditions();
  const asked = { text: $("#text").value.trim(), index: state.index.name, top: $("#top").value, refine: $("#refine").checked, where };
  if (byObject()) Object.assign(asked, { by: "object", images: IMAGES_OF_OBJECT });
  return state.image && asked.text ? { ...asked, image_weight: $("#weight input").value } : asked;
}
const byObject = () => $("#object").checked && Boolean(state.index.objects);

let typing = 0, running = null;
function searchSoon() { clearTimeout(typing); typing = setTimeout(search, TYPING_STOPS_MS); }

async function search() {
  clearTimeout(typing);
  running?.abort();
  const mine = ++state.asked;
  if (!state.index) return;
  const asked = state.query = query();
  address.remember(asked);
  document.title = asked.text ? `${asked.text} · mmref` : "mmref search";
  if (!asked.text && !state.image) {
    $("#results").setAttribute("aria-busy", "false");
    return show(null);
  }
  const path = url("search", asked);
  const known = state.image || state.within ? null : answers.get(path);
  if (known) show(known); // and asked again: the index may hold other images by now
  $("#results").setAttribute("aria-busy", `${!known}`);
  try {
    running = new AbortController();
    const began = performance.now();
    const answer = await request(asked, running.signal);
    answer.milliseconds = performance.now() - began;
    if (mine !== state.asked) return; // a newer search has been asked
    if (answer.identity !== state.index.identity) await renew(answer);
    if (mine !== state.asked) return;
    if (!state.image && !state.within) keep(path, answer);
    if (known?.identity !== answer.identity) show(answer);
    recovered();
    judge.recall();
  } catch (error) {
    if (mine !== state.asked || error.name === "AbortError") return;
    if (error.kind === "UnknownItem" && state.within) return stayWithin(null); // one of them is not in the index any more
    complain(error);
  } finally {
    if (mine === state.asked) $("#results").setAttribute("aria-busy", "false");
  }
}

// Many ids are too long for a URL: a search within results is sent as JSON, with its image.
async function request(asked, signal) {
  const sentence = state.image ? "" : asked.text;
  const answer = !state.within ? await ask(url("search", asked), { ...withImage(), signal })
    : await ask("search", { method: "POST", headers: { "content-type": "application/json" }, signal,
      body: JSON.stringify({ ...asked, within: state.within.ids, ...(state.image ? { image: await base64(state.image) } : {}) }) });
  answer.more = answer.results.length === Number(asked.top);
  answer.sentence = sentence; // that results are judged for
  return answer;
}

function base64(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.split(",")[1]);
    reader.onerror = () => failed(new Problem("The image cannot be read.", "Drop it again."));
    reader.readAsDataURL(file);
  });
}

// The next page of what is shown, below it.
async function showMore() {
  const { answer, asked: mine } = state;
  $("#further").disabled = true;
  try {
    const next = await request({ ...state.query, offset: answer.results.length });
    if (mine !== state.asked) return;
    if (next.identity !== answer.identity) return search(); // ranks are others by now
    answer.results.push(...next.results);
    answer.more = next.more;
    show(answer);
  } catch (error) {
    if (mine === state.asked) complain(error);
  } finally {
    $("#further").disabled = false;
  }
}

// What is shown stays the set that is searched, until it is left. `within`: {ids, words}, or null for the whole index.
function stayWithin(within) {
  state.within = within;
  $("#within").hidden = !within;
  $("#within span").textContent = within ? `Only among ${within.words}` : "";
  search();
}

function narrow() {
  const shown = state.results.flatMap((one) => [one, ...(one.others || [])]).map((one) => one.id), ids = fitting(shown);
  const of = state.query.text ? ` of “${state.query.text}”` : " of an image";
  const first = ids.length < shown.length ? `the first ${number(ids.length)} of ` : "";
  stayWithin({ ids, words: `${first}${number(shown.length)} images${of}` });
  $("#text").focus();
  $("#text").select();
}

// The first of some ids, as many as the service takes.
function fitting(ids) {
  const { within, within_bytes } = state.info.limits, encoder = new TextEncoder();
  let bytes = 1; // the brackets of the list, less a comma
  const over = ids.findIndex((id) => (bytes += encoder.encode(JSON.stringify(id)).length + 1) > within_bytes);
  return ids.slice(0, over < 0 ? within : Math.min(within, over));
}

function keep(path, answer) {
  answers.set(path, answer);
  if (answers.size > KEPT_ANSWERS) answers.delete(answers.keys().next().value);
}

// The index has changed, or another lies in its place: nothing that was known of it is shown again.
async function renew(answer) {
  answers.clear();
  state.info = await ask("indexes");
  const index = state.info.indexes.find((one) => one.name === state.index.name);
  if (!index) return;
  const where = conditions(), order = $("#order select").value;
  choose(Object.assign(index, { identity: answer.identity }));
  apply(where, filtered);
  put($("#order select"), order);
  countFilters();
}

// An item that is shown is not there any more.
function gone() {
  answers.clear();
  search();
}

// -- showing ---------------------------------------------------------------------------------------------------------

// An object as a result: its best image, in the object's place, with its other images.
const ofObject = ({ rank, rank_before, images: [best, ...others] }) => ({ ...best, rank, rank_before, others });

// What tells results of one caption apart, by their ids: a column in which each is different, else the end of its id.
function differences(results) {
  const groups = new Map(), found = new Map();
  for (const one of results) groups.set(captionOf(one), [...(groups.get(captionOf(one)) || []), one]);
  for (const alike of groups.values()) {
    if (alike.length < 2) continue;
    const told = (name) => alike.map((one) => `${one.metadata[name] ?? ""}`);
    const apart = (values) => new Set(values).size === values.length && values.every((value) => value && value.length <= SHORT);
    const column = Object.keys(alike[0].metadata).find((name) => name !== "caption" && apart(told(name)));
    const ends = alike.map((one) => lastPart(one.id));
    const values = column ? told(column).map((value) => `${readable(column)}: ${value}`)
      : new Set(ends).size === ends.length ? ends : alike.map((one) => one.id);
    alike.forEach((one, at) => found.set(one.id, values[at]));
  }
  return found;
}

function movement(result) {
  const up = gained(result);
  if (!up) return null;
  return element("span", { className: up > 0 ? "up moved" : "down moved", title: `rank ${result.rank_before} before refinement` },
    `${up > 0 ? "▲" : "▼"}${number(Math.abs(up))}`);
}

// How good a result is, against the best one that is shown: scores have no scale of their own.
function bar(result, best) {
  const share = best > 0 ? Math.min(1, Math.max(0, result.score / best)) : 0;
  const made = element("span", { className: "share", title: `score ${result.score.toFixed(3)}, ${Math.round(100 * share)} % of the best` },
    element("span"));
  made.firstChild.style.width = `${100 * share}%`;
  return made;
}

// Results as the visitor wants them: by rank, or by a column, those without a value last.
function inOrder(results) {
  const sort = $("#order select").value, column = sort.slice(1), sign = sort[0] === "-" ? -1 : 1;
  if (!sort) return results;
  const value = (one) => one.metadata[column] ?? null;
  const compare = (a, b) => value(a) === null || value(b) === null ? (value(a) === null) - (value(b) === null)
    : value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0;
  return [...results].sort((a, b) => compare(a, b) || a.rank - b.rank);
}

function card(result, best, at, difference, judged) {
  const up = gained(result), caption = captionOf(result), told = `${caption}${difference && `, ${difference}`}`;
  const moved = up ? `, moved ${up > 0 ? "up" : "down"} by ${number(Math.abs(up))}` : "";
  const button = element("button", { type: "button", className: "card", "aria-label": `${told}, rank ${result.rank}${moved}` },
    element("img", { src: picture("thumbnail", result.id), alt: "", loading: "lazy" }),
    element("span", { className: "words" },
      element("span", { className: "numbers" }, element("b", {}, `${result.rank}`), movement(result)),
      bar(result, best),
      element("span", { className: "caption" }, caption),
      difference ? element("span", { className: "difference" }, difference) : null),
    result.others?.length ? element("span", { className: "others" }, ...result.others.map((other) =>
      element("img", { src: picture("thumbnail", other.id), alt: "", loading: "lazy" }))) : null);
  button.dataset.id = result.id;
  button.addEventListener("click", () => open(at));
  return element("li", {}, button, judged ? judge.aim(judge.buttons(), result, told) : null);
}

function show(answer) {
  const list = $("#results"), before = new Map();
  for (const one of list.children) before.set(one.firstChild.dataset.id, one.getBoundingClientRect());
  const focused = here()?.firstChild.dataset.id;
  state.answer = answer;
  state.results = answer ? inOrder(answer.results.map((result) => result.images ? ofObject(result) : result)) : [];
  $("#error").hidden = true;
  $("#empty").hidden = Boolean(answer);
  $("#far").hidden = answer?.close_match !== false;
  list.classList.remove("old");
  list.classList.toggle("far", answer?.close_match === false);
  judge.begin(answer?.sentence || "", state.results.some((result) => result.others));
  const best = Math.max(...state.results.map((result) => result.score)), different = differences(state.results);
  const judged = (result) => state.info.judging && answer.sentence && !result.others;
  list.replaceChildren(...state.results.map((result, at) => card(result, best, at, different.get(result.id) || "", judged(result))));
  rove(list.firstChild);
  for (const one of list.children) {
    if (one.firstChild.dataset.id === focused) one.firstChild.focus();
    glide(one, before.get(one.firstChild.dataset.id));
  }
  const count = state.results.length, all = state.within?.ids.length ?? (byObject() ? state.index.objects : state.index.items);
  $("#further").hidden = !answer?.more || count >= all || count + Number($("#top").value) > state.info.limits.depth;
  $("#narrow").hidden = count < 2 || Boolean(state.within);
  $("#status").textContent = answer ? summary(answer) : `${number(state.index.items)} images in ${state.index.name}`;
}

// A result moves from where it was: the eye follows what refinement changed.
function glide(one, from) {
  if (!from || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const to = one.getBoundingClientRect();
  const [x, y] = [from.left - to.left, from.top - to.top];
  if (x || y) one.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], { duration: 350, easing: "ease-out" });
}

function summary(answer) {
  const moved = answer.results.filter(gained);
  const all = state.within ? `${number(state.within.ids.length)} images`
    : byObject() ? `${number(state.index.objects)} objects` : `${number(answer.items)} images`;
  const parts = [`${answer.results.length} of ${all}, ${Math.round(answer.milliseconds)} ms`];
  if (!answer.results.length) parts[0] = "No image matches these filters";
  else if (!$("#refine").checked) parts.push("not refined");
  else if (!state.index.refinement) parts.push("this model has no refinement");
  else if (!moved.length) parts.push("refinement moved none");
  else parts.push(`refinement moved ${moved.length}, by up to ${number(Math.max(...moved.map((r) => Math.abs(gained(r)))))} places`);
  return parts.join(" · ");
}

// -- errors ----------------------------------------------------------------------------------------------------------

let waiting = 0, pause = AGAIN_MS; // for the service to be back

// What was found before stays to be seen, as what it is: old.
function complain(error) {
  $("#error b").textContent = sentence(error.message);
  $("#error span").textContent = error.fix || "";
  const mayPass = error.status === 0 || error.status === 429 || error.status >= 500;
  $("#retry").hidden = !mayPass;
  $("#error").hidden = false;
  for (const other of ["#far", "#empty", "#further", "#narrow", "#judged"]) $(other).hidden = true;
  $("#status").textContent = state.results.length ? "These are the results of an earlier search." : "";
  $("#results").classList.add("old");
  clearTimeout(waiting);
  if (mayPass) waiting = setTimeout(again, pause);
}

// Ask again what has failed, once the service is well.
async function again() {
  pause = Math.min(2 * pause, AGAIN_AT_MOST_MS);
  try {
    if (!(await fetch("healthz")).ok) throw new Problem("");
  } catch {
    waiting = setTimeout(again, pause);
    return;
  }
  retry();
}

function retry() {
  clearTimeout(waiting);
  if (state.index) search(); else start();
}

function recovered() {
  clearTimeout(waiting);
  pause = AGAIN_MS;
}

const open = (at) => detail.open(at, query(), gone);

// -- images to search with -------------------------------------------------------------------------------------------

function useImage(file) {
  URL.revokeObjectURL(state.imageUrl);
  state.image = state.imageUrl = null;
  const most = state.info?.limits.image_bytes;
  if (file && most && file.size > most) {
    const message = `${file.name || "The image"} has ${number(file.size)} bytes.`;
    complain(new Problem(message, `Use an image of at most ${number(most)}.`, 413));
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
  $("#filters").replaceChildren(...controls(index.columns, filtered));
  offerOrders(index.columns);
  offer(index.examples);
  countFilters();
}

// A filter has changed; `soon`: by typing, which may go on.
function filtered(soon) {
  countFilters();
  if (soon) searchSoon(); else search();
}

// Numbers of results that the service allows.
function offerTops(most) {
  for (const option of [...$("#top").options]) if (Number(option.value) > most) option.remove();
  if (!$("#top").options.length) $("#top").append(element("option", {}, `${most}`));
}

// Numbers and times have an order that means something.
function offerOrders(columns) {
  const orders = columns.filter((c) => ["number", "date", "time"].includes(c.kind) && c.min !== c.max).flatMap(({ name, kind }) => {
    const [up, down] = kind === "number" ? ["low to high", "high to low"] : ["oldest first", "newest first"];
    return [[`+${name}`, `${readable(name)}, ${up}`], [`-${name}`, `${readable(name)}, ${down}`]];
  });
  $("#order").hidden = !orders.length;
  $("#order select").replaceChildren(...[["", "best first"], ...orders].map(([value, text]) => element("option", { value }, text)));
}

// What a first visit can begin with.
function offer({ sentences, items }) {
  $("#sentences").hidden = !sentences.length;
  $("#sentences").replaceChildren(...sentences.map((text) => {
    const button = element("button", { type: "button", className: "button" }, text);
    button.addEventListener("click", () => { $("#text").value = text; search(); });
    return button;
  }));
  $("#samples").hidden = $("#try").hidden = !items.length;
  $("#samples").replaceChildren(...items.map((id, at) => {
    const button = element("button", { type: "button", "aria-label": `What is like image ${at + 1}`, title: id },
      element("img", { src: picture("thumbnail", id), alt: "", loading: "lazy" }));
    button.addEventListener("click", () => searchLike(id));
    return button;
  }));
}

async function searchLike(id) {
  try {
    const answer = await fetch(picture("thumbnail", id));
    if (!answer.ok) throw new Problem("This image is not in the index any more.", "Take another one.", answer.status);
    useImage(await answer.blob());
  } catch (error) {
    complain(error instanceof Problem ? error : new Problem("The service does not answer."));
  }
}

function countFilters() {
  const set = conditions().length;
  $("#more").textContent = set ? `Filters and options (${set})` : "Filters and options";
}

async function start() {
  try {
    if (location.hash.length > 1) await enterByAddress();
    state.info = await ask("indexes");
  } catch (error) {
    return complain(error);
  }
  const { indexes } = state.info;
  offerTops(state.info.limits.top);
  $("#index").hidden = indexes.length < 2;
  $("#index select").replaceChildren(...indexes.map((i) => element("option", {}, i.name)));
  $("#refine").disabled = indexes.every((i) => !i.refinement);
  $("#keys").hidden = !state.info.judging;
  $("#error").hidden = true;
  $("#empty").hidden = false;
  const index = address.named(indexes);
  $("#index select").selectedIndex = indexes.indexOf(index);
  choose(index);
  address.reopen(filtered);
  countFilters();
  recovered();
  await search();
}

const enter = (token) => ask("session", { method: "POST", headers: { authorization: `Bearer ${token}` } });

// A token behind the # of the address. What is none, or a wrong one, is passed over: the service asks for it if it needs one.
async function enterByAddress() {
  const given = location.hash.slice(1);
  history.replaceState(null, "", location.pathname + location.search);
  let token = given;
  try { token = decodeURIComponent(given); } catch { /* it has a % of its own */ }
  try { await enter(token); } catch { /* as said above */ }
}

// -- keys, drops, clicks ---------------------------------------------------------------------------------------------

// The result that has the focus, itself or one of its buttons.
const here = () => document.activeElement?.closest("#results > li");

// One result at a time is a stop of the Tab key; arrows go to the others.
function rove(to) {
  for (const one of $("#results").children) for (const button of one.querySelectorAll("button")) button.tabIndex = one === to ? 0 : -1;
}

function focusCard(at) {
  const cards = [...$("#results").children];
  cards[Math.max(0, Math.min(at, cards.length - 1))]?.firstChild.focus();
}

function moveInGrid(key) {
  const cards = [...$("#results").children], at = cards.indexOf(here());
  if (at < 0) return false;
  const columns = cards.filter((one) => one.getBoundingClientRect().top === cards[0].getBoundingClientRect().top).length;
  if (key === "ArrowUp" && at < columns) $("#text").focus();
  else focusCard(at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key]);
  return true;
}

// The item that a key says something of: what is opened, or has the focus.
const pointed = () => ($("#detail").open ? $("#verdict .judge")
  : document.activeElement?.closest("#results:not(.old) > li")?.querySelector(".judge"))?.dataset.judged;

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#login").open) return;
  const { key } = event, inText = document.activeElement === $("#text");
  if ((key === "y" || key === "n") && !event.repeat && pointed()) return judge.press(pointed(), key === "y");
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

$("#results").addEventListener("focusin", () => rove(here()));
$("#search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("#text").addEventListener("input", () => { $("#weight").hidden = !state.image || !$("#text").value.trim(); searchSoon(); });
$("#refine").addEventListener("change", search);
$("#object").addEventListener("change", search);
$("#top").addEventListener("change", search);
$("#order select").addEventListener("change", () => {
  address.remember(state.query);
  if (state.answer) show(state.answer);
});
$("#further").addEventListener("click", showMore);
$("#narrow").addEventListener("click", narrow);
$("#within button").addEventListener("click", () => stayWithin(null));
$("#weight input").addEventListener("change", search);
$("#index select").addEventListener("change", () => { choose(state.info.indexes[$("#index select").selectedIndex]); stayWithin(null); });
$("#file").addEventListener("change", (event) => { if (event.target.files[0]) useImage(event.target.files[0]); event.target.value = ""; });
$("#picture button").addEventListener("click", () => useImage(null));
$("#retry").addEventListener("click", retry);
$("#more").addEventListener("click", () => {
  $("#more").setAttribute("aria-expanded", `${$("#options").classList.toggle("open")}`);
});
$("#close").addEventListener("click", () => $("#detail").close());
$("#previous").addEventListener("click", () => open(state.opened - 1));
$("#next").addEventListener("click", () => open(state.opened + 1));
$("#overlay").addEventListener("change", () => { $("#detail canvas").hidden = !$("#overlay").checked; });
$("#detail").addEventListener("click", (event) => { if (event.target === $("#detail")) $("#detail").close(); });
$("#detail").addEventListener("close", () => { // told a moment later, when another result may be open
  if ($("#detail").open) return;
  state.explained++;
  focusCard(state.opened);
});
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
