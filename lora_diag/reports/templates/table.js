// The table of layers: filter, sort order and pages; and the list of chosen layers.

function shownLayers() {
  const layers = data.layers.map((_, layer) => layer).filter(filtering(state.filter));
  const field = fields.get(state.sort);
  if (!state.sort) return layers;
  const sign = state.down ? -1 : 1;
  const value = field ? (layer) => field.values[layer] : (layer) => data.layers[layer];
  const compare = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  return layers.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;  // missing values come last
    return sign * compare(x, y) || a - b;
  });
}

// "C(8) < 0.5" compares a column; other text matches a part of the name.
function filtering(text) {
  const comparison = text.match(/^\s*(.+?)\s*(<=|>=|<|>|=)\s*(.+?)\s*$/);
  const field = comparison && data.fields.find((field) => [field.title, heading(field), field.id].includes(comparison[1]));
  if (!field) {
    const part = text.trim().toLowerCase();
    return (layer) => data.layers[layer].toLowerCase().includes(part);
  }
  const wanted = field.number ? Number(comparison[3]) : comparison[3];
  const holds = { "<": (a) => a < wanted, ">": (a) => a > wanted, "<=": (a) => a <= wanted, ">=": (a) => a >= wanted,
    "=": (a) => a === wanted }[comparison[2]];
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
    const button = element("button", title);
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
