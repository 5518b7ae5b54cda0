// Something that is asked for again and again, less often where the answer takes long, and not while nobody looks.

export class Poll {
  /** `ask(signal)` is called every `everyMs`; what it raises goes to `onError`. */
  constructor(everyMs, ask, onError) {
    this.everyMs = everyMs;
    this.ask = ask;
    this.onError = onError;
    this.timer = null;
    this.abort = new AbortController();
    this.again = false;
    this.isAsking = false;
  }

  start() {
    this.now();
    return this;
  }

  stop() {
    clearTimeout(this.timer);
    this.abort.abort();
  }

  /** Asks at once. */
  async now() {
    clearTimeout(this.timer);
    if (this.abort.signal.aborted) return;
    if (this.isAsking) {
      this.again = true;
      return;
    }
    this.isAsking = true;
    const began = performance.now();
    let took = 0;
    try {
      if (!document.hidden) await this.ask(this.abort.signal);
      took = performance.now() - began;
    } catch (error) {
      if (!this.abort.signal.aborted) this.onError(error);
    }
    this.isAsking = false;
    if (this.abort.signal.aborted) return;
    const pause = this.again ? 0 : Math.max(this.everyMs, 10 * took);
    this.again = false;
    this.timer = setTimeout(() => this.now(), pause);
  }
}
