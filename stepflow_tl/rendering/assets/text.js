// Text: everything that comes from the data passes through here, as text and never as markup.

const element = (id) => document.getElementById(id);

/** A new element with a class and a text. */
function made(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

// Control characters, and those that change the order in which text is shown.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/u;

/**
 * Show a text as it was written. A character that cannot be seen keeps its place in the text and is named in a
 * frame; it is isolated there, so it cannot turn its neighbours around.
 */
function showText(node, text) {
  node.replaceChildren();
  let rest = text;
  for (let found = UNSEEN.exec(rest); found; found = UNSEEN.exec(rest)) {
    node.append(rest.slice(0, found.index));
    const control = made("span", "control", found[0]);
    control.dataset.name = "U+" + found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(control);
    rest = rest.slice(found.index + found[0].length);
  }
  node.append(rest);
}

/** Where a text ends but for white space: the six ASCII characters, as everywhere in stepflow_tl. */
const trimmedEnd = (text) => text.replace(/[ \t\n\r\f\v]+$/, "").length;

/** A share as percent, three digits. */
function percent(share) {
  if (share === 0) return "0 %";
  if (share < 0.0001) return "<0.01 %";
  return `${(100 * share).toFixed(share < 0.01 ? 2 : share < 0.9995 ? 1 : 0)} %`;
}

/** A value in nats, three digits, or 1.2e-7. */
function nats(value) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 0.001 && Math.abs(value) < 1000) return String(Number(value.toPrecision(3)));
  return value.toExponential(2).replace("e+", "e");
}
