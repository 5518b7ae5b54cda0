// When events happened. An event says so only if it has no entry in the log: its place ends in milliseconds since 1970.
// Others happened between those; where the service keeps a run's history, it says when steps were made, and when what else
// has happened. What is known exactly is never moved by what is not.

import { now } from "./session.js";

const FIRST_MS = 1e12;

/** The place of an event: [epoch, seq, number], where number is 0 for an entry of the log. */
export function placeOf({ id }) {
  const [entry, number = "0"] = id.split(".");
  return [...entry.split("-"), number].map(Number);
}

/** The time that an event's own place says, in milliseconds; null where it says none. */
export function ownTime(event) {
  const number = placeOf(event)[2];
  return number > FIRST_MS ? number : null;
}

/** By what the time of a report of a metric is found. */
export function reportKey({ epoch, name, measured_at }) {
  return JSON.stringify([epoch, name, measured_at]);
}

/** Gives each event a `time`: of live ones now, of others as near as it can be told.
 *
 * Those that are not live are to be given together, up to the newest that there is: behind what is known there is only now.
 * newest: the time of the last event before them, or null. steps: {epoch, step, time}, rising. reports: times by
 * `reportKey`. milestones: events whose times are known.
 */
export function dateEvents(events, isLive, newest, { steps = [], reports = new Map() } = {}, milestones = []) {
  const asked = now();
  if (isLive) {
    for (const event of events) event.time = asked;
    return;
  }
  const told = new Map(milestones.map(({ id, time }) => [id, time]));
  const exact = events.map((event) => ownTime(event) ?? told.get(event.id) ?? (event.kind === "metric" ? reports.get(reportKey(event)) : null) ?? null);
  const places = placesAlong(events);
  const known = newest === null ? [] : [[0, newest]];
  const bounds = soonest(exact);
  events.forEach((event, index) => {
    const latest = known.at(-1)?.[1] ?? -Infinity;
    if (exact[index] !== null) {
      known.push([places[index], exact[index]]);
    } else if (index === 0 || isBefore(events[index - 1], event)) {
      const time = timeAt(steps, event);
      if (time !== null && time >= latest && time <= bounds[index]) known.push([places[index], time]);
    }
  });
  // What is behind all that is known has just happened: a run that nobody trains ends with its leases.
  const end = places.at(-1);
  if (known.length === 0 || known.at(-1)[0] < end) known.push([end, Math.max(asked, known.at(-1)?.[1] ?? asked)]);
  spread(events, places, known);
}

/** How many events there have been with each: pushes that came as one count as so many. */
function placesAlong(events) {
  let place = 0;
  return events.map((event) => (place += event.coalesced ?? 1));
}

/** At each index, the next time that is known there or behind it. */
function soonest(times) {
  let next = Infinity;
  return times.map((_, index) => (next = times[times.length - 1 - index] ?? next)).reverse();
}

/** When a step was made, by those before and behind it in its epoch; null where there are none. */
function timeAt(steps, event) {
  let [from, to] = [0, steps.length];
  while (from < to) {
    const middle = (from + to) >> 1;
    if (isBefore(steps[middle], event)) from = middle + 1;
    else to = middle;
  }
  const [before, after] = [steps[from - 1], steps[from]];
  if (after?.epoch !== event.epoch) return null;
  if (after.step === event.step) return after.time;
  if (before?.epoch !== event.epoch) return null;
  return before.time + ((after.time - before.time) * (event.step - before.step)) / (after.step - before.step);
}

/** Whether one was of an earlier step than another. */
export function isBefore(one, other) {
  return one.epoch < other.epoch || (one.epoch === other.epoch && one.step < other.step);
}

/** Times between those of anchors [place, time]; before the first, its own. */
function spread(events, places, anchors) {
  let next = 0;
  events.forEach((event, index) => {
    const place = places[index];
    while (anchors[next][0] < place) next += 1;
    const [to, end] = anchors[next];
    const [from, begin] = anchors[next - 1] ?? [place, end];
    event.time = to === from ? end : begin + ((end - begin) * (place - from)) / (to - from);
  });
}
