// The page: what is shown, and what follows from a choice. One direction: a control changes `state`, `refresh` draws.

const data = JSON.parse(element("data").textContent);
const steps = data.pieces.filter((piece) => piece.step >= 0);
const state = { layer: "0", head: "mean", scale: "share", direction: "sources", chosen: 0 };

/** Indices of the stored layers that the layer control stands for: one, or a band. */
function layerIndices() {
  const band = data.bands[state.layer];
  if (!band) return [Number(state.layer)];
  return data.layers.flatMap((layer, i) => (band.includes(layer) ? [i] : []));
}

/** The map shown, as triangles: shares of each row, and nats. A band is the mean over its layers of either. */
async function currentMap() {
  const { head } = state;
  const maps = head === "mean" ? await loaded.mean() : await loaded.heads();
  const triangles = layerIndices().map((layer) =>
    maps.triangle(head === "mean" ? layer : layer * data.n_heads + Number(head)));
  return { nats: meanOf(triangles), shares: meanOf(triangles.map((triangle) => rowShares(triangle, steps.length))) };
}

// Decoded once, when first needed.
const loaded = {};
for (const name of ["mean", "heads"]) {
  let promise = null;
  loaded[name] = () => (promise ??= Maps.decoded(data[name], steps.length));
}

let current = null;
let map, list, profiles;

/** Fetch the chosen map and draw everything; the last choice wins when decoding is slow. */
async function refresh(change = {}) {
  Object.assign(state, change);
  const wanted = { ...state };
  const found = await currentMap();
  if (wanted.layer !== state.layer || wanted.head !== state.head) return;
  current = found;
  draw();
}

function draw(scroll = "") {
  drawMap();
  drawText(scroll);
  drawReadout();
  profiles?.show(layerIndices().map((i) => data.layers[i]));
  const isBand = state.layer in data.bands;
  element("head").disabled = isBand || !data.heads;
  const kind = state.scale === "share" ? "share of each row's saliency" : data.quantity;
  const hint = isBand && data.heads ? ". Choose one layer to see its heads" : "";
  element("map-note").textContent = `${mapName()}; colours: ${kind}, logarithmic${hint}.`;
  // For whoever drives or times the page from outside.
  document.documentElement.dataset.shown = `${state.layer} ${state.head}`;
  performance.mark("shown");
}

function mapName() {
  const heads = state.head === "mean" ? "mean of the heads" : `head ${state.head}`;
  const band = data.bands[state.layer];
  if (!band) return `Layer ${data.layers[state.layer]}, ${heads}`;
  const inside = layerIndices().map((i) => data.layers[i]);
  return `Mean of the ${state.layer} layers ${Math.min(...inside)} to ${Math.max(...inside)}, ${heads}`;
}

function drawMap() {
  const values = state.scale === "share" ? current.shares : current.nats;
  const largest = state.scale === "share" ? 1 : values.reduce((a, b) => Math.max(a, b), 0);
  const ticks = Array.from({ length: data.decades + 1 }, (_, t) => {
    const value = largest * 10 ** -t;
    const text = state.scale === "share" ? `${Number((100 * value).toPrecision(3))} %` : nats(value);
    return t === data.decades ? `≤ ${text}` : text;
  });
  const { chosen, direction } = state;
  map.show({ place: (cell) => logPlace(values[cell], largest, data.decades), ticks, chosen, direction, start: strongestOf(chosen) });
}

/** Shares of the text pane: a row of the map (sources), or a column of it (readers). */
function chosenShares() {
  const { chosen, direction } = state;
  return steps.map((_, other) => {
    const [query, key] = direction === "sources" ? [chosen, other] : [other, chosen];
    return key <= query ? current.shares[rowStart(query) + key] : undefined;
  });
}

function drawText(scroll) {
  const { chosen, direction } = state;
  const { label } = steps[chosen];
  const shares = chosenShares();
  const words = direction === "sources" ? `${label} draws most on` : `${label} is drawn on most by`;
  element("text-note").textContent = `${words} ${strongest(shares, chosen)}.`;
  list.show(chosen, shares, scroll);
}

/** The three largest shares on other steps, in words. */
function strongest(shares, chosen) {
  const others = shares.map((share, i) => [share ?? 0, i]).filter(([share, i]) => share > 0 && i !== chosen);
  const top = others.sort((a, b) => b[0] - a[0]).slice(0, 3);
  return top.map(([share, i]) => `${steps[i].label} (${percent(share)})`).join(", ") || "no other step";
}

function drawReadout() {
  const { query, key } = map.cursor ?? strongestOf(state.chosen);
  const cell = rowStart(query) + key;
  const [reader, source] = [steps[query], steps[key]];
  const share = `${percent(current.shares[cell])} of its saliency`;
  element("readout-value").textContent =
    `${reader.label} draws on ${query === key ? "itself" : source.label}: ${share}, ${nats(current.nats[cell])} nats`;
  for (const [part, step] of [["query", reader], ["key", source]]) {
    const isRepeated = part === "key" && query === key;
    element(`${part}-label`).textContent = isRepeated ? "" : step.label;
    showText(element(`${part}-text`), isRepeated ? "" : excerpt(step.text));
  }
}

/** The cell of a step's strongest source besides itself, to start from. */
function strongestOf(query) {
  const row = current.shares.subarray(rowStart(query), rowStart(query) + query);
  return { query, key: query ? row.indexOf(Math.max(...row)) : 0 };
}

/** Enough of a step to know it; the whole text is in the text pane. */
function excerpt(text) {
  const trimmed = text.slice(0, trimmedEnd(text));
  return trimmed.length > 600 ? `${trimmed.slice(0, 600)}…` : trimmed;
}

/** A step's sources come before it in the text, its readers after it. */
function choose(step) {
  state.chosen = step;
  draw(state.direction === "sources" ? "nearest" : "top");
}

function addOptions(select, options) {
  for (const [value, text] of options) select.append(Object.assign(made("option", "", text), { value }));
}

function fillControls() {
  const layer = element("layer");
  for (const band of Object.keys(data.bands)) {
    const inside = data.layers.filter((number) => data.bands[band].includes(number));
    if (inside.length) addOptions(layer, [[band, `${band} band, mean of ${Math.min(...inside)}–${Math.max(...inside)}`]]);
  }
  addOptions(layer, data.layers.map((number, i) => [String(i), String(number)]));
  const head = element("head");
  addOptions(head, [["mean", "mean of all"]]);
  if (data.heads) addOptions(head, Array.from({ length: data.n_heads }, (_, h) => [String(h), String(h)]));
  state.layer = "deep" in data.bands && data.layers.some((l) => data.bands.deep.includes(l)) ? "deep" : "0";
  layer.value = state.layer;
  layer.addEventListener("change", () => chooseLayer(layer.value));
  head.addEventListener("change", () => refresh({ head: head.value }));
  element("scale").addEventListener("change", (event) => refresh({ scale: event.target.value }));
  for (const radio of document.getElementsByName("direction")) {
    radio.addEventListener("change", () => refresh({ direction: radio.value }));
  }
}

/** A band is a mean over layers, and head 3 of one layer is not head 3 of another: bands show head means. */
function chooseLayer(value) {
  element("layer").value = value;
  if (value in data.bands) {
    state.head = "mean";
    element("head").value = "mean";
  }
  refresh({ layer: value });
}

function fillProfiles() {
  const { profiles: found } = data;
  if (found.refusal) {
    element("profiles-note").textContent = `No profiles: ${found.refusal}`;
    element("numbers").hidden = true;
    return;
  }
  const slope = found.decay_slope === null ? "" : ` Decay slope ${nats(found.decay_slope)} a layer over the deep half.`;
  element("profiles-note").textContent =
    "Where Shallow Lock-in and Deep Decay would show: in the shaded bands, left and right. A click chooses the layer." + slope;
  profiles = new Profiles(element("profiles"), data, (index) => chooseLayer(String(index)));
  fillTable(element("numbers").querySelector("table"), data);
}

function fillWords() {
  const count = (segment) => steps.filter((step) => step.segment === segment).length;
  element("about").textContent =
    `${count("question")} question, ${count("thinking")} thinking and ${count("summary")} summary steps. ` +
    `${data.layers.length} of ${data.n_layers} layers, ${data.n_heads} heads.`;
  element("precision").textContent = data.precision;
  element("check").textContent = data.check ?? "";
  for (const [name, value] of data.provenance) {
    element("provenance").append(made("dt", "", name), made("dd", "", value));
  }
}

async function start() {
  element("main").hidden = false;
  fillWords();
  fillControls();
  fillProfiles();
  const summary = steps.findIndex((step) => step.segment === "summary");
  state.chosen = summary < 0 ? steps.length - 1 : summary;
  map = new StepMap(element("map"), steps, () => current && drawReadout(), choose);
  list = new StepList(element("text"), data.pieces, choose);
  await refresh();
}

start().catch((error) => {
  element("problem").textContent = `This page could not be drawn: ${error.message}. A current browser is needed.`;
  element("problem").hidden = false;
  throw error;
});
