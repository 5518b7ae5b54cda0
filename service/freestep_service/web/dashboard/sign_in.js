// Where nobody is signed in: a token is pasted here.

import { el } from "./dom.js";
import { signIn } from "./session.js";

export class SignIn {
  constructor({ shell, reason = "" }) {
    const input = el("input", {
      id: "token", type: "password", autocomplete: "current-password", spellcheck: "false", required: true, "aria-describedby": "wrong",
    });
    const wrong = el("p", { class: "bad", id: "wrong", role: "alert" }, reason);
    const button = el("button", { type: "submit", class: "primary" }, "Sign in");
    const onsubmit = async (event) => {
      event.preventDefault();
      button.disabled = true;
      try {
        shell.signedIn(await signIn({ token: input.value.trim() }));
      } catch (error) {
        wrong.textContent = error.message;
        button.disabled = false;
        input.focus();
      }
    };
    this.element = el(
      "div", { class: "sign-in card" }, el("h1", {}, "Sign in"),
      el("p", {}, "Run ", el("code", {}, "freestep dashboard"), " where you train, and open the link that it prints; or paste a token."),
      el("form", { onsubmit }, el("label", { for: "token" }, "Token"), input, wrong, button),
      el("p", { class: "note" }, "A token of scope read shows all, one of scope admin can act, too. freestep tokens create makes one."),
    );
  }

  start() {
    return this;
  }

  close() {}
}
