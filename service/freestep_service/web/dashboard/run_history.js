// A run's curves and milestones over its whole life, where the service keeps them.

import { isBefore, ownTime, placeOf, reportKey } from "./event_times.js";
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

/** When steps were made and metrics reported, as `dateEvents` takes it. */
export function timesOf(history) {
  const begun = (history?.epochs ?? []).map((each) => ({ ...each, time: 1000 * each.time }));
  const points = [...begun, ...pointsOf(history?.curves.applied, [])].sort((one, other) => one.epoch - other.epoch || one.step - other.step);
  const reports = Object.entries(history?.metrics ?? {}).flatMap(([name, curve]) => {
    return pointsOf(curve, []).map(({ epoch, step, time }) => [reportKey({ epoch, name, measured_at: step }), time]);
  });
  return { steps: points.filter((point, index) => index === 0 || isBefore(points[index - 1], point)), reports: new Map(reports) };
}

/** What has happened beside pushes, as events with their times, in the order of their places. */
export function milestonesOf(history) {
  const events = (history?.milestones ?? []).map(({ time, event }) => ({ ...event, time: 1000 * time }));
  return events.sort(compare);
}

/** Takes out of milestones those before an event, and the event itself, which is told of by itself. */
export function takeBefore(milestones, event) {
  const taken = [];
  while (milestones.length > 0 && compare(milestones[0], event) <= 0) taken.push(milestones.shift());
  return taken.filter((each) => each.id !== event.id);
}

/** What was before an event, with these milestones, as `RunRecord.begin` takes it. */
export function historyBefore(history, first, milestones) {
  if (history === null) return null;
  // A point of just its step may be a push that is told of behind it, unless it says when it was.
  const time = ownTime(first);
  const isPast = (point) => isBefore(point, first) || (time !== null && !isBefore(first, point) && point.time <= time);
  const before = (curve) => pointsOf(curve, history.epochs).filter(isPast);
  const applied = before(history.curves.applied);
  const metrics = Object.entries(history.metrics).map(([name, curve]) => [name, before(curve)]);
  const epochs = history.epochs.filter((begun) => isBefore(begun, first)).map((begun) => {
    // Nothing of an epoch comes before it.
    return { kind: "epoch", id: `${begun.epoch}-0`, epoch: begun.epoch, step: begun.step, time: 1000 * begun.time };
  });
  return {
    milestones: [...epochs, ...milestones].sort(compare),
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

/** Below 0 where the place of one event is before that of the other, 0 where it is the same. */
function compare(one, other) {
  const [place, against] = [placeOf(one), placeOf(other)];
  const index = place.findIndex((part, at) => part !== against[at]);
  return index < 0 ? 0 : place[index] - against[index];
}
