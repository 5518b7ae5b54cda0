// One run.

import { CurvesPanel } from "./curves_panel.js";
import { DataPanel } from "./data_panel.js";
import { DecisionsPanel, StalenessPanel } from "./decisions_panel.js";
import { DurabilityPanel, ShardsPanel, crashCost } from "./durability_panel.js";
import { SteerPanel, inForce, lossNote, pauseNote } from "./steer_panel.js";
import { Timeline } from "./timeline.js";
import { WorkersPanel } from "./workers_panel.js";
import { el, setText } from "./dom.js";
import { count, number, rate, short, steps } from "./format.js";
import { Poll } from "./polling.js";
import { RunFeed } from "./run_feed.js";
import { call, now, runPath } from "./session.js";

const FRAME_MS = 250;
const RATE_MS = 10000;

export class RunPage {
  /** shell: the frame around pages. compared: the names of other runs, whose curves are drawn too. */
  constructor(run, { session, shell, compared }) {
    this.run = run;
    this.shell = shell;
    this.compared = compared.filter((name) => name !== run);
    this.isAdmin = session.scope === "admin";
    this.status = null;
    this.isGone = false;
    this.topology = null;
    this.checkpoints = [];
    this.sets = [];
    this.index = null;
    this.polls = [];
    this.isClosed = false;
    this.feed = new RunFeed(run, {
      changed: () => this.later(),
      told: (state, error) => this.onStream(state, error),
      forgot: (count) => this.index !== null && this.timeline.move(Math.max(0, this.index - count)),
    });
    this.others = new Map();
    for (const name of this.compared) this.follow(name);
    this.make();
  }

  start() {
    this.feed.start();
    const poll = (everyMs, ask) => {
      const made = new Poll(everyMs, ask, (error) => this.onError(error)).start();
      this.polls.push(made);
      return made;
    };
    poll(2000, async (signal) => {
      this.status = await call("GET", runPath(this.run), { signal });
      this.isGone = false;
      this.shell.answered();
      this.later();
    });
    poll(1000, async (signal) => {
      this.workers.read((await call("GET", runPath(this.run, "/leases"), { signal })).leases);
      this.later();
    });
    poll(3000, async (signal) => { this.topology = await call("GET", runPath(this.run, "/topology"), { signal }); });
    poll(5000, async (signal) => {
      this.checkpoints = (await call("GET", runPath(this.run, "/checkpoints"), { signal })).checkpoints;
    });
    poll(3000, async (signal) => {
      if (this.status === null || Object.keys(this.status.data).length === 0) return;
      this.sets = (await call("GET", runPath(this.run, "/data"), { signal })).data;
    });
    poll(10000, async (signal) => {
      const { runs } = await call("GET", "/v1/runs", { signal });
      this.curves.offer(runs.map((each) => each.run), this.compared);
    });
    this.ticking = setInterval(() => this.later(), 500);
    return this;
  }

  close() {
    this.isClosed = true;
    clearInterval(this.ticking);
    for (const poll of this.polls) poll.stop();
    for (const feed of [this.feed, ...this.others.values()]) feed.stop();
    this.timeline.pause();
    this.curves.close();
  }

  follow(name) {
    this.others.set(name, new RunFeed(name, { changed: () => this.later(), holds: false }).start());
  }

  make() {
    const acting = { isAdmin: this.isAdmin, onAct: () => this.refresh() };
    this.facts = el("p", { class: "facts" });
    this.pause = pauseNote();
    this.lossNote = lossNote();
    this.tiles = new Map(["Step", "Steps a second", "Loss", "Staleness", "Live workers", "A crash now would cost"].map((name) => {
      const value = el("dd");
      return [name, { value, element: el("div", { class: "tile" }, el("dt", {}, name), value) }];
    }));
    this.timeline = new Timeline({ onMove: (index) => this.move(index), onKinds: () => this.later() });
    this.curves = new CurvesPanel(this.run, { onChange: () => this.later(), onCompare: (runs) => this.shell.go(this.run, runs) });
    this.workers = new WorkersPanel(this.run, acting);
    this.decisions = new DecisionsPanel();
    this.staleness = new StalenessPanel();
    this.shards = new ShardsPanel(this.run, acting);
    this.durability = new DurabilityPanel(this.run, acting);
    this.data = new DataPanel();
    this.steer = this.isAdmin ? new SteerPanel(this.run, { ...acting, onDeleted: () => this.shell.go(null) }) : null;
    this.note = el("p", { class: "note replay-note" }, "What is shown of shards, checkpoints, data units and settings is of now.");
    this.element = el(
      "div", { class: "run-page" },
      el("div", { class: "title" }, el("h1", {}, this.run), this.facts, this.pause.element, this.lossNote.element),
      el("dl", { class: "tiles" }, [...this.tiles.values()].map((tile) => tile.element)),
      el("div", { class: "strip card" }, this.curves.controls, this.timeline.scrub, this.note),
      this.curves.grid,
      this.workers.element,
      el(
        "div", { class: "columns" }, this.decisions.element, this.staleness.element, this.durability.element,
        this.shards.element, this.data.element, this.timeline.element, this.steer?.element,
      ),
    );
  }

  refresh() {
    for (const poll of this.polls) poll.now();
  }

  move(index) {
    this.index = index !== null && index >= this.feed.events.length ? null : index;
    this.timeline.index = this.index;
    this.later();
  }

  onStream(state, error) {
    if (state === "refused") this.onError(error);
  }

  onError(error) {
    if (error.slug === "run-not-found" && this.status === null) this.showNone();
    else if (error.status === 404 && this.status !== null) this.isGone = true;
    else this.shell.failed(error);
  }

  /** There is no such run, and nothing to ask for. */
  showNone() {
    if (this.isClosed) return;
    this.close();
    this.shell.answered();
    this.element.replaceChildren(
      el("div", { class: "title" }, el("h1", {}, this.run)),
      el(
        "p", { class: "card" }, "There is no run of this name: it was deleted, or no worker has begun it yet. ",
        el("a", { href: "#/" }, "All runs"),
      ),
    );
  }

  /** Shows the page anew, a few times a second at the most. */
  later() {
    if (this.isWaiting || this.isClosed) return;
    this.isWaiting = true;
    setTimeout(() => {
      this.isWaiting = false;
      if (!this.isClosed && !document.hidden) this.show();
    }, this.index === null ? FRAME_MS : 30);
  }

  show() {
    const whole = this.feed.record;
    const isNow = this.index === null;
    const record = isNow ? whole : this.feed.replayed(this.index);
    this.element.classList.toggle("replaying", !isNow);
    const others = new Map([...this.others].map(([name, feed]) => [name, feed.record]));
    this.timeline.show(record, this.feed.events);
    this.curves.show(record, others, this.timeline.shown(record.marks), whole);
    this.workers.show(record, isNow ? null : record.time ?? now());
    this.staleness.show(record.stalenesses);
    this.lossNote.show(record.loss.points);
    if (this.status === null) return;
    this.decisions.show(isNow ? this.status.pushes : record.decisions, record.reasons);
    this.showFacts();
    const speed = speedOf(record, isNow ? now() : record.time);
    const step = isNow ? Math.max(this.status.step, this.status.epoch === record.epoch ? record.step : 0) : record.step;
    const cost = crashCost({ ...this.status, step: isNow ? step : this.status.step }, speed, this.topology, this.checkpoints);
    const live = isNow ? this.status.workers.length : [...record.workers.values()].filter((each) => each.ended === null).length;
    this.tell("Step", count(step));
    this.tell("Steps a second", rate(speed));
    this.tell("Loss", number(isNow ? this.status.loss : record.loss.last?.value));
    this.tell("Staleness", steps(isNow ? this.status.staleness : record.staleness.last?.value));
    this.tell("Live workers", count(live));
    this.tell("A crash now would cost", cost.short);
    this.durability.show(cost, this.checkpoints);
    if (this.topology !== null) this.shards.show(this.topology);
    this.data.show(this.sets);
    this.pause.show(this.status);
    this.workers.showRefused(this.status);
    this.steer?.show(this.status);
  }

  tell(name, text) {
    setText(this.tiles.get(name).value, text);
  }

  showFacts() {
    if (this.isGone) {
      setText(this.facts, "This run is not there any more. What is shown is what was known last.");
      return;
    }
    const { parameter_count, epoch, shards, scheduled_lr } = this.status;
    const spec = inForce(this.status);
    const learning = Object.entries(scheduled_lr).map(([group, lr]) => (group === "default" ? number(lr) : `${group} ${number(lr)}`));
    const facts = [
      spec.optimizer.algorithm, spec.aggregation.policy, `durability ${spec.durability}`, `${short(parameter_count)} parameters`,
      shards === 1 ? "1 shard" : `${shards} shards`, `epoch ${epoch}`, learning.length > 0 ? `lr ${learning.slice(0, 4).join(", ")}` : null,
    ];
    setText(this.facts, facts.filter(Boolean).join(" · "));
  }
}

/** Steps a second, over the last seconds before a time. */
function speedOf(record, at) {
  const points = record.steps.points;
  let first = points.length - 1;
  while (first > 0 && points[first - 1].time >= at - RATE_MS) first -= 1;
  const [from, to] = [points[first], points.at(-1)];
  if (from === undefined || to.time < at - RATE_MS) return 0;
  // Up to the newest step, unless that is long ago.
  const until = at - to.time > 2000 ? at : to.time;
  return until > from.time ? (1000 * (to.step - from.step)) / (until - from.time) : 0;
}
