// What a reply is made of, gathered from its events, and how long it took.

export class Reply {
  content = "";
  reasoning = "";
  calls = []; // { id, name, arguments }
  usage = null;
  finishReason = null;
  predictedTtftS = null; // what the gateway said before it began
  #began = performance.now();
  #first = null; // when its first piece came
  #last = null;
  #thought = null; // when its thoughts were over

  begin(headers) {
    const predicted = headers.get("x-foretoken-predicted-ttft-ms");
    if (predicted !== null) this.predictedTtftS = Number(predicted) / 1000;
  }

  /** One chunk of either endpoint. */
  take(event) {
    if (event.usage) this.usage = event.usage;
    for (const choice of event.choices) {
      const delta = choice.delta ?? { content: choice.text };
      this.content += delta.content ?? "";
      this.reasoning += delta.reasoning ?? delta.reasoning_content ?? "";
      for (const part of delta.tool_calls ?? []) this.#takeCall(part);
      if (this.#thought === null && this.reasoning && (delta.content || delta.tool_calls)) this.#thought = performance.now();
      this.finishReason = choice.finish_reason ?? this.finishReason;
      if (delta.content || delta.reasoning || delta.tool_calls) this.#tick();
    }
  }

  #takeCall(part) {
    const call = (this.calls[part.index] ??= { id: part.id, name: "", arguments: "" });
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }

  #tick() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  get isEmpty() {
    return !this.content && !this.reasoning && !this.calls.length;
  }

  get isThinking() {
    return this.#thought === null && this.finishReason === null;
  }

  /** Seconds from the first piece to the end of the thoughts, or to now. */
  get thinkingS() {
    return ((this.#thought ?? this.#last) - this.#first) / 1000;
  }

  get ttftS() {
    return this.#first === null ? null : (this.#first - this.#began) / 1000;
  }

  get elapsedS() {
    return ((this.#last ?? performance.now()) - this.#began) / 1000;
  }

  /** Of the tokens behind the first; undefined where there are too few to say. */
  get tokensPerS() {
    const behind = (this.usage?.completion_tokens ?? 0) - 1;
    return behind > 0 && this.#last > this.#first ? behind / ((this.#last - this.#first) / 1000) : undefined;
  }

  /** As the next request tells it; a call that was stopped in its arguments is none. */
  message() {
    const calls = this.calls.filter((call) => isJson(call.arguments));
    const message = { role: "assistant", content: this.content || (calls.length ? null : "") };
    if (this.reasoning) message.reasoning = this.reasoning;
    if (calls.length) {
      message.tool_calls = calls.map((call) => ({
        id: call.id,
        type: "function",
        function: { name: call.name, arguments: call.arguments },
      }));
    }
    return message;
  }
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}
