// A value over time, as one line with what is below it filled.

import { byId } from "./dom.js";
import { age, count, rate } from "./words.js";
import { BATCH_HISTORY_S, GAP_S, HISTORY_S } from "./rates.js";

const HEIGHT = 40; // of a picture, in its own units; its width is in seconds

/** The next of 1, 2, 5, 10, 20, …: an axis that seldom changes. */
function roundedUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value);
}

/** `points`: [time in s, value]; returns the highest value. */
function draw(name, points, spanS) {
  const highest = Math.max(...points.map(([, value]) => value));
  const top = roundedUp(highest);
  const end = points.at(-1)[0];
  const pieces = []; // lines without a gap
  for (const [i, [at_s, value]] of points.entries()) {
    if (i === 0 || at_s - points[i - 1][0] > GAP_S) pieces.push([]);
    const height = ((HEIGHT - 2) * value) / top;
    pieces.at(-1).push([(spanS - (end - at_s)).toFixed(2), (HEIGHT - 1 - height).toFixed(2)]);
  }
  const lines = pieces.map((piece) => `M${piece.map((point) => point.join(" ")).join("L")}`);
  const areas = pieces.map((piece, i) => `${lines[i]}V${HEIGHT}H${piece[0][0]}Z`);
  byId(`${name}-line`).setAttribute("d", lines.join(""));
  byId(`${name}-area`).setAttribute("d", areas.join(""));
  byId(`${name}-top`).textContent = count(top);
  return highest;
}

const describe = (name, text) => byId(`${name}-chart`).setAttribute("aria-label", text);

export function drawCharts(rates, status) {
  const end = status.is_stale ? `${age(status.age_s)} ago` : "now";
  for (const name of ["tokens-end", "batch-end"]) byId(name).textContent = end;
  if (!rates.history.length) return;
  const highest = draw("tokens", rates.history, HISTORY_S);
  describe("tokens", `Now ${rate(rates.total)}, at most ${rate(highest)} in the last two minutes`);
  for (const [name, place] of [["decode", 1], ["prompt", 2]]) {
    const points = rates.batches.map((batch) => [batch[0], batch[place]]);
    const most = draw(name, points, BATCH_HISTORY_S);
    const last = points.at(-1)[1];
    byId(`${name}-now`).textContent = rate(last);
    describe(name, `${rate(last)} a step now, at most ${rate(most)} in the last minute`);
  }
}
