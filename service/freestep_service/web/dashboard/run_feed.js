// All that is known of a run's past and present from its events: followed by one page at a time.

import { dateEvents } from "./event_times.js";
import { EventStream } from "./event_stream.js";
import { curvesBefore, readHistory, timesOfSteps } from "./run_history.js";
import { RunRecord, replayed } from "./run_record.js";

const MOST_EVENTS = 20000;

/** Follows a run's events. changed(): there is more. told(state, error): how the stream is. */
export class RunFeed {
  constructor(run, { changed, told = () => {} }) {
    this.run = run;
    this.changed = changed;
    this.told = told;
    this.abort = new AbortController();
    this.clear();
  }

  /** Begins with the history, and goes on with the events. */
  start() {
    this.begin();
    return this;
  }

  async begin() {
    try {
      this.history = await readHistory(this.run, this.abort.signal);
    } catch {
      // Whatever is wrong, the stream of events says so, too.
    }
    if (!this.abort.signal.aborted) this.stream.start();
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
    this.stream = new EventStream(this.run, {
      heard: (events, isLive) => this.hear(events, isLive),
      changed: (state, error) => (state === "lost" ? this.beginAgain() : this.told(state, error)),
    });
    this.record = new RunRecord();
    this.events = [];
    this.curves = null;
  }

  /** The run as it stood after so many of the kept events. */
  replayed(count) {
    return replayed(this.events, count, this.curves);
  }

  hear(events, isLive) {
    dateEvents(events, isLive, this.record.time, timesOfSteps(this.history));
    if (this.events.length === 0 && this.curves === null) {
      this.curves = curvesBefore(this.history, events[0]);
      this.record.begin(this.curves);
    }
    for (const event of events) {
      this.events.push(event);
      this.record.take(event);
    }
    if (this.events.length > 1.1 * MOST_EVENTS) this.events.splice(0, this.events.length - MOST_EVENTS);
    this.changed();
  }
}
