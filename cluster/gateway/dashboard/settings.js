// The fields of a request that somebody may set; one that is left empty is not sent, and the model's own value holds.

import { byId, element } from "./dom.js";

const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };

const READERS = {
  number: (text) => Number(text),
  text: (text) => text,
  lines: (text) =>
    text
      .split("\n")
      .filter(Boolean)
      .map((line) => line.replace(/\\([ntr\\])/g, (_, letter) => ESCAPES[letter])),
  json: (text) => JSON.parse(text),
};

/** What stands in a field cannot be sent. */
export class FieldError extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

export class Settings {
  #form = byId("settings");
  #capabilities = null;
  #path = "";

  constructor() {
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("input", (event) => {
      this.#unmark(event.target);
      this.#countChanged();
    });
    this.#form.addEventListener("reset", () => {
      for (const control of this.#controls()) this.#unmark(control);
      setTimeout(() => this.#countChanged()); // the values go after the event
    });
    byId("settings-toggle").addEventListener("click", ({ currentTarget }) => {
      const isOpen = currentTarget.getAttribute("aria-expanded") !== "true";
      currentTarget.setAttribute("aria-expanded", String(isOpen));
      this.#form.classList.toggle("open", isOpen);
    });
    this.#countChanged();
  }

  #controls() {
    return [...this.#form.elements].filter((control) => control.name);
  }

  #countChanged() {
    const number = this.#controls().filter((control) => control.value !== "" && !control.disabled).length;
    byId("settings-changed").textContent = number ? `${number} set` : "";
  }

  /** From now on requests go to the endpoint at `path`; what it does not honour cannot be set. */
  useFor(path) {
    this.#path = path;
    this.#allow();
  }

  learn(capabilities) {
    this.#capabilities = capabilities;
    this.#allow();
  }

  #allow() {
    const fields = this.#capabilities?.endpoints[`/${this.#path}`]?.fields;
    if (!fields) return;
    for (const control of this.#controls()) {
      const found = fields[control.dataset.field ?? control.name];
      control.disabled = found?.support !== "honoured";
      const note = control.closest("label").querySelector(".not-here");
      note.textContent = !control.disabled ? "" : found ? "not honoured here" : "not in this mode";
      for (const [bound, side] of [["minimum", "min"], ["maximum", "max"]]) {
        if (control.type === "number" && Math.abs(found?.[bound]) < 1e6) control[side] = found[bound];
      }
    }
    this.#countChanged();
  }

  /** The request's fields, and the system prompt: [fields, system]. Raises `FieldError`. */
  read() {
    const fields = {};
    let system = "";
    for (const control of this.#controls()) {
      this.#unmark(control);
      if (control.disabled || (control.value === "" && !control.validity.badInput)) continue;
      if (control.name === "system") system = control.value;
      else fields[control.name] = this.#value(control);
    }
    return [fields, system];
  }

  #value(control) {
    try {
      if (control.validity.badInput) throw new SyntaxError("it must be a number");
      return READERS[control.dataset.kind ?? control.type](control.value);
    } catch (error) {
      throw new FieldError(control.name, `${control.name}: ${error.message}`);
    }
  }

  /** Show that the field a refusal is about is this one; returns whether it is among these. */
  mark(param) {
    const control = this.#controlOf(param);
    if (control === undefined) return false;
    control.setAttribute("aria-invalid", "true");
    return true;
  }

  /** To the field of this name. */
  goTo(param) {
    const control = this.#controlOf(param);
    byId("settings-toggle").setAttribute("aria-expanded", "true");
    this.#form.classList.add("open");
    const group = control?.closest("details");
    if (group) group.open = true;
    control?.focus();
  }

  /** The control of a request's field: `stop[0]` is of `stop`. */
  #controlOf(param) {
    const name = param?.split(/[.[]/)[0];
    return this.#controls().find((one) => one.name === name);
  }

  #unmark(control) {
    control.removeAttribute("aria-invalid");
  }
}

/** A choice of `reasoning_effort` for each that the API has is made from its own table. */
export function fillEfforts(capabilities) {
  const efforts = capabilities.endpoints["/v1/chat/completions"]?.fields.reasoning_effort?.enum ?? [];
  const select = byId("reasoning-effort");
  select.replaceChildren(select.options[0], ...efforts.map((effort) => element("option", {}, effort)));
}
