// Numbers over steps and time, with a bound on how many are kept; and what is drawn of them.

const MOST = 20000;
/** The weight of the past in a loss that is compared with what it was, and how many times the best it may be. */
const STEADY = 0.9;
const MOST_TIMES = 100;

/** Points (step, time, value, count), in the order of their steps: `count` observations have this mean. */
export class Series {
  constructor() {
    this.points = [];
  }

  copy() {
    const made = new Series();
    made.points = this.points.slice();
    return made;
  }

  add(step, time, value, count = 1) {
    if (!Number.isFinite(value)) return;
    this.points.push({ step, time, value, count });
    if (this.points.length > MOST) this.points = thinned(this.points);
  }

  /** The run has gone back: what came of later steps counts no more. */
  goBack(step) {
    if (this.points.length === 0 || this.points.at(-1).step <= step) return;
    this.points = this.points.filter((point) => point.step <= step);
  }

  get last() {
    return this.points.at(-1) ?? null;
  }
}

/** Half as many points: of two neighbours one, with the mean of their values. */
function thinned(points) {
  const made = [];
  for (let index = 0; index + 1 < points.length; index += 2) {
    made.push(merged(points[index], points[index + 1]));
  }
  return made;
}

/** A point for both of two neighbours. */
function merged(one, other) {
  const count = one.count + other.count;
  return { ...other, count, value: one.value + (other.value - one.value) * (other.count / count) };
}

/** Points that each stand for at least as many observations as the coarsest, but for the last: all have the same noise. */
export function evened(points) {
  const most = points.reduce((so, point) => Math.max(so, point.count), 1);
  const made = [];
  for (const point of points) {
    if (made.length > 0 && made.at(-1).count < most) made.push(merged(made.pop(), point));
    else made.push(point);
  }
  return made;
}

/** A moving average of values, by a weight of the past from 0 to 1; corrected for its beginning. */
export function smoothed(values, weight) {
  let average = 0;
  let total = 0;
  return values.map((value) => {
    average = weight * average + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return average / total;
  });
}

/** {newest, best} of losses, smoothed, that have run away: to a hundred times the best, and above the first; else null. */
export function runaway(points) {
  if (points.length === 0) return null;
  const losses = smoothed(evened(points).map((point) => point.value), STEADY);
  const [first, newest] = [losses[0], losses.at(-1)];
  const best = losses.reduce((least, loss) => Math.min(least, loss));
  return newest > first && newest - best > (MOST_TIMES - 1) * Math.abs(best) ? { newest, best } : null;
}

/** How fast a count has grown, a second: points over stretches of at least `stretchMs`. */
export function rates(points, stretchMs) {
  const made = [];
  let from = null;
  for (const point of points) {
    if (from === null || point.value < from.value) {
      from = point;
    } else if (point.time - from.time >= stretchMs) {
      const value = (1000 * (point.value - from.value)) / (point.time - from.time);
      made.push({ step: point.step, time: point.time, value });
      from = point;
    }
  }
  return made;
}
