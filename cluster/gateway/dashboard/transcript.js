// The conversation as it is seen: what was asked, and replies that grow.

import { byId, element, focusableWhereItScrolls, grow } from "./dom.js";
import { count, latency, plural, rate } from "./words.js";

const AT_END_PX = 48; // so near the end, the end stays in view

export class Transcript {
  #region = byId("transcript");
  #isAtEnd = true; // so is the reader
  #top = 0; // how far it was scrolled last

  constructor() {
    const region = this.#region;
    region.addEventListener("scroll", () => {
      if (region.scrollHeight - region.scrollTop - region.clientHeight < AT_END_PX) this.#isAtEnd = true;
      else if (region.scrollTop < this.#top) this.#isAtEnd = false; // or it is the region that has changed
      this.#top = region.scrollTop;
    });
    new ResizeObserver(() => this.change(() => {})).observe(region);
  }

  /** Do something that makes it longer, or smaller; a reader who is at its end stays there. */
  change(work) {
    work();
    if (this.#isAtEnd) this.#region.scrollTop = this.#region.scrollHeight;
    focusableWhereItScrolls(this.#region);
  }

  add(node) {
    this.#isAtEnd = true;
    this.change(() => this.#region.append(node));
  }

  clear() {
    this.change(() => this.#region.replaceChildren());
  }
}

export function asked(who, text) {
  return element("article", { class: "asked", "aria-label": who }, element("p", { class: "text" }, text));
}

/** One tool call: its name, its arguments a line each, and a place for what the tool gave. */
class CallView {
  #name = element("strong", {});
  #arguments = element("pre", {});
  #input = element("textarea", { rows: "2" });
  #result = element("label", { class: "field", hidden: "" }, element("span", {}, "What it gave back"), this.#input);
  node = element("section", { class: "call" }, element("h4", {}, "Calls ", this.#name), this.#arguments, this.#result);

  show(call) {
    this.#name.textContent = call.name;
    this.node.setAttribute("aria-label", `Call of ${call.name}`);
    let text = call.arguments;
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // it is not complete yet
    }
    if (this.#arguments.textContent !== text) this.#arguments.textContent = text;
  }

  get result() {
    return this.#input.value;
  }

  canBeAnswered(yes) {
    this.#result.hidden = !yes && this.#input.value === "";
    this.#input.readOnly = !yes;
  }
}

/** `prompt`: the text that a completion goes on with; null in a chat. */
export class ReplyView {
  #thoughts = document.createTextNode("");
  #thoughtsTitle = element("summary", {}, "Thinking…");
  #folded = element("details", { class: "thoughts", hidden: "" }, this.#thoughtsTitle, element("p", { class: "text" }, this.#thoughts));
  #content = document.createTextNode("");
  #calls = [];
  #callList = element("div", { class: "calls" });
  #end = element("div", { class: "reply-end" });
  #numbers = element("p", { class: "reply-numbers" });
  #foot = element("div", { class: "reply-foot" }, this.#numbers);
  node;

  constructor(prompt) {
    const text = element("p", { class: "text" });
    if (prompt !== null) text.append(element("span", { class: "prompt" }, prompt));
    text.append(element("span", { class: "written" }, this.#content));
    this.node = element(
      "article",
      { class: "reply writing", "aria-label": prompt === null ? "Reply" : "Completion" },
      this.#folded,
      text,
      this.#callList,
      this.#end,
      this.#foot,
    );
  }

  show(reply) {
    grow(this.#content, reply.content);
    if (reply.reasoning) {
      this.#folded.hidden = false;
      grow(this.#thoughts, reply.reasoning);
      this.#thoughtsTitle.textContent = reply.isThinking ? "Thinking…" : `Thought for ${latency(reply.thinkingS)}`;
    }
    reply.calls.forEach((call, i) => {
      if (!this.#calls[i]) {
        this.#calls[i] = new CallView();
        this.#callList.append(this.#calls[i].node);
      }
      this.#calls[i].show(call);
    });
    this.#numbers.replaceChildren(...numbersOf(reply).map((text) => element("span", {}, text)));
  }

  /** `note`: why it ended where that is not its own end. */
  finish(reply, note = "") {
    this.show(reply);
    this.node.classList.remove("writing");
    if (reply.isThinking && reply.reasoning) this.#thoughtsTitle.textContent = `Thought for ${latency(reply.thinkingS)}`;
    if (reply.isEmpty && !note) note = "The reply is empty: the model ended at once.";
    if (note) this.#end.append(element("p", { class: "dim" }, note));
    this.canBeAnswered(true);
  }

  fail(reply, card) {
    this.show(reply);
    this.node.classList.remove("writing");
    this.#end.append(card);
  }

  /** What the tools gave: by place of the call; "" where nobody has said. */
  get results() {
    return this.#calls.map((call) => call.result);
  }

  canBeAnswered(yes) {
    for (const call of this.#calls) call.canBeAnswered(yes);
  }

  addAction(button) {
    this.#foot.append(button);
  }
}

function numbersOf(reply) {
  const { usage } = reply;
  const predicted = reply.predictedTtftS === null ? "" : ` (predicted ${latency(reply.predictedTtftS)})`;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  return [
    usage && plural(usage.completion_tokens, "token"),
    reply.ttftS !== null && latency(reply.elapsedS),
    reply.ttftS !== null && `first token after ${latency(reply.ttftS)}${predicted}`,
    reply.tokensPerS !== undefined && `${rate(reply.tokensPerS)} tokens/s`,
    usage && `prompt ${count(usage.prompt_tokens)}${cached ? `, ${count(cached)} cached` : ""}`,
    reply.finishReason === "length" && "cut at the limit",
  ].filter(Boolean);
}
