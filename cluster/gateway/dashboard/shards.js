// Which worker holds which experts.

import { byId, drawn, element, show } from "./dom.js";
import { count, plural } from "./words.js";
import { condition } from "./parts.js";
import { isServing } from "./rates.js";

const MAX_MAP_HEIGHT = 240; // px

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

const seen = { model: "", layers: new Set() }; // where experts have been seen: a model may have layers without

/** The layers of this model in which experts have been seen, in these numbers or before. */
function expertLayers(status) {
  const model = `${status.model} ${status.num_layers} ${status.num_experts}`;
  if (seen.model !== model) Object.assign(seen, { model, layers: new Set() });
  for (const worker of status.workers) {
    worker.shards.forEach((experts, layer) => experts.length && seen.layers.add(layer));
  }
  return seen.layers.size || status.num_layers;
}

/** How many of all experts have a holder that serves: [held, all]; null where workers hold everything by themselves. */
export function coverage(status) {
  if (!status.num_experts || !status.workers.some((worker) => worker.role !== "all")) return null;
  const held = new Set();
  for (const worker of status.workers) {
    if (!isServing(worker)) continue;
    worker.shards.forEach((experts, layer) => {
      for (const expert of experts) held.add(layer * status.num_experts + expert);
    });
  }
  return [held.size, expertLayers(status) * status.num_experts];
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

export function showShards(status, experts) {
  const holders = status.workers.filter((worker) => worker.num_experts > 0);
  byId("shards-section").hidden = status.num_experts === 0;
  byId("shards-note").textContent = shardsNote(status, experts);
  show(byId("shards"), holders.map((worker) => shardCard(worker, status, experts ? experts[1] : worker.num_experts)));
}
