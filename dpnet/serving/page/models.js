// The versions that the server offers, and the two lists in which a person chooses.

import { readModels } from "./api.js";
import { element } from "./page.js";

export class Models {
  constructor() {
    this.all = [];
    this.limits = {};
    this.votes = true; // whether the server can store votes
  }

  /** Ask the server again, and keep what is chosen. Throw if it cannot answer. */
  async refresh() {
    const answer = await readModels();
    this.all = answer.models ?? [];
    this.limits = answer.limits ?? {};
    this.votes = answer.votes ?? true;
    element("blind").disabled = !this.votes;
    const champion = this.champion();
    const first = champion ? `Champion: ${champion.name}` : "The server's choice";
    this.#offer(element("model"), first);
    this.#offer(element("rival"), "Nothing");
  }

  /** Return the version that answers if none is chosen. */
  champion() {
    return this.all.find((model) => model.champion);
  }

  /** Return the chosen ids; "" is the champion. The second is there only to compare. */
  chosen() {
    const rival = element("rival").value;
    return rival ? [element("model").value, rival] : [element("model").value];
  }

  /** Return the model that an answer names by its id or its name. */
  find(text) {
    const found = this.all.find((model) => model.id === text || model.name === text);
    return found ?? { id: text, name: text };
  }

  #offer(list, first) {
    const chosen = list.value;
    const options = this.all.map((model) => new Option(model.name, model.id));
    list.replaceChildren(new Option(first, ""), ...options);
    list.value = chosen;
    if (list.selectedIndex < 0) list.value = ""; // the chosen version is gone
  }
}
