"""What a rule judges: results files, the records in them and those that are missing, and the
records of a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lora_diag.catalog import features, read_results
from lora_diag.errors import InputError
from lora_diag.gating.conditions import KINDS, LAYER_KINDS, RecordField, Value, find
from lora_diag.gating.policy import Regression
from lora_diag.records import Results, RunInput, totals
from lora_diag.records.base import Record
from lora_diag.records.vocabulary import METRIC_NAMES, NOISE_MARKS, Metric, metric_of

# Reasons of left-out tensors that need no record: 1-D tensors have no rank; of the others the
# remaining rows are measured.
NO_CANDIDATES = frozenset({"vector", "added_rows", "removed_rows", "empty"})


@cache
def commands_of(kind: str) -> tuple[str, ...]:
    """Return the commands that write records of a kind."""
    return tuple(
        feature.name for feature in features() if KINDS[kind] in map(feature.load, feature.records)
    )


@dataclass(frozen=True, slots=True)
class InputState:
    """The current state of one input of results.

    Args:
        input: The input as it was measured.
        state: ``same``, ``changed`` (also if it can no longer be read), or ``unknown`` if it was
            not found or has no fingerprint that can be compared.
        reason: Reason for another state than ``same``; for ``same``, the path of ``--for`` that is
            equal, if any.
        now: Its current fingerprint; empty if unknown.
    """

    input: RunInput
    state: Literal["same", "changed", "unknown"]
    reason: str = ""
    now: str = ""


@dataclass(frozen=True, slots=True)
class ResultsSource:
    """A results file, or results in memory, and the state of its inputs.

    Args:
        path: Its path; for results in memory, a description.
        results: Its contents.
        inputs: The state of the checkpoints and adapters among its inputs.
        sealed: Whether the hash in its last line was checked; also true without a last line, and
            without a file.
    """

    path: str
    results: Results[Any]
    inputs: tuple[InputState, ...] = ()
    sealed: bool = True

    def holds(self, kind: str) -> bool:
        """Return whether it may contain records of a kind."""
        if kind == "end" or self.results.run.command in commands_of(kind):
            return True
        records = (*self.results.layers, *self.results.whole)
        return any(isinstance(record, KINDS[kind]) for record in records)

    def names(self) -> set[str]:
        """Return the names of the layers with a record, and of the skipped tensors."""
        return {record.layer for record in (*self.results.layers, *self.results.left_out)}


Sources = Sequence[ResultsSource]


def list_layers(sources: Sources) -> list[Any]:
    """Return the records of layers of all results."""
    return [record for source in sources for record in source.results.layers]


def list_inputs(sources: Sources, role: str) -> list[RunInput]:
    """Return the inputs of a role of all results."""
    inputs = [item for source in sources for item in source.results.run.inputs]
    return [item for item in inputs if item.role == role]


def open_results(item: Path | str | Results[Any], number: int = 1) -> ResultsSource:
    """Return results as a source, if the totals in their last line, which the hash does not cover,
    fit the records.

    Args:
        item: A results file; or results in memory, which are named after their command and last
            input.
        number: Position, which names results in memory that have no input.

    Raises:
        InputError: The file cannot be read, was edited, or records are missing.
    """
    if isinstance(item, Results):
        inputs = item.run.inputs
        path = f"{item.run.command} of {inputs[-1].path if inputs else number}"
        source = ResultsSource(path, item)
    else:
        results = read_results(item)
        sealed = results.end is None or bool(results.end.sha256)
        source = ResultsSource(str(item), results, sealed=sealed)
    _check_totals(source)
    return source


def _check_totals(source: ResultsSource) -> None:
    """Check that the totals in the last line of results fit the records.

    Raises:
        InputError: They do not.
    """
    results = source.results
    if results.end is None:
        return
    actual = totals(results.layers, results.left_out)
    for name in ("layers", "left_out", "fro", "base_fro"):
        found, stated = getattr(actual, name), getattr(results.end, name)
        is_norm = name not in {"layers", "left_out"}
        if found == stated or (is_norm and not results.layers):
            continue
        if found is None or stated is None or not math.isclose(found, stated):
            raise InputError(
                f"{source.path}: has {_format_total(found)} {name}, but its last line states "
                f"{_format_total(stated)}, so it was truncated or edited; measure again"
            )


def _format_total(value: float | None) -> str:
    return "no" if value is None else f"{value:.9g}"


@dataclass(frozen=True, slots=True)
class RuleSubject:
    """The subject of a rule: one record, or a missing one.

    Args:
        layer: Its layer; None for the run as a whole.
        group: Identifies one of several records of the layer by file, metric and key; empty if none
            of them does.
        key: Identifies the group, independent of the adapter's path.
        record: The record; None if it is missing.
        reason: Reason why it is missing.
        fro: ‖Δ‖_F of the layer; None if unknown.
        label: Identifies one of several records of a whole run; else empty. Aggregates are over all
            labels.
    """

    layer: str | None = None
    group: str = ""
    key: tuple[Any, ...] = ()
    record: Record | None = None
    reason: str = ""
    fro: float | None = None
    label: str = ""


def energy_of(subjects: Iterable[RuleSubject]) -> float:
    """Return Σ‖Δ‖²_F of subjects; unknown norms count as zero."""
    return math.fsum((subject.fro or 0.0) ** 2 for subject in subjects)


def list_subjects(
    kind: str,
    source: ResultsSource,
    left_out: frozenset[str] = frozenset(),
    name_file: bool = False,
) -> list[RuleSubject]:
    """Return a subject for each record of one kind in a file, and for each missing one.

    Args:
        kind: The kind of record.
        source: The file.
        left_out: Reasons for which a tensor may have no record, in addition to ``NO_CANDIDATES``.
        name_file: Whether groups include the file, because there are several.
    """
    results, cls = source.results, KINDS[kind]
    prefix = [source.path] if name_file else []
    metric = metric_of(results.layers)
    if "metric" in cls.model_fields and metric != "weights":
        prefix.append(f"in {METRIC_NAMES[metric]}")
    if kind not in LAYER_KINDS:
        return _list_whole_subjects(kind, results, ", ".join(prefix))
    group_fields = tuple(name for name in cls.key if name != "layer")
    groups: dict[tuple[Any, ...], list[Any]] = {}
    if group_fields == ("adapter",):  # each adapter is expected to have records
        adapters = [item for item in results.run.inputs if item.role in {"adapter", "reference"}]
        groups = {(item.path,): [] for item in adapters}
    records: list[Any] = [record for record in results.layers if isinstance(record, cls)]
    for record in records:
        groups.setdefault(tuple(getattr(record, name) for name in group_fields), []).append(record)
    norms = {record.layer: getattr(record, "fro", None) for record in records}
    absent = [(layer, "the file has no record of it", fro) for layer, fro in norms.items()]
    for item in results.left_out:
        is_candidate = item.reason not in NO_CANDIDATES | left_out and len(item.shape) != 1
        if is_candidate and item.layer not in norms:
            absent.append((item.layer, f"not measured: {item.detail}", item.fro))
    # Paths are replaced by their order in the file, so that a key does not depend on them.
    positions: dict[str, int] = {}
    subjects: list[RuleSubject] = []
    for values, of_group in (groups or {(): []}).items():
        key = tuple(
            positions.setdefault(value, len(positions)) if isinstance(value, str) else value
            for value in values
        )
        names = [f"{name} {value}" for name, value in zip(group_fields, values, strict=False)]
        group = ", ".join((*prefix, *names))
        for record in of_group:
            subjects.append(RuleSubject(record.layer, group, key, record, fro=norms[record.layer]))
        present = {record.layer for record in of_group}
        for layer, reason, fro in absent:
            if layer not in present:
                subjects.append(RuleSubject(layer, group, key, None, reason, fro))
    return subjects


def _list_whole_subjects(kind: str, results: Results[Any], group: str) -> list[RuleSubject]:
    """Return a subject for each record of a kind about the whole run, or one for the missing
    record.
    """
    cls = KINDS[kind]
    records = [record for record in (*results.whole, results.end) if isinstance(record, cls)]
    if not records:
        reason = "the run did not finish" if kind == "end" else f"the file has no {kind} record"
        return [RuleSubject(None, group, (0,), None, reason)]
    subjects = []
    for number, record in enumerate(records):
        parts = [group] if group else []
        if len(records) > 1:
            values = [getattr(record, name, None) for name in cls.key]
            parts.append(" ".join(str(value) for value in values if value))
        label = ", ".join(filter(None, parts))
        subjects.append(RuleSubject(None, group, (number,), record, label=label))
    return subjects


def value_of(
    field: RecordField, subject: RuleSubject, floor: str = "inconclusive"
) -> tuple[Value | None, str]:
    """Return the value of a subject for a rule, or None with the reason.

    Args:
        field: The judged field.
        subject: The subject.
        floor: ``ignore`` also uses values of layers that the files do not resolve.
    """
    record = subject.record
    if record is None:
        return None, subject.reason
    value = field.of(record)
    if value is None:
        if subject.fro == 0:
            return None, f"the update is zero, so {field.name} does not exist"
        table = getattr(record, field.path[0], None)
        if isinstance(table, dict) and field.path[1] not in table:
            return None, f"{field.name} was not measured; the record has {', '.join(table)}"
        return None, f"{field.name} is null: it was not computed"
    if value == "inconclusive":
        return None, f"{field.name} is inconclusive in the record itself"
    resolution = getattr(record, "resolution", None)
    if resolution is None:
        resolution = getattr(getattr(record, "spectrum", None), "resolution", None)
    verdict = getattr(resolution, "verdict", None) or getattr(record, "verdict", None)
    if verdict in NOISE_MARKS and field.doubtful_at_floor and floor != "ignore":
        reason = f"{field.name} may be that of the files' rounding, not of the update"
        return None, f"{verdict}: {reason}"
    return value, ""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Earlier records, by metric, layer, and the position of their adapter in the file or their
    step and rank.

    Args:
        sources: The results files.

    Attributes:
        subjects: The subjects of the kinds that were looked up so far, as ``of_kind`` returns them.
    """

    sources: Sources
    subjects: dict[str, dict[tuple[Any, ...], RuleSubject]] = field(
        default_factory=dict, init=False
    )

    def of_kind(self, kind: str) -> dict[tuple[Any, ...], RuleSubject]:
        """Return the subjects of a kind by metric, layer and key; one without a record where
        several have the key.
        """
        if kind not in self.subjects:
            stored = self.subjects[kind] = {}
            for source in self.sources:
                if not source.holds(kind):
                    continue
                metric = metric_of(source.results.layers)
                for subject in list_subjects(kind, source):
                    key = (_get_metric(subject, metric), subject.layer, *subject.key)
                    # It is undefined with which of two records a new one would be compared.
                    if key in stored and subject.record is not None:
                        reason = "several records of it, which nothing distinguishes"
                        subject = replace(subject, record=None, reason=reason)
                    stored[key] = subject
        return self.subjects[kind]

    def find(self, kind: str, subject: RuleSubject) -> RuleSubject | None:
        """Return the baseline's subject with the metric, layer and key of a measured one; None
        without one.
        """
        return self.of_kind(kind).get((_get_metric(subject), subject.layer, *subject.key))

    def value(
        self, field: RecordField, subject: RuleSubject, floor: str
    ) -> tuple[float | None, str]:
        """Return the baseline's value of a field for a subject, or None with the reason."""
        stored = self.find(field.kind, subject)
        if stored is None:
            metric = _get_metric(subject)
            metrics = [key[0] for key in self.of_kind(field.kind)]
            if metrics and metric not in metrics:
                before, now = METRIC_NAMES[metrics[0]], METRIC_NAMES[metric]
                return None, f"the baseline is in {before} and this in {now}: no comparison"
            return None, "not in the baseline: measure the baseline anew to compare it from now on"
        value, reason = value_of(field, stored, floor)
        if isinstance(value, float | int):
            return float(value), ""
        return None, f"in the baseline: {reason}"

    def tighten(self, regressions: Sequence[Regression], sources: Sources) -> Results[Any] | None:
        """Return the baseline, of one file, with improved records in place of the stored ones; None
        without any.

        A record is an improvement if no compared field is missing or worse than stored, regardless
        of tolerance, and one is better. Whole records are replaced, never single values, so that
        each was measured. Kinds of which several of ``sources`` may have records are not compared.
        """
        replacements: dict[int, Any] = {}
        for kind in sorted(LAYER_KINDS):
            fields = []
            for demand in regressions:
                fields += [(demand, field) for field in find(demand.field) if field.kind == kind]
            holding = [source for source in sources if source.holds(kind)]
            if not fields or len(holding) != 1:
                continue
            for subject in list_subjects(kind, holding[0]):
                old = self.find(kind, subject)
                if old and old.record and subject.record and _is_better(subject, old, fields):
                    # The replaced record's key, such as the path of its adapter, stays.
                    key = {name: getattr(old.record, name) for name in KINDS[kind].key}
                    replacements[id(old.record)] = subject.record.model_copy(update=key)
        if not replacements:
            return None
        (source,) = self.sources
        layers = tuple(replacements.get(id(record), record) for record in source.results.layers)
        return replace(source.results, layers=layers, end=totals(layers, source.results.left_out))


def _get_metric(subject: RuleSubject, default: Metric = "weights") -> Metric:
    """Return the metric of a subject's record, ``weights`` if it has none; ``default`` if the
    record is missing.
    """
    metric: Metric = getattr(subject.record, "metric", "weights" if subject.record else default)
    return metric


def _is_better(
    new: RuleSubject, old: RuleSubject, fields: Sequence[tuple[Regression, RecordField]]
) -> bool:
    """Return whether no compared value is worse or missing, and one is better."""
    gains = []
    for demand, compared in fields:
        if new.layer is None or not demand.selects(new.layer):
            continue
        now, _ = value_of(compared, new, demand.floor)
        before, _ = value_of(compared, old, demand.floor)
        if not isinstance(now, float | int) or not isinstance(before, float | int):
            return False
        gains.append(before - now if demand.worse == "higher" else now - before)
    return bool(gains) and min(gains) >= 0 and max(gains) > 0
