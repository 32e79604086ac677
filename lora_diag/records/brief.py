"""Results in short: five lines for a prompt, a table by module type for a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lora_diag.errors import safe
from lora_diag.records.base import LayerRecord
from lora_diag.records.names import module_type_of, place_of, short_names
from lora_diag.records.shown import Shown, Value, pooled_value

if TYPE_CHECKING:
    from lora_diag.records.results import Results

# More inputs than these are counted and not named; more rows of a table likewise.
_INPUTS, _ROWS = 4, 40


def text_of(results: Results[Any]) -> str:
    """Return what was measured of what, in at most five lines."""
    return "\n".join([_title(results), *(f"  {label:<9} {words}" for label, words in _facts(results))])


def html_of(results: Results[Any]) -> str:
    """Return the same with the main columns of the records, by module type; of a probe or a gate, record by record.

    Names are escaped, and nothing is loaded from elsewhere.
    """
    facts = "".join(f"<br>{escape(label)}: {escape(words)}" for label, words in _facts(results))
    return f"<div><p><b>{escape(_title(results))}</b>{facts}</p>{''.join(map(_table, _grids(results)))}</div>"


def _title(results: Results[Any]) -> str:
    finished = "finished" if results.end is not None else "unfinished"
    return f"Results of loradiag {safe(results.run.command)}, {finished}"


def _facts(results: Results[Any]) -> list[tuple[str, str]]:
    inputs = [f"{safe(side.role)} {safe(side.path)}" for side in results.run.inputs]
    more = [f"and {len(inputs) - _INPUTS} more"] if len(inputs) > _INPUTS else []
    facts = [("inputs", ", ".join([*inputs[:_INPUTS], *more]) or "none")]
    records = Counter(record.record for record in (*results.layers, *results.whole))
    layers = len({record.layer for record in results.layers if _is_of_layer(type(record))})
    kinds = ", ".join(f"{count} {safe(kind)}" for kind, count in records.items())
    facts.append(("records", (kinds or "none") + (f" of {layers} layers" if layers else "")))
    reasons = Counter(item.reason for item in results.left_out)
    if reasons:
        words = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.items())
        facts.append(("left out", words))
    key = next((_range(shown[0], records) for _, records, shown in _kinds(results)), None)
    return [*facts, ("measured", key)] if key else facts


def _kinds(results: Results[Any]) -> list[tuple[type[Any], list[Any], list[Shown]]]:
    """Return each kind of record that says how it is shown, with its records and main columns."""
    found = []
    for kind in dict.fromkeys(type(record) for record in (*results.layers, *results.whole)):
        records = [record for record in (*results.layers, *results.whole) if type(record) is kind]
        all_shown = kind.shown_of(results.run.settings, records) if issubclass(kind, LayerRecord) else kind.shown
        if shown := [one for one in all_shown if one.main]:
            found.append((kind, records, shown))
    return found


def _is_of_layer(kind: type[Any]) -> bool:
    """Return whether records of a kind have a layer; in a fleet an adapter stands in the place of one."""
    return "layer" in kind.model_fields


def _range(shown: Shown, records: Sequence[Any]) -> str | None:
    """Return the first of the main values over all records, such as ``ε 0.5 to 0.9, pooled 0.7 over 30 records``."""
    values = [value for record in records if (value := shown.value(record)) is not None]
    whole = pooled_value(shown, records)
    if not values or whole is None:
        return None
    if any(isinstance(value, str) for value in values):
        counts = Counter(map(str, values)).most_common(4)
        return f"{shown.title} " + ", ".join(f"{safe(word)} {count}" for word, count in counts)
    low, high, middle = (_cell(shown, value) for value in (min(values), max(values), whole))
    how = "median" if shown.pool is None else "pooled"
    return f"{shown.title} {low} to {high}, {how} {middle}, {len(values)} records"


def _grids(results: Results[Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return each table: its headings and its rows."""
    short = short_names(side.path for side in results.run.inputs)
    grids = []
    for kind, records, shown in _kinds(results):
        layered = issubclass(kind, LayerRecord) and _is_of_layer(kind)
        keys = [key for key in kind.key if len({getattr(record, key, None) for record in records}) > 1]
        if layered:  # numbers, such as steps, are pooled; adapters are not
            keys = [key for key in keys if key != "layer" and isinstance(getattr(records[0], key, None), str)]
        groups: dict[tuple[Hashable, ...], list[Any]] = {}
        for record in records:
            own = [getattr(record, key, None) for key in keys]
            groups.setdefault((*([module_type_of(record.layer)] if layered else []), *own), []).append(record)
        order = sorted(groups, key=lambda name: place_of(groups[name][0].layer)) if layered else list(groups)
        names = keys if _is_of_layer(kind) else ["adapter" if key == "layer" else key for key in keys]
        headings = [*(["module type"] if layered else []), *names, *(["n"] if layered else [])]
        rows = [
            [
                *(_word(short.get(str(word), word)) for word in name),
                *([str(len(groups[name]))] if layered else []),
                *(_cell(one, pooled_value(one, groups[name])) for one in shown),
            ]
            for name in order
        ]
        grids.append(([*headings, *(one.title for one in shown)], rows))
    return grids


def _table(grid: tuple[list[str], list[list[str]]]) -> str:
    headings, rows = grid
    head = "".join(f"<th>{escape(safe(title))}</th>" for title in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[:_ROWS])
    more = f"<p>and {len(rows) - _ROWS} more rows</p>" if len(rows) > _ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else safe(str(value)).removesuffix(".weight")


def _cell(shown: Shown, value: Value) -> str:
    """Return a value in four digits; a share below 1 is not rounded up to 1."""
    if isinstance(value, float) and shown.share and value < 1:
        return _word(min(value, 0.9999))
    return _word(value)
