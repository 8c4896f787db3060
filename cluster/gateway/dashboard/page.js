// Asks for the cluster's numbers every second and shows them. Rates are differences of counters between two statuses.

const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;
const HISTORY_S = 120; // on the chart
const WINDOW_S = 3; // a rate is over so long: workers report at moments of their own, so shorter ones jump
const GAP_S = 5; // statuses further apart say nothing about the time between them
const MAX_MAP_HEIGHT = 240; // px
const SVG = "http://www.w3.org/2000/svg";
const NONE = "–";

const byId = (id) => document.getElementById(id);

// --------------------------------------------------------------------------------------------------------------- DOM

/** An element with its text or children; `attributes` are set as they are, so no text is ever taken for markup. */
function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Show `children` under `parent` by changing only what differs, so that a reader's place and selection stay. */
function show(parent, children) {
  const before = [...parent.childNodes];
  children.forEach((child, i) => (before[i] ? update(before[i], child) : parent.append(child)));
  for (const extra of before.slice(children.length)) extra.remove();
}

function update(node, wanted) {
  if (node.nodeName !== wanted.nodeName) return node.replaceWith(wanted);
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== wanted.data) node.data = wanted.data;
    return;
  }
  for (const name of node.getAttributeNames()) if (!wanted.hasAttribute(name)) node.removeAttribute(name);
  for (const { name, value } of wanted.attributes) {
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  show(node, [...wanted.childNodes]);
}

// -------------------------------------------------------------------------------------------------------------- words

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = number > 0 ? Math.min(Math.floor(Math.log2(number) / 10), units.length - 1) : 0;
  return `${(number / 1024 ** power).toLocaleString("en", { maximumFractionDigits: 1 })} ${units[power]}`;
}

const count = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** Always with the same number of digits behind the point, so that the text does not jump. */
function rate(value) {
  if (value === undefined) return NONE;
  const digits = value >= 100 || value === 0 ? 0 : 1;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** An age that is read out less often the longer it gets. */
function age(seconds) {
  if (seconds < 60) return `${seconds < 10 ? Math.floor(seconds) : 10 * Math.floor(seconds / 10)} s`;
  if (seconds < 3600) return plural(Math.floor(seconds / 60), "minute");
  return plural(Math.floor(seconds / 3600), "hour");
}

/** "cuda:0", "cuda:1" and "cpu" as "2 × cuda, cpu". */
function devices(names) {
  const kinds = new Map();
  for (const name of names) kinds.set(name.split(":")[0], (kinds.get(name.split(":")[0]) ?? 0) + 1);
  return [...kinds].map(([kind, number]) => (number > 1 ? `${number} × ${kind}` : kind)).join(", ");
}

// -------------------------------------------------------------------------------------------------------------- rates

let samples = []; // the statuses of the last WINDOW_S: when, and what each process had done
let rates = new Map(); // by worker's name: tokens a second of one that runs requests, rows of one that holds experts
let total; // tokens a second of all; undefined where that is not known
let history = []; // [time in s, tokens a second]

function measure(status) {
  if (status.at_s === null || status.is_stale) {
    [rates, total] = [new Map(), undefined];
    return;
  }
  const latest = samples.at(-1);
  if (latest?.at_s === status.at_s) return;
  if (latest && latest.at_s > status.at_s) [samples, history] = [[], []]; // another clock
  const isAfterGap = latest !== undefined && status.at_s > latest.at_s + GAP_S; // its counters may be older
  const serving = isAfterGap ? [] : status.workers.filter((worker) => worker.worker_id && isServing(worker));
  samples = samples.filter((sample, i) => i === samples.length - 1 || sample.at_s >= status.at_s - WINDOW_S);
  rates = new Map();
  for (const worker of serving) {
    const first = samples.find((sample) => sample.done.has(worker.worker_id));
    if (first === undefined) continue;
    const done = doneBy(worker) - first.done.get(worker.worker_id);
    rates.set(worker.name, Math.max(0, done) / (status.at_s - first.at_s));
  }
  samples.push({ at_s: status.at_s, done: new Map(serving.map((worker) => [worker.worker_id, doneBy(worker)])) });
  const known = serving.filter((worker) => runs(worker) && rates.has(worker.name));
  total = known.length ? known.reduce((sum, worker) => sum + rates.get(worker.name), 0) : undefined;
  if (total !== undefined) history.push([status.at_s, total]);
  history = history.filter(([at_s]) => at_s >= status.at_s - HISTORY_S);
}

const isServing = (worker) => worker.condition === "serving";
const runs = (worker) => worker.role !== "expert";
const doneBy = (worker) => (runs(worker) ? worker.generated_tokens : worker.expert_rows);

/** The next of 10, 20, 50, 100, …: an axis that seldom changes. */
function roundedUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(10, value)));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value);
}

function drawChart() {
  if (!history.length) return;
  const end = history.at(-1)[0];
  const highest = Math.max(...history.map(([, value]) => value));
  const top = roundedUp(highest);
  const pieces = []; // lines without a gap
  for (const [i, [at_s, value]] of history.entries()) {
    if (i === 0 || at_s - history[i - 1][0] > GAP_S) pieces.push([]);
    pieces.at(-1).push([(HISTORY_S - (end - at_s)).toFixed(2), (39 - (38 * value) / top).toFixed(2)]);
  }
  const lines = pieces.map((piece) => `M${piece.map((point) => point.join(" ")).join("L")}`);
  const areas = pieces.map((piece, i) => `${lines[i]}V40H${piece[0][0]}Z`);
  byId("line").setAttribute("d", lines.join(""));
  byId("area").setAttribute("d", areas.join(""));
  byId("chart").setAttribute("aria-label", `Now ${rate(total)}, at most ${rate(highest)} in the last two minutes`);
  byId("chart-top").textContent = count(top);
}

// -------------------------------------------------------------------------------------------------------------- parts

const ROLES = { all: "all in one", attention: "attention", expert: "expert" };

function condition(worker) {
  return element("span", { class: `condition ${worker.condition}` }, worker.condition);
}

/** A number with its name; `all`: what it is a part of, and bad to be less than. */
function tile(name, value, all) {
  const part = all === undefined ? [value] : [count(value), " ", element("small", {}, `of ${count(all)}`)];
  return element("div", {}, element("dt", {}, name), element("dd", value < all ? { class: "bad" } : {}, ...part));
}

/** What a worker does now, in a few words. */
function work(worker, status) {
  if (!isServing(worker)) return "";
  if (!runs(worker)) {
    const rows = status.is_stale ? "" : `${rate(rates.get(worker.name))} rows/s, `;
    return `${rows}holds ${worker.num_experts ? plural(worker.num_experts, "expert") : "no expert yet"}`;
  }
  const waiting = worker.num_waiting ? `, ${count(worker.num_waiting)} waiting` : "";
  const tokens = status.is_stale ? "" : `${rate(rates.get(worker.name))} tokens/s, `;
  return `${tokens}${count(worker.num_running)} running${waiting}`;
}

function nodeCard(node, status) {
  const memory = node.memory_bytes ? `${bytes(node.memory_bytes)} of memory` : "";
  const facts = [memory, devices(node.devices)].filter(Boolean);
  const lost = node.is_alive ? [] : [" ", element("span", { class: "condition lost" }, "lost")];
  const workers = status.workers.filter((worker) => worker.node_id === node.node_id);
  return element(
    "li",
    {},
    element("h3", {}, node.node_id, ...lost),
    element("p", { class: "dim" }, facts.join(" · ") || (node.is_alive ? "" : "It has left the cluster.")),
    element(
      "ul",
      { class: "runs" },
      ...workers.map((worker) =>
        element(
          "li",
          {},
          element("strong", {}, worker.name),
          " ",
          condition(worker),
          element("span", { class: "dim work" }, work(worker, status)),
        ),
      ),
    ),
    ...(workers.length ? [] : [element("p", { class: "dim" }, "No worker runs here.")]),
  );
}

function pages(worker) {
  if (!worker.pages_total) return [NONE];
  const used = worker.pages_total - worker.pages_free;
  const bar = { value: String(used), max: String(worker.pages_total), "aria-hidden": "true" }; // the text says it
  return [element("progress", bar), `${count(used)} of ${count(worker.pages_total)}`];
}

function cell(label, kind, ...children) {
  const absent = children[0] === NONE ? " none" : "";
  return element("td", { role: "cell", class: kind + absent, "data-label": label }, ...children);
}

function workerRow(worker) {
  const isRunning = runs(worker) && isServing(worker);
  const isHolding = !runs(worker) && isServing(worker);
  const experts = worker.num_experts ? count(worker.num_experts) : worker.role === "all" ? "all" : NONE;
  return element(
    "tr",
    { role: "row" },
    element("th", { role: "rowheader", scope: "row", class: "name" }, worker.name),
    cell("Role", "", ROLES[worker.role] ?? worker.role),
    cell("Node", "name", worker.node_id),
    cell("Condition", "", condition(worker)),
    cell("Experts", "number", experts),
    cell("Running", "number", isRunning ? count(worker.num_running) : NONE),
    cell("Waiting", "number", isRunning ? count(worker.num_waiting) : NONE),
    cell("KV pages in use", "pages", ...(isRunning ? pages(worker) : [NONE])),
    cell("Tokens/s", "number", isRunning ? rate(rates.get(worker.name)) : NONE),
    cell("Expert rows/s", "number", isHolding ? rate(rates.get(worker.name)) : NONE),
  );
}

function workersNote(workers) {
  if (workers.every((worker) => worker.role === "all")) {
    return "An all-in-one worker runs requests and holds every expert.";
  }
  return (
    "Attention workers run the requests and keep their KV cache. At each layer they call the expert workers, " +
    "which hold the experts: a row is one token at one of its experts."
  );
}

// ------------------------------------------------------------------------------------------------------------- shards

/** Neighbouring numbers as one range: [first, length]. */
function ranges(numbers) {
  const found = [];
  for (const number of numbers) {
    const end = found.at(-1);
    if (end && end[0] + end[1] === number) end[1] += 1;
    else found.push([number, 1]);
  }
  return found;
}

/** "32 in each of the layers 0 to 7, 16 in layer 9" */
function inWords(shards) {
  const layers = new Map(); // number of experts -> layers with so many
  shards.forEach((experts, layer) => {
    if (experts.length) layers.set(experts.length, [...(layers.get(experts.length) ?? []), layer]);
  });
  const parts = [...layers].flatMap(([number, those]) =>
    ranges(those).map(([first, length]) =>
      length === 1
        ? `${number} in layer ${first}`
        : `${number} in each of the layers ${first} to ${first + length - 1}`,
    ),
  );
  return parts.join(", ") || "none yet";
}

function axis(kind, ...ends) {
  return element("div", { class: kind, "aria-hidden": "true" }, ...ends.map((end) => element("span", {}, end)));
}

function shardCard(worker, status, numHeld) {
  const [numLayers, numExperts] = [worker.shards.length, Math.max(1, status.num_experts)];
  const cells = worker.shards.flatMap((experts, layer) =>
    ranges(experts).map(([first, length]) => `M${first} ${layer}h${length}v1h-${length}z`),
  );
  const map = drawn(
    "svg",
    {
      class: "map",
      viewBox: `0 0 ${numExperts} ${numLayers}`,
      preserveAspectRatio: "none",
      height: String(Math.min(MAX_MAP_HEIGHT, Math.max(24, numLayers * 8))),
      role: "img",
      "aria-label": `Experts of ${worker.name}: ${inWords(worker.shards)}`,
    },
    drawn("path", { d: cells.join("") }),
  );
  const text = `${count(worker.num_experts)} of ${count(numHeld)} experts, on ${worker.node_id}`;
  return element(
    "li",
    { class: isServing(worker) ? "" : "away" },
    element("h3", {}, worker.name, " ", condition(worker)),
    element("p", { class: "dim" }, isServing(worker) ? text : `held ${text}`),
    element(
      "div",
      { class: "plot" },
      map,
      axis("upright", "layer 0", count(numLayers - 1)),
      axis("across", "expert 0", count(numExperts - 1)),
    ),
  );
}

let expertLayers = new Set(); // where experts have been seen: a model may have layers without

/** How many of all experts have a holder that serves: [held, all]; null where workers hold everything by themselves. */
function coverage(status) {
  if (!status.num_experts || !status.workers.some((worker) => worker.role !== "all")) return null;
  const held = new Set();
  for (const worker of status.workers) {
    worker.shards.forEach((experts, layer) => {
      if (experts.length) expertLayers.add(layer);
      if (isServing(worker)) for (const expert of experts) held.add(layer * status.num_experts + expert);
    });
  }
  return [held.size, (expertLayers.size || status.num_layers) * status.num_experts];
}

function shardsNote(status, experts) {
  if (experts === null) return `Every worker holds all ${count(status.num_experts)} experts of each layer.`;
  const [held, all] = experts;
  if (!held) return "No worker holds an expert yet.";
  const lacking = held < all ? `; ${count(all - held)} are on no live worker, and requests wait until they are` : "";
  const layers = all / status.num_experts;
  return (
    `${plural(layers, "layer")} of ${plural(status.num_experts, "expert")} make ${count(all)}${lacking}. ` +
    "In the maps a row is a layer, a column an expert; what is filled, the worker holds."
  );
}

// --------------------------------------------------------------------------------------------------------------- page

function warnings(status) {
  const found = [];
  if (status.problem) found.push(status.problem[0].toUpperCase() + status.problem.slice(1));
  if (status.is_stale) {
    found.push(
      `The cluster's status is ${age(status.age_s)} old: its controller is silent. What follows is the last that is ` +
        "known and may be over. Workers serve on without the controller for a while.",
    );
  }
  if (status.gateway.is_draining) found.push("This gateway is shutting down and takes no new requests.");
  return found;
}

function showWarnings(texts, isOld) {
  show(byId("warnings"), texts.map((text) => element("p", { class: "warning" }, text)));
  byId("main").classList.toggle("old", isOld);
}

const sum = (workers, field) => workers.reduce((number, worker) => number + worker[field], 0);

function numberTiles(status, experts) {
  const serving = status.workers.filter(isServing);
  return [
    tile("Tokens a second", rate(total)),
    tile("Sequences running", count(sum(serving, "num_running"))),
    tile("Sequences waiting", count(sum(serving, "num_waiting"))),
    tile("Workers serving", serving.length, status.workers.length),
    ...(experts ? [tile("Experts held", ...experts)] : []),
    tile("Open requests", count(status.gateway.open_requests)),
    tile("Resumed after a loss", count(status.gateway.requests_resumed)),
  ];
}

function render(status) {
  measure(status);
  const experts = coverage(status);
  const place = status.cluster ? `the cluster ${status.cluster}` : "one worker";
  byId("subtitle").textContent = `${status.model} on ${place}`;
  byId("epoch").textContent = status.epoch === null ? "" : `The controller's epoch is ${status.epoch}.`;
  document.title = `${status.model} · Foretoken`;
  showWarnings(warnings(status), status.is_stale);
  byId("main").hidden = false;
  show(byId("numbers"), numberTiles(status, experts));
  drawChart();
  byId("chart-end").textContent = status.is_stale ? `${age(status.age_s)} ago` : "now";

  show(byId("nodes"), status.nodes.map((node) => nodeCard(node, status)));
  byId("no-nodes").hidden = status.nodes.length > 0;
  show(byId("workers"), status.workers.map(workerRow));
  byId("workers-note").textContent = status.workers.length ? workersNote(status.workers) : "";
  byId("no-workers").hidden = status.workers.length > 0;
  const scroll = byId("workers-scroll");
  scroll.hidden = status.workers.length === 0;
  if (scroll.scrollWidth > scroll.clientWidth) scroll.tabIndex = 0;
  else scroll.removeAttribute("tabindex");

  const holders = status.workers.filter((worker) => worker.num_experts > 0);
  byId("shards-section").hidden = status.num_experts === 0;
  byId("shards-note").textContent = shardsNote(status, experts);
  show(byId("shards"), holders.map((worker) => shardCard(worker, status, experts ? experts[1] : worker.num_experts)));
}

async function poll() {
  try {
    const response = await fetch("cluster", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    render(await response.json());
  } catch (error) {
    console.warn("the gateway does not answer", error);
    showWarnings(["The gateway does not answer. What is shown is the last that it told."], true);
  }
  setTimeout(nextPoll, PERIOD_MS);
}

/** A page that nobody sees asks for nothing. */
function nextPoll() {
  if (document.hidden) document.addEventListener("visibilitychange", poll, { once: true });
  else poll();
}

poll();
