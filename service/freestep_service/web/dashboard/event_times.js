// When events happened. An event says so only if it has no entry in the log: its place ends in milliseconds since 1970.
// Others happened between those; where the service keeps a run's history, it says when steps were made, and when what else
// has happened.

const FIRST_MS = 1e12;

/** The place of an event: [epoch, seq, number], where number is 0 for an entry of the log. */
export function placeOf({ id }) {
  const [entry, number = "0"] = id.split(".");
  return [...entry.split("-"), number].map(Number);
}

/** Gives each event a `time`: of live ones now, of others as near as it can be told.
 *
 * newest: the time of the last event before them, or null. history: {epoch, step, time} of steps, in their order.
 * milestones: events whose times are known.
 */
export function dateEvents(events, isLive, newest, history = [], milestones = []) {
  const now = Date.now();
  if (isLive) {
    for (const event of events) event.time = now;
    return;
  }
  const known = newest === null ? [] : [[-1, newest]];
  const told = new Map(milestones.map(({ id, time }) => [id, time]));
  let next = 0;
  events.forEach((event, index) => {
    const number = placeOf(event)[2];
    while (next < history.length && isBefore(history[next], event)) next += 1;
    if (number > FIRST_MS) known.push([index, number]);
    else if (told.has(event.id)) known.push([index, told.get(event.id)]);
    else if (history[next]?.step === event.step && history[next].epoch === event.epoch) known.push([index, history[next].time]);
  });
  // What has no number at the end has just happened: a run that nobody trains ends with its leases.
  if (known.length === 0 || known.at(-1)[0] < events.length - 1) known.push([events.length - 1, now]);
  let latest = 0;
  for (const anchor of known) {
    latest = Math.max(latest, anchor[1]);
    anchor[1] = Math.min(latest, now);
  }
  spread(events, known);
}

function isBefore(point, event) {
  return point.epoch < event.epoch || (point.epoch === event.epoch && point.step < event.step);
}

/** Times between those of anchors [index, time]; before the first, its own. */
function spread(events, anchors) {
  let next = 0;
  events.forEach((event, index) => {
    while (anchors[next][0] < index) next += 1;
    const [to, end] = anchors[next];
    const [from, begin] = anchors[next - 1] ?? [index, end];
    event.time = to === from ? end : begin + ((end - begin) * (index - from)) / (to - from);
  });
}
