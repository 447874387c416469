// The map: a canvas with cells, segment boundaries, labels and a colour bar. It knows pixels; what a cell means is
// the page's business.

const SEGMENT_NAMES = { question: "Question", thinking: "Thinking", summary: "Summary" };
const FONT = '12px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif';
const LABEL_HEIGHT = 13;

class StepMap {
  /**
   * @param canvas where to draw
   * @param steps {label, segment} of each step
   * @param onCell called with (query, key) when a cell is pointed at or reached by keys
   * @param onChoose called with a query step on a click or Enter
   */
  constructor(canvas, steps, onCell, onChoose) {
    this.canvas = canvas;
    this.steps = steps;
    this.n = steps.length;
    this.runs = segmentRuns(steps);
    this.cursor = null;
    this.shown = null;
    canvas.addEventListener("pointermove", (event) => this.point(event, onCell));
    canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (!cell) return;
      this.moveTo(cell, onCell);
      onChoose(cell.query);
    });
    canvas.addEventListener("keydown", (event) => this.key(event, onCell, onChoose));
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /**
   * Show a map.
   * @param shown {place: cell => [0, 1], ticks: texts of the colour bar from the top, chosen: step, direction,
   *   start: the cell from which keys move first}
   */
  show(shown) {
    this.shown = shown;
    this.draw();
  }

  point(event, onCell) {
    const cell = this.cellAt(event);
    if (cell && !(this.cursor && cell.query === this.cursor.query && cell.key === this.cursor.key)) {
      this.moveTo(cell, onCell);
    }
  }

  key(event, onCell, onChoose) {
    const { query, key } = this.cursor ?? this.shown.start;
    const last = this.n - 1;
    const to = {
      ArrowUp: [query - 1, Math.min(key, query - 1)],
      ArrowDown: [query + 1, key],
      ArrowLeft: [query, key - 1],
      ArrowRight: [query, key + 1],
      Home: [query, 0],
      End: [query, query],
    }[event.key];
    if (to) {
      const row = Math.min(last, Math.max(0, to[0]));
      this.moveTo({ query: row, key: Math.min(row, Math.max(0, to[1])) }, onCell);
    } else if (event.key === "Enter" || event.key === " ") {
      this.moveTo({ query, key }, onCell);
      onChoose(query);
    } else {
      return;
    }
    event.preventDefault();
  }

  moveTo(cell, onCell) {
    this.cursor = cell;
    onCell(cell.query, cell.key);
    this.draw();
  }

  /** The cell under the pointer; none above the diagonal. */
  cellAt(event) {
    const { left, top, side } = this.frame;
    const box = this.canvas.getBoundingClientRect();
    const key = Math.floor(((event.clientX - box.left - left) / side) * this.n);
    const query = Math.floor(((event.clientY - box.top - top) / side) * this.n);
    return key >= 0 && key <= query && query < this.n ? { query, key } : null;
  }

  /** Middle of a cell, in pixels of the canvas. */
  middle(query, key) {
    const { left, top, side } = this.frame;
    return [left + ((key + 0.5) / this.n) * side, top + ((query + 0.5) / this.n) * side];
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (!this.shown || !width) return;
    const pen = this.canvas.getContext("2d");
    pen.font = FONT;
    const labels = Math.max(...this.steps.map((step) => pen.measureText(step.label).width));
    const bar = 14 + Math.max(...this.shown.ticks.map((tick) => pen.measureText(tick).width)) + 24;
    const left = labels + 32;
    const side = Math.max(80, width - left - bar - 8);
    this.frame = { left, top: 8, side, bar: left + side + 18, labels };
    this.canvas.dataset.cells = JSON.stringify({ left, top: 8, side }); // for whoever drives the page from outside
    const height = 8 + side + labels + 34;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    pen.scale(scale, scale);
    pen.font = FONT;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    this.drawCells(pen);
    this.drawBoundaries(pen, colour);
    this.drawLabels(pen, colour);
    this.drawMarks(pen, colour);
    this.drawBar(pen, colour);
  }

  drawCells(pen) {
    const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
    const image = new ImageData(this.n, this.n);
    for (let query = 0, cell = 0; query < this.n; query++) {
      for (let key = 0; key <= query; key++, cell++) {
        image.data.set([...mapColour(this.shown.place(cell), isDark), 255], 4 * (query * this.n + key));
      }
    }
    const small = new OffscreenCanvas(this.n, this.n);
    small.getContext("2d").putImageData(image, 0, 0);
    const { left, top, side } = this.frame;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left, top, side, side);
  }

  drawBoundaries(pen, colour) {
    const { left, top, side } = this.frame;
    const cell = side / this.n;
    pen.strokeStyle = colour("boundary");
    pen.lineWidth = Math.min(1.5, Math.max(0.75, 0.35 * cell));
    for (const run of this.runs.slice(1)) {
      const at = run.start * cell;
      pen.beginPath();
      pen.moveTo(left, top + at);
      pen.lineTo(left + at, top + at);
      pen.lineTo(left + at, top + side);
      pen.stroke();
    }
  }

  drawLabels(pen, colour) {
    const { left, top, side, labels } = this.frame;
    const cell = side / this.n;
    pen.fillStyle = colour("soft");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const i of thinTicks(this.runs, LABEL_HEIGHT / cell)) {
      const at = (i + 0.5) * cell;
      pen.fillText(this.steps[i].label, left - 4, top + at);
      turned(pen, left + at, top + side + 4, () => pen.fillText(this.steps[i].label, 0, 0));
    }
    pen.textAlign = "center";
    const widths = this.runs.map((run) => pen.measureText(SEGMENT_NAMES[run.segment]).width + 6);
    for (const [r, run] of this.runs.entries()) {
      const [from, to] = [run.start * cell + 1, Math.max(run.end * cell - 1, run.start * cell + 2)];
      pen.fillStyle = colour("boundary");
      pen.fillRect(left - labels - 12, top + from, 3, to - from);
      pen.fillRect(left + from, top + side + labels + 9, to - from, 3);
      const name = widths[r] <= to - from ? SEGMENT_NAMES[run.segment] : SEGMENT_NAMES[run.segment][0];
      pen.fillStyle = colour("text");
      const middle = Math.min(side - 5, Math.max(5, (from + to) / 2));
      turned(pen, left - labels - 21, top + middle, () => pen.fillText(name, 0, 0));
      pen.fillText(name, left + middle, top + side + labels + 23);
    }
  }

  /** The chosen step's row (or column, when its readers are shown), and the cell pointed at. */
  drawMarks(pen, colour) {
    const { left, top, side } = this.frame;
    const cell = side / this.n;
    const { chosen, direction } = this.shown;
    const at = chosen * cell;
    const [x, y, w, h] =
      direction === "sources" ? [left, top + at, at + cell, cell] : [left + at, top + at, cell, side - at];
    pen.strokeStyle = colour("mark");
    pen.lineWidth = 2;
    pen.strokeRect(x - 1, y - 1, w + 2, h + 2);
    if (!this.cursor) return;
    const size = Math.max(cell, 5);
    const [cx, cy] = this.middle(this.cursor.query, this.cursor.key);
    for (const [grow, stroke] of [[3, colour("page")], [1, colour("text")]]) {
      pen.strokeStyle = stroke;
      pen.strokeRect(cx - size / 2 - grow, cy - size / 2 - grow, size + 2 * grow, size + 2 * grow);
    }
  }

  drawBar(pen, colour) {
    const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
    const { top, side, bar } = this.frame;
    const length = Math.min(side, 240);
    for (let y = 0; y < length; y++) {
      pen.fillStyle = `rgb(${mapColour(1 - y / (length - 1), isDark).join(" ")})`;
      pen.fillRect(bar, top + y, 14, 1.5);
    }
    pen.strokeStyle = colour("line");
    pen.lineWidth = 1;
    pen.strokeRect(bar - 0.5, top - 0.5, 15, length + 1);
    pen.fillStyle = colour("text");
    pen.textAlign = "left";
    const { ticks } = this.shown;
    for (const [t, tick] of ticks.entries()) {
      const y = top + (t / (ticks.length - 1)) * length;
      pen.fillRect(bar + 14, y - 0.5, 4, 1);
      pen.fillText(tick, bar + 22, Math.min(top + length - 4, Math.max(top + 5, y)));
    }
  }
}

/** Draw with the origin at (x, y), turned so that text runs upwards. */
function turned(pen, x, y, draw) {
  pen.save();
  pen.translate(x, y);
  pen.rotate(-Math.PI / 2);
  draw();
  pen.restore();
}

/** Neighbouring steps of one segment: {segment, start, end}. */
function segmentRuns(steps) {
  const runs = [];
  for (const [i, { segment }] of steps.entries()) {
    const last = runs[runs.length - 1];
    if (last && last.segment === segment) last.end = i + 1;
    else runs.push({ segment, start: i, end: i + 1 });
  }
  return runs;
}

/** Steps whose labels fit when two need `gap` steps between them; as `layout.thin_ticks`. */
function thinTicks(runs, gap) {
  const all = runs.flatMap(({ start, end }) => Array.from({ length: end - start }, (_, i) => start + i));
  if (gap <= 1) return all;
  const stride = [2, 5, 10, 20, 50, 100, 200, 500, 1000].find((step) => step >= gap) ?? Math.floor(gap) + 1;
  const round = runs.flatMap(({ start, end }) => all.filter((i) => i >= start && i < end && (i - start + 1) % stride === 0));
  const taken = [];
  for (const i of [...runs.map((run) => run.start), ...round]) {
    if (taken.every((other) => Math.abs(other - i) >= gap)) taken.push(i);
  }
  return taken;
}
