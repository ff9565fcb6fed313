// What the parts of the page share: its state, how it asks the service, how it makes elements.
export const $ = (selector) => document.querySelector(selector);

export const state = {
  info: null, index: null, image: null, imageUrl: "", results: [], answer: null, opened: -1, asked: 0, explained: 0, query: null, within: null,
};

export class Problem extends Error {
  // `status`: of the answer; 0 where none came.
  constructor(message, fix = "", status = 0, kind = "") { super(message); Object.assign(this, { fix, status, kind }); }
}

// A whole number that JavaScript would round, as an id may be, stays the text that it came as, where the browser tells it.
const exact = (_, value, context) =>
  Number.isInteger(value) && !Number.isSafeInteger(value) && context?.source ? context.source : value;

export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service does not answer.", "The search is asked again as soon as it does.");
  }
  if (response.ok) return response.status === 204 ? null : JSON.parse(await response.text(), exact);
  if (response.status === 401 && path !== "session" && !$("#login").open) $("#login").showModal();
  let said = {};
  try { said = await response.json(); } catch { /* not one of ours: a proxy between, say */ }
  throw new Problem(said.message || `The service answers ${response.status}.`, said.fix, response.status, said.error);
}

export const url = (path, parameters = {}) => {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters))
    for (const one of [value].flat()) if (one !== null && one !== "") query.append(name, one);
  return `${path}?${query}`;
};
export const picture = (kind, id) =>
  url(`${kind}/${encodeURIComponent(id)}`, { index: state.index.name, identity: state.index.identity });
export const withImage = () => state.image
  ? { method: "POST", headers: { "content-type": state.image.type || "application/octet-stream" }, body: state.image } : {};

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name in made && name !== "list") made[name] = value; else made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Give a control a value; a choice that does not offer it stays as it is.
export function put(control, value) {
  if (!control.options || [...control.options].some((option) => option.value === value)) control.value = value;
}

export const number = (n) => n.toLocaleString("en");
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
// A column as people would call it: "photo_date" is "Photo date".
export const readable = (column) => sentence(column.replace(/[_\s]+/g, " ").trim()) || column;
export const lastPart = (id) => id.split("/").at(-1) || id; // of a path: the folders before it are mostly alike
export const captionOf = (result) => result.metadata.caption || result.object_id || lastPart(result.id);
export const gained = (result) => result.rank_before - result.rank;
