// A curve on the page, drawn by uPlot, with what happened to the run laid over it.

import { el, setText } from "./dom.js";
import { clock, count, day, moment, number } from "./format.js";

/** Of the script that the page loads before its modules: uPlot is released minified in this form alone. */
const { uPlot } = window;
const HEIGHT = 190;
/** The least extent of an axis of values, as a part of them: ticks of a smaller one are no numbers apart, and never end. */
const LEAST_PART = 1e-6;
/** Values beyond it are not drawn: an extent has to be a number. */
const LARGEST = 1e300;
/** The most spaces between the lines of a logarithmic grid. */
const MOST_SPACES = 5;
/** The least extent of x, in steps and in seconds. */
const LEAST = { step: 1, time: 0.01 };
/** The colours of marks over curves, by their kind: names of variables of the style sheet. */
export const MARKS = {
  join: ["--good", "joins"],
  leave: ["--muted", "leaves"],
  kill: ["--bad", "kills"],
  epoch: ["--series-4", "epochs"],
  checkpoint: ["--series-3", "checkpoints"],
  control: ["--series-2", "control"],
  shards: ["--series-5", "shards"],
  data: ["--muted", "data sets"],
  gap: ["--muted", "gaps"],
};

const all = new Set();
const probe = document.body.appendChild(el("span", { hidden: true }));
const colours = new Map();

/** The colour that a variable of the style sheet is in the theme of now: a canvas takes no variables. */
function colour(name) {
  if (!colours.has(name)) {
    probe.style.setProperty("color", `var(${name})`);
    colours.set(name, getComputedStyle(probe).color);
  }
  return colours.get(name);
}

/** Draws all charts anew, in other colours. */
export function recolour() {
  colours.clear();
  for (const chart of all) chart.rebuild();
}

export class Chart {
  /** zoom: what is looked at closer of each x, {step: [from, to], time: [from, to]}, which charts may share. */
  constructor(title, { unit = "", format = number, zoom = {} } = {}) {
    this.title = title;
    this.zoom = zoom;
    this.unit = unit;
    this.format = format;
    this.readout = el("span", { class: "readout" });
    this.key = el("ul", { class: "key", "aria-label": "Lines" });
    this.plot = el("div", { class: "plot", role: "img" });
    this.empty = el("p", { class: "empty" }, "Nothing yet.");
    this.element = el(
      "figure", { class: "chart card" },
      el("figcaption", {}, el("h2", {}, title), this.readout), this.plot, this.empty, this.key,
    );
    this.shown = null;
    this.shape = "";
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.plot);
    all.add(this);
  }

  close() {
    all.delete(this);
    this.sizes.disconnect();
    this.uplot?.destroy();
  }

  /** Shows lines {label, points, colour, isFaint, isRaw}, against `x`: "step" or "time".
   *
   * marks: what happened. range: the least extent of x, as [from, to]. isLog: whether values are on a log scale.
   */
  show({ x, lines, marks = [], range = null, isLog = false }) {
    this.shown = { x, lines: lines.filter((line) => line.points.length > 0), marks, range, isLog };
    this.element.classList.toggle("is-empty", this.shown.lines.length === 0);
    this.draw();
  }

  draw() {
    const { x, lines, isLog } = this.shown;
    this.describe();
    if (lines.length === 0) return;
    const shape = JSON.stringify([x, isLog, lines.map((line) => [line.label, line.colour, line.isFaint])]);
    const data = this.data();
    if (this.uplot === undefined || shape !== this.shape) {
      this.shape = shape;
      this.uplot?.destroy();
      this.uplot = new uPlot(this.options(), data, this.plot);
    } else {
      this.uplot.setData(data);
    }
  }

  rebuild() {
    this.shape = "";
    if (this.shown !== null) this.draw();
  }

  resize() {
    const width = this.plot.clientWidth;
    if (this.uplot !== undefined && width > 0) this.uplot.setSize({ width, height: HEIGHT });
  }

  data() {
    const { x, lines, isLog } = this.shown;
    const tables = lines.map(({ points }) => {
      const ordered = inOrder(points, x);
      const xs = ordered.map((point) => (x === "time" ? point.time / 1000 : point.step));
      const ys = ordered.map((point) => (isLog && point.value <= 0 ? null : point.value));
      return [xs, ys];
    });
    return uPlot.join(tables.map(([xs, ys]) => lastOfEach(xs, ys)));
  }

  options() {
    const { x, lines, isLog } = this.shown;
    const [ink, line] = [colour("--muted"), colour("--line")];
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : this.format(tick)));
    // Those of uPlot never end where the scale begins at 1e-30.
    const ofLog = isLog ? { splits: (_, axisIndex, low, high) => logTicks(low, high), filter: (_, splits) => splits } : {};
    return {
      width: Math.max(200, this.plot.clientWidth),
      height: HEIGHT,
      legend: { show: false },
      cursor: {
        sync: { key: `freestep-${x}` }, drag: { x: true, y: false }, points: { size: 6 },
        bind: { dblclick: (_, target, handle) => (event) => { delete this.zoom[x]; handle(event); } },
      },
      scales: {
        x: { time: x === "time", range: (_, low, high) => this.extent(low, high) },
        y: isLog ? { distr: 3, range: (_, low, high) => decadesOf(low, high) } : { range: (_, low, high) => padded(low, high) },
      },
      axes: [
        { ...axis, size: 28, values: (_, ticks) => ticks.map(x === "step" ? count : clockOver(ticks)), space: 76 },
        { ...axis, size: 56, values, space: 36, ...ofLog, grid: { ...axis.grid, filter: isLog ? decades : (_, splits) => splits } },
      ],
      series: [
        {},
        ...lines.map((each) => ({
          label: each.label,
          stroke: colour(each.colour),
          alpha: each.isFaint ? 0.33 : 1,
          width: each.isFaint ? 1 : 2,
          spanGaps: true,
          points: { show: each.points.length < 2 },
        })),
      ],
      hooks: {
        draw: [(plot) => this.drawMarks(plot)],
        setCursor: [(plot) => this.read(plot)],
        setSelect: [({ select, posToVal }) => {
          if (select.width > 0) this.zoom[x] = [posToVal(select.left, "x"), posToVal(select.left + select.width, "x")];
        }],
      },
    };
  }

  extent(low, high) {
    const { x, range } = this.shown;
    const scale = x === "time" ? 1000 : 1;
    const [from, to] = range ?? [low * scale, high * scale];
    const [begin, end] = this.zoom[x] ?? [Math.min(low, from / scale), Math.max(high, to / scale)];
    return end > begin ? [begin, Math.max(end, begin + LEAST[x])] : [begin, begin + 1];
  }

  /** Draws a line for each mark, with a head on it; of marks that would lie on each other, one. */
  drawMarks(plot) {
    const { ctx, bbox } = plot;
    const { x, marks } = this.shown;
    const ratio = window.devicePixelRatio || 1;
    const drawn = new Set();
    ctx.save();
    for (const mark of marks) {
      const at = plot.valToPos(x === "time" ? mark.time / 1000 : mark.step, "x", true);
      if (!(at >= bbox.left && at <= bbox.left + bbox.width)) continue;
      const place = `${mark.kind} ${Math.round(at / (3 * ratio))}`;
      if (drawn.has(place)) continue;
      drawn.add(place);
      ctx.strokeStyle = ctx.fillStyle = colour(MARKS[mark.kind][0]);
      ctx.globalAlpha = 0.55;
      ctx.lineWidth = ratio;
      ctx.setLineDash(mark.kind === "kill" ? [] : [3 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      ctx.globalAlpha = 1;
      ctx.beginPath();
      ctx.arc(at, bbox.top + 3 * ratio, 3 * ratio, 0, 2 * Math.PI);
      ctx.fill();
    }
    ctx.restore();
  }

  /** Says the values under the cursor, or the newest. */
  read(plot) {
    const { x, lines } = this.shown;
    const index = plot.cursor.idx;
    if (index === null || index === undefined || plot.cursor.left < 0) {
      setText(this.readout, this.newest());
      return;
    }
    const at = plot.data[0][index];
    const place = x === "time" ? moment(at * 1000) : `step ${count(at)}`;
    const parts = lines.map((line, row) => [line, plot.data[row + 1][index]]);
    const found = parts.filter(([line, value]) => !line.isRaw && value !== null && value !== undefined);
    const values = found.map(([line, value]) => (found.length > 1 ? `${line.label} ` : "") + this.format(value));
    setText(this.readout, values.length === 0 ? place : `${values.join(" · ")} at ${place}`);
  }

  newest() {
    const line = this.shown.lines.find((each) => !each.isRaw);
    return line === undefined ? "" : this.format(line.points.at(-1).value) + this.unit;
  }

  /** Says in words what is drawn. */
  describe() {
    const { lines, x } = this.shown;
    const told = lines.filter((line) => !line.isRaw).map((line) => {
      const [first, last] = [line.points[0], line.points.at(-1)];
      const from = x === "time" ? moment(first.time) : `step ${count(first.step)}`;
      const to = x === "time" ? moment(last.time) : `step ${count(last.step)}`;
      return `${line.label}: ${this.format(first.value)} at ${from}, ${this.format(last.value)} at ${to}`;
    });
    this.plot.setAttribute("aria-label", `${this.title}. ${told.join(". ") || "Nothing yet"}.`);
    if (!this.element.matches(":hover")) setText(this.readout, this.newest());
    const named = lines.filter((line) => !line.isRaw);
    const key = named.length > 1 ? named.map((line) => `${line.label} ${line.colour}`).join("\n") : "";
    if (this.key.dataset.shown === key) return;
    this.key.dataset.shown = key;
    this.key.replaceChildren(...(named.length > 1 ? named.map(entry) : []));
  }
}

function entry(line) {
  const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.setProperty("--colour", `var(${line.colour})`);
  return el("li", {}, swatch, line.label);
}

/** Metrics may be reported of earlier steps, and clocks go back, or are not those of the service. */
function inOrder(points, x) {
  const isInOrder = points.every((point, index) => index === 0 || points[index - 1][x] <= point[x]);
  return isInOrder ? points : [...points].sort((one, other) => one[x] - other[x]);
}

/** The last value of each x: uPlot joins lines by their x. */
function lastOfEach(xs, ys) {
  const [keptX, keptY] = [[], []];
  xs.forEach((value, index) => {
    if (keptX.at(-1) === value) keptY[keptY.length - 1] = ys[index];
    else {
      keptX.push(value);
      keptY.push(ys[index]);
    }
  });
  return [keptX, keptY];
}

/** Writes times, in seconds, as short as their distances allow. */
function clockOver(ticks) {
  const apart = ticks.length < 2 ? 0 : ticks[1] - ticks[0];
  if (apart >= 86400) return (tick) => day(1000 * tick);
  return (tick) => clock(1000 * tick).slice(0, apart >= 60 ? 5 : 8);
}

/** Of the lines of a logarithmic grid, those of powers of ten. */
function decades(_, splits) {
  return splits.map((split) => (split > 0 && Math.abs(Math.log10(split) - Math.round(Math.log10(split))) < 1e-6 ? split : null));
}

function padded(low, high) {
  if (low === null || high === null) return [0, 1];
  const [from, to] = [bounded(low), bounded(high)];
  const size = Math.max(Math.abs(from), Math.abs(to));
  const room = (to - from > LEAST_PART * size ? to - from : size || 1) * 0.08;
  return [from >= 0 && from - room < 0 ? 0 : from - room, to + room];
}

function bounded(value) {
  return Math.max(-LARGEST, Math.min(LARGEST, value));
}

/** The ticks of whole decades; between few of them there are more. */
function logTicks(low, high) {
  const [from, to] = [Math.round(Math.log10(low)), Math.round(Math.log10(high))];
  const [stride, parts] = [Math.ceil((to - from) / MOST_SPACES), to - from <= 2 ? [1, 2, 5] : [1]];
  const made = [];
  for (let power = from; power <= to; power += stride) made.push(...parts.map((part) => Number(`${part}e${power}`)));
  return made.filter((tick) => tick <= high);
}

/** Whole decades around values, of which there are perhaps none above 0. */
function decadesOf(low, high) {
  if (low === null || high === null) return [1, 10];
  const [from, to] = [low, high].map((value) => Math.log10(Math.max(1 / LARGEST, bounded(value))));
  return [10 ** Math.floor(from), 10 ** Math.max(Math.floor(from) + 1, Math.ceil(to))];
}
