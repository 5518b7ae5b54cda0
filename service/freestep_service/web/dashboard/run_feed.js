// All that is known of a run's past and present from its events: followed by one page at a time.

import { dateEvents } from "./event_times.js";
import { EventStream, sleep } from "./event_stream.js";
import { historyBefore, milestonesOf, readHistory, takeBefore, timesOf } from "./run_history.js";
import { RunRecord } from "./run_record.js";
import { Away } from "./session.js";

const MOST_EVENTS = 20000;
const AGAIN_MS = 1000;

/** Follows a run's events. changed(): there is more. told(state, error): how the stream is. forgot(count): so many of the
 * oldest events are kept no more. holds: as for EventStream. */
export class RunFeed {
  constructor(run, { changed, told = () => {}, forgot = () => {}, holds = true }) {
    this.holds = holds;
    this.run = run;
    this.changed = changed;
    this.told = told;
    this.forgot = forgot;
    this.abort = new AbortController();
    this.clear();
  }

  /** Begins with the history, and goes on with the events. */
  start() {
    this.begin();
    return this;
  }

  async begin() {
    const signal = this.abort.signal;
    for (let isAway = true; isAway && !signal.aborted;) {
      try {
        this.history = await readHistory(this.run, signal);
        isAway = false;
      } catch (error) {
        // Why it is refused, the stream of events says, too.
        isAway = error instanceof Away || error.isPassing === true;
        if (isAway) await sleep(AGAIN_MS, signal);
      }
    }
    this.milestones = milestonesOf(this.history);
    this.times = timesOf(this.history);
    if (!signal.aborted) this.stream.start();
  }

  /** The run is not the one that it was. */
  beginAgain() {
    this.stream.stop();
    this.clear();
    this.begin();
  }

  stop() {
    this.abort.abort();
    this.stream.stop();
  }

  clear() {
    this.history = null;
    /** Those of the history that are neither among the events yet nor before them. */
    this.milestones = [];
    this.times = timesOf(null);
    this.stream = new EventStream(this.run, {
      holds: this.holds,
      heard: (events, isLive) => this.hear(events, isLive),
      changed: (state, error) => (state === "lost" ? this.beginAgain() : this.told(state, error)),
    });
    this.record = new RunRecord();
    this.events = [];
    /** The run as it stood before the kept events. */
    this.base = new RunRecord();
  }

  /** The run as it stood after so many of the kept events. */
  replayed(count) {
    const record = this.base.copy();
    for (const event of this.events.slice(0, count)) record.take(event);
    return record;
  }

  hear(events, isLive) {
    // What lies in a gap, the history knows.
    if (this.history !== null && this.record.time !== null && events.some((event) => event.kind === "gap")) {
      this.beginAgain();
      return;
    }
    dateEvents(events, isLive, this.record.time, this.times, this.milestones);
    if (this.events.length === 0) {
      const past = historyBefore(this.history, events[0], takeBefore(this.milestones, events[0]));
      for (const record of [this.base, this.record]) record.begin(past);
    }
    for (const event of events.flatMap((each) => [...takeBefore(this.milestones, each), each])) {
      this.events.push(event);
      this.record.take(event);
    }
    if (this.events.length > 1.1 * MOST_EVENTS) {
      const forgotten = this.events.splice(0, this.events.length - MOST_EVENTS);
      for (const event of forgotten) this.base.take(event);
      this.forgot(forgotten.length);
    }
    this.changed();
  }
}
