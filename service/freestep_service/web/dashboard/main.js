// The frame around pages: which one is shown, who is signed in, whether the service answers.

import { recolour } from "./chart.js";
import { el, setText } from "./dom.js";
import { Overview } from "./overview.js";
import { RunPage } from "./run_page.js";
import { Away, Refused, signIn, signOut, takeLinkCode, whoAmI } from "./session.js";
import { SignIn } from "./sign_in.js";

const THEME = "freestep-theme";
const THEMES = ["auto", "light", "dark"];
const AGAIN_MS = 2000;
const LINK = "#sign-in=";

class Shell {
  constructor() {
    this.main = document.getElementById("main");
    this.banner = document.getElementById("banner");
    this.session = null;
    this.attempts = 0;
    this.page = null;
    this.trail = el("nav", { class: "trail", "aria-label": "Where you are" });
    this.who = el("span", { class: "who" });
    this.themeButton = el("button", { type: "button", class: "quiet", onclick: () => this.nextTheme() });
    this.outButton = el("button", { type: "button", class: "quiet", onclick: () => this.signOut() }, "Sign out");
    document.getElementById("bar").append(this.trail, this.who, this.themeButton, this.outButton);
    this.setTheme(localStorage.getItem(THEME) ?? "auto");
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
    addEventListener("hashchange", () => this.onHash());
    document.querySelector(".skip").addEventListener("click", (event) => {
      // The address's fragment says which page is shown, and stays.
      event.preventDefault();
      this.main.focus();
    });
  }

  /** Another page, or a link that signs in. */
  onHash() {
    if (location.hash.startsWith(LINK)) {
      this.start();
    } else if (this.session !== null) {
      this.route();
      // Who listens hears that it is another page.
      this.main.focus();
    }
  }

  /** Finds out who this browser is, by a link's code if it was opened with one. */
  async start() {
    const code = takeLinkCode();
    const attempt = ++this.attempts;
    let reason = "";
    let session = null;
    while (session === null) {
      try {
        session = code === null ? await whoAmI() : await signIn({ code });
      } catch (error) {
        if (error instanceof Away || error.isPassing) {
          this.failed(error);
          await new Promise((done) => setTimeout(done, AGAIN_MS));
        } else {
          reason = error.message;
          session = { scope: null };
        }
      }
    }
    // A link that came meanwhile knows better.
    if (attempt !== this.attempts) return;
    this.session = session;
    this.answered();
    this.route(reason);
  }

  signedIn(session) {
    this.session = session;
    this.route();
  }

  async signOut() {
    try {
      await signOut();
      this.session = { scope: null };
      this.route();
    } catch (error) {
      this.failed(error);
    }
  }

  /** Goes to the page of a run, beside others; null is that of all runs. */
  go(run, compared = []) {
    const beside = compared.map((name) => `&with=${encodeURIComponent(name)}`).join("").replace("&", "?");
    location.hash = run === null ? "#/" : `#/runs/${encodeURIComponent(run)}${beside}`;
  }

  route(reason = "") {
    this.page?.close();
    const isIn = this.session.scope !== null;
    const [path, query] = location.hash.slice(1).split("?");
    const match = /^\/runs\/([^/]+)$/.exec(path ?? "");
    let run = null;
    try {
      run = isIn && match !== null ? decodeURIComponent(match[1]) : null;
    } catch {
      // No name of a run.
    }
    const compared = new URLSearchParams(query ?? "").getAll("with");
    if (!isIn) this.page = new SignIn({ shell: this, reason });
    else if (run !== null) this.page = new RunPage(run, { session: this.session, shell: this, compared });
    else this.page = new Overview({ shell: this });
    document.title = run === null ? "freestep" : `${run} · freestep`;
    this.showBar(run);
    this.main.replaceChildren(this.page.element);
    this.page.start();
  }

  showBar(run) {
    const { scope, name, is_open } = this.session;
    const brand = el("a", { class: "brand", href: "#/", "aria-current": run === null ? "page" : null }, "freestep");
    this.trail.replaceChildren(brand, ...(run === null ? [] : [el("span", { "aria-hidden": "true" }, "/"), el("span", { class: "here", "aria-current": "page" }, run)]));
    setText(this.who, scope === null ? "" : is_open ? "open: no tokens" : `${name || "token"} · ${scope}`);
    this.outButton.hidden = scope === null || is_open;
  }

  /** The headers of requests that are made without `session`. */
  headers() {
    const half = localStorage.getItem("freestep-session");
    return half === null ? {} : { "Freestep-Session": half };
  }

  /** The service has answered. */
  answered() {
    setText(this.banner, "");
  }

  /** A request has failed. */
  failed(error) {
    if (error instanceof Refused && error.status === 401) {
      this.session = { scope: null };
      this.route("The session has ended, or its token is good no more.");
    } else if (error instanceof Away) {
      setText(this.banner, "The service does not answer. This page goes on when it does.");
    } else {
      setText(this.banner, error.message);
    }
  }

  setTheme(theme) {
    this.theme = THEMES.includes(theme) ? theme : "auto";
    document.documentElement.dataset.theme = this.theme;
    setText(this.themeButton, `Theme: ${this.theme}`);
    recolour();
  }

  nextTheme() {
    this.setTheme(THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length]);
    localStorage.setItem(THEME, this.theme);
  }
}

new Shell().start();
