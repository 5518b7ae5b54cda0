// What may be changed of a run while it trains.

import { card, el, setText } from "./dom.js";
import { setting, twice } from "./acts.js";
import { call, runPath } from "./session.js";

const OFFERED = ["lr", "base.lr", "weight_decay", "momentum", "betas", "max_grad_norm"];

/** What a run's spec is with what has been changed since. */
export function inForce({ spec, control }) {
  return {
    ...spec, optimizer: { ...spec.optimizer, ...control.optimizer }, aggregation: { ...spec.aggregation, ...control.aggregation },
  };
}

export class SteerPanel {
  constructor(run, { onAct, onDeleted }) {
    this.run = run;
    this.onAct = onAct;
    this.pauseButton = null;
    this.settings = new Map();
    this.fields = el("div", { class: "settings" });
    this.pausing = el("p", { class: "acts" });
    const remove = async () => {
      await call("DELETE", runPath(run));
      onDeleted();
      return `the run ${run} is deleted`;
    };
    const deletion = twice("Delete the run", `Delete ${run} and its checkpoints?`, remove, { isGrave: true });
    this.element = card("Steer", this.pausing, this.fields, el("p", { class: "acts" }, deletion));
  }

  async change(body, told) {
    await call("PATCH", runPath(this.run), { body });
    this.onAct();
    return told;
  }

  /** Shows what is in force. */
  show(status) {
    this.showPause(status.control.paused);
    for (const name of OFFERED) {
      const value = name.split(".").reduce((document, member) => document?.[member], inForce(status).optimizer);
      if (value !== undefined) this.showSetting(name, JSON.stringify(value));
    }
  }

  showPause(isPaused) {
    if (this.isPaused === isPaused) return;
    this.isPaused = isPaused;
    const told = isPaused ? "the run goes on" : "the run is paused";
    const [label, question] = isPaused ? ["Resume", "Take pushes again?"] : ["Pause", "Refuse all pushes?"];
    this.pausing.replaceChildren(twice(label, question, () => this.change({ paused: !isPaused }, told)));
  }

  showSetting(name, text) {
    if (!this.settings.has(name)) {
      const act = (given) => this.change({ optimizer: nested(name, valueOf(given)) }, `${name} is ${given} now`);
      const made = setting(name, { value: text }, `Set ${name}?`, act);
      made.shown = text;
      this.settings.set(name, made);
      this.fields.append(made.element);
    }
    const made = this.settings.get(name);
    // What somebody is typing stays.
    if (made.shown !== text && made.input.value === made.shown) made.input.value = text;
    made.shown = text;
  }
}

/** {base: {lr: value}} for base.lr. */
function nested(name, value) {
  return name.split(".").reduceRight((inner, member) => ({ [member]: inner }), value);
}

function valueOf(text) {
  try {
    return JSON.parse(text.replace(/^none$/i, "null"));
  } catch {
    throw new Error(`${text || "nothing"} is no value: a number, a list of numbers such as [0.9, 0.999], or none`);
  }
}

/** A line that says that the run takes no pushes. */
export function pauseNote() {
  const element = el("p", { class: "paused" });
  return { element, show(status) { setText(element, status.control.paused ? "Paused: pushes are refused until the run is resumed." : ""); } };
}
