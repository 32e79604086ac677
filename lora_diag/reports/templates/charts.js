// The charts: Plotly traces and layouts of the values in the records.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => window.innerWidth < 640;

function layout(more) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--quiet"), zeroline: false, automargin: true };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 340, showlegend: true, hovermode: "closest",
    font: { family: css("--sans"), size: 13, color: css("--text") }, margin: { l: 56, r: 12, t: 10, b: 48 },
    legend: { orientation: "h", y: 1.02, x: 0, yanchor: "bottom" }, dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
    ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis } };
}

function draw(id, traces, more, description) {
  const isDrawn = traces.length > 0;
  if ($(id + "-figure")) $(id + "-figure").hidden = !isDrawn;
  if (!isDrawn) return;
  Plotly.react($(id), traces, layout(more), { displayModeBar: false, responsive: true,
    doubleClick: id === "heat" ? false : "reset" });
  if (description) $(id).setAttribute("aria-label", description);
}

const color = (place) => css("--series").split(" ")[place % MAX_CHOSEN];

// Whether the heat map is navigated by keyboard.
const onKeys = () => $("heat").matches(":focus-visible");

function drawHeat() {
  const field = fields.get(state.field);
  if (!field) return;
  const value = (layers) => { const sorted = known(layers, field); return sorted.length ? field.values[middle(sorted)] : null; };
  const describe = (layers) => {
    if (!layers.length) return "";
    const many = layers.length > 1 ? `median of ${layers.length} matrices, ` : "";
    return `${layers.length > 1 ? plain(label(layers[0])) + " …" : plain(short(layers[0]))}<br>${many}` +
      `${plain(heading(field))} = ${show(value(layers)) || "not computed"}`;
  };
  const shown = rowsOf(field);
  const width = narrow() ? 14 : 30;
  const every = Math.ceil(depths.length / (narrow() ? 8 : 24));
  const ticks = depths.map((_, i) => i).filter((i) => i % every === 0 && depths[i] !== null || depths[i] === null);
  const box = ([type, col], line) => {
    const row = shown.indexOf(type);
    return row < 0 ? [] : [{ type: "rect", x0: col - 0.5, x1: col + 0.5, y0: row - 0.5, y1: row + 0.5, line }];
  };
  const chosen = state.layers.flatMap((layer, place) =>
    box([data.type[layer], column.get(data.depth[layer])], { color: color(place), width: 3 }));
  const cursor = onKeys() ? box(state.at, { color: css("--text"), width: 3, dash: "dot" }) : [];
  const trace = { type: "heatmap", z: shown.map((type) => cells[type].map(value)),
    text: shown.map((type) => cells[type].map(describe)),
    hovertemplate: "%{text}<extra></extra>", colorscale: "Cividis", xgap: 1, ygap: 1, hoverongaps: false,
    colorbar: { thickness: 12, outlinewidth: 0 }, ...(field.share ? { zmin: 0, zmax: 1 } : {}) };
  draw("heat", [trace], { showlegend: false, dragmode: false, height: Math.min(1200, 26 * shown.length + 78),
    margin: { l: 8, r: 8, t: 8, b: 40 }, shapes: [...chosen, ...cursor],
    xaxis: { tickvals: ticks, ticktext: ticks.map((i) => (depths[i] === null ? "outside" : depths[i])), showgrid: false,
      title: { text: "block" } },
    yaxis: { tickvals: shown.map((_, i) => i), ticktext: shown.map((type) => plain(crop(data.types[type], width))),
      autorange: "reversed", showgrid: false } });
  $("about").textContent = field.about;
}

function spectrumTraces(of) {
  const runs = data.spectra.filter((run) => run.metric === state.metric);
  return state.layers.flatMap((layer, place) => runs.flatMap((run, dash) => {
    const curve = run.byLayer.get(layer);
    if (!curve || !curve.kept) return [];
    const ranks = run.ranks[curve.kept];
    const name = plain(label(layer) + (runs.length > 1 ? ` · ${run.label}` : ""));
    return of(curve, ranks, { type: "scatter", mode: ranks.length < 20 ? "lines+markers" : "lines", name,
      line: { color: color(place), dash: DASHES[dash % DASHES.length], width: 2 } });
  }));
}

function drawSpectra() {
  const positive = (values) => values.map((value) => (value > 0 ? value : null));
  const spectra = spectrumTraces((curve, ranks, look) => [
    { ...look, x: ranks, y: positive(curve.s), hovertemplate: "σ<sub>%{x}</sub> = %{y:.4g}" },
    ...(curve.edge > 0 && curve.edge >= curve.s[curve.s.length - 1] ? [{ ...look, x: [1, curve.kept], y: [curve.edge, curve.edge],
      mode: "lines", showlegend: false, name: "noise edge", hovertemplate: "noise edge %{y:.4g}",
      line: { ...look.line, width: 1, dash: "dot" } }] : []),
  ]);
  const { of = "ΔW" } = data.metrics.find((metric) => metric.id === state.metric) || {};
  const names = `${of} of ${state.layers.map(short).join(", ")}`;
  document.querySelectorAll(".of").forEach((span) => { span.textContent = of; });
  draw("spectrum", spectra, { xaxis: { type: "log", title: { text: "i" }, dtick: 1 }, yaxis: { type: "log", title: { text: "σ" },
    exponentformat: "power", dtick: 1 } }, `Singular values of ${names}`);
  const energy = spectrumTraces((curve, ranks, look) => curve.c[0] === null ? [] :
    [{ ...look, x: ranks, y: curve.c, hovertemplate: "C(%{x}) = %{y:.4f}" }]);
  draw("energy", energy, { xaxis: { type: "log", title: { text: "rank r" }, dtick: 1 },
    yaxis: { title: { text: "C(r)" }, range: [0, 1.02] },
    shapes: MARKED.map((rank) => ({ type: "line", x0: rank, x1: rank, y0: 0, y1: 1, yref: "paper",
      line: { color: css("--quiet"), width: 1, dash: "dot" } })),
    annotations: MARKED.map((rank) => ({ x: Math.log10(rank), y: 0, yref: "paper", yanchor: "bottom", xanchor: "left",
      text: `r=${rank}`, showarrow: false, font: { size: 11, color: css("--quiet") } })) },
    `Energy curves of ${names}`);
}

function drawResiduals() {
  const of = (name) => data.fields.filter((field) => /^a\d+\./.test(field.id) && field.id.replace(/^a\d+\./, "") === name);
  const floors = new Map(of("least_epsilon").map((field) => [field.group, field]));
  const x = state.layers.map((layer) => plain(label(layer)));
  const traces = of("epsilon").flatMap((field, place) => {
    if (state.layers.every((layer) => field.values[layer] === null)) return [];
    const floor = floors.get(field.group);
    const group = { offsetgroup: String(place), x };
    return [
      { ...group, type: "bar", name: plain(crop(field.group, 30)), y: state.layers.map((layer) => field.values[layer]),
        marker: { color: state.layers.map((_, i) => color(i)), pattern: { shape: PATTERNS[place % PATTERNS.length], size: 6 } },
        hovertemplate: "ε = %{y:.4g}" },
      ...(floor ? [{ ...group, type: "bar", name: "lower bound at its rank", showlegend: false, base: state.layers.map((layer) =>
        floor.values[layer]), y: state.layers.map((layer) => (floor.values[layer] === null ? null : 0.012)),
        marker: { color: css("--text") }, customdata: state.layers.map((layer) => floor.values[layer]),
        hovertemplate: "lower bound = %{customdata:.4g}" }] : []),
    ];
  });
  draw("residual", traces, { barmode: "group", yaxis: { title: { text: "ε" }, rangemode: "tozero" }, xaxis: { showgrid: false } },
    `Residuals of ${state.layers.map(short).join(", ")}`);
}

function drawOverlaps() {
  const traces = state.layers.flatMap((layer, place) => data.overlaps.flatMap((run) => {
    const curve = run.byLayer.get(layer);
    if (!curve) return [];
    const line = (entry, name, dash, width, legend) => ({ type: "scatter", mode: "lines+markers", name, showlegend: legend,
      x: curve.rows.map((row) => row[0]), y: curve.rows.map((row) => row[entry]), marker: { size: width + 3 },
      line: { color: color(place), width, dash }, hovertemplate: `step %{x}: %{y:.4g}` });
    const name = plain(label(layer));
    return [line(3, `${name} tangent`, "solid", 2, true), line(1, `${name} κ`, "dash", 2, true),
      { ...line(4, "tangent, random subspace", "dot", 1, false), mode: "lines" },
      { ...line(2, "κ, random subspace", "dot", 1, false), mode: "lines" }];
  }));
  draw("overlap", traces, { xaxis: { title: { text: "step" } }, yaxis: { title: { text: "fraction of ‖G‖" }, rangemode: "tozero" } },
    `Gradient overlap of ${state.layers.map(short).join(", ")}`);
}

function drawCharts() {
  if (!window.Plotly) return;
  drawHeat();
  drawSpectra();
  drawResiduals();
  drawOverlaps();
}
