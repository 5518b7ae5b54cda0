// What may be changed of a run while it trains.

import { card, el, setText } from "./dom.js";
import { setting, twice } from "./acts.js";
import { number } from "./format.js";
import { runaway } from "./series.js";
import { call, runPath } from "./session.js";

const OFFERED = ["lr", "base.lr", "weight_decay", "momentum", "betas", "max_grad_norm"];
const POLICIES = ["async", "ringmaster", "sync", "quorum", "buffered", "rennala", "ssp"];
const OF_POLICY = ["batch", "max_staleness", "slack"];

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
    this.onDeleted = onDeleted;
    this.pauseButton = null;
    this.settings = new Map();
    this.fields = el("div", { class: "settings" });
    this.pausing = el("p", { class: "acts" });
    this.policy = new PolicyFields((aggregation) => this.change({ aggregation }, `the policy is ${aggregation.policy} now`));
    this.deleting = el("p", { class: "acts" });
    // A run that cannot be opened has no status, and can be deleted.
    this.showDeletion("");
    this.element = card("Steer", this.pausing, this.fields, this.policy.element, this.deleting);
  }

  async change(body, told) {
    await call("PATCH", runPath(this.run), { body });
    this.onAct();
    return told;
  }

  /** Shows what is in force. */
  show(status) {
    this.showDeletion(status.id);
    this.showPause(status.control.paused);
    for (const name of OFFERED) {
      const value = name.split(".").reduce((document, member) => document?.[member], inForce(status).optimizer);
      if (value !== undefined) this.showSetting(name, JSON.stringify(value));
    }
    this.policy.show(inForce(status).aggregation);
  }

  /** Offers to delete the run of an id; where none is known, whichever has the name. */
  showDeletion(id) {
    if (this.id === id) return;
    this.id = id;
    const remove = async () => {
      await call("DELETE", runPath(this.run, id && `?id=${encodeURIComponent(id)}`));
      this.onDeleted();
      return `the run ${this.run} is deleted`;
    };
    const question = `Delete ${this.run} and its checkpoints?`;
    this.deleting.replaceChildren(twice("Delete the run", question, remove, { isGrave: true }));
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
      const act = (value) => this.change({ optimizer: nested(name, value) }, `${name} is ${JSON.stringify(value)} now`);
      const made = setting(name, { value: text }, `Set ${name}?`, act, valueOf);
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

/** The aggregation policy and the values that replace its own, which are set together. */
class PolicyFields {
  /** act(aggregation): sets these fields. */
  constructor(act) {
    this.inForce = null;
    this.choice = el("select", { id: "policy" }, POLICIES.map((name) => el("option", { value: name }, name)));
    this.choice.addEventListener("change", () => this.fill(this.choice.value));
    const button = twice("Set", "Change the policy?", act, { given: () => this.given() });
    const row = (name, field, more) => el("div", { class: "setting" }, el("label", { for: field.id }, name), field, more);
    this.inputs = new Map(OF_POLICY.map((name) => {
      return [name, el("input", { id: `policy-${name}`, type: "text", inputmode: "numeric", autocomplete: "off" })];
    }));
    this.element = el(
      "fieldset", { class: "settings", hidden: true }, el("legend", { class: "hidden" }, "Aggregation"), row("policy", this.choice, button),
      [...this.inputs].map(([name, input]) => row(name, input)),
      el("p", { class: "note" }, "What is left empty is the policy's own."),
    );
  }

  /** Shows what is in force, unless somebody has begun to change it. */
  show(inForce) {
    const isUntouched = this.inForce === null || this.isAsIn(this.inForce);
    this.inForce = inForce;
    this.element.hidden = false;
    if (isUntouched && !this.isAsIn(inForce)) this.fill(inForce.policy);
  }

  /** Another policy than that in force begins with its own values. */
  fill(policy) {
    this.choice.value = policy;
    for (const [name, input] of this.inputs) input.value = policy === this.inForce.policy ? textOf(this.inForce[name]) : "";
  }

  isAsIn(aggregation) {
    return this.choice.value === aggregation.policy
      && [...this.inputs].every(([name, input]) => input.value === textOf(aggregation[name]));
  }

  given() {
    const values = [...this.inputs].map(([name, input]) => [name, valueOf(input.value.trim() || "none")]);
    return { policy: this.choice.value, ...Object.fromEntries(values) };
  }
}

function textOf(value) {
  return value === null || value === undefined ? "" : String(value);
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

/** A line that says that the loss has run away, and what helps. */
export function lossNote() {
  const element = el("p", { class: "bad" });
  return {
    element,
    show(points) {
      const found = runaway(points);
      const told = found && `The loss is ${number(found.newest)}, and was ${number(found.best)} at its best. To go back, restore a checkpoint.`;
      setText(element, told ?? "");
    },
  };
}

/** A line that says that the run takes no pushes. */
export function pauseNote() {
  const element = el("p", { class: "paused" });
  return { element, show(status) { setText(element, status.control.paused ? "Paused: pushes are refused until the run is resumed." : ""); } };
}
