"""Numeric fields of records by dotted name with their axis titles, and groups of layers by module
type and depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lora_diag.records import LayerRecord
from lora_diag.records.base import Record, value_at
from lora_diag.records.names import depth_of, module_type_of, tower_of, type_order
from lora_diag.records.vocabulary import METRIC_NAMES, NORMS, metrics_of
from lora_diag.rendering.figures.style import name_of
from lora_diag.rendering.text import quantity

# Fields of spectra whose title in another metric is followed by the symbol of what is measured.
_OF_ENERGY = ("energy.", "rank_at.", "tail.", "effective_rank")


def changes_of(records: Iterable[LayerRecord]) -> str:
    """Return the symbol of what records measure: ``ΔW``, in another metric as ``ΔW·C^½``; of
    several, all joined.
    """
    return " and ".join(NORMS[metric][0].strip("‖") for metric in metrics_of(records)) or "ΔW"


def metric_suffix(records: Iterable[LayerRecord]) -> str:
    """Return a suffix that names the metric if all spectra among records have one, but not the
    weights'; else empty.
    """
    metrics = metrics_of(records)
    if len(metrics) != 1 or metrics == ["weights"]:
        return ""
    return f", in {METRIC_NAMES[metrics[0]]}"


def count_matrices(records: Iterable[LayerRecord]) -> str:
    """Return the number of distinct layers, such as ``12 matrices`` or
    ``12 matrices and 9 vectors``.
    """
    is_vector = {record.layer: len(getattr(record, "shape", (0, 0))) == 1 for record in records}
    vectors = sum(is_vector.values())
    matrices = len(is_vector) - vectors
    if not vectors:
        return quantity(matrices, "matrix")
    if not matrices:
        return quantity(vectors, "vector")
    return f"{quantity(matrices, 'matrix')} and {quantity(vectors, 'vector')}"


def title_in(field: str, records: Iterable[LayerRecord]) -> str:
    """Return the axis title of a field, in the metric of the records."""
    records = tuple(records)
    title = title_of(field, type(records[0]) if records else LayerRecord)
    norms_text = changes_of(records)
    if norms_text == "ΔW":
        return title
    if "ΔW" in title or "W_base" in title:
        titles = []
        for norm in norms_text.split(" and "):
            of_base = norm.replace("ΔW", "W_base")
            titles.append(title.replace("ΔW", norm).replace("W_base", of_base))
        return " and ".join(titles)
    return f"{title} of {norms_text}" if field.startswith(_OF_ENERGY) else title


def title_of(field: str, kind: type[LayerRecord] = LayerRecord) -> str:
    """Return the axis title of a field: that of an energy, rank or tail, else the kind's declared
    title, else its name.

    >>> title_of("energy.8"), title_of("rank_at.0.9"), title_of("tail.8.fro"), title_of("other")
    ('energy fraction C(8)', 'rank at 90% of the energy', 'tail of rank 8: √Σᵢ﹥ᵣσᵢ²', 'other')
    """
    head, _, path = field.partition(".")
    if head == "energy" and path.isdigit():
        return f"energy fraction C({path})"
    if head == "rank_at" and path:
        return f"rank at {_format_percent(path)} of the energy"
    if head == "additive" and path:
        return f"rank of the sum over ranks of the updates, at {_format_percent(path)}"
    if head == "tail" and path.endswith(".fro"):
        return f"tail of rank {path.removesuffix('.fro')}: √Σᵢ﹥ᵣσᵢ²"
    for column in kind.shown:
        if column.path == field:
            return column.axis or column.title
    return field


def _format_percent(share: str) -> str:
    try:
        return f"{float(share):.0%}"
    except ValueError:
        return share


def value_of(record: LayerRecord, field: str) -> float | None:
    """Return a numeric field of a record; None if it is null or does not exist.

    Args:
        record: Record of any diagnostic.
        field: Dotted name: ``energy.16``, ``resolution.signal_rank``, ``rank_at.0.9``.
    """
    value = value_at(record, field)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def numbers_of(records: Iterable[Record]) -> list[str]:
    """Return the names of all fields that are numeric in any record.

    Derived fields are included for layers only: a diverged run has no loss to derive from.
    """
    names: dict[str, None] = {}
    for record in records:
        content = {key: getattr(record, key) for key in type(record).model_fields}
        names.update(dict.fromkeys(_iterate_numbers(content, "")))
        if isinstance(record, LayerRecord):
            for key, member in vars(type(record)).items():
                if isinstance(member, property) and value_of(record, key) is not None:
                    names[key] = None
    return list(names)


def _iterate_numbers(content: Any, prefix: str) -> Iterable[str]:
    """Yield the dotted names of the numbers in a record, a table or a value."""
    if isinstance(content, Record):
        content = {key: getattr(content, key) for key in type(content).model_fields}
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _iterate_numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield prefix


def format_cell(value: float) -> str:
    """Return a number for a heat map: whole ones without decimals, others with two, fewer from 10
    on, or an exponent.

    >>> format_cell(0.4123), format_cell(12.0), format_cell(1234.5), format_cell(2.6e-5)
    ('0.41', '12', '1234', '3e-05')
    """
    if value == 0 or (value == math.floor(value) and abs(value) < 1e4):
        return f"{value:.0f}"
    if abs(value) >= 1e6 or abs(value) < 1e-2:
        return f"{value:.0e}"
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{decimals}f}"


R = TypeVar("R", bound=LayerRecord)


class Types:
    """Module types of layers by tower, in the usual order; a type of several towers is prefixed
    with its tower.

    Args:
        layers: Names of the weights.

    Attributes:
        names: The types, each once.

    Example:
        >>> types = Types(
        ...     ["encoder.block.0.q.weight", "decoder.block.0.q.weight", "lm_head.weight"]
        ... )
        >>> types.names
        ('encoder: q', 'decoder: q', 'lm_head')
        >>> types.of("decoder.block.0.q.weight")
        'decoder: q'
        >>> Types(["model.layers.0.mlp.up.weight", "bert.layer.0.output.dense.weight"]).names
        ('mlp.up', 'output.dense')
    """

    def __init__(self, layers: Iterable[str]) -> None:
        layers = tuple(dict.fromkeys(layers))
        towers_by_type: dict[str, set[tuple[str, ...]]] = {}
        tower_order: dict[tuple[str, ...], int] = {}
        for layer in layers:
            tower = tower_of(layer)
            if tower:
                towers_by_type.setdefault(module_type_of(layer), set()).add(tower)
                tower_order.setdefault(tower, len(tower_order))
        ambiguous = [towers for towers in towers_by_type.values() if len(towers) > 1]
        tower_labels = _find_distinguishing_parts(set[tuple[str, ...]]().union(*ambiguous))

        def place(layer: str) -> tuple[Any, ...]:
            return tower_order.get(tower_of(layer), len(tower_order)), type_order(layer)

        self._type_names: dict[str, str] = {}
        for layer in sorted(layers, key=place):
            label, module_type = tower_labels.get(tower_of(layer)), module_type_of(layer)
            self._type_names[layer] = name_of(f"{label}: {module_type}" if label else module_type)
        self.names = tuple(dict.fromkeys(self._type_names.values()))

    def of(self, layer: str) -> str:
        """Return the module type of a layer as drawn."""
        return self._type_names[layer]

    def pool(self, own: Iterable[str]) -> dict[str, str]:
        """Return the name of each type where not all can be shown: types that are not in ``own``
        share one.

        A single type besides them keeps its name.
        """
        own = set(own)
        others = [name for name in self.names if name not in own]
        shared = f"{len(others)} other types"
        return {name: name if name in own or len(others) == 1 else shared for name in self.names}


def _find_distinguishing_parts(towers: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the first part of each tower's name that differs; the whole names if such parts are
    equal or missing.
    """
    shared = 0
    for parts in zip(*towers, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    labels = {tower: ".".join(tower[shared : shared + 1]) for tower in towers}
    if len(set(labels.values())) < len(labels) or "" in labels.values():
        return {tower: ".".join(tower) for tower in towers}
    return labels


def by_depth(records: Sequence[R]) -> dict[int | None, tuple[R, ...]]:
    """Return the records by block, in ascending order; those outside the blocks, by None, come
    last.
    """
    by_block: dict[int | None, list[R]] = {}
    for record in records:
        by_block.setdefault(depth_of(record.layer), []).append(record)
    depths = sorted(by_block, key=lambda depth: (depth is None, depth or 0))
    return {depth: tuple(by_block[depth]) for depth in depths}


def deepest(layers: Iterable[str]) -> int:
    """Return the largest block index, 0 without blocks."""
    return max((depth_of(layer) or 0 for layer in layers), default=0)
