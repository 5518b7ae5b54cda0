// The workers of a run in rows, coloured by how long they have been silent.

import { Rows, card, cellsOf, el, setText } from "./dom.js";
import { twice } from "./acts.js";
import { bytes, count, duration, number, rate } from "./format.js";
import { call, now, runPath } from "./session.js";

const MOST_GONE = 10;
const RATE_MS = 10000;
const BAN_S = 3600;
/** What a worker is called whose lease has ended, by how it has. */
const GONE = { released: "left", expired: "expired", ended: "ended" };
const COLUMNS = [
  ["Worker", ""], ["State", ""], ["Silent for", "Since its last push or renewal, of the time after which its lease ends"],
  ["Last push", ""], ["Pushes", ""], ["Received", "Bytes of the bodies of these pushes"], ["Dropped", ""],
  ["Staleness", "Of its last push, in steps"],
  ["Steps/s", "Its local steps a second, where its pushes say, else its pushes a second"], ["Samples", ""], ["Units", "Units of data that have counted with its pushes"],
];

export class WorkersPanel {
  constructor(run, { isAdmin, onAct }) {
    this.run = run;
    this.isAdmin = isAdmin;
    this.onAct = onAct;
    this.leases = [];
    this.readAt = 0;
    /** How many pushes of each worker were seen at what times. */
    this.looks = new Map();
    this.body = el("tbody");
    this.rows = new Rows(this.body, (item) => this.row(item));
    this.empty = el("p", { class: "empty" }, "No worker has a lease.");
    const head = COLUMNS.map(([name, title]) => el("th", { scope: "col", title: title || null }, name));
    if (isAdmin) head.push(el("th", { scope: "col" }, "Acts"));
    this.summary = el("p", { class: "note" });
    this.refused = el("ul", { class: "refused" });
    this.refusedRows = new Rows(this.refused, ({ worker, isLifted }) => this.refusedRow(worker, isLifted));
    this.element = card(
      "Workers", this.summary,
      el(
        "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Workers, a row each" },
        el("table", { class: "workers stacks" }, el("thead", {}, el("tr", {}, head)), this.body),
      ),
      this.empty, this.refused,
    );
  }

  /** Takes over which leases there are. */
  read(leases) {
    this.readAt = performance.now();
    this.looks = new Map(leases.map(({ worker, pushes }) => [worker, looksWith(this.looks.get(worker) ?? [], pushes, this.readAt)]));
    this.leases = leases.map((lease) => ({ ...lease, speed: lease.speed ?? speedOf(this.looks.get(lease.worker)) }));
  }

  /** Shows live workers and those that went last. at: null for now, else the time that is replayed. */
  show(record, at) {
    const items = at === null ? this.now(record) : replayedWorkers(record, at);
    this.rows.show(items, (item) => item.worker, (row, item) => fill(row, item, at ?? now()));
    const live = items.filter((item) => !isGone(item)).length;
    setText(this.summary, `${count(live)} live` + (items.length > live ? `, and ${items.length - live} that went last` : ""));
    this.empty.hidden = items.length > 0;
  }

  /** Shows who gets no lease: for a time, by an act here, or for good, by the run's rule against outliers. */
  showRefused({ control, banned }) {
    const suspended = Object.entries(control.suspended).map(([worker, ms]) => ({ worker, isLifted: true, told: `for ${duration(ms)}` }));
    const ruled = banned.map((worker) => ({ worker, isLifted: false, told: "for its outliers" }));
    this.refusedRows.show([...suspended, ...ruled], (each) => `${each.isLifted} ${each.worker}`, ({ text }, { worker, told }) => {
      setText(text, `${worker} gets no lease, ${told}. `);
    });
  }

  refusedRow(worker, isLifted) {
    const text = el("span");
    const lift = twice("Lift", "Let it come back?", async () => {
      await call("DELETE", runPath(this.run, `/workers/${encodeURIComponent(worker)}?ban=0`));
      this.onAct();
      return `${worker} may have a lease again`;
    });
    lift.setAttribute("aria-label", `Lift: ${worker}`);
    return { element: el("li", {}, text, this.isAdmin && isLifted ? lift : null), text };
  }

  now(record) {
    const since = performance.now() - this.readAt;
    const live = this.leases.map((lease) => {
      const silent = Math.max(0, lease.ttl_ms - lease.expires_in_ms) + since;
      return { ...told(record, lease.worker), ...lease, silent, ttl: lease.ttl_ms, state: stateOf(silent / lease.ttl_ms) };
    });
    const names = new Set(live.map((item) => item.worker));
    const gone = [...record.workers.values()].filter((worker) => worker.ended !== null && !names.has(worker.worker));
    gone.sort((one, other) => other.endedAt - one.endedAt);
    return [...live, ...gone.slice(0, MOST_GONE).map((worker) => goneWorker(worker, now()))];
  }

  row(item) {
    const cells = cellsOf(COLUMNS.map(([name]) => name));
    const bar = el("span", { class: "fill" });
    const silence = el("span", { class: "figure" });
    cells[2].append(el("span", { class: "meter", "aria-hidden": "true" }, bar), silence);
    const badge = el("span", { class: "badge" });
    cells[1].append(badge);
    const element = el("tr", {}, cells);
    const row = { element, cells, bar, silence, badge };
    if (this.isAdmin) {
      row.acts = el("td", { class: "acts" }, this.end(item.worker, 0), this.end(item.worker, BAN_S));
      element.append(row.acts);
    }
    return row;
  }

  end(worker, ban) {
    const path = runPath(this.run, `/workers/${encodeURIComponent(worker)}`) + (ban ? `?ban=${ban}` : "");
    const act = async () => {
      await call("DELETE", path);
      this.onAct();
      return ban ? `${worker} gets no lease for an hour` : `the lease of ${worker} has ended`;
    };
    const [label, question] = ban ? ["Ban 1 h", "Ban it for an hour?"] : ["End", "End its lease?"];
    const button = twice(label, question, act, { isGrave: ban > 0 });
    button.setAttribute("aria-label", `${label}: ${worker}`);
    return button;
  }
}

function told(record, name) {
  return record.workers.get(name) ?? { worker: name, pushes: 0, dropped: 0, staleness: null, samples: 0, units: 0, pushedAt: null };
}

function goneWorker(worker, now) {
  const state = GONE[worker.ended] ?? "left";
  // Of one that went before the first event, pushes are not known.
  const { pushes, dropped } = worker.pushedAt === null ? { pushes: null, dropped: null } : worker;
  return { ...worker, pushes, dropped, state, silent: now - worker.endedAt, ttl: null };
}

function replayedWorkers(record, at) {
  const workers = [...record.workers.values()].filter((worker) => worker.since !== null || worker.pushedAt !== null);
  return workers.map((worker) => {
    if (worker.ended !== null) return goneWorker(worker, at);
    const silent = at - Math.max(worker.pushedAt ?? 0, worker.since ?? 0);
    return { ...worker, state: "live", silent, ttl: null };
  });
}

/** Looks {time, pushes} of the last seconds with one more; a lease that was granted since begins anew. */
function looksWith(looks, pushes, time) {
  const since = pushes < (looks.at(-1)?.pushes ?? 0) ? [] : looks;
  const first = since.findLastIndex((each) => each.time <= time - RATE_MS);
  return [...since.slice(Math.max(0, first)), { time, pushes }];
}

/** Pushes a second; null of one look. */
function speedOf(looks) {
  const [from, to] = [looks[0], looks.at(-1)];
  return to.time > from.time ? (1000 * (to.pushes - from.pushes)) / (to.time - from.time) : null;
}

/** What a worker is that has been silent for a part of its lease. */
export function stateOf(part) {
  return part < 0.5 ? "live" : part < 0.8 ? "quiet" : "late";
}

function fill(row, item, now) {
  const { cells } = row;
  row.element.dataset.state = item.state;
  setText(cells[0], item.worker);
  setText(row.badge, item.state);
  const hasGone = isGone(item);
  setText(row.silence, hasGone ? `${duration(item.silent)} ago` : duration(item.silent) + (item.ttl ? ` of ${duration(item.ttl)}` : ""));
  row.bar.style.setProperty("width", `${hasGone ? 100 : Math.min(100, (100 * item.silent) / (item.ttl ?? Infinity))}%`);
  setText(cells[3], item.pushedAt === null ? "–" : `${duration(now - item.pushedAt)} ago`);
  setText(cells[4], count(item.pushes));
  setText(cells[5], bytes(item.received_bytes));
  setText(cells[6], count(item.dropped));
  setText(cells[7], count(item.staleness));
  setText(cells[8], rate(item.speed));
  setText(cells[9], item.samples ? number(item.samples) : "–");
  setText(cells[10], item.units ? count(item.units) : "–");
  if (row.acts) row.acts.classList.toggle("none", hasGone);
}

function isGone({ state }) {
  return Object.values(GONE).includes(state);
}
