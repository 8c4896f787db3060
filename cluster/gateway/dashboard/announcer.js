// What is read out of a reply while it comes: whole sentences, now and then, not every token.

import { byId } from "./dom.js";

const PERIOD_MS = 4000;
const MAX_CHARS = 600; // at once

export class Announcer {
  #region = byId("announcer");
  #said = 0; // characters of the reply
  #last = 0;

  say(text) {
    this.#region.textContent = text;
  }

  begin() {
    [this.#said, this.#last] = [0, performance.now()];
    this.say("The model is writing.");
  }

  follow(text) {
    if (performance.now() - this.#last < PERIOD_MS) return;
    const end = /^[^]*[.!?…:;\n](?=\s)/.exec(text.slice(this.#said))?.[0].length;
    if (!end) return;
    this.say(text.slice(this.#said, this.#said + end).slice(-MAX_CHARS));
    this.#said += end;
    this.#last = performance.now();
  }

  end(text, summary) {
    this.say(`${text.slice(this.#said).slice(-MAX_CHARS)} ${summary}`.trim());
  }
}
