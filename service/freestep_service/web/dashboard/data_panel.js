// The units of a run's data sets: which have counted, which are out with workers, which are open.

import { Rows, card, el, setText } from "./dom.js";
import { count, duration } from "./format.js";

const PARTS = [["done", "--good"], ["out", "--series-2"], ["open", "--line"]];

export class DataPanel {
  constructor() {
    this.list = el("div");
    this.rows = new Rows(this.list, makeRow);
    this.element = card("Data units", this.list);
    this.element.hidden = true;
  }

  show(sets) {
    this.element.hidden = sets.length === 0;
    this.rows.show(sets, (set) => set.name, fill);
  }
}

function makeRow() {
  const name = el("h3");
  const parts = PARTS.map(([part, colour]) => {
    const bar = el("span", { class: "part" });
    bar.style.setProperty("background", `var(${colour})`);
    const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.setProperty("--colour", `var(${colour})`);
    const value = el("dd");
    return { part, bar, value, entry: el("div", {}, el("dt", {}, swatch, part), value) };
  });
  const [passes, holders] = [el("p", { class: "note" }), el("p", { class: "note" })];
  const element = el(
    "div", { class: "data-set" }, name, el("div", { class: "stack", "aria-hidden": "true" }, parts.map((each) => each.bar)),
    el("dl", { class: "figures" }, parts.map((each) => each.entry)), passes, holders,
  );
  return { element, name, parts, passes, holders };
}

function fill(row, set) {
  setText(row.name, set.name);
  // Without an end, what is shown is the pass that is under way.
  const pass = set.passes[0];
  const shown = set.open === null && pass !== undefined ? pass : set;
  const all = shown.done + shown.out + (shown.open ?? 0);
  for (const { part, bar, value } of row.parts) {
    bar.style.setProperty("width", `${all === 0 ? 0 : (100 * (shown[part] ?? 0)) / all}%`);
    setText(value, count(shown[part]));
  }
  const total = set.spec.passes === null ? "" : ` of ${count(set.spec.passes)}`;
  setText(row.passes, `${count(set.passes_done)}${total} passes done, ${count(set.examples_done)} examples; ${count(set.units)} units of ${count(set.spec.unit)} a pass${set.exhausted ? "; all have counted" : ""}.`);
  const held = set.holders.map((each) => `${each.worker} has ${count(each.units)} (the oldest for ${duration(each.oldest_ms)})`);
  setText(row.holders, held.join("; "));
}
