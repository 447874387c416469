// The text pane: the whole trace in order, one entry a step, coloured by shares. A listbox: one stop for Tab, arrow
// keys inside.

class StepList {
  /**
   * @param list the listbox
   * @param pieces the trace: steps, and template pieces (step -1) between them
   * @param onChoose called with a step when it is clicked or reached by keys
   */
  constructor(list, pieces, onChoose) {
    this.list = list;
    this.entries = [];
    this.chosen = 0;
    let before = "";
    for (const piece of pieces) {
      const isStep = piece.step >= 0;
      const entry = made("div", `piece ${isStep ? "step" : "template"}`);
      if (piece.segment !== before && isStep) entry.classList.add("first-of-segment");
      before = isStep ? piece.segment : before;
      const value = made("span", "value");
      const text = made("div", "text");
      showPiece(text, piece.text);
      text.dir = "auto";
      entry.append(made("span", "label", isStep ? piece.label : ""), value, text);
      list.append(entry);
      if (!isStep) {
        entry.setAttribute("role", "presentation");
        continue;
      }
      entry.setAttribute("role", "option");
      entry.id = `step-${piece.step}`;
      entry.addEventListener("click", () => {
        if (getSelection().isCollapsed) onChoose(piece.step); // someone who marks text does not choose
      });
      this.entries[piece.step] = { entry, value, label: piece.label };
    }
    list.addEventListener("keydown", (event) => {
      const last = this.entries.length - 1;
      const to = { ArrowUp: this.chosen - 1, ArrowDown: this.chosen + 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      onChoose(Math.min(last, Math.max(0, to)));
    });
  }

  /** Colour every step by its share (undefined: none applies), mark the chosen one and, if told where, scroll to it. */
  show(chosen, shares, scroll) {
    // The step's own share is often the largest by far; the tint is there to tell the others apart.
    const largest = Math.max(...shares.map((share, i) => (i === chosen ? 0 : share ?? 0)));
    for (const [i, { entry, value, label }] of this.entries.entries()) {
      const share = shares[i];
      const strength = share > 0 ? Math.min(1, share / largest) : 0;
      entry.style.background = strength > 0 ? `rgb(var(--tint) / ${(0.55 * strength).toFixed(3)})` : "";
      entry.classList.toggle("chosen", i === chosen);
      entry.setAttribute("aria-selected", String(i === chosen));
      value.textContent = share === undefined ? "" : percent(share);
      entry.setAttribute("aria-label", share === undefined ? label : `${label}, ${percent(share)}`);
    }
    this.chosen = chosen;
    this.list.setAttribute("aria-activedescendant", `step-${chosen}`);
    if (scroll) this.reveal(chosen, scroll);
  }

  /** Scroll the pane, and nothing but the pane: the step to the "top", or to the "nearest" place where it is seen. */
  reveal(step, where) {
    const { entry } = this.entries[step];
    const above = entry.offsetTop - this.list.scrollTop;
    const below = above + entry.offsetHeight - this.list.clientHeight;
    if (above < 0 || where === "top") this.list.scrollTop += above - 8;
    else if (below > 0) this.list.scrollTop += Math.min(below + 8, above);
  }
}

/** A piece's text; the blank lines at its end are part of it, but take no room. */
function showPiece(node, text) {
  const end = trimmedEnd(text);
  showText(node, text.slice(0, end));
  if (end === text.length) return;
  const trailing = made("span", "trailing");
  showText(trailing, text.slice(end));
  node.append(trailing);
}
