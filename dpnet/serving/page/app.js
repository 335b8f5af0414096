// The page: one photo, its hole and its results, and what each button and key does with them.

import { ConnectionError, ServerError, fill, isThere, vote } from "./api.js";
import { formatOf, isUnusual } from "./formats.js";
import { Input } from "./input.js";
import { Mask } from "./mask.js";
import { Models } from "./models.js";
import {
  about, element, hideError, percent, save, say, showBar, showError, showProblem, stem,
} from "./page.js";
import { Painter } from "./paint.js";
import { openPhoto } from "./photo.js";
import { decodeMask, encodeMask } from "./png.js";
import { Results, describe } from "./results.js";
import { View } from "./view.js";

const MOST_STEPS = 20; // fills that can be taken back
const SAME_VERSION = "Both sides are the same version: choose two different ones.";
const NO_HOLE = "There is no hole: paint over what should go.";
const ALL_HOLE = "The hole is the whole photo: leave a part around what should go.";
const BACK_MS = 2000; // between two questions whether the server is back
const LOOK_MS = 10_000; // between two questions about the models
const SPEAK_MS = 500; // the keyboard's cursor is announced when it rests this long
const EXTENSIONS = { JPEG: "jpg", WebP: "webp" }; // of formats that are not exact, as PNG is

const stage = element("stage");
const view = new View(stage, {
  photo: element("photo-canvas"),
  hole: element("hole-canvas"),
  brush: element("brush-canvas"),
});
const models = new Models();
const results = new Results(view);
const painter = new Painter(view, changed);
const input = new Input(stage, view, {
  canPaint: () => painter.canPaint(),
  start: (pixel, erase) => painter.start(pixel, erase),
  move: (pixel) => painter.move(pixel),
  finish: () => painter.finish(),
  cancel: () => painter.cancel(),
  clamp: (pixel) => painter.clamp(pixel),
  hover,
});

let photo = null; // what is shown and filled
let mask = null;
let original = null; // the file that the person gave
let ownFormat = ""; // of that file
let steps = []; // earlier photos, {file, maskFile}: filled, and then filled again
let lastChampion = ""; // its id when the page was opened, or at the last result
let working = null; // the AbortController of the work in progress
let speaking = 0;
let opening = 0; // counts, so that of two files opened at once the later one stays

// Photo

/** Open a file that was chosen, dropped or pasted. */
async function open(file) {
  if (!file || working) return;
  const number = ++opening;
  hideError();
  say("Opening the photo.");
  await look();
  try {
    checkBytes(file);
    const opened = await decoded(file);
    checkPixels(opened);
    const format = await formatOf(file);
    if (number !== opening) return opened.close();
    [original, ownFormat] = [file, format];
    steps = [];
    show(opened, new Mask(opened.width, opened.height));
    view.fit();
    say(`${file.name || "The photo"} is open: ${photo.width} x ${photo.height} pixels.`);
  } catch (error) {
    say("");
    showError(error.message);
  }
}

async function decoded(file) {
  let opened;
  try {
    opened = await openPhoto(file);
  } catch {
    throw new Error((await refusalOf(file)) ||
      "This browser cannot show the file: open a JPEG, PNG or WebP photo.");
  }
  const refusal = (await isUnusual(file)) ? await refusalOf(file) : "";
  if (!refusal) return opened;
  opened.close();
  throw new Error(refusal);
}

/** Return the sentence with which the server refuses a photo; "" if it takes it or is busy. */
async function refusalOf(file) {
  const dot = new Mask(1, 1);
  dot.invert();
  const order = { image: file, mask: await encodeMask(dot), model: "", format: "png" };
  const stop = new AbortController();
  try {
    await fill(order, stop.signal, ({ state }) => state === "busy" && stop.abort());
  } catch (error) {
    // A sentence about the mask, which has one pixel, means that the server can read the photo.
    const isRefused = error instanceof ServerError && error.status < 500;
    if (isRefused && !/mask/i.test(error.message)) return error.message;
  }
  return "";
}

function checkNotEmpty(file) {
  if (!file.size) throw new Error(`The file ${file.name} is empty: choose another file.`);
}

function checkBytes(file) {
  checkNotEmpty(file);
  const most = models.limits.bytes;
  if (most && file.size > most) {
    throw new Error(`The file has ${millions(file.size)} MB and this server takes at most ` +
      `${millions(most)} MB: make the photo smaller.`);
  }
}

function checkPixels(opened) {
  const [most, pixels] = [models.limits.pixels, opened.width * opened.height];
  if (!most || pixels <= most) return;
  opened.close();
  throw new Error(`The photo has ${millions(pixels)} megapixels and this server takes at most ` +
    `${millions(most)}: make it smaller.`);
}

const millions = (number) => (number / 1e6).toFixed(number < 1e7 ? 1 : 0);

/** Show a photo with its hole, ready to paint. */
function show(newPhoto, newMask) {
  results.close(newPhoto);
  if (photo && photo !== newPhoto) photo.close();
  [photo, mask] = [newPhoto, newMask];
  painter.most = Math.max(16, Math.min(4000, Math.round(Math.max(photo.width, photo.height) / 2)));
  setSize(Math.max(photo.width, photo.height) / 25);
  element("welcome").hidden = true;
  element("photo-name").textContent = original.name;
  for (const id of ["open-mask", "save-mask"]) element(id).disabled = false;
  paint();
}

/** Show the hole again, after a result or a cancel. */
function paint() {
  results.close();
  const pair = view.panes.length === 2 && !view.together;
  view.showPhoto(photo, mask);
  if (pair) view.fit();
  painter.mask = mask;
  showBar("paint-bar");
  showTool();
  showHole();
}

// Hole

const isAllHole = () => mask.total === mask.width * mask.height;

/** Show the hole after a person has changed it; an older message no longer fits. */
function changed() {
  hideError();
  if (isAllHole()) showError(ALL_HOLE);
  showHole();
}

function holeText() {
  const share = percent(mask.total / (mask.width * mask.height));
  return mask.total ? `The hole is ${share} of the photo.` : "No hole yet.";
}

function showHole() {
  const [share, text] = [mask.total / (mask.width * mask.height), holeText()];
  element("share").textContent = mask.total ? `Hole ${percent(share)}` : "No hole";
  stage.setAttribute("aria-label", `Photo, ${mask.width} x ${mask.height} pixels. ${text}`);
  element("undo").disabled = !mask.past.length && !steps.length;
  element("redo").disabled = !mask.future.length;
  element("clear").disabled = !mask.total;
  if (input.cursor) say(text);
}

function hover(pixel, cross = false) {
  painter.hover(pixel, cross);
  const inside = pixel && photo && pixel.x >= 0 && pixel.y >= 0 && pixel.x < photo.width &&
    pixel.y < photo.height;
  element("place").textContent = inside ? `${pixel.x}, ${pixel.y}` : "";
  clearTimeout(speaking);
  if (cross && inside) speaking = setTimeout(() => say(placeText(pixel)), SPEAK_MS);
}

function placeText({ x, y }) {
  const hole = mask.pixels[y * mask.width + x] ? "in the hole" : "not in the hole";
  return `Cursor at ${x}, ${y}, ${hole}.`;
}

function setSize(size) {
  painter.setSize(size);
  element("size").value = painter.size;
  element("size").max = painter.most;
  const slider = element("size-slider");
  slider.value = (1000 * Math.log(painter.size)) / Math.log(painter.most);
  slider.setAttribute("aria-valuetext", `${painter.size} pixels`);
  if (painter.hovered) painter.hover(painter.hovered, Boolean(input.cursor));
}

function showTool() {
  painter.tool = document.querySelector("input[name=tool]:checked").value;
  stage.dataset.tool = painter.mask ? painter.tool : "move";
  painter.hover(input.cursor, Boolean(input.cursor));
}

function chooseTool(name) {
  document.querySelector(`input[name=tool][value=${name}]`).checked = true;
  showTool();
}

/** Change the whole mask, and show it. */
function change(action) {
  if (!painter.mask) return;
  painter.finish();
  view.redrawHole(action());
  changed();
}

async function undo() {
  if (!painter.mask) return;
  painter.finish();
  if (!mask.past.length && steps.length) return undoFill();
  change(() => mask.undo());
}

/** Go back to the photo before the last fill, with its hole. */
async function undoFill() {
  painter.mask = null; // until the photo is open, so that a second Ctrl+Z does nothing
  const { file, maskFile } = steps.pop();
  const earlier = await openPhoto(file);
  const pixels = await decodeMask(maskFile, earlier.width, earlier.height);
  const its = new Mask(earlier.width, earlier.height);
  its.load(pixels);
  show(earlier, its);
  say("The photo is as it was before the last fill.");
}

async function openMask(file) {
  if (!file || !painter.mask) return;
  hideError();
  try {
    checkNotEmpty(file);
    const pixels = await decodeMask(file, mask.width, mask.height);
    change(() => mask.load(pixels));
    say(`The mask is open. ${mask.total ? holeText() : "It has no hole: nothing in it is white."}`);
  } catch (error) {
    showError(error.message);
  }
}

async function saveMask() {
  if (mask) save(await encodeMask(mask), `${stem(original.name)}-mask.png`);
}

// Work

/** Do work that can be cancelled, with its progress. Return null if it failed. */
async function work(doing, job) {
  hideError();
  working = new AbortController();
  painter.finish();
  painter.mask = null;
  painter.hover(null);
  showProgress(doing, { state: "waiting" });
  showBar("busy-bar");
  say(`${doing}.`);
  try {
    return await job(working.signal, (news) => showProgress(doing, news));
  } catch (error) {
    say(error.name === "AbortError" ? "Cancelled." : "");
    if (error.name !== "AbortError") showError(error.message);
    if (error instanceof ConnectionError) waitForServer();
    return null;
  } finally {
    working = null;
  }
}

function showProgress(what, news) {
  const { state, position, done, total, seconds, seconds_left: left, side = "" } = news;
  const bar = element("progress");
  const doing = what + side;
  let text = doing;
  bar.removeAttribute("value");
  if (state === "busy") text = `The server is busy: trying again in ${seconds} s`;
  if (state === "waiting" && position) text = `${doing}: waits for ${position} before it`;
  if (state === "running" && total > 1) {
    text = `${doing}: ${done} of ${total} tiles`;
    [bar.max, bar.value] = [total, done];
  }
  element("busy-text").textContent = left > 0 ? `${text}, ${about(left)} left` : text;
}

/** Say when a server that was gone answers again. */
async function waitForServer() {
  while (!(await isThere())) await new Promise((resolve) => setTimeout(resolve, BACK_MS));
  hideError();
  say("The server is back: press Fill.");
}

async function startFill() {
  if (!painter.mask) return;
  painter.finish();
  if (!mask.total) return showError(NO_HOLE);
  if (isAllHole()) return showError(ALL_HOLE);
  const chosen = models.chosen();
  const blind = chosen.length > 1 && models.votes && element("blind").checked;
  if (blind && Math.random() < 0.5) chosen.reverse();
  const found = await work("Filling", (signal, report) => fillWith(chosen, signal, report));
  if (found) await showResults(found, blind);
  else paint();
}

/** Fill the hole with one or two models, one after the other. */
async function fillWith(chosen, signal, report) {
  const maskFile = await encodeMask(mask);
  // A PNG file stays one with all that it holds; other formats would lose at each fill.
  const format = (await formatOf(photo.file)) === "PNG" ? "same" : "png";
  const found = [];
  for (const [place, model] of chosen.entries()) {
    const order = { image: photo.file, mask: maskFile, model, format };
    const side = chosen.length > 1 ? ` ${"AB"[place]}` : "";
    const { blob, ...answer } = await fill(order, signal, (news) => report({ ...news, side }));
    const file = new File([blob], "result.png", { type: "image/png" });
    found.push({ photo: await openPhoto(file), maskFile, answer });
  }
  return found;
}

async function showResults(found, blind) {
  await look();
  const shown = found.map(({ photo: its, answer, maskFile }) => ({
    photo: its,
    maskFile,
    model: models.find(answer.model),
    seconds: answer.seconds,
  }));
  if (shown.length === 1) return showOne(shown[0]);
  if (shown[0].model.id === shown[1].model.id) {
    for (const { photo: its } of shown) its.close();
    paint();
    return showError(SAME_VERSION); // another version has become the champion
  }
  results.showTwo(shown, blind, models.votes);
  showMoving();
  say(models.votes ? "Two results are here. Look at both, then vote." : "Two results are here.");
}

function showOne(result) {
  results.showOne(photo, result);
  showMoving();
  // After a second fill the photo is a PNG file, and its own format is of no use.
  const offered = ownFormat in EXTENSIONS && !steps.length;
  element("save-own").hidden = !offered;
  if (offered) element("save-own").querySelector("span").textContent = `Download ${ownFormat}`;
  const now = models.champion()?.id;
  const promoted = lastChampion && now !== lastChampion && result.model.id === now;
  lastChampion = now;
  say(`${describe(result)}${promoted ? " It is the new champion." : ""}`);
}

/** Let drags move the photo while results are shown. */
function showMoving() {
  painter.mask = null;
  stage.dataset.tool = "move";
  input.setCursor(false);
}

// Results

/** Continue on the result as the new photo. */
function again() {
  const [result] = results.shown;
  steps.push({ file: photo.file, maskFile: result.maskFile });
  steps = steps.slice(-MOST_STEPS);
  show(result.photo, new Mask(result.photo.width, result.photo.height));
  say("Paint the next hole on the result.");
}

async function saveOwn() {
  const [result] = results.shown;
  const order = { image: original, mask: result.maskFile, model: result.model.id, format: "same" };
  const made = await work("Making the file", (signal, report) => fill(order, signal, report));
  showBar("result-bar");
  if (!made) return;
  save(made.blob, `${stem(original.name)}-filled.${EXTENSIONS[ownFormat]}`);
  say("The download has the photo's own format, colour profile and EXIF.");
}

async function sendVote(winner) {
  hideError();
  const [won, lost] = [results.shown[winner], results.shown[1 - winner]];
  const choice = { winner: won.model.id, loser: lost.model.id, blind: results.blind,
    reason: element("reason").value.trim() };
  try {
    await vote(choice);
    results.reveal(winner);
  } catch (error) {
    showError(error.message);
  }
}

/** Continue with one of two results under the slider. */
function keepOne(place) {
  const kept = results.shown[place];
  results.close(kept.photo);
  view.panes = [];
  showOne(kept);
  view.fit();
}

// Buttons and keys

function press(actions) {
  for (const [id, action] of Object.entries(actions)) {
    element(id).addEventListener("click", (event) => {
      action();
      // After a click with the mouse, keys belong to the photo again.
      if (event.detail && painter.mask) stage.focus({ preventScroll: true });
    });
  }
}

press({
  open: () => element("photo-file").click(),
  choose: () => element("photo-file").click(),
  "open-mask": () => element("mask-file").click(),
  "save-mask": saveMask,
  undo,
  redo: () => change(() => mask.redo()),
  invert: () => change(() => mask.invert()),
  clear: () => change(() => mask.clear()),
  fill: startFill,
  cancel: () => working?.abort(),
  change: paint,
  "change-pair": paint,
  again,
  save: () => save(results.shown[0].photo.file, `${stem(original.name)}-filled.png`),
  "save-own": saveOwn,
  "keep-a": () => keepOne(0),
  "keep-b": () => keepOne(1),
  "zoom-in": () => view.zoom(1.25),
  "zoom-out": () => view.zoom(0.8),
  "zoom-one": () => view.zoom(1 / view.scale),
  fit: () => view.fit(),
  "close-alert": hideError,
  "show-help": () => element("help").showModal(),
  "close-help": () => element("help").close(),
  "show-panel": () => {
    const shown = element("panel").classList.toggle("open");
    element("show-panel").setAttribute("aria-expanded", String(shown));
  },
});

const LETTERS = {
  b: () => chooseTool("brush"),
  e: () => chooseTool("eraser"),
  r: () => chooseTool("box"),
  h: () => chooseTool("move"),
  "[": () => setSize((painter.grow(-1), painter.size)),
  "]": () => setSize((painter.grow(1), painter.size)),
  i: () => change(() => mask.invert()),
  Delete: () => change(() => mask.clear()),
  Backspace: () => change(() => mask.clear()),
  "+": () => view.zoom(1.25),
  "=": () => view.zoom(1.25),
  "-": () => view.zoom(0.8),
  0: () => view.fit(),
  1: () => view.zoom(1 / view.scale),
  c: () => input.setCursor(!input.cursor),
  o: () => element("photo-file").click(),
  "?": () => element("help").showModal(),
  Escape: () => {
    if (working) working.abort();
    else if (results.shown.length) paint();
  },
};
const WITH_CTRL = {
  z: undo,
  Z: () => change(() => mask.redo()),
  y: () => change(() => mask.redo()),
  Enter: startFill,
};
const NEEDS_PHOTO = new Set(["o", "?", "Escape"]);

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.altKey || element("help").open) return;
  const place = event.target;
  const withCtrl = event.ctrlKey || event.metaKey;
  const takesKeys = "select, input:not([type=radio], [type=range], [type=checkbox])";
  if (place.matches(takesKeys) && !(withCtrl && event.key === "Enter")) return;
  if (!withCtrl && !element("letters").checked && place !== stage) return;
  const key = event.shiftKey || event.key.length > 1 ? event.key : event.key.toLowerCase();
  const action = (withCtrl ? WITH_CTRL : LETTERS)[key];
  if (!action || (!photo && !NEEDS_PHOTO.has(key))) return;
  event.preventDefault();
  action();
});

document.querySelectorAll("input[name=tool]").forEach((radio) => {
  radio.addEventListener("change", showTool);
  radio.addEventListener("click", (event) => event.detail && stage.focus({ preventScroll: true }));
});
element("size-slider").addEventListener("input", (event) => {
  setSize(painter.most ** (event.target.value / 1000));
});
element("size").addEventListener("change", (event) => setSize(Number(event.target.value)));
element("vote").addEventListener("submit", (event) => {
  event.preventDefault();
  sendVote(Number(event.submitter.value));
});
for (const [id, action] of [["photo-file", open], ["mask-file", openMask]]) {
  element(id).addEventListener("change", (event) => {
    action(event.target.files[0]);
    event.target.value = ""; // the same file can be chosen again
  });
}

document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) open(file);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  stage.classList.add("over");
});
document.addEventListener("dragleave", () => stage.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  open(event.dataTransfer.files[0]);
});
window.addEventListener("beforeunload", (event) => {
  if (mask?.total || results.shown.length) event.preventDefault();
});

/** Ask for the models, and show what is wrong with them. */
async function look() {
  try {
    await models.refresh();
    showProblem(models.problem);
    lastChampion ||= models.champion()?.id;
  } catch (error) {
    // Painting works without the server; Fill says that it does not answer.
    if (error instanceof ServerError) showProblem(error.message);
  }
}

const lookIfSeen = () => document.hidden || look();
document.addEventListener("visibilitychange", lookIfSeen);
setInterval(lookIfSeen, LOOK_MS);

view.onChange = () => {
  element("zoom").textContent = `${Math.round(100 * view.scale)} %`;
};
view.onResize = () => {
  if (view.scale === view.fitScale) view.fit();
};
look();
