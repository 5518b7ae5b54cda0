// All runs of the service.

import { stateOf } from "./workers_panel.js";
import { crashCost } from "./durability_panel.js";
import { Rows, el, setText } from "./dom.js";
import { count, number, plural, rate, short, steps } from "./format.js";
import { Poll } from "./polling.js";
import { inForce } from "./steer_panel.js";
import { readHistory } from "./run_history.js";
import { Patience, call } from "./session.js";

const EVERY_MS = 2000;
const PROBLEMS_MS = 10000;
const MOST_KEPT = 150;
const MOST_WITH_PAST = 50;
const PAST_POINTS = 60;
const SVG = "http://www.w3.org/2000/svg";
const FIGURES = ["Step", "Steps/s", "Loss", "Staleness", "Crash cost"];

export class Overview {
  constructor({ shell }) {
    this.shell = shell;
    /** What was seen of each run since the page was opened, by its name. */
    this.seen = new Map();
    /** The losses of runs before that. */
    this.past = new Map();
    this.total = el("p", { class: "facts" });
    this.problems = el("div", { class: "problems" });
    this.list = el("ul", { class: "runs" });
    this.rows = new Rows(this.list, makeCard);
    this.empty = el("p", { class: "card", hidden: true }, "There are no runs yet. A worker that begins one shows up here.");
    this.element = el("div", {}, el("div", { class: "title" }, el("h1", {}, "Runs"), this.total), this.problems, this.empty, this.list);
  }

  start() {
    this.poll = new Poll(EVERY_MS, (signal) => this.read(signal), (error) => this.shell.failed(error)).start();
    return this;
  }

  close() {
    this.poll.stop();
  }

  async read(signal) {
    const runs = [];
    for (let after = ""; after !== null;) {
      const page = await call("GET", `/v1/runs?after=${encodeURIComponent(after)}`, { signal });
      runs.push(...page.runs);
      after = page.next;
    }
    this.shell.answered();
    this.show(runs);
    await this.readProblems(signal);
    for (const { run } of runs.slice(0, MOST_WITH_PAST)) {
      if (!this.past.has(run)) this.past.set(run, await pastLosses(run, signal));
    }
  }

  /** What the service says is wrong with runs. */
  async readProblems(signal) {
    const patience = new Patience(PROBLEMS_MS, signal);
    const answer = await fetch("/readyz", { signal: patience.signal, headers: this.shell.headers() }).then((each) => each.json()).catch(() => ({}));
    patience.end();
    const found = Object.entries(answer.problems ?? {});
    const key = JSON.stringify(found);
    if (key === this.told) return;
    this.told = key;
    this.problems.replaceChildren(...found.map(([run, reason]) => el("p", { class: "card bad" }, `${run}: ${reason}`)));
  }

  forget(name) {
    this.seen.delete(name);
    this.past.delete(name);
  }

  show(runs) {
    const now = performance.now();
    const names = new Set(runs.map((status) => status.run));
    for (const name of this.seen.keys()) if (!names.has(name)) this.forget(name);
    for (const status of runs) {
      const last = this.seen.get(status.run)?.at(-1);
      // One that has no loss any more is another one of this name.
      if (status.loss === null && last !== undefined && last.loss !== null) this.forget(status.run);
      const seen = this.seen.get(status.run) ?? [];
      seen.push({ time: now, step: status.step, epoch: status.epoch, loss: status.loss });
      if (seen.length > MOST_KEPT) seen.shift();
      this.seen.set(status.run, seen);
    }
    const live = runs.reduce((sum, status) => sum + status.workers.length, 0);
    setText(this.total, `${plural(runs.length, "run")} · ${plural(live, "live worker")}`);
    this.empty.hidden = runs.length > 0;
    this.rows.show(runs, (status) => status.run, (row, status) => fill(row, status, this.seen.get(status.run), this.past.get(status.run) ?? []));
  }
}

function makeCard({ run }) {
  const [facts, workers] = [el("p", { class: "facts" }), el("p", { class: "dots" })];
  const values = FIGURES.map((name) => {
    const value = el("dd");
    return [value, el("div", {}, el("dt", {}, name), value)];
  });
  const line = document.createElementNS(SVG, "polyline");
  const spark = document.createElementNS(SVG, "svg");
  spark.setAttribute("class", "spark");
  spark.setAttribute("viewBox", "0 0 100 28");
  spark.setAttribute("preserveAspectRatio", "none");
  spark.setAttribute("aria-hidden", "true");
  spark.append(line);
  const link = el("a", { href: `#/runs/${encodeURIComponent(run)}` }, run);
  const element = el(
    "li", { class: "card run" }, el("div", { class: "head" }, el("h2", {}, link), facts), spark,
    el("dl", { class: "figures" }, values.map(([, entry]) => entry)), workers,
  );
  return { element, facts, workers, line, values: values.map(([value]) => value) };
}

function fill(row, status, seen, past) {
  const spec = inForce(status);
  const paused = status.control.paused ? "paused · " : "";
  setText(row.facts, `${paused}${spec.optimizer.algorithm} · ${spec.aggregation.policy} · ${spec.durability} · ${short(status.parameter_count)} parameters · epoch ${status.epoch}`);
  const speed = speedOf(seen);
  const figures = [count(status.step), rate(speed), number(status.loss), steps(status.staleness), crashCost(status, speed).short];
  row.values.forEach((value, index) => setText(value, figures[index]));
  const states = status.workers.map((each) => stateOf(1 - each.expires_in_ms / each.ttl_ms));
  const key = states.join(" ");
  if (row.key !== key) {
    row.key = key;
    const dots = states.slice(0, 200).map((state) => el("span", { class: "dot", "data-state": state, "aria-hidden": "true" }));
    const silent = states.filter((state) => state !== "live").length;
    const text = states.length === 0 ? "no live worker" : plural(states.length, "live worker") + (silent ? `, ${silent} of them silent` : "");
    row.workers.replaceChildren(...dots, el("span", {}, text));
  }
  const losses = [...past, ...seen.map((each) => each.loss)].filter((loss) => loss !== null && loss !== undefined);
  row.line.setAttribute("points", sparkline(losses));
}

function speedOf(seen) {
  const last = seen.at(-1);
  const from = seen.find((each) => each.time > last.time - 10000 && each.epoch === last.epoch);
  return last.time > from.time ? Math.max(0, (1000 * (last.step - from.step)) / (last.time - from.time)) : null;
}

function sparkline(values) {
  if (values.length < 2) return "";
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const tall = high - low || 1;
  return values.map((value, index) => `${((100 * index) / (values.length - 1)).toFixed(2)},${(26 - (24 * (value - low)) / tall).toFixed(2)}`).join(" ");
}

/** The losses of a run's whole life, in few points. */
async function pastLosses(run, signal) {
  const history = await readHistory(run, signal, `?curves=loss&points=${PAST_POINTS}`);
  return history?.curves.loss.mean ?? [];
}
