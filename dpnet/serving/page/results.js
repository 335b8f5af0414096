// What a fill gave: one result under a slider, or two next to each other with a vote.

import { element, say, showBar } from "./page.js";

const KEY_STEP = 0.02; // of the width, for an arrow key

export class Results {
  /** Show results in a view. */
  constructor(view) {
    this.view = view;
    this.shown = []; // {photo, blob, model: {id, name}, seconds}
    this.share = 0.5;
    this.#listenToDivider();
  }

  /** Show one result over the photo before it. */
  showOne(before, result) {
    this.before = before;
    this.shown = [result];
    this.share = 0.5;
    this.#name("Before", `After: ${result.model.name || "the model"}`);
    this.#slide();
    element("divider").hidden = false;
    showBar("result-bar");
  }

  /** Show two results. `blind` hides their names until the vote, `votes` offers to vote. */
  showTwo(results, blind, votes) {
    this.shown = results;
    this.blind = blind;
    this.view.showPair(results[0].photo, results[1].photo);
    this.view.fit();
    element("stage").classList.toggle("tall", this.view.height > this.view.width);
    element("vote").hidden = !votes;
    element("reason").value = "";
    element("divider").hidden = true;
    this.#nameTwo();
    showBar("vote-bar");
  }

  /** Tell the names after a vote. */
  reveal(winner) {
    this.blind = false;
    element("vote").hidden = true;
    this.#nameTwo();
    const [won, lost] = [this.shown[winner], this.shown[1 - winner]];
    say(`Your vote is stored: ${won.model.name} is better than ${lost.model.name}.`);
  }

  /** Remove the results, and give back the memory of all but one photo. */
  close(keep = null) {
    for (const { photo } of this.shown) if (photo !== keep) photo.close();
    this.shown = [];
    for (const id of ["divider", "name-before", "name-after"]) element(id).hidden = true;
    element("stage").classList.remove("two", "tall");
  }

  #name(one, other, two = false) {
    for (const [id, text] of [["name-before", one], ["name-after", other]]) {
      element(id).hidden = false;
      element(id).textContent = text;
    }
    element("stage").classList.toggle("two", two);
  }

  #nameTwo() {
    const names = this.shown.map((one, place) => {
      const letter = "AB"[place];
      return this.blind ? letter : `${letter}: ${one.model.name}`;
    });
    this.#name(names[0], names[1], true);
    element("pair-answer").textContent = this.blind
      ? "Two versions filled the same hole. Which is better?"
      : `A is ${this.shown[0].model.name}, B is ${this.shown[1].model.name}.`;
  }

  #slide() {
    const divider = element("divider");
    divider.style.left = `${100 * this.share}%`;
    divider.setAttribute("aria-valuenow", String(Math.round(100 * this.share)));
    this.view.showSlider(this.before, this.shown[0].photo, this.share);
  }

  #listenToDivider() {
    const divider = element("divider");
    divider.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      divider.setPointerCapture(event.pointerId);
    });
    divider.addEventListener("pointermove", (event) => {
      if (!divider.hasPointerCapture(event.pointerId)) return;
      const box = element("stage").getBoundingClientRect();
      this.#setShare((event.clientX - box.left) / box.width);
    });
    divider.addEventListener("keydown", (event) => {
      const target = { Home: 0, End: 1 }[event.key];
      const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (target === undefined && !step) return;
      event.preventDefault();
      event.stopPropagation();
      this.#setShare(target ?? this.share + step * KEY_STEP * (event.shiftKey ? 5 : 1));
    });
  }

  #setShare(share) {
    this.share = Math.min(1, Math.max(0, share));
    this.#slide();
  }
}

/** Return the sentence that says which version answered. */
export function describe({ model, seconds }) {
  const time = Number.isFinite(seconds) && seconds > 0 ? ` in ${seconds.toFixed(1)} s` : "";
  return `Filled by ${model.name || "the model"}${time}.`;
}
