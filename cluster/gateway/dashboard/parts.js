// What the cluster is made of: its nodes and its workers.

import { byId, element, focusableWhereItScrolls, show } from "./dom.js";
import { NONE, bytes, count, devices, plural, rate } from "./words.js";
import { isServing, runs } from "./rates.js";

const ROLES = { all: "all in one", attention: "attention", expert: "expert" };

export function condition(worker) {
  return element("span", { class: `condition ${worker.condition}` }, worker.condition);
}

/** What a worker does now, in a few words. */
function work(worker, status, rates) {
  if (!isServing(worker)) return "";
  if (!runs(worker)) {
    const rows = status.is_stale ? "" : `${rate(rates.of(worker))} rows/s, `;
    return `${rows}holds ${worker.num_experts ? plural(worker.num_experts, "expert") : "no expert yet"}`;
  }
  const waiting = worker.num_waiting ? `, ${count(worker.num_waiting)} waiting` : "";
  const tokens = status.is_stale ? "" : `${rate(rates.of(worker))} tokens/s, `;
  return `${tokens}${count(worker.num_running)} running${waiting}`;
}

function nodeCard(node, status, rates) {
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
          element("span", { class: "dim work" }, work(worker, status, rates)),
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

function workerRow(worker, rates) {
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
    cell("Tokens/s", "number", isRunning ? rate(rates.of(worker)) : NONE),
    cell("Expert rows/s", "number", isHolding ? rate(rates.of(worker)) : NONE),
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

export function showParts(status, rates) {
  show(byId("nodes"), status.nodes.map((node) => nodeCard(node, status, rates)));
  byId("no-nodes").hidden = status.nodes.length > 0;
  show(byId("workers"), status.workers.map((worker) => workerRow(worker, rates)));
  byId("workers-note").textContent = status.workers.length ? workersNote(status.workers) : "";
  byId("no-workers").hidden = status.workers.length > 0;
  byId("workers-scroll").hidden = status.workers.length === 0;
  focusableWhereItScrolls(byId("workers-scroll"));
}
