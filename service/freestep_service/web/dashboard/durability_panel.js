// Where a run's state is: its shards and their owners, its checkpoints and journal, and what a crash now would cost.

import { Rows, card, cellsOf, el, setText } from "./dom.js";
import { twice, setting } from "./acts.js";
import { bytes, count, duration, plural } from "./format.js";
import { call, now, runPath } from "./session.js";

const OF_CHECKPOINT = ["Step", "Epoch", "Written", "Size"];
const OF_SHARD = ["Shard", "Owner", "Elements", "Applied", "Durable", "Journal"];

/** What would be lost if the service's processes were killed now: {short, text, isBad}.
 *
 * checkpoints: those that are kept, where they are known: until it has written one, a service that was started again does
 * not say which is the newest.
 */
export function crashCost(status, stepsASecond, topology = null, checkpoints = []) {
  const { durability } = status.spec;
  if (!status.initialized) return { short: "nothing", text: "Nothing: the run has no weights yet." };
  if (durability === "journal") {
    const text = "Nothing: every push is on disk before it is answered. A restart goes on at the same step.";
    const isAway = (topology?.missing ?? []).length > 0;
    return { short: "nothing", text: isAway ? `${text} Shards without an owner wait for their host.` : text };
  }
  const kept = durableStep(topology) ?? status.checkpoint_step ?? checkpoints.at(-1)?.step ?? null;
  if (kept === null) {
    return { short: "–", text: "Not known: the service says of no checkpoint.", isBad: status.step > 0 };
  }
  const steps = Math.max(0, status.step - kept);
  const time = stepsASecond ? `, about ${duration((1000 * steps) / stepsASecond)} of training` : "";
  return { short: plural(steps, "step"), text: `${plural(steps, "step")}${time}. The run would go on at step ${count(kept)}, in a new epoch.` };
}

function durableStep(topology) {
  const steps = (topology?.shards ?? []).map((shard) => shard.durable_step ?? null);
  return steps.length === 0 || steps.includes(null) ? null : Math.min(...steps);
}

export class DurabilityPanel {
  constructor(run, { isAdmin, onAct }) {
    this.run = run;
    this.isAdmin = isAdmin;
    this.onAct = onAct;
    this.cost = el("p", { class: "cost" });
    this.body = el("tbody");
    this.rows = new Rows(this.body, (item) => this.row(item));
    this.empty = el("p", { class: "empty" }, "There is no checkpoint.");
    const head = [...OF_CHECKPOINT, ...(isAdmin ? ["Acts"] : [])];
    this.table = el(
      "table", { class: "stacks" }, el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))), this.body,
    );
    const write = async () => {
      const { step } = await call("POST", runPath(run, "/checkpoints"));
      onAct();
      return `checkpoint of step ${count(step)} written`;
    };
    this.element = card(
      "What a crash now would cost", this.cost, el("h3", {}, "Checkpoints"),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Checkpoints" }, this.table), this.empty,
      isAdmin ? el("p", { class: "acts" }, twice("Write a checkpoint", "Write one now?", write)) : null,
    );
  }

  row({ step }) {
    const cells = cellsOf(OF_CHECKPOINT);
    const element = el("tr", {}, cells);
    if (this.isAdmin) {
      const act = async () => {
        await call("POST", runPath(this.run, `/checkpoints/${step}/restore`));
        this.onAct();
        return `the run is back at step ${count(step)}`;
      };
      const button = twice("Restore", "Go back to it?", act, { isGrave: true });
      button.setAttribute("aria-label", `Restore step ${step}`);
      element.append(el("td", { class: "acts" }, button));
    }
    return { element, cells };
  }

  show(cost, checkpoints) {
    setText(this.cost, cost.text);
    this.cost.classList.toggle("bad", Boolean(cost.isBad));
    this.table.hidden = checkpoints.length === 0;
    this.empty.hidden = checkpoints.length > 0;
    const newest = [...checkpoints].reverse();
    this.rows.show(newest, (each) => `${each.epoch} ${each.step}`, ({ cells }, each) => {
      setText(cells[0], count(each.step));
      setText(cells[1], count(each.epoch));
      setText(cells[2], `${duration(now() - Date.parse(each.created_at))} ago`);
      setText(cells[3], bytes(each.bytes));
    });
  }
}

function shardsOf(text) {
  if (!/^[1-9][0-9]{0,2}$/.test(text)) throw new Error("the number of shards is a whole number");
  return Number(text);
}

export class ShardsPanel {
  constructor(run, { isAdmin, onAct }) {
    this.body = el("tbody");
    this.rows = new Rows(this.body, () => {
      const cells = cellsOf(OF_SHARD);
      return { element: el("tr", {}, cells), cells };
    });
    this.element = card(
      "Shards and their owners",
      el(
        "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Shards, a row each" },
        el("table", { class: "shards stacks" }, el("thead", {}, el("tr", {}, OF_SHARD.map((name) => el("th", { scope: "col" }, name)))), this.body),
      ),
    );
    if (isAdmin) {
      const act = async (shards) => {
        await call("POST", runPath(run, "/reshard"), { body: { shards } });
        onAct();
        return `the run has ${shards} shards`;
      };
      const { element } = setting("Number of shards", { value: "", inputmode: "numeric" }, "Reshard the run?", act, shardsOf);
      this.element.append(element);
    }
  }

  show(topology) {
    this.rows.show(topology.shards, (shard) => shard.index, ({ element, cells }, shard) => {
      element.dataset.state = shard.url === null ? "expired" : "live";
      setText(cells[0], String(shard.index));
      setText(cells[1], shard.url ?? "no owner");
      setText(cells[2], count(shard.end - shard.begin));
      setText(cells[3], count(shard.applied_step));
      setText(cells[4], count(shard.durable_step));
      setText(cells[5], shard.journal ?? "–");
    });
  }
}
