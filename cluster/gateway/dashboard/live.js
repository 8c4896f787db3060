// Asks for the cluster's numbers every second and shows them; says so where there are none, or old ones.

import { byId, element, show } from "./dom.js";
import { age, capitalised } from "./words.js";
import { drawCharts } from "./charts.js";
import { numberTiles } from "./numbers.js";
import { showParts } from "./parts.js";
import { coverage, showShards } from "./shards.js";
import { Rates } from "./rates.js";

const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;

const rates = new Rates();

function warnings(status) {
  const found = [];
  if (status.problem) found.push(capitalised(status.problem));
  if (status.is_stale) {
    found.push(
      `The cluster's status is ${age(status.age_s)} old: its controller is silent. What follows is the last that is ` +
        "known and may be over. Workers serve on without the controller for a while.",
    );
  }
  if (status.gateway.is_draining) found.push("This gateway is shutting down and takes no new requests.");
  return found;
}

/** `connection`: the class of the mark in the page's head, and its word. */
function tell(texts, isOld, [kind, word]) {
  show(byId("warnings"), texts.map((text) => element("p", { class: "warning" }, text)));
  for (const id of ["live", "cluster"]) byId(id).classList.toggle("old", isOld);
  show(byId("connection"), [element("span", { class: `condition ${kind}` }, word)]);
}

function render(status) {
  rates.take(status);
  const experts = coverage(status);
  const place = status.cluster ? `the cluster ${status.cluster}` : "one worker";
  byId("subtitle").textContent = `${status.model} on ${place}`;
  byId("epoch").textContent = status.epoch === null ? "" : `The controller's epoch is ${status.epoch}.`;
  document.title = `${status.model} · Foretoken`;
  tell(warnings(status), status.is_stale, status.is_stale ? ["starting", "old numbers"] : ["serving", "live"]);
  for (const id of ["live", "cluster"]) byId(id).hidden = false;
  show(byId("numbers"), numberTiles(status, rates, experts));
  drawCharts(rates, status);
  showParts(status, rates);
  showShards(status, experts);
}

/** Why the gateway told no numbers, in words for the page. */
class StatusError extends Error {}

/** Follow the cluster; `onStatus` gets each status too. */
export function follow(onStatus) {
  const poll = async () => {
    try {
      const response = await fetch("cluster", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (response.status === 401) throw new StatusError("This session has ended. Reload this page to log in again.");
      if (!response.ok) {
        throw new StatusError("The gateway refuses to tell its numbers. What is shown is the last that it told.");
      }
      const status = await response.json();
      render(status);
      onStatus(status);
    } catch (error) {
      console.warn("no status", error);
      const text =
        error instanceof StatusError
          ? error.message
          : "The gateway does not answer. What is shown is the last that it told.";
      tell([text], true, ["lost", "not connected"]);
    }
    setTimeout(next, PERIOD_MS);
  };
  /** A page that nobody sees asks for nothing. */
  const next = () => {
    if (document.hidden) document.addEventListener("visibilitychange", poll, { once: true });
    else poll();
  };
  poll();
}
