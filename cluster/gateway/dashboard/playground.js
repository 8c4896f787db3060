// Asks the model and shows what it answers. The conversation is kept in this page and nowhere else.

import { Announcer } from "./announcer.js";
import { curlLine } from "./curl.js";
import { byId, element } from "./dom.js";
import { ApiError, LostError, events } from "./event_stream.js";
import { Reply } from "./reply.js";
import { FieldError, Settings, fillEfforts } from "./settings.js";
import { ReplyView, Transcript, asked } from "./transcript.js";
import { plural } from "./words.js";

const PATHS = { chat: "v1/chat/completions", completions: "v1/completions" };
const LABELS = { chat: "Message", completions: "Prompt" };
const RETRY_MS = 2000;

export class Playground {
  #settings = new Settings();
  #transcript = new Transcript();
  #announcer = new Announcer();
  #composer = byId("message");
  #messages = []; // of this chat
  #last = null; // the view of the last reply, whose calls can be answered
  #stopper = null; // an AbortController while a reply comes
  #model;
  #needsKey = false;

  constructor() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#composer.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.#stop());
    byId("stop").addEventListener("click", () => this.#stop());
    byId("new-chat").addEventListener("click", () => this.#begin());
    for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", () => this.#begin());
    for (const button of document.querySelectorAll("#examples button")) {
      button.addEventListener("click", () => {
        this.#composer.value = button.textContent;
        this.#send();
      });
    }
    this.#begin();
    this.#learn();
  }

  /** Each status of the server tells what it serves, and whether a key is needed. */
  take(status) {
    this.#model = status.model;
    this.#needsKey = status.gateway.needs_key;
  }

  async #learn() {
    try {
      const response = await fetch("v1/capabilities");
      if (!response.ok) throw new Error(`status ${response.status}`);
      const capabilities = await response.json();
      this.#model ??= capabilities.model;
      fillEfforts(capabilities);
      this.#settings.learn(capabilities);
    } catch (error) {
      console.warn("the capabilities are not known yet", error);
      setTimeout(() => this.#learn(), RETRY_MS);
    }
  }

  get #mode() {
    return document.querySelector("[name=mode]:checked").value;
  }

  #begin() {
    this.#stop();
    this.#transcript.clear();
    [this.#messages, this.#last] = [[], null];
    byId("empty").hidden = false;
    byId("message-label").textContent = LABELS[this.#mode];
    this.#composer.placeholder = this.#mode === "chat" ? "Ask something" : "A text to go on with";
    this.#settings.useFor(PATHS[this.#mode]);
    this.#announcer.say("");
  }

  #stop() {
    this.#stopper?.abort();
  }

  #running(isRunning) {
    const stop = byId("stop");
    if (!isRunning && document.activeElement === stop) this.#composer.focus();
    stop.hidden = !isRunning;
    byId("send").hidden = isRunning;
  }

  // ------------------------------------------------------------------------------------------------------- a request

  /** What is asked next: [the messages to add, the request's body]; null where there is nothing to ask. */
  #question() {
    const text = this.#composer.value;
    const [fields, system] = this.#settings.read();
    const head = { model: this.#model, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    if (this.#mode === "completions") return text ? [[], { ...head, prompt: text, ...fields }] : null;
    const calls = this.#messages.at(-1)?.tool_calls ?? [];
    const results = this.#last?.results ?? [];
    const next = calls
      .map((call, i) => ({ role: "tool", tool_call_id: call.id, content: results[i] }))
      .filter((message) => message.content);
    if (text.trim()) next.push({ role: "user", content: text });
    if (!next.length) return null;
    const first = system ? [{ role: "system", content: system }] : [];
    return [next, { ...head, messages: [...first, ...this.#messages, ...next], ...fields }];
  }

  async #send() {
    if (this.#stopper) return;
    let question;
    try {
      question = this.#question();
    } catch (error) {
      if (!(error instanceof FieldError)) throw error;
      byId("empty").hidden = true;
      this.#transcript.add(this.#errorCard("This field cannot be sent", error.message, error.param));
      this.#announcer.say(error.message);
      return;
    }
    if (question === null) {
      this.#composer.focus();
      return;
    }
    const [next, body] = question;
    const text = this.#composer.value;
    const isChat = this.#mode === "chat";
    byId("empty").hidden = true;
    this.#last?.canBeAnswered(false);
    for (const message of next) if (message.role === "user") this.#transcript.add(asked("You", message.content));
    if (isChat) this.#composer.value = "";
    await this.#receive(PATHS[this.#mode], body, next, new ReplyView(isChat ? null : body.prompt), text);
  }

  async #receive(path, body, next, view, text) {
    const reply = new Reply();
    const stopper = (this.#stopper = new AbortController());
    this.#transcript.add(view.node);
    this.#running(true);
    this.#announcer.begin();
    try {
      for await (const batch of events(path, body, stopper.signal, (headers) => reply.begin(headers))) {
        for (const event of batch) reply.take(event);
        this.#transcript.change(() => view.show(reply));
        this.#announcer.follow(reply.content);
      }
      this.#transcript.change(() => view.finish(reply));
      this.#announcer.end(reply.content, `The reply is complete: ${plural(reply.usage?.completion_tokens ?? 0, "token")}.`);
    } catch (error) {
      if (stopper.signal.aborted) {
        this.#transcript.change(() => view.finish(reply, "Stopped."));
        this.#announcer.say("Stopped.");
      } else this.#failed(error, reply, view, text);
    }
    this.#transcript.change(() => view.addAction(this.#curlButton(path, body)));
    const isOfThisChat = view.node.isConnected; // or another one was begun meanwhile
    if (path === PATHS.chat && isOfThisChat && !reply.isEmpty) {
      this.#messages.push(...next, reply.message());
      this.#last = view;
    }
    this.#stopper = null;
    this.#running(false);
  }

  // ---------------------------------------------------------------------------------------------------------- errors

  #failed(error, reply, view, text) {
    let [title, message, param] = ["The gateway did not answer", "The connection failed. Is the server still there?", null];
    if (error instanceof ApiError) {
      title = [error.status === 200 ? "Ended early" : error.status, error.code ?? error.kind].join(" · ");
      message = error.message;
      if (error.retryAfter) message += ` (try again in ${error.retryAfter} s)`;
      if (error.status === 401) message += ". Reload this page to log in again.";
      param = error.param;
    } else if (error instanceof LostError || !reply.isEmpty) {
      [title, message] = ["The connection was lost", "It ended before the reply was complete."];
    }
    if (reply.isEmpty) {
      this.#composer.value ||= text; // to be sent again, or changed
      this.#last?.canBeAnswered(true);
    }
    this.#transcript.change(() => view.fail(reply, this.#errorCard(title, message, param)));
    this.#announcer.say(`Error: ${message}`);
  }

  #errorCard(title, message, param) {
    const card = element("div", { class: "error" }, element("h4", {}, title), element("p", { class: "text" }, message));
    if (param && this.#settings.mark(param)) {
      const field = element("button", { type: "button", class: "quiet" }, `Go to ${param}`);
      field.addEventListener("click", () => this.#settings.goTo(param));
      card.append(field);
    } else if (param) card.append(element("p", { class: "dim" }, `Field: ${param}`));
    return card;
  }

  // ------------------------------------------------------------------------------------------------------------ curl

  #curlButton(path, body) {
    const button = element("button", { type: "button", class: "quiet" }, "Copy as curl");
    button.addEventListener("click", async () => {
      const line = curlLine(path, body, this.#needsKey);
      try {
        await navigator.clipboard.writeText(line);
        button.textContent = "Copied";
        this.#announcer.say("Copied");
      } catch {
        // a browser gives its clipboard to pages of secure addresses only
        const text = element("textarea", { class: "curl", readonly: "", rows: "6", "aria-label": "The request as curl" });
        text.value = line;
        this.#transcript.change(() => button.replaceWith(text));
        text.select();
      }
    });
    return button;
  }
}
