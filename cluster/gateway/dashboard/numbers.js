// The tiles: what the server does now, in a few numbers.

import { element } from "./dom.js";
import { NONE, count, latency, rate, share } from "./words.js";
import { isServing, runs } from "./rates.js";

/** A number with its name, and under it what belongs to it. */
function tile(name, value, ...below) {
  return element("div", {}, element("dt", {}, name), value, ...below);
}

const value = (...parts) => element("dd", {}, ...parts);
const small = (text) => element("dd", { class: "below" }, text);

/** `part` of `all`, and bad to be less than. */
function partOf(part, all) {
  const whole = element("small", {}, `of ${count(all)}`);
  return element("dd", part < all ? { class: "bad" } : {}, count(part), " ", whole);
}

/** The median and the 99th percentile of the last minute. */
function latencyTile(name, found, windowS) {
  const below = found.count ? `p99 ${latency(found.p99_s)}` : `nothing in the last ${windowS} s`;
  return tile(name, value(latency(found.p50_s), ...(found.count ? [" ", element("small", {}, "p50")] : [])), small(below));
}

const sum = (workers, field) => workers.reduce((number, worker) => number + worker[field], 0);

function cacheTile(serving) {
  const total = sum(serving, "pages_total");
  if (!total) return tile("KV cache in use", value(NONE), small("no pages"));
  const used = total - sum(serving, "pages_free");
  const bar = element("progress", { value: String(used), max: String(total), "aria-hidden": "true" }); // the text says it
  return tile("KV cache in use", value(share(used, total)), element("dd", { class: "below" }, bar, `${count(used)} of ${count(total)} pages`));
}

/** `experts`: [held, all], or null where workers hold everything by themselves. */
export function numberTiles(status, rates, experts) {
  const serving = status.workers.filter((worker) => isServing(worker) && runs(worker));
  const { open_requests, requests_resumed, latency: recent } = status.gateway;
  const resumed = requests_resumed ? [small(`${count(requests_resumed)} resumed after a loss`)] : [];
  return [
    tile("Tokens a second", value(rate(rates.total))),
    tile("Sequences running", value(count(sum(serving, "num_running"))), small(`${count(sum(serving, "num_waiting"))} waiting`)),
    cacheTile(serving),
    latencyTile("Time to first token", recent.ttft, recent.window_s),
    latencyTile("Between tokens", recent.itl, recent.window_s),
    tile("Open requests", value(count(open_requests)), ...resumed),
    tile("Workers serving", partOf(status.workers.filter(isServing).length, status.workers.length)),
    ...(experts ? [tile("Experts held", partOf(...experts))] : []),
  ];
}
