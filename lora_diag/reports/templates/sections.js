// The tables of sections: a heading sorts ascending, then descending, then in the original order.

const UNITS = { k: 1e3, M: 1e6, B: 1e9, T: 1e12 };

// The leading number of a cell such as "+0.0123 ±0.002", "45%", "1.05 M", "<0.1%" and "> 64"; null without one.
function numberOf(text) {
  const found = text.match(/^([<>])?\s*([+-]?[\d.]+(?:e[+-]?\d+)?)(?: ([kMBT])(?![a-z]))?/);
  const value = found ? Number(found[2]) * (UNITS[found[3]] || 1) : NaN;
  if (Number.isNaN(value)) return null;
  return found[1] === "<" ? value - Math.abs(value) * 1e-9 : found[1] === ">" ? value + Math.abs(value) * 1e-9 : value;
}

function sortable(table) {
  const body = table.tBodies[0], written = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const text = (row) => row.cells[place].textContent.trim();
    // Names sort as text; in a numeric column, words ("diverged", "-") come last.
    const value = place === 0 ? text : (row) => numberOf(text(row));
    const numeric = place > 0 && written.some((row) => value(row) !== null);
    const compare = (a, b) => {
      const [x, y] = numeric ? [value(a), value(b)] : [text(a), text(b)];
      if (numeric && (x === null || y === null)) return [(x === null) - (y === null), 0];
      return [0, numeric ? x - y : x.localeCompare(y, "en", { numeric: true })];
    };
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? next : "none"));
      const sign = next === "descending" ? -1 : 1;
      const order = (a, b) => { const [known, by] = compare(a, b); return known || sign * by; };
      body.replaceChildren(...(next === "none" ? written : [...written].sort(order)));
    });
  });
}

document.querySelectorAll(".several table").forEach(sortable);
