// The service, asked with the browser's session: one half of its token is a cookie, the other is kept here.

const KEPT = "freestep-session";
const ANSWER_MS = 30000;
/** How old an answer's date is at most when it is given: it is in seconds, and is kept for one. */
const DATE_AGE_MS = 2000;

let aheadMs = 0;

/** What time it is for the service, in milliseconds: what it says of times is compared with that. */
export function now() {
  return Date.now() + aheadMs;
}

/** Learns from an answer's date, given at some moment between `asked` and now: a difference that explains it is kept. */
export function compareClocks(date, asked) {
  const least = date - Date.now();
  const most = date + DATE_AGE_MS - asked;
  if (aheadMs < least || aheadMs > most) aheadMs = (least + most) / 2;
}

/** A refusal of the service: its status, slug and reason. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `the service answered ${status}`);
    this.status = status;
    this.slug = String(problem.type ?? "").split(":").pop();
    this.field = problem.field ?? null;
  }

  /** Whether the same request may be taken later. */
  get isPassing() {
    return this.status >= 429 || this.status === 408;
  }
}

/** The service does not answer. */
export class Away extends Error {}

/** Ends a request whose answer does not come, or stops: for it browsers wait for minutes. `signal` ends it, too. */
export class Patience {
  constructor(ms, signal = null) {
    this.ms = ms;
    this.abort = new AbortController();
    this.signal = signal === null ? this.abort.signal : AbortSignal.any([signal, this.abort.signal]);
    this.heard();
  }

  /** Something has come. */
  heard() {
    this.end();
    this.timer = setTimeout(() => this.abort.abort(new Away("the service does not answer")), this.ms);
  }

  end() {
    clearTimeout(this.timer);
  }
}

/** An answer of the service; raises Refused and Away. */
export async function ask(method, path, { body, headers = {}, signal } = {}) {
  const half = localStorage.getItem(KEPT);
  const sent = { ...headers };
  if (half !== null) sent["Freestep-Session"] = half;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const asked = Date.now();
  let answer;
  try {
    const content = body === undefined ? undefined : JSON.stringify(body);
    answer = await fetch(path, { method, headers: sent, body: content, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Away("the service does not answer");
  }
  compareClocks(Date.parse(answer.headers.get("Date")), asked);
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

/** The JSON of an answer; null where there is none. An act takes as long as it takes. */
export async function call(method, path, { signal = null, ...options } = {}) {
  const patience = method === "GET" ? new Patience(ANSWER_MS, signal) : null;
  try {
    const answer = await ask(method, path, { ...options, signal: patience?.signal ?? signal });
    return answer.status === 204 ? null : await answer.json().catch(() => Promise.reject(new Away("the answer was cut short")));
  } finally {
    patience?.end();
  }
}

/** Who this browser is: `scope` is null where it has to sign in. */
export function whoAmI() {
  return call("GET", "/dashboard/session");
}

/** Signs in with a token or the code of a link. */
export async function signIn(given) {
  localStorage.removeItem(KEPT);
  const session = await call("POST", "/dashboard/session", { body: given });
  localStorage.setItem(KEPT, session.half);
  return session;
}

/** Has this browser forget its session. */
export async function signOut() {
  await call("DELETE", "/dashboard/session");
  localStorage.removeItem(KEPT);
}

/** The code of a sign-in link that the page was opened with, which then leaves the address. */
export function takeLinkCode() {
  const match = /^#sign-in=([\w-]+)(?:&to=(\/.*))?$/.exec(location.hash);
  if (match === null) return null;
  history.replaceState(null, "", `/#${match[2] ?? "/"}`);
  return match[1];
}

/** The path of a run, or of something of it. */
export function runPath(run, rest = "") {
  return `/v1/runs/${encodeURIComponent(run)}${rest}`;
}
