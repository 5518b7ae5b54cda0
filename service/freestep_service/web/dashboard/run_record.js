// What the events of a run add up to: its curves, its workers, and what happened when. It is a function of them alone,
// so that a run can be replayed up to any of its events.

import { Series } from "./series.js";

const MOST_MARKS = 2000;
/** Workers that have gone are forgotten, the first first, where there are more in all. */
const MOST_WORKERS = 1000;
const ENDS = { released: "left", expired: "fell silent: its lease expired", ended: "had its lease ended" };
const DECISIONS = ["applied", "accumulated", "dropped"];

export class RunRecord {
  constructor() {
    this.epoch = null;
    this.step = 0;
    this.time = null;
    this.loss = new Series();
    this.metrics = new Map();
    this.staleness = new Series();
    this.steps = new Series();
    /** How often pushes had a staleness. */
    this.stalenesses = new Map();
    this.decisions = { applied: 0, accumulated: 0, dropped: 0 };
    /** How many pushes of each decision there had been, over time. */
    this.decided = { applied: new Series(), accumulated: new Series(), dropped: new Series() };
    this.reasons = new Map();
    this.workers = new Map();
    this.marks = [];
  }

  /** Another that goes on from here. */
  copy() {
    const made = new RunRecord();
    const all = (series) => Object.fromEntries(Object.entries(series).map(([name, each]) => [name, each.copy()]));
    const { epoch, step, time, loss, staleness, steps } = this;
    Object.assign(made, { epoch, step, time, ...all({ loss, staleness, steps }) });
    made.metrics = new Map([...this.metrics].map(([name, series]) => [name, series.copy()]));
    made.stalenesses = new Map(this.stalenesses);
    made.decisions = { ...this.decisions };
    made.decided = all(this.decided);
    made.reasons = new Map(this.reasons);
    made.workers = new Map([...this.workers].map(([name, worker]) => [name, { ...worker }]));
    made.marks = this.marks.map((mark) => ({ ...mark }));
    return made;
  }

  /** Begins with what was before the first event. */
  begin(past) {
    if (past === null) return;
    // Before the curves, which are without what the run has gone back behind.
    for (const event of past.milestones) this.take(event);
    // Who was there is perhaps gone, with a store that was lost; leases say who is there now.
    for (const { worker, ended } of [...this.workers.values()]) if (ended === null) this.workers.delete(worker);
    for (const name of ["loss", "staleness"]) {
      for (const { step, time, value, count } of past[name]) this[name].add(step, time, value, count);
    }
    for (const { step, time, value } of past.steps) this.steps.add(step, time, value);
    for (const [decision, points] of Object.entries(past.decided)) {
      for (const { step, time, value } of points) this.decided[decision].add(step, time, value);
      this.decisions[decision] = points.at(-1)?.value ?? 0;
    }
    for (const [name, points] of past.metrics) {
      for (const { step, time, value, count } of points) this.metric(name).add(step, time, value, count);
    }
  }

  /** Takes an event that happened at a time. */
  take(event) {
    const { epoch, step, time } = event;
    if (this.epoch !== null && event.kind === "epoch" && step < this.step) this.goBack(step);
    this.epoch = epoch;
    this.step = step;
    this.time = time;
    this["on_" + event.kind]?.(event);
  }

  goBack(step) {
    for (const mark of this.marks) if (mark.step > step) mark.isGivenUp = true;
    for (const series of [this.loss, this.staleness, this.steps, ...this.metrics.values()]) series.goBack(step);
  }

  metric(name) {
    if (!this.metrics.has(name)) this.metrics.set(name, new Series());
    return this.metrics.get(name);
  }

  worker(name) {
    if (!this.workers.has(name)) {
      this.workers.set(name, {
        worker: name, pushes: 0, applied: 0, accumulated: 0, dropped: 0, staleness: null, samples: 0, units: 0,
        pushedAt: null, since: null, ended: null, endedAt: null,
      });
    }
    return this.workers.get(name);
  }

  forgetGone() {
    if (this.workers.size <= MOST_WORKERS) return;
    const gone = [...this.workers.values()].filter(({ ended }) => ended !== null).sort((one, other) => one.endedAt - other.endedAt);
    for (const { worker } of gone.slice(0, this.workers.size - MOST_WORKERS)) this.workers.delete(worker);
  }

  on_push(event) {
    const { step, time, decision, staleness, coalesced = 1 } = event;
    const worker = this.worker(event.worker);
    worker.pushes += coalesced;
    if (DECISIONS.includes(decision)) {
      worker[decision] += coalesced;
      this.decisions[decision] += coalesced;
      this.decided[decision].add(step, time, this.decisions[decision]);
    }
    worker.staleness = staleness;
    worker.samples += event.samples ?? 0;
    worker.pushedAt = time;
    // A push renews its lease.
    worker.ended = null;
    for (const numbers of Object.values(event.units ?? {})) worker.units += numbers.length;
    this.stalenesses.set(staleness, (this.stalenesses.get(staleness) ?? 0) + coalesced);
    this.staleness.add(step, time, staleness);
    if (event.reason) {
      const reason = `${decision}: ${event.reason}`;
      this.reasons.set(reason, (this.reasons.get(reason) ?? 0) + coalesced);
    }
    if (decision !== "dropped" && event.loss !== null) this.loss.add(step, time, event.loss);
    this.steps.add(step, time, step);
  }

  on_update({ step, time }) {
    this.steps.add(step, time, step);
  }

  on_metric({ name, value, measured_at, time }) {
    this.metric(name).add(measured_at, time, value);
  }

  on_lease(event) {
    const worker = this.worker(event.worker);
    if (event.change === "granted") {
      worker.since = event.time;
      worker.ended = null;
      this.mark(event, "join", `${event.worker} joined`);
    } else {
      worker.ended = event.change;
      worker.endedAt = event.time;
      this.forgetGone();
      this.mark(event, event.change === "released" ? "leave" : "kill", `${event.worker} ${ENDS[event.change] ?? event.change}`);
    }
  }

  on_epoch(event) {
    this.mark(event, "epoch", `epoch ${event.epoch} goes on at step ${event.step}`);
  }

  on_checkpoint(event) {
    this.mark(event, "checkpoint", `checkpoint of step ${event.written_step}`);
  }

  on_shards(event) {
    const lost = event.owners.filter((owner) => owner === null).length;
    const all = event.shards === 1 ? "1 shard" : `${event.shards} shards`;
    this.mark(event, "shards", all + (lost ? `, ${lost} without an owner` : ""));
  }

  on_data(event) {
    this.mark(event, "data", `data set ${event.name} added`);
  }

  on_control(event) {
    this.mark(event, "control", controlText(event));
  }

  on_gap(event) {
    const missing = event.entries === null ? "some events are" : `${event.entries} entries of the log are`;
    this.mark(event, "gap", `${missing} not known any more`);
  }

  mark({ step, time, id }, kind, text) {
    this.marks.push({ step, time, kind, text, id });
    if (this.marks.length > MOST_MARKS) this.marks.shift();
  }
}

/** What a control change has changed, in words. */
function controlText({ by, changes }) {
  const words = [];
  const describe = (prefix, value) => {
    if (value === null || value === undefined) return;
    if (typeof value === "object" && !Array.isArray(value)) {
      for (const [name, inner] of Object.entries(value)) describe(prefix ? `${prefix}.${name}` : name, inner);
    } else {
      words.push(`${prefix} = ${JSON.stringify(value)}`);
    }
  };
  describe("", changes);
  return (words.join(", ") || "control change") + (by ? `, by ${by}` : "");
}
