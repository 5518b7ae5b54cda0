// A run's curves over its whole life, where the service keeps them.

import { Refused, call, runPath } from "./session.js";

const DECISIONS = ["applied", "accumulated", "dropped"];

/** The history of a run; null where the service keeps none. query: which curves are wanted, and how fine. */
export async function readHistory(run, signal, query = "") {
  try {
    return await call("GET", runPath(run, `/history${query}`), { signal });
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return null;
    throw error;
  }
}

/** When steps were made: {epoch, step, time}, in their order. */
export function timesOfSteps(history) {
  return pointsOf(history?.curves.applied, []).filter((point, index, all) => index === 0 || isAfter(point, all[index - 1]));
}

/** The curves before an event, as `RunRecord.begin` takes them. */
export function curvesBefore(history, first) {
  if (history === null) return null;
  const before = (curve) => pointsOf(curve, history.epochs).filter((point) => isAfter(first, point));
  const applied = before(history.curves.applied);
  const metrics = Object.entries(history.metrics).map(([name, curve]) => [name, before(curve)]);
  return {
    loss: before(history.curves.loss),
    staleness: before(history.curves.staleness),
    steps: applied.map((point) => ({ ...point, value: point.step })),
    decided: Object.fromEntries(DECISIONS.map((name) => [name, totals(before(history.curves[name]))])),
    metrics,
  };
}

/** A curve's columns as points; without those of steps that the run has gone back behind. */
function pointsOf(curve, epochs) {
  if (curve === undefined) return [];
  const points = curve.step.map((step, index) => ({
    step, epoch: curve.epoch[index], time: 1000 * curve.time[index], value: curve.mean[index], count: curve.count[index],
  }));
  return points.filter((point) => epochs.every((begun) => point.epoch >= begun.epoch || point.step <= begun.step));
}

/** How many there have been, of how many there were at each point. */
function totals(points) {
  let total = 0;
  return points.map((point) => {
    total += Math.round(point.value * point.count);
    return { ...point, value: total };
  });
}

function isAfter(one, other) {
  return one.epoch > other.epoch || (one.epoch === other.epoch && one.step > other.step);
}
