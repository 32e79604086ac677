"""Short forms of results: five lines for a prompt, a table by module type for a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_diag.errors import safe
from lora_diag.records.base import LayerRecord
from lora_diag.records.shown import Shown, Value, pooled_value

if TYPE_CHECKING:
    from lora_diag.records.results import Results

# Maximum number of inputs that are named.
_INPUTS = 4


def text_of(results: Results[Any]) -> str:
    """Return a description of results in at most five lines."""
    return "\n".join([_make_title(results), *(f"  {label:<9} {words}" for label, words in _list_properties(results))])


def _make_title(results: Results[Any]) -> str:
    finished = "finished" if results.end is not None else "unfinished"
    return f"Results of loradiag {safe(results.run.command)}, {finished}"


def _list_properties(results: Results[Any]) -> list[tuple[str, str]]:
    inputs = [f"{safe(side.role)} {safe(side.path)}".strip() for side in results.run.inputs]
    suffix = [f"and {len(inputs) - _INPUTS} more"] if len(inputs) > _INPUTS else []
    facts = [("inputs", ", ".join([*inputs[:_INPUTS], *suffix]) or "none")]
    records = Counter(record.record for record in (*results.layers, *results.whole))
    layers = len({record.layer for record in results.layers if _is_of_layer(type(record))})
    kinds = ", ".join(f"{count} {safe(kind)}" for kind, count in records.items())
    facts.append(("records", (kinds or "none") + (f" of {layers} layers" if layers else "")))
    reasons = Counter(item.reason for item in results.left_out)
    if reasons:
        words = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.items())
        facts.append(("left out", words))
    key = next((_describe_range(shown[0], records) for _, records, shown in _list_kinds(results)), None)
    return [*facts, ("measured", key)] if key else facts


def _list_kinds(results: Results[Any]) -> list[tuple[type[Any], list[Any], list[Shown]]]:
    """Return each kind of record with a presentation, with its records and main columns."""
    kinds = []
    for kind in dict.fromkeys(type(record) for record in (*results.layers, *results.whole)):
        records = [record for record in (*results.layers, *results.whole) if type(record) is kind]
        all_shown = kind.shown_of(results.run.settings, records) if issubclass(kind, LayerRecord) else kind.shown
        if shown := [field for field in all_shown if field.main]:
            kinds.append((kind, records, shown))
    return kinds


def _is_of_layer(kind: type[Any]) -> bool:
    """Return whether records of a kind have a layer; in a fleet the adapter counts as one."""
    return "layer" in kind.model_fields


def _describe_range(shown: Shown, records: Sequence[Any]) -> str | None:
    """Return the range of the first main value, such as ``ε 0.5 to 0.9, pooled 0.7 over 30 records``."""
    values = [value for record in records if (value := shown.value(record)) is not None]
    whole = pooled_value(shown, records)
    if not values or whole is None:
        return None
    if any(isinstance(value, str) for value in values):
        counts = Counter(map(str, values)).most_common(4)
        return f"{shown.title} " + ", ".join(f"{safe(word)} {count}" for word, count in counts)
    low, high, middle = (_format_cell(shown, value) for value in (min(values), max(values), whole))
    how = "median" if shown.pool is None else "pooled"
    return f"{shown.title} {low} to {high}, {how} {middle}, {len(values)} records"


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else safe(str(value)).removesuffix(".weight")


def _format_cell(shown: Shown, value: Value) -> str:
    """Return a value in four digits; a fraction below 1 is not rounded up to 1."""
    if isinstance(value, float) and shown.share and value < 1:
        return _format_value(min(value, 0.9999))
    return _format_value(value)
