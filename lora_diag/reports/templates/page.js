// The page's script. It shows the values in the element "data" (written by reports/html.py, _make_data) and computes only
// the medians over the matrices of a cell. Layers are indices into data.layers. Names are text, never markup: they go through
// textContent, or through plain() where Plotly would interpret markup.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const fields = new Map(data.fields.map((field) => [field.id, field]));
const MAX_CHOSEN = 8, PAGE = 100, DASHES = ["solid", "dash", "dot", "dashdot"], PATTERNS = ["", "/", "x", "."], MARKED = [4, 16, 64];
const numeric = data.fields.filter((field) => field.number);
const preferred = numeric.find((field) => field.share && field.main) || numeric.find((field) => field.main) || numeric[0];

// ---- text and numbers

const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (layer) => data.layers[layer].replace(/\.weight$/, "");
const crop = (text, width) => (text.length <= width ? text : "…" + text.slice(text.length - width + 1));
const show = (value) => {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  if (value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(1);
  return Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
};
const heading = (field) => (field.group ? `${field.title} · ${field.group}` : field.title);

// ---- cells of the heat map: every layer has a module type and a depth

const depths = [...new Set(data.depth)].sort((a, b) => (a === null) - (b === null) || a - b);
const column = new Map(depths.map((depth, i) => [depth, i]));
const cells = data.types.map(() => depths.map(() => []));
data.layers.forEach((_, layer) => cells[data.type[layer]][column.get(data.depth[layer])].push(layer));
const alone = (layer) => cells[data.type[layer]][column.get(data.depth[layer])].length === 1;
const label = (layer) => {
  if (!alone(layer)) return crop(short(layer), 36);
  const type = crop(data.types[data.type[layer]], 28);
  return data.depth[layer] === null ? type : `${type} ${data.depth[layer]}`;
};
const known = (layers, field) =>
  layers.filter((layer) => field.values[layer] !== null).sort((a, b) => field.values[a] - field.values[b]);
// The module types that have a value of a field.
const rowsOf = (field) =>
  data.types.map((_, type) => type).filter((type) => cells[type].some((layers) => known(layers, field).length));
const middle = (sorted) => sorted[Math.floor((sorted.length - 1) / 2)];
// The lowest, median and highest value of a cell with several matrices (experts).
const representatives = (layers, field) => {
  const sorted = known(layers, field);
  if (layers.length <= 3 || !sorted.length) return layers.slice(0, 3);
  return [...new Set([sorted[0], middle(sorted), sorted[sorted.length - 1]])];
};

// ---- state, stored in the address

const state = { metric: data.metrics[0]?.id, field: preferred && preferred.id, layers: [], chosen: false, sort: "", down: false, filter: "", all: false,
  page: 0, at: [0, 0] };

function resetState() {
  const sorted = preferred ? known(data.layers.map((_, layer) => layer), preferred) : [];
  const ends = sorted.length ? [sorted[0], sorted[sorted.length - 1]] : [0];
  Object.assign(state, { metric: data.metrics[0]?.id, field: preferred && preferred.id, layers: [...new Set(ends)], chosen: false, sort: "", down: false,
    filter: "", all: false, page: 0 });
}

function readAddress() {
  resetState();
  const query = new URLSearchParams(location.hash.slice(1));
  const field = fields.get(query.get("field"));
  if (field && field.number) state.field = field.id;
  const metric = data.metrics.find((metric) => metric.id === query.get("metric"));
  if (metric) state.metric = metric.id;
  const layers = query.getAll("layer").map((name) => data.layers.indexOf(name)).filter((layer) => layer >= 0);
  if (layers.length) Object.assign(state, { layers: layers.slice(0, MAX_CHOSEN), chosen: true });
  const sort = query.get("sort") || "";
  if (sort === "layer" || fields.has(sort)) Object.assign(state, { sort, down: query.get("down") === "1" });
  state.filter = query.get("filter") || "";
  state.all = query.get("all") === "1";
}

function writeAddress() {
  const query = new URLSearchParams();
  if (preferred && state.field !== preferred.id) query.set("field", state.field);
  if (data.metrics.length && state.metric !== data.metrics[0].id) query.set("metric", state.metric);
  if (state.chosen) state.layers.forEach((layer) => query.append("layer", data.layers[layer]));
  if (state.sort) query.set("sort", state.sort);
  if (state.sort && state.down) query.set("down", "1");
  if (state.filter) query.set("filter", state.filter);
  if (state.all) query.set("all", "1");
  history.replaceState(null, "", "#" + query.toString());
}

function toggle(layers) {
  const all = layers.every((layer) => state.layers.includes(layer));
  const kept = state.chosen ? state.layers.filter((layer) => !layers.includes(layer)) : [];
  state.layers = (all && state.chosen ? kept : [...kept, ...layers]).slice(-MAX_CHOSEN);
  state.chosen = true;
  changed();
}

function changed() {
  writeAddress();
  drawChosen();
  drawTable();
  drawCharts();
}
