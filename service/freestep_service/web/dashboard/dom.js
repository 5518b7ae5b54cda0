// Elements of the page. Whatever a name contains, it becomes a text node, and never markup.

/** An element with attributes, listeners (`onclick`) and children: elements and texts. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in PROPERTIES) made[name] = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const PROPERTIES = { value: 1, checked: 1, disabled: 1, hidden: 1 };

/** Sets an element's text, if it is another one: so that nothing is read out again for nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Has screen readers say something. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** A card: a titled part of a page. */
export function card(title, ...children) {
  const id = `title-${++cards}`;
  return el("section", { class: "card", "aria-labelledby": id }, el("h2", { id }, title), ...children);
}

let cards = 0;

/** The cells of a table's row, the first its heading; a narrow page stacks them, each below the name of its column. */
export function cellsOf(names) {
  return names.map((name, index) => el(index === 0 ? "th" : "td", { scope: index === 0 ? "row" : null, "data-column": name }));
}

/** A row for each key, made once and updated in place: what has the focus keeps it. */
export class Rows {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.rows = new Map();
  }

  /** Shows these items, in their order; `update(row, item)` fills a row. */
  show(items, keyOf, update) {
    const wanted = new Set(items.map(keyOf));
    for (const [key, row] of this.rows) {
      if (!wanted.has(key)) {
        row.element.remove();
        this.rows.delete(key);
      }
    }
    items.forEach((item, index) => {
      const key = keyOf(item);
      if (!this.rows.has(key)) this.rows.set(key, this.make(item));
      const row = this.rows.get(key);
      if (this.parent.children[index] !== row.element) {
        this.parent.insertBefore(row.element, this.parent.children[index] ?? null);
      }
      update(row, item);
    });
  }
}
