// Profiles: the per-layer numbers of `diagnose` as two panels, and all of them as a table.

const SVG = "http://www.w3.org/2000/svg";
const PANELS = [
  ["Thinking steps", ["lock_in", "question_share"]],
  ["Summary steps", ["thinking_share", "self_share"]],
];
const PANEL = { width: 480, height: 242, left: 48, right: 10, top: 58, bottom: 38 };

function drawn(parent, tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

class Profiles {
  /** @param onLayer called with the index of a stored layer when a panel is clicked */
  constructor(root, data, onLayer) {
    this.data = data;
    this.panels = PANELS.map(([name, metrics]) => this.panel(root, name, metrics, onLayer));
  }

  x(layer) {
    return PANEL.left + ((layer + 0.5) / this.data.n_layers) * (PANEL.width - PANEL.left - PANEL.right);
  }

  y(share) {
    return PANEL.height - PANEL.bottom - (share / 1.05) * (PANEL.height - PANEL.top - PANEL.bottom);
  }

  panel(root, name, metrics, onLayer) {
    const { layers, bands, profiles } = this.data;
    const svg = drawn(root, "svg", { viewBox: `0 0 ${PANEL.width} ${PANEL.height}`, role: "img" });
    svg.setAttribute("aria-label", `${name}: share of saliency over depth. The numbers are in the table below.`);
    drawn(svg, "text", { x: PANEL.left, y: 13, class: "name" }, name);
    for (const [band, inside] of Object.entries(bands)) this.band(svg, inside, "band", band);
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const y = this.y(share);
      drawn(svg, "line", { x1: PANEL.left, x2: PANEL.width - PANEL.right, y1: y, y2: y, class: "grid" });
      drawn(svg, "text", { x: PANEL.left - 6, y: y + 4, "text-anchor": "end", class: "soft" }, `${100 * share} %`);
    }
    this.layerTicks(svg);
    const here = drawn(svg, "g", {});
    let legend = PANEL.left;
    for (const [i, metric] of metrics.entries()) {
      const kind = i ? "second" : "first";
      const words = profiles.labels[metric];
      const values = profiles.metrics[metric];
      if (values.every((value) => value === null)) continue;
      this.line(svg, kind, layers, values, words);
      drawn(svg, "path", { d: `M${legend} 26h26`, class: kind });
      const text = drawn(svg, "text", { x: legend + 31, y: 30, class: kind }, words);
      legend += 31 + (text.getComputedTextLength() || 7 * words.length) + 18;
    }
    if (legend === PANEL.left) {
      const why = metrics.map((metric) => profiles.reasons[metric]).find(Boolean) ?? "not defined for this trace";
      drawn(svg, "text", { x: PANEL.width / 2, y: PANEL.height / 2, "text-anchor": "middle", class: "soft" }, why);
    }
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * PANEL.width;
      const distances = layers.map((layer) => Math.abs(this.x(layer) - at));
      onLayer(distances.indexOf(Math.min(...distances)));
    });
    return { svg, here };
  }

  band(parent, layers, className, name = "") {
    const [from, to] = [this.x(Math.min(...layers) - 0.5), this.x(Math.max(...layers) + 0.5)];
    const box = { x: from, width: to - from, y: PANEL.top, height: PANEL.height - PANEL.top - PANEL.bottom };
    drawn(parent, "rect", { ...box, class: className });
    if (name) drawn(parent, "text", { x: (from + to) / 2, y: PANEL.top - 5, "text-anchor": "middle", class: "soft" }, name);
  }

  layerTicks(svg) {
    const { n_layers: n } = this.data;
    const stride = [1, 2, 5, 10, 20].find((step) => n / step <= 16) ?? 50;
    for (let layer = 0; layer < n; layer += stride) {
      const at = { x: this.x(layer), y: PANEL.height - PANEL.bottom + 15, "text-anchor": "middle", class: "soft" };
      drawn(svg, "text", at, String(layer));
    }
    const middle = (PANEL.left + PANEL.width - PANEL.right) / 2;
    drawn(svg, "text", { x: middle, y: PANEL.height - 6, "text-anchor": "middle", class: "soft" }, "layer");
  }

  /** One metric; a layer without a value leaves a gap. */
  line(svg, kind, layers, values, words) {
    const points = layers.map((layer, i) => [layer, values[i]]).sort((a, b) => a[0] - b[0]);
    let path = "";
    let pen = "M";
    for (const [layer, value] of points) {
      if (value === null) {
        pen = "M";
        continue;
      }
      path += `${pen}${this.x(layer).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
    }
    drawn(svg, "path", { d: path, class: kind });
    for (const [layer, value] of points) {
      if (value === null) continue;
      const [x, y] = [this.x(layer), this.y(value)];
      const mark =
        kind === "first"
          ? drawn(svg, "circle", { cx: x, cy: y, r: 3.2, class: kind })
          : drawn(svg, "rect", { x: x - 2.8, y: y - 2.8, width: 5.6, height: 5.6, class: kind });
      drawn(mark, "title", {}, `Layer ${layer}, ${words}: ${percent(value)}`);
    }
  }

  /** Mark the layers whose map is shown. */
  show(layers) {
    for (const { here } of this.panels) {
      here.replaceChildren();
      if (layers.length > 1) this.band(here, layers, "here-band");
      else {
        const x = this.x(layers[0]);
        drawn(here, "line", { x1: x, x2: x, y1: PANEL.top, y2: PANEL.height - PANEL.bottom, class: "here" });
      }
    }
  }
}

/** All metrics, one row per layer. */
function fillTable(table, { layers, profiles }) {
  const metrics = Object.keys(profiles.metrics);
  const head = table.createTHead().insertRow();
  for (const name of ["layer", ...metrics]) {
    const cell = made("th", "", name.replaceAll("_", " "));
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const [i, layer] of layers.entries()) {
    const row = body.insertRow();
    const first = made("th", "", String(layer));
    first.scope = "row";
    row.append(first);
    for (const metric of metrics) {
      const value = profiles.metrics[metric][i];
      row.append(made("td", "", value === null ? "–" : nats(value)));
    }
  }
}
