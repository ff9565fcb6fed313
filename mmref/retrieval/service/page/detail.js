// One result, opened: the image and where it matches, its facts, why it ranks where it does.
import { $, ask, captionOf, element, gained, number, picture, readable, state, url, withImage } from "./common.js";
import { aim, buttons } from "./judge.js";

const LISTED = 4; // references in the list itself; others are folded
const STRONG = 0.5; // of the strongest cell's loss: so much makes a cell a part of the outline
const FLAT = 0.05; // of the cosine: where the strongest cell loses less, no cell stands out
const LEGEND = "Outlined: the match loses most where this is hidden. Found by hiding each part in turn.";
const FLAT_LEGEND = "No part stands out: whichever is hidden, the match stays about the same.";

$("#verdict").append(buttons());

// A result, or another image of it where it is an object. `asked`: what is searched for; `gone` is told when the item is not
// in the index any more.
export async function open(at, asked, gone, shown = state.results[at]) {
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
    button.addEventListener("click", () => open(at, asked, gone, image));
    return button;
  }));
  aim($("#verdict .judge"), shown);
  outline(null);
  $("#facts").replaceChildren(...facts(shown));
  $("#reasons").replaceChildren(...reasons(shown, shown === result));
  $("#references").setAttribute("aria-busy", "true");
  const awaited = Array.from({ length: LISTED }, () => element("p", { className: "awaited" }));
  $("#references").replaceChildren(element("h3", {}, "References"), ...awaited);
  if (!$("#detail").open) { $("#detail").showModal(); $("#detail").focus(); }
  $("#detail").scrollTop = 0;
  const { text, index, image_weight = null } = asked;
  try {
    const found = await ask(url("explain", { text, index, image_weight, id: shown.id }), withImage());
    if (mine !== state.explained) return;
    outline(found.heat, found.cosine);
    $("#references").replaceChildren(...references(found));
  } catch (error) {
    if (mine !== state.explained) return;
    $("#legend").textContent = "";
    $("#references").replaceChildren(element("p", { className: "down", role: "alert" }, `${error.message} ${error.fix || ""}`));
    if (error.kind === "UnknownItem") gone();
  } finally {
    if (mine === state.explained) $("#references").setAttribute("aria-busy", "false");
  }
}

// Its own columns first. What every item has is called so that no column is taken for it: a garment has a size, too.
function facts(result) {
  const pairs = [...Object.entries(result.metadata).map(([name, value]) => [readable(name), value]),
    ["Image size", `${result.width} × ${result.height}`], ["Object id", result.object_id], ["Id", result.id]];
  const told = pairs.filter(([, value]) => value !== null && value !== undefined && `${value}` !== captionOf(result));
  return told.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, `${value}`)]);
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

// Each reference once: those that raise the result, then those that are near to query and image, or to one of them.
function merged(found) {
  const all = new Map();
  for (const one of [...found.shared, ...found.references, ...found.query_references, ...found.item_references])
    all.set(one.object_id, { ...one, ...all.get(one.object_id), ...("query" in one ? { query: one.query, item: one.item } : {}) });
  return [...all.values()];
}

function row(reference) {
  const near = "query" in reference ? `query ${reference.query.toFixed(2)}, image ${reference.item.toFixed(2)}` : "";
  const gain = reference.gain >= 0.00005 ? element("b", { className: "up" }, `+${reference.gain.toFixed(4)}`) : null;
  return element("li", {}, reference.item_id ? element("img", { src: picture("thumbnail", reference.item_id), alt: "" }) : null,
    element("span", {}, reference.caption || reference.object_id), element("span", { className: "value" }, gain, near));
}

// A picture lets one see what a reference is: where some have one, the others wait in the fold.
function references(found) {
  const all = merged(found), seen = all.filter((one) => one.item_id);
  if (!all.length) return [];
  const listed = (seen.length ? seen : all).slice(0, LISTED), folded = all.filter((one) => !listed.includes(one));
  const made = [element("h3", {}, found.shared.length ? "References it shares with the query" : "References near it"),
    element("ul", {}, ...listed.map(row))];
  if (folded.length) made.push(element("details", {}, element("summary", {}, `${number(folded.length)} more`),
    element("ul", {}, ...folded.map(row))));
  return made;
}

// Where the match lies: a line around the cells that it would lose most by.
function outline(heat, cosine = 0) {
  const canvas = $("#detail canvas"), legend = $("#legend"), most = heat ? Math.max(...heat.flat()) : 0;
  const flat = heat && most < FLAT * Math.abs(cosine);
  $("#overlay").disabled = !heat || flat;
  legend.textContent = !heat ? "Looking where it matches …" : flat ? FLAT_LEGEND : LEGEND;
  const { clientWidth, clientHeight } = canvas.parentElement; // the canvas itself may be hidden
  canvas.width = Math.round(clientWidth * devicePixelRatio); // which also wipes it
  canvas.height = Math.round(clientHeight * devicePixelRatio);
  if (!heat || flat) return;
  const strong = heat.map((cells) => cells.map((value) => value >= STRONG * most));
  const [high, wide] = [canvas.height / heat.length, canvas.width / heat[0].length], path = new Path2D();
  const line = (x, y, toX, toY) => { path.moveTo(x * wide, y * high); path.lineTo(toX * wide, toY * high); };
  strong.forEach((cells, y) => cells.forEach((inside, x) => {
    if (!inside) return;
    if (!strong[y - 1]?.[x]) line(x, y, x + 1, y);
    if (!strong[y + 1]?.[x]) line(x, y + 1, x + 1, y + 1);
    if (!cells[x - 1]) line(x, y, x, y + 1);
    if (!cells[x + 1]) line(x + 1, y, x + 1, y + 1);
  }));
  const context = canvas.getContext("2d");
  context.lineCap = "round";
  for (const [color, width] of [["#000a", 5], ["#fff", 2.5]]) { // seen on dark and on bright images
    context.strokeStyle = color;
    context.lineWidth = width * devicePixelRatio;
    context.stroke(path);
  }
}
