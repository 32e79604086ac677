// The page's script. It shows what stands in the element "data" (written by reports/html.py, _data) and computes nothing
// but medians over the matrices of one cell. Layers are numbers, places in data.layers. Names are text, never markup: they
// go through textContent, or through plain() where Plotly would read them as markup.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const fields = new Map(data.fields.map((field) => [field.id, field]));
  const MOST = 8, PAGE = 100, DASHES = ["solid", "dash", "dot", "dashdot"], PATTERNS = ["", "/", "x", "."], MARKED = [8, 16, 64];
  const numeric = data.fields.filter((field) => field.number);
  const preferred = numeric.find((field) => field.share && field.main) || numeric.find((field) => field.main) || numeric[0];

  // ---- words and numbers

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
  // Of a cell of many matrices (experts): the lowest, the median and the highest.
  const representatives = (layers, field) => {
    const sorted = known(layers, field);
    if (layers.length <= 3 || !sorted.length) return layers.slice(0, 3);
    return [...new Set([sorted[0], middle(sorted), sorted[sorted.length - 1]])];
  };

  // ---- state, and its place in the address

  const state = { field: preferred && preferred.id, layers: [], chosen: false, sort: "", down: false, filter: "", all: false,
    page: 0, at: [0, 0] };

  function start() {
    const sorted = preferred ? known(data.layers.map((_, layer) => layer), preferred) : [];
    const ends = sorted.length ? [sorted[0], sorted[sorted.length - 1]] : [0];
    Object.assign(state, { field: preferred && preferred.id, layers: [...new Set(ends)], chosen: false, sort: "", down: false,
      filter: "", all: false, page: 0 });
  }

  function readAddress() {
    start();
    const said = new URLSearchParams(location.hash.slice(1));
    const field = fields.get(said.get("field"));
    if (field && field.number) state.field = field.id;
    const layers = said.getAll("layer").map((name) => data.layers.indexOf(name)).filter((layer) => layer >= 0);
    if (layers.length) Object.assign(state, { layers: layers.slice(0, MOST), chosen: true });
    const sort = said.get("sort") || "";
    if (sort === "layer" || fields.has(sort)) Object.assign(state, { sort, down: said.get("down") === "1" });
    state.filter = said.get("filter") || "";
    state.all = said.get("all") === "1";
  }

  function writeAddress() {
    const said = new URLSearchParams();
    if (preferred && state.field !== preferred.id) said.set("field", state.field);
    if (state.chosen) state.layers.forEach((layer) => said.append("layer", data.layers[layer]));
    if (state.sort) said.set("sort", state.sort);
    if (state.sort && state.down) said.set("down", "1");
    if (state.filter) said.set("filter", state.filter);
    if (state.all) said.set("all", "1");
    history.replaceState(null, "", "#" + said.toString());
  }

  function toggle(layers) {
    const all = layers.every((layer) => state.layers.includes(layer));
    const kept = state.chosen ? state.layers.filter((layer) => !layers.includes(layer)) : [];
    state.layers = (all && state.chosen ? kept : [...kept, ...layers]).slice(-MOST);
    state.chosen = true;
    changed();
  }

  function changed() {
    writeAddress();
    drawChosen();
    drawTable();
    drawCharts();
  }

  // ---- table

  function shownLayers() {
    const layers = data.layers.map((_, layer) => layer).filter(filtering(state.filter));
    const field = fields.get(state.sort);
    if (!state.sort) return layers;
    const sign = state.down ? -1 : 1;
    const value = field ? (layer) => field.values[layer] : (layer) => data.layers[layer];
    const compare = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    return layers.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;  // what is not known comes last
      return sign * compare(x, y) || a - b;
    });
  }

  // "C(8) < 0.5" compares a column; anything else is part of a name.
  function filtering(text) {
    const asked = text.match(/^\s*(.+?)\s*(<=|>=|<|>|=)\s*(.+?)\s*$/);
    const field = asked && data.fields.find((field) => [field.title, heading(field), field.id].includes(asked[1]));
    if (!field) {
      const part = text.trim().toLowerCase();
      return (layer) => data.layers[layer].toLowerCase().includes(part);
    }
    const wanted = field.number ? Number(asked[3]) : asked[3];
    const holds = { "<": (a) => a < wanted, ">": (a) => a > wanted, "<=": (a) => a <= wanted, ">=": (a) => a >= wanted,
      "=": (a) => a === wanted }[asked[2]];
    return (layer) => field.values[layer] !== null && holds(field.values[layer]);
  }

  function drawTable() {
    const layers = shownLayers();
    const pages = Math.max(1, Math.ceil(layers.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const columns = data.fields.filter((field) => state.all || field.main);
    $("table").tHead.replaceChildren(headRow(columns));
    $("table").tBodies[0].replaceChildren(
      ...layers.slice(state.page * PAGE, (state.page + 1) * PAGE).map((layer) => bodyRow(layer, columns)));
    $("count").textContent = `${layers.length} of ${data.layers.length} layers`;
    $("page").textContent = `page ${state.page + 1} of ${pages}`;
    $("before").disabled = state.page === 0;
    $("after").disabled = state.page === pages - 1;
  }

  function headRow(columns) {
    const row = document.createElement("tr");
    const add = (id, title, group, about) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.title = about;
      if (group) cell.append(element("small", group));
      const sorted = state.sort === id;
      const button = element("button", title + (sorted ? (state.down ? " ▾" : " ▴") : ""));
      button.type = "button";
      button.dataset.sort = id;
      cell.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
      cell.append(button);
      row.append(cell);
    };
    add("layer", "layer", "", "Name of the weight");
    columns.forEach((field) => add(field.id, field.title, field.group, field.about));
    return row;
  }

  function bodyRow(layer, columns) {
    const row = document.createElement("tr");
    const on = state.layers.includes(layer);
    row.className = on ? "on" : "";
    const name = element("th", "");
    name.scope = "row";
    name.className = "name";
    const button = element("button", short(layer));
    button.type = "button";
    button.dataset.layer = layer;
    button.setAttribute("aria-pressed", on);
    name.append(button);
    row.append(name);
    for (const field of columns) {
      const cell = element("td", show(field.values[layer]));
      if (typeof field.values[layer] === "number") cell.title = String(field.values[layer]);
      row.append(cell);
    }
    return row;
  }

  function element(tag, text) {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  }

  // ---- charts

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const narrow = () => window.innerWidth < 640;

  function layout(more) {
    const axis = { gridcolor: css("--grid"), linecolor: css("--quiet"), zeroline: false, automargin: true };
    return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 340, showlegend: true, hovermode: "closest",
      font: { family: css("--sans"), size: 13, color: css("--text") }, margin: { l: 56, r: 12, t: 10, b: 48 },
      legend: { orientation: "h", y: 1.02, x: 0, yanchor: "bottom" }, dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis } };
  }

  function draw(id, traces, more, says) {
    const there = traces.length > 0;
    if ($(id + "-figure")) $(id + "-figure").hidden = !there;
    if (!there) return;
    Plotly.react($(id), traces, layout(more), { displayModeBar: false, responsive: true });
    if (says) $(id).setAttribute("aria-label", says);
  }

  const color = (place) => css("--series").split(" ")[place % MOST];

  function drawHeat() {
    const field = fields.get(state.field);
    if (!field) return;
    const value = (layers) => { const sorted = known(layers, field); return sorted.length ? field.values[middle(sorted)] : null; };
    const told = (layers) => {
      if (!layers.length) return "";
      const many = layers.length > 1 ? `median of ${layers.length} matrices, ` : "";
      return `${layers.length > 1 ? plain(label(layers[0])) + " …" : plain(short(layers[0]))}<br>${many}` +
        `${plain(heading(field))} = ${show(value(layers)) || "not known"}`;
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
    const cursor = document.activeElement === $("heat") ? box(state.at, { color: css("--text"), width: 3, dash: "dot" }) : [];
    const trace = { type: "heatmap", z: shown.map((type) => cells[type].map(value)),
      text: shown.map((type) => cells[type].map(told)),
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
    return state.layers.flatMap((layer, place) => data.spectra.flatMap((run, dash) => {
      const curve = run.byLayer.get(layer);
      if (!curve || !curve.kept) return [];
      const ranks = run.ranks[curve.kept];
      const name = plain(label(layer) + (data.spectra.length > 1 ? ` · ${run.label}` : ""));
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
    const names = state.layers.map(short).join(", ");
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
    const of = (name) => data.fields.filter((field) => /^a\d+$/.test(field.id.split(".")[0]) && field.id.endsWith("." + name));
    const floors = new Map(of("floor").map((field) => [field.group, field]));
    const x = state.layers.map((layer) => plain(label(layer)));
    const traces = of("epsilon").flatMap((field, place) => {
      if (state.layers.every((layer) => field.values[layer] === null)) return [];
      const floor = floors.get(field.group);
      const group = { offsetgroup: String(place), x };
      return [
        { ...group, type: "bar", name: plain(crop(field.group, 30)), y: state.layers.map((layer) => field.values[layer]),
          marker: { color: state.layers.map((_, i) => color(i)), pattern: { shape: PATTERNS[place % PATTERNS.length], size: 6 } },
          hovertemplate: "ε = %{y:.4g}" },
        ...(floor ? [{ ...group, type: "bar", name: "floor of its rank", showlegend: false, base: state.layers.map((layer) =>
          floor.values[layer]), y: state.layers.map((layer) => (floor.values[layer] === null ? null : 0.012)),
          marker: { color: css("--text") }, customdata: state.layers.map((layer) => floor.values[layer]),
          hovertemplate: "floor = %{customdata:.4g}" }] : []),
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
    draw("overlap", traces, { xaxis: { title: { text: "step" } }, yaxis: { title: { text: "share of ‖G‖" }, rangemode: "tozero" } },
      `Gradient overlap of ${state.layers.map(short).join(", ")}`);
  }

  function drawChosen() {
    $("chosen").replaceChildren(...state.layers.map((layer, place) => {
      const button = element("button", `${short(layer)} ×`);
      button.type = "button";
      button.dataset.drop = layer;
      button.style.borderLeftColor = color(place);
      button.setAttribute("aria-label", `Remove ${short(layer)}`);
      return button;
    }));
  }

  function drawCharts() {
    if (!window.Plotly) return;
    drawHeat();
    drawSpectra();
    drawResiduals();
    drawOverlaps();
  }

  function drawAll() {
    $("field").value = state.field;
    $("filter").value = state.filter;
    $("all").checked = state.all;
    drawChosen();
    drawTable();
    drawCharts();
  }

  // ---- what the reader does

  function say() {
    const [row, col] = state.at, layers = cells[row][col], field = fields.get(state.field);
    const where = `${data.types[row]}, ${depths[col] === null ? "outside the blocks" : "block " + depths[col]}`;
    const sorted = known(layers, field);
    const what = sorted.length ? `${heading(field)} = ${show(field.values[middle(sorted)])}` : "no value";
    $("cursor").textContent = `${where}: ${what}${layers.length > 1 ? `, median of ${layers.length} matrices` : ""}`;
  }

  function choose(row, col) {
    state.at = [row, col];
    say();
    if (cells[row][col].length) toggle(representatives(cells[row][col], fields.get(state.field)));
  }

  function onKey(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const [row, col] = state.at;
    if (moves[event.key]) {
      const keep = (value, most) => Math.max(0, Math.min(most - 1, value));
      const shown = rowsOf(fields.get(state.field));
      state.at = [shown[keep(shown.indexOf(row) + moves[event.key][0], shown.length)],
        keep(col + moves[event.key][1], depths.length)];
      say();
      drawHeat();
    } else if (event.key === "Enter" || event.key === " ") choose(row, col);
    else return;
    event.preventDefault();
  }

  function listen() {
    $("field").append(...numeric.map((field) => { const option = element("option", heading(field)); option.value = field.id; return option; }));
    $("field").addEventListener("change", (event) => { state.field = event.target.value; writeAddress(); drawCharts(); });
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
    $("heat").addEventListener("focus", () => { say(); if (window.Plotly) drawHeat(); });
    $("heat").addEventListener("blur", () => { if (window.Plotly) drawHeat(); });
    window.addEventListener("hashchange", () => { readAddress(); drawAll(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    matchMedia("print").addEventListener("change", drawAll);
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
    $("heat").on("plotly_click", (event) => choose(rowsOf(fields.get(state.field))[event.points[0].y], event.points[0].x));
    document.documentElement.dataset.ready = "1";
  }).catch(() => {
    $("chosen").replaceChildren(element("p", "The charts need a browser of 2023 or later; the figures and the table stand without them."));
  });
})();
