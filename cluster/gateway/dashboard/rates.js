// Rates and the composition of a step: differences of counters between two statuses.

export const HISTORY_S = 120; // of tokens a second
export const BATCH_HISTORY_S = 60;
export const GAP_S = 5; // statuses further apart say nothing about the time between them
const WINDOW_S = 3; // a rate is over so long: workers report at moments of their own, so shorter ones jump

export const isServing = (worker) => worker.condition === "serving";
export const runs = (worker) => worker.role !== "expert";

const doneBy = (worker) => (runs(worker) ? worker.generated_tokens : worker.expert_rows);
const countersOf = (worker) => ({
  done: doneBy(worker),
  steps: worker.steps,
  promptTokens: worker.prompt_tokens,
  stepTokens: worker.step_tokens,
});

export class Rates {
  total; // tokens a second of all; undefined where that is not known
  history = []; // [time in s, tokens a second]
  batches = []; // [time in s, sequences that decode in a step, prompt tokens in a step]
  #byName = new Map(); // tokens a second of one that runs requests, rows of one that holds experts
  #samples = []; // the statuses of the last WINDOW_S: when, and what each process had counted

  of(worker) {
    return this.#byName.get(worker.name);
  }

  take(status) {
    if (status.at_s === null || status.is_stale) {
      this.#byName = new Map();
      this.total = undefined;
      return;
    }
    const latest = this.#samples.at(-1);
    if (latest?.at_s === status.at_s) return;
    if (latest && latest.at_s > status.at_s) [this.#samples, this.history, this.batches] = [[], [], []]; // another clock
    const isAfterGap = latest !== undefined && status.at_s > latest.at_s + GAP_S; // its counters may be older
    const serving = isAfterGap ? [] : status.workers.filter((worker) => worker.worker_id && isServing(worker));
    this.#samples = this.#samples.filter(
      (sample, i) => i === this.#samples.length - 1 || sample.at_s >= status.at_s - WINDOW_S,
    );
    this.#compare(serving, status.at_s);
    const counters = new Map(serving.map((worker) => [worker.worker_id, countersOf(worker)]));
    this.#samples.push({ at_s: status.at_s, counters });
    this.history = this.history.filter(([at_s]) => at_s >= status.at_s - HISTORY_S);
    this.batches = this.batches.filter(([at_s]) => at_s >= status.at_s - BATCH_HISTORY_S);
  }

  #compare(serving, at_s) {
    this.#byName = new Map();
    this.total = undefined;
    let [steps, prompt, all] = [0, 0, 0];
    for (const worker of serving) {
      const first = this.#samples.find((sample) => sample.counters.has(worker.worker_id));
      if (first === undefined) continue;
      const [before, now] = [first.counters.get(worker.worker_id), countersOf(worker)];
      const rate = Math.max(0, now.done - before.done) / (at_s - first.at_s);
      this.#byName.set(worker.name, rate);
      if (!runs(worker)) continue;
      this.total = (this.total ?? 0) + rate;
      steps += now.steps - before.steps;
      prompt += now.promptTokens - before.promptTokens;
      all += now.stepTokens - before.stepTokens;
    }
    if (this.total === undefined) return;
    this.history.push([at_s, this.total]);
    const aStep = (tokens) => (steps > 0 ? Math.max(0, tokens) / steps : 0);
    this.batches.push([at_s, aStep(all - prompt), aStep(prompt)]);
  }
}
