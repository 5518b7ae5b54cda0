// The events of a run, from one stream after the other: what has happened, then what happens.

import { Patience, Refused, ask, runPath } from "./session.js";

const LONGEST_PAUSE_MS = 5000;
const HIDDEN_MS = 60000;
/** The service says something every 15 seconds at the latest. */
const SILENT_MS = 40000;
/** How long until a stream that is not held looks again. */
const LOOK_MS = 2000;

/** Reads events until `stop`.
 *
 * holds: whether a connection is held for those to come, of which browsers have six for a host; else they are asked for.
 * heard(events, isLive): some more; events that happened before they were asked for are not live, and come all at once.
 * changed(state, error): "following", "away" (it goes on trying), "lost" (all is told again), or "refused".
 */
export class EventStream {
  constructor(run, { heard, changed, holds = true }) {
    this.holds = holds;
    this.path = runPath(run, "/events");
    this.heard = heard;
    this.changed = changed;
    this.last = null;
    this.abort = new AbortController();
    this.onVisible = () => this.seen();
  }

  start() {
    document.addEventListener("visibilitychange", this.onVisible);
    this.follow();
    return this;
  }

  stop() {
    document.removeEventListener("visibilitychange", this.onVisible);
    clearTimeout(this.hiding);
    this.abort.abort();
  }

  /** A page that nobody looks at holds no connection: browsers have few for each host. */
  seen() {
    clearTimeout(this.hiding);
    if (document.hidden) {
      this.hiding = setTimeout(() => this.abort.abort(), HIDDEN_MS);
    } else if (this.abort.signal.aborted) {
      this.abort = new AbortController();
      this.follow();
    }
  }

  async follow() {
    const signal = this.abort.signal;
    let pause = 250;
    while (!signal.aborted) {
      try {
        await this.read(false, signal);
        this.changed("following");
        pause = this.holds ? 250 : LOOK_MS;
        if (this.holds) await this.read(true, signal);
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof Refused && error.status === 400 && this.last !== null) {
          // The run is not where it was: another one of this name, or one that has lost its past.
          this.last = null;
          this.changed("lost");
        } else if (error instanceof Refused && !error.isPassing) {
          this.changed("refused", error);
          pause = LONGEST_PAUSE_MS;
        } else {
          this.changed("away", error);
        }
      }
      await sleep(pause, signal);
      pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
    }
  }

  async read(isLive, signal) {
    const headers = this.last === null ? {} : { "Last-Event-ID": this.last };
    const patience = new Patience(SILENT_MS, signal);
    try {
      const answer = await ask("GET", `${this.path}?follow=${isLive}`, { headers, signal: patience.signal });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let [text, old] = ["", []];
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        patience.heard();
        text += value;
        const end = text.lastIndexOf("\n\n");
        if (end < 0) continue;
        const events = text.slice(0, end).split("\n\n").map(eventOf).filter((event) => event !== null);
        text = text.slice(end + 2);
        if (isLive) this.hear(events, true);
        else old = old.concat(events);
      }
      this.hear(old, false);
    } finally {
      patience.end();
    }
  }

  hear(events, isLive) {
    if (events.length === 0) return;
    this.last = events.at(-1).id;
    this.heard(events, isLive);
  }
}

/** The event of a block of lines; null for a comment. */
function eventOf(block) {
  const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
  return data.length === 0 ? null : JSON.parse(data.join("\n"));
}

/** Ends after a time, or when the signal is given. */
export function sleep(ms, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); done(); }, { once: true });
  });
}
