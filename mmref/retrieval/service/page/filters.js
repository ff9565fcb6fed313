// Filters by column: a choice where there are few values, from and to for numbers and days, what a text contains. A condition
// that no control can say, as an old address may hold, stands beside them until it is taken away.
import { $, element, number, put, readable } from "./common.js";

const CHOSEN_NUMBERS = 12; // numbers of at most so many values are chosen from, as stars and sizes are
const all = () => [...document.querySelectorAll("#filters [data-op]")];
const set = () => all().filter((control) => control.value.trim());
const kept = () => [...document.querySelectorAll("#filters [data-condition]")].map((one) => one.dataset.condition);

// A name or value as it is, whatever signs it holds: see the language of filters in docs/search.md.
const quoted = (text, odd) => odd.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
const ODD_NAME = /[=<>!~"]|^\s|\s$|\s(in|is)\s/, ODD_VALUE = /^[=<>!~]|"|^\s|\s$/;

const begin = ({ name, dataset }) => `${quoted(name, ODD_NAME)}${dataset.op}`;

// What the controls say, and what is kept beside them, as the service takes it.
export function conditions() {
  return [...set().map((control) => `${begin(control)}${quoted(control.value, ODD_VALUE)}`), ...kept()];
}

// Put the controls, which say nothing yet, where conditions say; keep those that none of them can say. `changed` is told when
// one of these is taken away.
export function apply(where, changed) {
  const told = where.filter((one) => one.trim() && !all().some((control) => takes(control, one)));
  $("#filters").append(...told.map((one) => chip(one, changed)));
}

// Whether a control says a condition from now on. A choice may not offer the value, and a field of days holds no text.
function takes(control, condition) {
  const before = begin(control), value = plain(condition.slice(before.length));
  if (control.value || !value.trim() || !condition.startsWith(before)) return false;
  put(control, value);
  if (control.value === value) return true;
  control.value = "";
  return false;
}
const plain = (value) => /^".*"$/s.test(value) ? value.slice(1, -1).replaceAll('""', '"') : value;

function chip(condition, changed) {
  const remove = element("button", { type: "button", "aria-label": `Take away the filter ${condition}` }, "×");
  const made = element("span", { className: "button chip" }, element("span", {}, condition), remove);
  made.dataset.condition = condition;
  remove.addEventListener("click", () => { made.remove(); changed(false); });
  return made;
}

// `changed` is told whether the visitor may still be typing.
export function controls(columns, changed) {
  return columns.map((column) => controlOf(column, changed)).filter(Boolean);
}

function controlOf(column, changed) {
  const { kind, values, min, max } = column, called = readable(column.name);
  const few = kind === "number" ? values?.length <= CHOSEN_NUMBERS : kind === "text" || kind === "boolean" ? values : null;
  if (few) return values.length > 1 ? field(called, [choice(column, changed)]) : null;
  if (kind === "text") return field(called, [typed(column, "~", "search", `${called} contains`, { placeholder: "contains" }, changed)]);
  if (min === null || min === max) return null;
  const type = kind === "number" ? "number" : "date", ends = [min, max].map((end) => type === "date" ? end.slice(0, 10) : end);
  const limits = type === "number" ? { step: "any" } : { min: ends[0], max: ends[1] };
  return field(called, [
    typed(column, ">=", type, `${called} from`, { ...limits, placeholder: ends[0] }, changed), "–",
    typed(column, "<=", type, `${called} to`, { ...limits, placeholder: ends[1] }, changed),
  ]);
}

function field(called, parts) {
  return element(parts.length === 1 ? "label" : "span", { className: "field", role: parts.length === 1 ? null : "group", "aria-label": called },
    `${called} `, element("span", { className: "range" }, ...parts));
}

function choice({ name, values }, changed) {
  const options = values.map(([value, count]) => element("option", { value: `${value}` }, `${value} (${number(count)})`));
  const select = element("select", { name }, element("option", { value: "" }, "any"), ...options);
  select.dataset.op = "=";
  select.addEventListener("change", () => changed(false));
  return select;
}

function typed({ name }, op, type, called, more, changed) {
  const input = element("input", { type, name, "aria-label": called, autocomplete: "off", ...more });
  input.dataset.op = op;
  input.addEventListener("input", () => changed(true));
  return input;
}
