// A streamed request: server-sent events in, parsed objects out, each failure as what it is.

/** What the API answers in place of a reply: its words, and the field that it is about. */
export class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error.message);
    Object.assign(this, { status, kind: error.type, code: error.code, param: error.param ?? null, retryAfter });
  }
}

/** The connection ended before the reply was complete. */
export class LostError extends Error {}

async function refusal(response) {
  const text = await response.text();
  try {
    return new ApiError(response.status, JSON.parse(text).error, response.headers.get("retry-after"));
  } catch {
    const message = text.trim().slice(0, 400) || `an answer of status ${response.status} without a text`;
    return new ApiError(response.status, { message, type: "not from the API", code: null });
  }
}

/** The events of a text that is complete up to its last blank line: [events, whether `[DONE]` came, what is left]. */
function parsed(text) {
  const blocks = text.split(/\r?\n\r?\n/);
  const rest = blocks.pop();
  const data = blocks.map((block) =>
    block
      .split(/\r?\n/)
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).trimStart())
      .join("\n"),
  );
  const isDone = data.includes("[DONE]");
  return [data.filter((one) => one && one !== "[DONE]").map((one) => JSON.parse(one)), isDone, rest];
}

/**
 * Yields the events that came together, so that the page changes once for them. Raises what ended it early.
 * `onHeaders` gets the headers of the answer, once it has begun.
 */
export async function* events(path, body, signal, onHeaders) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await refusal(response);
  onHeaders(response.headers);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  while (true) {
    const { done, value } = await reader.read();
    text += decoder.decode(value, { stream: !done });
    const [found, isDone, rest] = parsed(text);
    text = rest;
    const failed = found.findIndex((event) => event.error);
    const whole = failed < 0 ? found : found.slice(0, failed);
    if (whole.length) yield whole;
    if (failed >= 0) throw new ApiError(response.status, found[failed].error);
    if (isDone) return;
    if (done) throw new LostError("the connection ended before the reply was complete");
  }
}
