// Numbers over steps and time, with a bound on how many are kept; and what is drawn of them.

const MOST = 20000;

/** Points (step, time, value), in the order of their steps. */
export class Series {
  constructor() {
    this.points = [];
  }

  add(step, time, value) {
    if (!Number.isFinite(value)) return;
    this.points.push({ step, time, value });
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
    const [one, other] = [points[index], points[index + 1]];
    made.push({ ...other, value: (one.value + other.value) / 2 });
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
