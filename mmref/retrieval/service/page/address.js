// What is searched for, in the address of the page: a link that is kept or sent opens the same search.
// An image, and a search within results, are of this visit alone.
import { $, put, state } from "./common.js";
import { apply } from "./filters.js";

const given = () => new URLSearchParams(location.search);
const switches = { by: ["#object", "object", true], refine: ["#refine", "false", false] }; // the value that says so, and what it says
const selects = { top: "#top", sort: "#order select" };

// Write what is asked, and leave out what is as it is at first; and without what stood behind #.
export function remember({ text, index, where }) {
  const here = new URLSearchParams();
  if (text) here.set("q", text);
  if (state.info.indexes.length > 1 && index !== state.info.indexes[0].name) here.set("index", index);
  for (const one of where) here.append("where", one);
  for (const [name, [of, value, says]] of Object.entries(switches)) if ($(of).checked === says) here.set(name, value);
  for (const [name, of] of Object.entries(selects)) if ($(of).selectedIndex !== firstOf($(of))) here.set(name, $(of).value);
  const told = here.toString(); // Safari before 17 does not know how many parameters there are
  history.replaceState(null, "", told ? `?${told}` : location.pathname);
}
const firstOf = (select) => Math.max(0, [...select.options].findIndex((option) => option.defaultSelected));

// The index that the address names, else the first.
export const named = (indexes) => indexes.find((one) => one.name === given().get("index")) ?? indexes[0];

// Put the controls of an index where the address says. Filters without a control are kept beside them; of other things what
// there is no control for is passed over.
export function reopen(changed) {
  const told = given();
  $("#text").value ||= told.get("q") || "";
  for (const [name, [of, value, says]] of Object.entries(switches)) if (told.get(name) === value) $(of).checked = says;
  for (const [name, of] of Object.entries(selects)) if (told.has(name)) put($(of), told.get(name));
  apply(told.getAll("where"), changed);
}
