"""A baseline: earlier results files to compare with, of which a run may tighten one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_diag.decisions.gate.evidence import Source, Subject, list_subjects, value_of
from lora_diag.decisions.gate.fields import KINDS, LAYER_KINDS, Field, find
from lora_diag.decisions.gate.policy import Regression
from lora_diag.records import Results, totals
from lora_diag.records.vocabulary import METRIC_NAMES


class Stored:
    """The records of a baseline, indexed by layer and by the position of their adapter, step or rank in the file."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources
        self.subjects: dict[str, dict[tuple[Any, ...], Subject]] = {}

    def of_kind(self, kind: str) -> dict[tuple[Any, ...], Subject]:
        """Return all subjects of a kind."""
        if kind not in self.subjects:
            stored = [s for source in self.sources if source.holds(kind) for s in list_subjects(kind, source)]
            self.subjects[kind] = {}
            for subject in stored:
                key = (subject.layer, *subject.key)
                # With two records in one place it is undefined which one a new record is compared with.
                twice = key in self.subjects[kind] and subject.record is not None
                ambiguous = replace(subject, record=None, why="several records of it, which nothing distinguishes")
                self.subjects[kind][key] = ambiguous if twice else subject
        return self.subjects[kind]

    def value(self, field: Field, subject: Subject, floor: str) -> tuple[float | None, str]:
        """Return the baseline's value of a field for a subject, or None with the reason."""
        stored = self.of_kind(field.kind).get((subject.layer, *subject.key))
        if stored is None:
            return None, "not in the baseline: measure the baseline anew to compare it from now on"
        now, before = _get_metric(subject), _get_metric(stored)
        if stored.record is not None and now != before:
            return None, f"the baseline is in {METRIC_NAMES[before]} and this in {METRIC_NAMES[now]}: no comparison"
        value, reason = value_of(field, stored, floor)
        if not isinstance(value, float | int):
            return None, f"in the baseline: {reason}"
        return float(value), ""

    def limit(self, demand: Regression, before: float) -> tuple[float, str]:
        """Return the limit of a value, given that of the baseline, and its description."""
        increase = demand.allowed_increase(before)
        limit, sign = (before + increase, "<=") if demand.worse == "higher" else (before - increase, ">=")
        return limit, f"{demand.field} {sign} {limit:.6g} ({before:.6g} in the baseline)"

    def layers(self) -> list[str]:
        """Return the names of its layers."""
        return list(dict.fromkeys(record.layer for source in self.sources for record in source.results.layers))


def tighten_baseline(
    regressions: Sequence[Regression], stored: Stored, sources: Sequence[Source]
) -> Results[Any] | None:
    """Return a baseline, of one file, with improved records in place of the stored ones; None without improvements.

    A record is an improvement if no compared field is worse than stored, regardless of tolerance, and one is better.
    Whole records are replaced, never single values, so that each was measured.
    """
    better: dict[int, Any] = {}
    for kind in sorted(LAYER_KINDS):
        fields = [(demand, field) for demand in regressions for field in find(demand.field) if field.kind == kind]
        holding = [source for source in sources if source.holds(kind)]
        if not fields or len(holding) != 1:
            continue
        for subject in list_subjects(kind, holding[0]):
            old = stored.of_kind(kind).get((subject.layer, *subject.key))
            if (
                old is not None
                and old.record is not None
                and subject.record is not None
                and _is_better(subject, old, fields)
            ):
                better[id(old.record)] = subject.record
    if not better:
        return None
    (source,) = stored.sources
    results = source.results
    layers = tuple(
        _rename_record(better[id(record)], record) if id(record) in better else record for record in results.layers
    )
    return replace(results, layers=layers, end=totals(layers, results.left_out))


def _get_metric(subject: Subject) -> str:
    return getattr(subject.record, "metric", "weights")


def _is_better(new: Subject, old: Subject, fields: Sequence[tuple[Regression, Field]]) -> bool:
    if _get_metric(new) != _get_metric(old):
        return False
    gains = []
    for demand, field in fields:
        if new.layer is None or not demand.selects(new.layer):
            continue
        now, before = value_of(field, new, demand.floor)[0], value_of(field, old, demand.floor)[0]
        if not isinstance(now, float | int) or not isinstance(before, float | int):
            return False
        gains.append(before - now if demand.worse == "higher" else now - before)
    return bool(gains) and min(gains) >= 0 and max(gains) > 0


def _rename_record(record: Any, old: Any) -> Any:
    """Return a record under the key of the one it replaces, such as the path of its adapter."""
    return record.model_copy(update={name: getattr(old, name) for name in KINDS[record.record].key})
