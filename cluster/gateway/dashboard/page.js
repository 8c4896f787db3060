// Asks for the cluster's numbers every second and shows them. Rates are differences of counters between two statuses.

const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;
const HISTORY = 120; // seconds on the chart
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);

/** An element with its text or children; `attributes` are set as they are, so no text is ever taken for markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Show `children` under `parent`, unless they are what it shows already: a reader's place is not disturbed. */
function show(parent, children) {
  const next = document.createElement(parent.tagName);
  next.append(...children);
  if (next.innerHTML !== parent.innerHTML) parent.replaceChildren(...next.childNodes);
}

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = number > 0 ? Math.min(Math.floor(Math.log2(number) / 10), units.length - 1) : 0;
  return `${(number / 1024 ** power).toLocaleString("en", { maximumFractionDigits: 1 })} ${units[power]}`;
}

const count = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const rate = (value) => (value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: 1 }));

// ------------------------------------------------------------------------------------------------------------- rates

let last = null; // the status before: when, and tokens by process
let rates = new Map(); // tokens a second by worker's name
const history = []; // [time in s, tokens a second]

function measure(status) {
  if (status.at_s === null || (last !== null && status.at_s <= last.at_s)) return;
  const tokens = new Map(status.workers.map((worker) => [worker.worker_id, worker.generated_tokens]));
  if (last !== null) {
    const seconds = status.at_s - last.at_s;
    rates = new Map();
    for (const worker of status.workers) {
      const before = last.tokens.get(worker.worker_id);
      if (worker.worker_id && before !== undefined && worker.generated_tokens >= before) {
        rates.set(worker.name, (worker.generated_tokens - before) / seconds);
      }
    }
    history.push([status.at_s, total()]);
    while (history.length && history[0][0] < status.at_s - HISTORY) history.shift();
  }
  last = { at_s: status.at_s, tokens };
}

const total = () => [...rates.values()].reduce((sum, value) => sum + value, 0);

function drawChart() {
  if (history.length < 2) return;
  const end = history[history.length - 1][0];
  const top = Math.max(1, ...history.map(([, value]) => value)) * 1.1;
  const points = history.map(([at, value]) => `${(HISTORY - (end - at)).toFixed(2)} ${(40 - (40 * value) / top).toFixed(2)}`);
  const first = (HISTORY - (end - history[0][0])).toFixed(2);
  byId("line").setAttribute("d", `M${points.join("L")}`);
  byId("area").setAttribute("d", `M${points.join("L")}L${HISTORY} 40L${first} 40Z`);
  const highest = rate(Math.max(...history.map(([, value]) => value)));
  byId("chart").setAttribute("aria-label", `Tokens a second: now ${rate(total())}, at most ${highest}`);
  byId("chart-caption").textContent = `Tokens a second, over the last two minutes; at most ${highest}`;
}

// ------------------------------------------------------------------------------------------------------------- parts

function tile(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}

function nodeCard(node) {
  const facts = [node.memory_bytes ? `${bytes(node.memory_bytes)} of memory` : "", ...node.devices].filter(Boolean);
  const state = node.is_alive ? [] : [" ", element("span", { class: "bad" }, "lost")];
  return element(
    "li",
    {},
    element("h3", {}, node.node_id, ...state),
    element("p", { class: "dim" }, facts.join(", ")),
    element("p", { class: "dim" }, node.workers.length ? `Runs ${node.workers.join(", ")}` : "Runs no worker"),
  );
}

const ROLES = { all: "all in one", attention: "attention", expert: "expert" };

function pages(worker) {
  if (!worker.pages_total) return ["–"];
  const used = worker.pages_total - worker.pages_free;
  const bar = { value: String(used), max: String(worker.pages_total), "aria-label": `KV pages in use on ${worker.name}` };
  return [element("progress", bar), `${count(used)} of ${count(worker.pages_total)}`];
}

function workerRow(worker) {
  const runs = worker.role !== "expert";
  const condition = worker.condition === "lost" ? { class: "bad" } : {};
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, worker.name),
    element("td", {}, ROLES[worker.role] ?? worker.role),
    element("td", {}, worker.node_id),
    element("td", condition, worker.condition),
    element("td", { class: "number" }, runs ? count(worker.num_running) : "–"),
    element("td", { class: "number" }, runs ? count(worker.num_waiting) : "–"),
    element("td", {}, ...pages(worker)),
    element("td", { class: "number" }, runs ? rate(rates.get(worker.name)) : "–"),
  );
}

/** Neighbouring experts as one bar: [first, length]. */
function ranges(experts) {
  const found = [];
  for (const expert of experts) {
    const end = found[found.length - 1];
    if (end && end[0] + end[1] === expert) end[1] += 1;
    else found.push([expert, 1]);
  }
  return found;
}

function shardCard(worker, numExperts) {
  const held = worker.shards.flatMap((experts, layer) => ranges(experts).map(([first, length]) => [layer, first, length]));
  const grid = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  const layers = worker.shards.map((experts, layer) => [layer, experts.length]).filter(([, number]) => number);
  grid.setAttribute("class", "grid");
  grid.setAttribute("viewBox", `0 0 ${numExperts} ${worker.shards.length}`);
  grid.setAttribute("preserveAspectRatio", "none");
  grid.setAttribute("height", String(Math.min(320, Math.max(24, worker.shards.length * 8))));
  grid.setAttribute("role", "img");
  grid.setAttribute(
    "aria-label",
    `Experts of ${worker.name}: ${layers.map(([layer, number]) => `${number} of layer ${layer}`).join(", ") || "none"}`,
  );
  path.setAttribute("d", held.map(([layer, first, length]) => `M${first} ${layer}h${length}v1h-${length}z`).join(""));
  grid.append(path);
  const text = `${plural(worker.num_experts, "expert")} in ${plural(layers.length, "layer")}`;
  return element("li", {}, element("h3", {}, worker.name), element("p", { class: "dim" }, text), grid);
}

// -------------------------------------------------------------------------------------------------------------- page

function warnings(status) {
  const found = [];
  if (status.problem) found.push(status.problem);
  if (status.is_stale) {
    const age = status.age_s < 10 ? Math.floor(status.age_s) : 10 * Math.floor(status.age_s / 10); // read out less often
    found.push(`The cluster's status is ${count(age)} s old: what follows may be over.`);
  }
  if (status.gateway.is_draining) found.push("This gateway is shutting down and takes no new requests.");
  return found;
}

function showWarnings(texts) {
  show(byId("warnings"), texts.map((text) => element("p", { class: "warning" }, text)));
}

function render(status) {
  measure(status);
  const name = status.cluster ? `cluster ${status.cluster}` : "one worker";
  const epoch = status.epoch === null ? "" : `, epoch ${status.epoch}`;
  byId("subtitle").textContent = `${status.model} on ${name}${epoch}`;
  document.title = `${status.model} · Foretoken`;
  showWarnings(warnings(status));

  const running = status.workers.reduce((sum, worker) => sum + worker.num_running, 0);
  const waiting = status.workers.reduce((sum, worker) => sum + worker.num_waiting, 0);
  const serving = status.workers.filter((worker) => worker.condition === "serving").length;
  show(byId("numbers"), [
    tile("Tokens a second", rates.size ? rate(total()) : "–"),
    tile("Sequences running", count(running)),
    tile("Sequences waiting", count(waiting)),
    tile("Workers serving", `${count(serving)} of ${count(status.workers.length)}`),
    tile("Open requests here", count(status.gateway.open_requests)),
    tile("Resumed after a loss", count(status.gateway.requests_resumed)),
  ]);
  drawChart();

  show(byId("nodes"), status.nodes.map(nodeCard));
  byId("no-nodes").hidden = status.nodes.length > 0;
  show(byId("workers"), status.workers.map(workerRow));
  byId("workers-scroll").hidden = status.workers.length === 0;
  byId("no-workers").hidden = status.workers.length > 0;

  const holders = status.workers.filter((worker) => worker.shards.length);
  byId("shards-section").hidden = status.num_experts === 0 && holders.length === 0;
  byId("shards-note").textContent = holders.length
    ? "A row is a layer, a column an expert; a filled cell is held by the worker."
    : `Every worker holds all ${count(status.num_experts)} experts of each layer.`;
  if (!holders.length && status.workers.some((worker) => worker.role !== "all")) {
    byId("shards-note").textContent = "No worker holds an expert yet.";
  }
  const width = Math.max(1, status.num_experts);
  show(byId("shards"), holders.map((worker) => shardCard(worker, width)));
}

async function poll() {
  try {
    const response = await fetch("cluster", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    render(await response.json());
  } catch (error) {
    console.warn("the gateway does not answer", error);
    showWarnings(["The gateway does not answer. What is shown is the last that it told."]);
  }
  setTimeout(nextPoll, PERIOD_MS);
}

/** A page that nobody sees asks for nothing. */
function nextPoll() {
  if (document.hidden) document.addEventListener("visibilitychange", poll, { once: true });
  else poll();
}

poll();
