// What happened to a run, as a strip of marks, a list, and a scrubber that takes the page back to any moment.

import { Rows, card, el, setText } from "./dom.js";
import { MARKS } from "./chart.js";
import { count, moment } from "./format.js";

const MOST_LISTED = 60;
const PLAYED_S = 20;
const FRAME_MS = 80;

export class Timeline {
  /** onMove(index): the first so many events are to be shown; null is all, as they come. onKinds(): others are shown. */
  constructor({ onMove, onKinds }) {
    this.onMove = onMove;
    this.index = null;
    this.events = [];
    this.hiddenKinds = new Set();
    this.playing = null;
    this.slider = el("input", { type: "range", min: "0", max: "0", step: "1", value: "0", id: "scrubber" });
    this.slider.addEventListener("input", () => { this.pause(); this.move(Number(this.slider.value)); });
    this.playButton = el("button", { type: "button", onclick: () => this.toggle() }, "Replay");
    this.liveButton = el("button", { type: "button", onclick: () => { this.pause(); this.move(null); } }, "Live");
    this.place = el("span", { class: "place" });
    this.kinds = el("fieldset", { class: "kinds" }, el("legend", {}, "Shown over curves"));
    for (const [kind, [colour, name]] of Object.entries(MARKS)) {
      const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.setProperty("--colour", `var(${colour})`);
      const box = el("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        if (box.checked) this.hiddenKinds.delete(kind);
        else this.hiddenKinds.add(kind);
        onKinds();
      });
      this.kinds.append(el("label", {}, box, swatch, name));
    }
    this.list = el("ol", { class: "events" });
    this.rows = new Rows(this.list, (mark) => {
      const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.setProperty("--colour", `var(${MARKS[mark.kind][0]})`);
      const [when, text] = [el("span", { class: "when" }), el("span")];
      return { element: el("li", {}, swatch, when, text), when, text };
    });
    this.empty = el("p", { class: "empty" }, "Nothing yet.");
    this.scrub = el(
      "div", { class: "scrub" }, el("label", { for: "scrubber" }, "Moment"), this.slider, this.playButton, this.liveButton, this.place,
    );
    this.element = card("What happened", this.kinds, this.empty, el("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "What happened, newest first" }, this.list));
  }

  /** The marks that are to be laid over curves. */
  shown(marks) {
    return marks.filter((mark) => !this.hiddenKinds.has(mark.kind));
  }

  show(record, events) {
    this.events = events;
    this.slider.max = String(events.length);
    if (this.index === null) this.slider.value = String(events.length);
    const event = this.index === null ? null : events[Math.max(0, this.index - 1)];
    const isNow = event === null || event === undefined;
    const text = isNow
      ? "Live"
      : `Event ${count(this.index)} of ${count(events.length)}: step ${count(event.step)}, ${moment(event.time)}`;
    // The button beside it says the same of now.
    setText(this.place, isNow ? "" : text);
    this.slider.setAttribute("aria-valuetext", text);
    this.liveButton.disabled = this.index === null;
    const marks = this.shown(record.marks).slice(-MOST_LISTED).reverse();
    this.empty.hidden = marks.length > 0;
    this.rows.show(marks, (mark) => `${mark.id} ${mark.kind}`, (row, mark) => {
      setText(row.when, `${moment(mark.time)} · step ${count(mark.step)}`);
      setText(row.text, mark.text + (mark.isGivenUp ? " (this step was given up)" : ""));
    });
  }

  move(index) {
    this.index = index;
    if (index !== null) this.slider.value = String(index);
    this.onMove(index);
  }

  toggle() {
    if (this.playing !== null) {
      this.pause();
      return;
    }
    const total = this.events.length;
    let at = this.index === null || this.index >= total ? 0 : this.index;
    const stride = Math.max(1, Math.ceil((total * FRAME_MS) / (1000 * PLAYED_S)));
    setText(this.playButton, "Pause");
    this.playing = setInterval(() => {
      at = Math.min(total, at + stride);
      this.move(at);
      if (at >= total) this.pause();
    }, FRAME_MS);
  }

  pause() {
    clearInterval(this.playing);
    this.playing = null;
    setText(this.playButton, "Replay");
  }
}
