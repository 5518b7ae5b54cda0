// What may be done to a run, by who has the scope admin; each act takes a second click.

import { el, say } from "./dom.js";

const ARMED_MS = 5000;

/** A button that acts on its second click: the first has it ask. `act` may raise, and the button says why.
 *
 * The second of a double click, and those of a key that is held down, answer nothing that somebody has read.
 * given(): what is acted with. It may raise, too, and then nothing is asked.
 */
export function twice(label, question, act, { isGrave = false, title = null, given = () => null } = {}) {
  const button = el("button", { type: "button", class: isGrave ? "act grave" : "act", title }, label);
  let timer = null;

  function disarm() {
    clearTimeout(timer);
    timer = null;
    button.classList.remove("armed");
    button.textContent = label;
  }

  button.addEventListener("click", async (event) => {
    if (event.detail > 1 || button.getAttribute("aria-disabled") === "true") return;
    if (timer === null) {
      try {
        given();
      } catch (error) {
        notify(`${label}: ${error.message}`, true);
        return;
      }
      button.classList.add("armed");
      button.textContent = question;
      say(`${question} Press again to do it, Escape to leave it.`);
      timer = setTimeout(disarm, ARMED_MS);
      return;
    }
    disarm();
    button.setAttribute("aria-disabled", "true");
    try {
      notify(await act(given()) ?? `${label}: done`);
    } catch (error) {
      notify(`${label}: ${error.message}`, true);
    }
    button.removeAttribute("aria-disabled");
  });
  button.addEventListener("keydown", (event) => {
    if (event.key === "Escape") disarm();
    if (event.repeat && event.key === "Enter") event.preventDefault();
  });
  button.addEventListener("blur", disarm);
  return button;
}

/** Shows what became of an act. */
export function notify(text, isError = false) {
  const toasts = document.getElementById("toasts") ?? document.body.appendChild(el("div", { id: "toasts" }));
  const toast = el("p", { class: isError ? "toast bad" : "toast", role: isError ? "alert" : "status" }, text);
  toasts.append(toast);
  setTimeout(() => toast.remove(), isError ? 12000 : 5000);
}

/** A field with a button that sets it, on the second click, to what `valueOf` makes of its text. */
export function setting(label, { value, type = "text", inputmode = "decimal" }, question, act, valueOf) {
  const id = `setting-${++settings}`;
  const input = el("input", { id, type, inputmode, value, autocomplete: "off", spellcheck: "false" });
  const button = twice("Set", question, act, { given: () => valueOf(input.value.trim()) });
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") button.focus(); });
  return { element: el("div", { class: "setting" }, el("label", { for: id }, label), input, button), input };
}

let settings = 0;
