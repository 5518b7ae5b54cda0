// The service, asked with the browser's session: one half of its token is a cookie, the other is kept here.

const KEPT = "freestep-session";

/** A refusal of the service: its status, slug and reason. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `the service answered ${status}`);
    this.status = status;
    this.slug = String(problem.type ?? "").split(":").pop();
    this.field = problem.field ?? null;
  }
}

/** The service does not answer. */
export class Away extends Error {}

/** An answer of the service; raises Refused and Away. */
export async function ask(method, path, { body, headers = {}, signal } = {}) {
  const half = localStorage.getItem(KEPT);
  const sent = { ...headers };
  if (half !== null) sent["Freestep-Session"] = half;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let answer;
  try {
    const content = body === undefined ? undefined : JSON.stringify(body);
    answer = await fetch(path, { method, headers: sent, body: content, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Away("the service does not answer");
  }
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

/** The JSON of an answer; null where there is none. */
export async function call(method, path, options) {
  const answer = await ask(method, path, options);
  return answer.status === 204 ? null : answer.json().catch(() => Promise.reject(new Away("the answer was cut short")));
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
