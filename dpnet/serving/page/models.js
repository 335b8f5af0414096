// The versions that the server offers, and the two lists in which a person chooses.

import { readModels } from "./api.js";
import { element } from "./page.js";

export class Models {
  constructor() {
    this.all = [];
    this.limits = {};
    this.votes = true; // whether the server can store votes
    this.problem = ""; // a sentence about what is wrong with the models
    element("model").addEventListener("change", () => this.#offerRivals());
  }

  /** Ask the server again, and keep what is chosen. Throw if it cannot answer. */
  async refresh() {
    const answer = await readModels();
    this.all = answer.models ?? [];
    this.limits = answer.limits ?? {};
    this.votes = answer.votes ?? true;
    this.problem = answer.problem ?? "";
    element("blind").disabled = !this.votes;
    const champion = this.champion();
    const first = champion ? `Champion: ${champion.name}` : "The server's choice";
    this.#offer(element("model"), first, this.all);
    this.#offerRivals();
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

  /** Offer every version but the chosen one to compare with. */
  #offerRivals() {
    const chosen = element("model").value || this.champion()?.id;
    this.#offer(element("rival"), "Nothing", this.all.filter((model) => model.id !== chosen));
  }

  #offer(list, first, models) {
    const options = [["", first], ...models.map((model) => [model.id, model.name])];
    const shown = [...list.options].map((option) => [option.value, option.text]);
    if (JSON.stringify(options) === JSON.stringify(shown)) return; // a list that is open stays so
    const chosen = list.value;
    list.replaceChildren(...options.map(([id, name]) => new Option(name, id)));
    list.value = chosen;
    if (list.selectedIndex < 0) list.value = ""; // the chosen version is gone
  }
}
