// What became of pushes, and why; and how stale they were.

import { Rows, card, el, setText } from "./dom.js";
import { count, number, plural } from "./format.js";

const DECISIONS = [["applied", "--good"], ["accumulated", "--series-1"], ["dropped", "--bad"]];
const MOST_BARS = 24;
/** More would lie on each other on a phone. */
const MOST_TICKS = 8;

export class DecisionsPanel {
  constructor() {
    this.parts = DECISIONS.map(([name, colour]) => {
      const part = el("span", { class: "part" });
      part.style.setProperty("background", `var(${colour})`);
      const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.setProperty("--colour", `var(${colour})`);
      const value = el("dd");
      return { name, part, value, entry: el("div", {}, el("dt", {}, swatch, name), value) };
    });
    this.bar = el("div", { class: "stack", "aria-hidden": "true" }, this.parts.map((each) => each.part));
    this.reasons = el("tbody");
    this.rows = new Rows(this.reasons, () => {
      const cells = [el("th", { scope: "row" }), el("td")];
      return { element: el("tr", {}, cells), cells };
    });
    this.table = el(
      "table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Reason"), el("th", { scope: "col" }, "Pushes"))),
      this.reasons,
    );
    this.note = el("p", { class: "note" });
    this.element = card(
      "Decisions on pushes", this.bar, el("dl", { class: "figures" }, this.parts.map((each) => each.entry)),
      this.note, this.table,
    );
  }

  /** totals: pushes by decision. reasons: how many pushes had which, of those that events tell of. */
  show(totals, reasons) {
    const all = DECISIONS.reduce((sum, [name]) => sum + (totals[name] ?? 0), 0);
    for (const { name, part, value } of this.parts) {
      const pushes = totals[name] ?? 0;
      part.style.setProperty("width", `${all === 0 ? 0 : (100 * pushes) / all}%`);
      setText(value, count(pushes) + (all > 0 && pushes > 0 ? ` (${share(pushes / all)})` : ""));
    }
    const found = [...reasons].sort((one, other) => other[1] - one[1]);
    this.table.hidden = found.length === 0;
    setText(this.note, found.length > 0 ? "Why, of the pushes that events tell of:" : "No push was dropped, of those that events tell of.");
    this.rows.show(found, ([reason]) => reason, ({ cells }, [reason, pushes]) => {
      setText(cells[0], reason);
      setText(cells[1], count(pushes));
    });
  }
}

function share(part) {
  const percent = 100 * part;
  return percent < 0.1 ? "under 0.1%" : percent > 99.9 && percent < 100 ? "over 99.9%" : `${number(Number(percent.toFixed(1)))}%`;
}

export class StalenessPanel {
  constructor() {
    this.bars = el("div", { class: "histogram", role: "img" });
    this.rows = new Rows(this.bars, () => {
      const [bar, label] = [el("span", { class: "column" }), el("span", { class: "tick" })];
      return { element: el("div", { class: "bin" }, bar, label), bar, label };
    });
    this.note = el("p", { class: "note" });
    this.element = card("How stale pushes were", this.bars, this.note);
  }

  /** stalenesses: how many pushes were so many steps behind. */
  show(stalenesses) {
    const found = [...stalenesses].sort((one, other) => one[0] - other[0]);
    const pushes = found.reduce((sum, [, each]) => sum + each, 0);
    const bins = binned(found);
    const most = Math.max(1, ...bins.map((bin) => bin.pushes));
    const every = Math.ceil(bins.length / MOST_TICKS);
    this.rows.show(bins, (bin) => bin.label, ({ bar, label, element }, bin) => {
      bar.style.setProperty("height", `${(100 * bin.pushes) / most}%`);
      setText(label, bin.index % every === 0 ? count(bin.from) : "");
      element.title = `${bin.label} steps behind: ${plural(bin.pushes, "push").replace("pushs", "pushes")}`;
    });
    const mean = found.reduce((sum, [steps, each]) => sum + steps * each, 0) / Math.max(1, pushes);
    const told = pushes === 0 ? "No pushes yet." : `Mean ${number(mean)} steps behind, at most ${count(found.at(-1)[0])}, of ${count(pushes)} pushes.`;
    setText(this.note, told);
    this.bars.setAttribute("aria-label", `Pushes by staleness. ${bins.map((bin) => `${bin.label}: ${bin.pushes}`).join(", ")}`);
    this.bars.hidden = pushes === 0;
  }
}

function binned(found) {
  if (found.length === 0) return [];
  const most = found.at(-1)[0];
  const width = Math.ceil((most + 1) / MOST_BARS);
  const bins = Array.from({ length: Math.floor(most / width) + 1 }, (_, index) => {
    const [from, to] = [index * width, (index + 1) * width - 1];
    return { index, from, label: from === to ? String(from) : `${from}–${to}`, pushes: 0 };
  });
  for (const [steps, pushes] of found) bins[Math.floor(steps / width)].pushes += pushes;
  return bins;
}
