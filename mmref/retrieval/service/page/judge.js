// Judgements: whether a result is right for the sentence that it was found by. The service keeps them.
import { $, ask, captionOf, element, number, sentence as capital, state, url } from "./common.js";

const SAID_MS = 12_000; // that a failure is shown

// Of the sentence that is shown: what the service has (`kept`) and what the page shows, which runs ahead of it.
const about = (sentence) =>
  ({ sentence, index: state.index?.name, kept: new Map(), shown: new Map(), presses: new Map(), sentences: 0, objects: false, problem: "" });
let current = about(""), pressed = 0, turn = Promise.resolve();

const wanted = () => Boolean(state.info?.judging && current.sentence);

// `sentence`: what the shown results were found by; "" where they are of none, or of an image. `objects`: whether they are
// objects, which are judged by their images, each where it is opened.
export function begin(sentence, objects) {
  if (sentence !== current.sentence || state.index?.name !== current.index) current = about(sentence);
  current.objects = objects;
  paint();
}

// What was said of this sentence before, here or elsewhere.
export function recall() {
  if (!wanted()) return;
  const mine = current;
  inTurn(mine, "What was judged before is not known.", async () => {
    const found = await ask(url("judgements", { text: mine.sentence, index: mine.index }));
    mine.kept = new Map(Object.entries(found.judgements));
    for (const id of new Set([...mine.kept.keys(), ...mine.shown.keys()]))
      if (!mine.presses.has(id)) mine.shown.set(id, mine.kept.get(id) ?? null);
    mine.sentences = found.sentences;
    mine.problem = "";
  });
}

// A press on what is pressed takes it back.
export function press(id, relevant) {
  if (!wanted()) return;
  const mine = current, now = mine.shown.get(id) === relevant ? null : relevant, mark = ++pressed;
  mine.shown.set(id, now);
  mine.presses.set(id, mark);
  mine.problem = "";
  paint();
  inTurn(mine, "Not kept.", async () => {
    const body = JSON.stringify({ text: mine.sentence, index: mine.index, id, relevant: now });
    try {
      const found = await ask("judgements", { method: "POST", headers: { "content-type": "application/json" }, keepalive: true, body });
      mine.kept.set(id, now);
      mine.sentences = found.sentences;
    } finally {
      if (mine.presses.get(id) === mark) { // nothing newer waits
        mine.shown.set(id, mine.kept.get(id) ?? null);
        mine.presses.delete(id);
      }
    }
  });
}

// One after the other, so that the last press counts and no answer is older than what it changes.
function inTurn(mine, failed, work) {
  turn = turn.then(work).catch((error) => {
    const said = mine.problem = `${failed} ${capital(error.message)} ${error.status ? error.fix : "Press again once it does."}`;
    setTimeout(() => { if (mine.problem === said) { mine.problem = ""; paint(); } }, SAID_MS); // it lies over other results
  }).then(() => { if (mine === current) paint(); });
}

// A pair of buttons; `aim` says of which item they are.
export function buttons() {
  const made = [["Right", true], ["Wrong", false]].map(([word, relevant]) => {
    const button = element("button", { type: "button" }, word);
    button.dataset.relevant = relevant;
    button.addEventListener("click", () => press(button.parentElement.dataset.judged, relevant));
    return button;
  });
  return element("div", { className: "judge" }, ...made);
}

export function aim(pair, result, name = captionOf(result)) {
  pair.dataset.judged = result.id;
  for (const button of pair.children) button.setAttribute("aria-label", `${button.textContent}: ${name}`);
  paint([pair]);
  return pair;
}

function paint(pairs = document.querySelectorAll(".judge[data-judged]")) {
  for (const pair of pairs) {
    const said = current.shown.get(pair.dataset.judged) ?? null;
    for (const button of pair.children) button.setAttribute("aria-pressed", `${`${said}` === button.dataset.relevant}`);
  }
  $("#judged").hidden = $("#verdict").hidden = !wanted();
  const { problem } = current;
  $("#train").hidden = Boolean(problem);
  for (const [place, text] of [["#counted", counted()], ["#asked", `Is it right for “${current.sentence}”?`]]) {
    if ($(place).textContent !== (problem || text)) $(place).textContent = problem || text; // what is said twice is read out twice
    $(place).classList.toggle("down", Boolean(problem));
  }
}

function counted() {
  const count = [...current.shown.values()].filter((said) => said !== null).length, { sentences } = current;
  const said = count ? `${number(count)} judged for this sentence`
    : current.objects ? "Open an object to say which of its images are right for this sentence"
      : "Say which are right and which are wrong for this sentence";
  return sentences ? `${said} · ${number(sentences)} ${sentences === 1 ? "sentence" : "sentences"} in all` : said;
}
