// The page's elements, messages and downloads. Text goes in as text and never as HTML.

/** Return the element with an id. */
export const element = (id) => document.getElementById(id);

const BARS = ["paint-bar", "busy-bar", "result-bar", "vote-bar"];

/** Say what happened, also to a screen reader. */
export function say(text) {
  element("status").textContent = text;
}

/** Show an error; it stays until the next action or until it is closed. */
export function showError(text) {
  element("alert-box").hidden = false;
  element("alert").textContent = text.charAt(0).toUpperCase() + text.slice(1);
}

export function hideError() {
  element("alert-box").hidden = true;
  element("alert").textContent = "";
}

/** Show what is wrong with the models until it is mended; "" is nothing. */
export function showProblem(text) {
  const shown = element("problem");
  shown.hidden = !text;
  const sentence = text.charAt(0).toUpperCase() + text.slice(1);
  if (shown.textContent !== sentence) shown.textContent = sentence; // it is read out once
}

/** Show one of the bars below the photo. The focus does not stay in a bar that disappears. */
export function showBar(name) {
  const left = document.activeElement?.closest(".bar");
  for (const bar of BARS) element(bar).hidden = bar !== name;
  const shown = element(name);
  if (left?.hidden) (shown.querySelector(".main") ?? shown.querySelector("button")).focus();
}

/** Let the browser save a file. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Return a file's name without its extension. */
export function stem(name) {
  return name.replace(/\.[^.]*$/, "") || "photo";
}

/** Return seconds as text, no more exact than an estimate is. */
export function about(seconds) {
  if (seconds >= 90) return `about ${Math.round(seconds / 60)} minutes`;
  const step = seconds > 20 ? 5 : 1;
  return `about ${Math.max(1, Math.round(seconds / step) * step)} s`;
}

/** Return a share as text with a sensible number of digits. */
export function percent(share) {
  if (share > 0 && share < 0.001) return "less than 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}
