// Event handlers, and initialization.

function drawAll() {
  $("field").value = state.field;
  if ($("metric")) $("metric").value = state.metric;
  $("filter").value = state.filter;
  $("all").checked = state.all;
  drawChosen();
  drawTable();
  drawCharts();
}

function describeCursor() {
  const [row, col] = state.at, layers = cells[row][col], field = fields.get(state.field);
  if (!field) return;
  const where = `${data.types[row]}, ${depths[col] === null ? "outside the blocks" : "block " + depths[col]}`;
  const sorted = known(layers, field);
  const what = sorted.length ? `${heading(field)} = ${show(field.values[middle(sorted)])}` : "no value";
  $("cursor").textContent = `${where}: ${what}${layers.length > 1 ? `, median of ${layers.length} matrices` : ""}`;
}

function choose(row, col) {
  state.at = [row, col];
  describeCursor();
  if (cells[row][col].length) toggle(representatives(cells[row][col], fields.get(state.field)));
}

function onKey(event) {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const [row, col] = state.at;
  if (moves[event.key]) {
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    const shown = rowsOf(fields.get(state.field));
    state.at = [shown[clamp(shown.indexOf(row) + moves[event.key][0], shown.length)],
      clamp(col + moves[event.key][1], depths.length)];
    describeCursor();
    drawHeat();
  } else if (event.key === "Enter" || event.key === " ") choose(row, col);
  else return;
  event.preventDefault();
}

function listen() {
  $("field").append(...numeric.map((field) => { const option = element("option", heading(field)); option.value = field.id; return option; }));
  $("field").addEventListener("change", (event) => { state.field = event.target.value; writeAddress(); drawCharts(); });
  $("metric")?.addEventListener("change", (event) => { state.metric = event.target.value; writeAddress(); drawCharts(); });
  $("filter").addEventListener("input", (event) => { Object.assign(state, { filter: event.target.value, page: 0 }); writeAddress(); drawTable(); });
  $("all").addEventListener("change", (event) => { state.all = event.target.checked; writeAddress(); drawTable(); });
  $("before").addEventListener("click", () => { state.page -= 1; drawTable(); });
  $("after").addEventListener("click", () => { state.page += 1; drawTable(); });
  $("chosen").addEventListener("click", (event) => {
    const drop = event.target.dataset.drop;
    if (drop === undefined) return;
    Object.assign(state, { layers: state.layers.filter((layer) => layer !== Number(drop)), chosen: true });
    changed();
  });
  $("table").addEventListener("click", (event) => {
    const { sort, layer } = event.target.dataset;
    if (sort) {
      Object.assign(state, { down: state.sort === sort && !state.down, sort, page: 0 });
      writeAddress();
      drawTable();
      $("table").querySelector(`button[data-sort="${CSS.escape(sort)}"]`).focus();
    } else if (layer !== undefined) {
      toggle([Number(layer)]);
      $("table").querySelector(`button[data-layer="${layer}"]`).focus();
    }
  });
  $("heat").addEventListener("keydown", onKey);
  // Not on focus from a click: drawing between press and release would lose the click.
  $("heat").addEventListener("focus", () => { if (onKeys()) { describeCursor(); if (window.Plotly) drawHeat(); } });
  $("heat").addEventListener("blur", () => { if (window.Plotly) drawHeat(); });
  // The browser has followed a link to a part of the page; restore the state in the address.
  window.addEventListener("hashchange", () => {
    if (document.getElementById(location.hash.slice(1))) return writeAddress();
    readAddress();
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
}

// Plotly loses a click if a deferred hover event arrives between press and release, as on a busy machine. Therefore the
// cell under the mouse at the press is stored here.
function listenToHeat() {
  let under = null, pressed = false;
  $("heat").on("plotly_hover", (event) => { under = [event.points[0].y, event.points[0].x]; });
  $("heat").on("plotly_unhover", () => { if (!pressed) under = null; });
  $("heat").addEventListener("pointerdown", () => { pressed = true; }, true);
  window.addEventListener("click", (event) => {
    // Plotly sends a second click after the browser's.
    if (event.isTrusted && pressed && under && $("heat").contains(event.target)) {
      choose(rowsOf(fields.get(state.field))[under[0]], under[1]);
    }
    if (event.isTrusted) pressed = false;
  });
}

async function loadPlotly() {
  const packed = Uint8Array.from(atob($("plotly").textContent), (char) => char.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = element("script", await new Response(unpacked).text());
  document.head.append(script);
}

for (const run of [...data.spectra, ...data.overlaps]) run.byLayer = new Map(run.curves.map((curve) => [curve.layer, curve]));
readAddress();
listen();
document.documentElement.classList.add("js");
drawAll();
loadPlotly().then(() => {
  document.documentElement.classList.add("live");
  drawCharts();
  listenToHeat();
  document.documentElement.dataset.ready = "1";
}).catch(() => {
  $("chosen").replaceChildren(element("p", "The charts need a browser from 2023 or later; the figures and the table work without them."));
});
