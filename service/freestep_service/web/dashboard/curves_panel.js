// A run's curves over steps or time, beside those of other runs.

import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { rate, steps } from "./format.js";
import { evened, rates, smoothed } from "./series.js";

const KEPT = "freestep-view";
const STRETCHES = 150;
const COLOURS = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6"];
const DECISION_COLOURS = { applied: "--good", accumulated: "--series-1", dropped: "--bad" };

export class CurvesPanel {
  /** onChange(): other curves are to be shown. onCompare(runs): with those of other runs. */
  constructor(run, { onChange, onCompare }) {
    this.run = run;
    this.onCompare = onCompare;
    this.view = { x: "step", isLog: false, smoothing: 0.6, ...kept() };
    const set = (name, value) => {
      this.view[name] = value;
      localStorage.setItem(KEPT, JSON.stringify(this.view));
      onChange();
    };
    const axis = ["step", "time"].map((x) => {
      const box = el("input", { type: "radio", name: "axis", value: x, checked: this.view.x === x });
      box.addEventListener("change", () => set("x", x));
      return el("label", {}, box, x === "step" ? "Steps" : "Time");
    });
    const log = el("input", { type: "checkbox", checked: this.view.isLog });
    log.addEventListener("change", () => set("isLog", log.checked));
    const smoothing = el("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: String(this.view.smoothing), id: "smoothing" });
    smoothing.addEventListener("input", () => set("smoothing", Number(smoothing.value)));
    this.others = el("div", { class: "others" });
    this.compare = el("details", { class: "compare" }, el("summary", {}, "Compare"), this.others);
    this.controls = el(
      "div", { class: "controls" },
      el("fieldset", { class: "choice" }, el("legend", { class: "hidden" }, "Curves over"), axis),
      el("label", {}, log, "Log scale"),
      el("label", { class: "slider", for: "smoothing" }, "Smoothing", smoothing),
      this.compare,
    );
    /** What is looked at closer, in all charts. */
    this.zoom = {};
    this.loss = this.chart("Loss");
    this.metrics = new Map();
    this.rate = this.chart("Steps a second", { format: rate });
    this.staleness = this.chart("Staleness of pushes", { format: steps, unit: " steps" });
    this.decided = this.chart("Pushes a second", { format: rate });
    this.grid = el("div", { class: "charts" }, this.loss.element, this.rate.element, this.staleness.element, this.decided.element);
  }

  chart(title, how = {}) {
    return new Chart(title, { ...how, zoom: this.zoom });
  }

  close() {
    for (const chart of [this.loss, this.rate, this.staleness, this.decided, ...this.metrics.values()]) chart.close();
  }

  /** Offers other runs to compare with. */
  offer(names, chosen) {
    const others = names.filter((name) => name !== this.run);
    this.compare.hidden = others.length === 0;
    const key = JSON.stringify([others, chosen]);
    if (key === this.offered) return;
    this.offered = key;
    this.others.replaceChildren(...others.map((name) => {
      const box = el("input", { type: "checkbox", checked: chosen.includes(name) });
      box.addEventListener("change", () => {
        const left = chosen.filter((each) => each !== name);
        this.onCompare(box.checked ? [...left, name] : left);
      });
      return el("label", {}, box, name);
    }));
  }

  /** Draws the curves of a record, and those of others: a map of records by their runs. */
  show(record, others, marks, whole) {
    const { x, isLog, smoothing } = this.view;
    const range = extentOf(whole, x);
    const options = { x, marks: marks.filter((mark) => isOn(x, mark)), range };
    const draw = (chart, lines, how = {}) => chart.show({ ...options, ...how, lines });
    draw(this.loss, this.lines("loss", record, others, (each) => evened(each.loss.points), smoothing), { isLog });
    for (const name of record.metrics.keys()) this.metric(name);
    for (const [name, chart] of this.metrics) {
      draw(chart, this.lines(name, record, others, (each) => evened(each.metrics.get(name)?.points ?? []), 0), { isLog });
    }
    const stretch = stretchOf(whole);
    const speeds = (each) => rates(each.steps.points, stretch);
    draw(this.rate, this.lines("steps a second", record, others, speeds, 0));
    draw(this.staleness, this.lines("staleness", record, others, (each) => evened(each.staleness.points), Math.max(0.9, smoothing)));
    const made = Object.entries(record.decided).filter(([, series]) => series.last?.value > 0);
    const decisions = made.map(([label, series]) => {
      return { label, colour: DECISION_COLOURS[label], points: rates(series.points, stretch) };
    });
    draw(this.decided, decisions);
  }

  lines(label, record, others, pointsOf, weight) {
    const runs = others.size === 0 ? [[label, record]] : [[this.run, record], ...others];
    return runs.flatMap(([name, each], index) => {
      const colour = COLOURS[index % COLOURS.length];
      const points = pointsOf(each);
      if (weight === 0) return [{ label: name, colour, points }];
      const values = smoothed(points.map((point) => point.value), weight);
      const smooth = { label: name, colour, points: points.map((point, at) => ({ ...point, value: values[at] })) };
      return index === 0 ? [{ label: name, colour, points, isFaint: true, isRaw: true }, smooth] : [smooth];
    });
  }

  metric(name) {
    if (this.metrics.has(name)) return;
    const chart = this.chart(name);
    this.metrics.set(name, chart);
    this.grid.insertBefore(chart.element, this.rate.element);
  }
}

function kept() {
  try {
    const view = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    const isGood = (view.x === "step" || view.x === "time") && view.smoothing >= 0 && view.smoothing < 1;
    return isGood ? view : {};
  } catch {
    return {};
  }
}

/** Whether a mark lies on an axis: of steps that a run has given up, there are others by now. */
function isOn(x, mark) {
  return x === "time" || !mark.isGivenUp;
}

/** From the first to the last of what is known of a run. */
function extentOf(record, x) {
  const ends = [record.steps, record.loss].flatMap((series) => [series.points[0], series.last]);
  // An epoch begins before its first push, and workers join then.
  const points = [...ends, ...record.marks.filter((mark) => mark.kind === "epoch" && isOn(x, mark))].filter(Boolean);
  if (points.length === 0) return null;
  const values = points.map((point) => (x === "time" ? point.time : point.step));
  return [Math.min(...values), Math.max(...values)];
}

function stretchOf(record) {
  const points = record.steps.points;
  return points.length < 2 ? 1000 : Math.max(1000, (points.at(-1).time - points[0].time) / STRETCHES);
}
