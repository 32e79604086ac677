"""The records to judge, and missing ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.decisions.gate.consistency import find_contradictions
from lora_diag.decisions.gate.fields import KINDS, LAYER_KINDS, Field
from lora_diag.errors import InputError
from lora_diag.records import Results, totals
from lora_diag.records.base import Record
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of

# Reasons of left-out tensors that need no record: 1-D tensors have no rank; of the others the remaining rows are
# measured.
NO_CANDIDATES = frozenset({"vector", "added_rows", "removed_rows", "empty"})

# Kinds that a command of another name writes.
_COMMANDS = {
    "allocation": "allocate",
    "certificate": "allocate",
    "extraction": "extract",
    "merge": "verify-merge",
    "plan_merge": "plan-merge",
    "union": "interference",
    "fleet": "spectrum --adapters",
    "verdict": "gate",
}


@dataclass(frozen=True, slots=True)
class Present:
    """The current state of one input of results.

    Args:
        role: Its role in the run.
        path: Its path during the measurement.
        recorded: Its fingerprint when it was measured; empty if unknown.
        now: Its current fingerprint; empty if unknown.
        state: Whether both are equal; ``unknown`` if it was not found or has none.
        why: Reason for a difference; for equal inputs, their path if different.
    """

    role: str
    path: str
    recorded: str
    now: str
    state: str
    why: str


@dataclass(frozen=True, slots=True)
class Source:
    """A results file: its path, its contents, and the state of its inputs.

    Args:
        path: Its path.
        results: Its contents.
        present: The state of its inputs.
        sealed: Whether the hash in its last line was checked, or there is no file.
    """

    path: str
    results: Results[Any]
    present: tuple[Present, ...] = ()
    sealed: bool = True

    def holds(self, kind: str) -> bool:
        """Return whether it may contain records of a kind."""
        if kind == "end" or self.results.run.command == _COMMANDS.get(kind, kind):
            return True
        return any(isinstance(record, KINDS[kind]) for record in (*self.results.layers, *self.results.whole))

    def names(self) -> set[str]:
        """Return the names of all its tensors."""
        return {record.layer for record in (*self.results.layers, *self.results.left_out)}


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of a rule: one record, or a missing one.

    Args:
        layer: Its layer; None for the run as a whole.
        group: Identifies one of several records of the layer; empty if there is only one.
        key: Identifies the group, independent of the adapter's path.
        record: The record; None if it is missing.
        why: Reason why it is missing.
        fro: ‖Δ‖_F of the layer; None if unknown.
    """

    layer: str | None
    group: str
    key: tuple[Any, ...]
    record: Record | None
    why: str = ""
    fro: float | None = None


def read_source(path: Path | str) -> Source:
    """Read a results file and check it against its last line.

    Raises:
        InputError: The file cannot be read, or records are missing.
    """
    results = read_results(path)
    return check_source(Source(str(path), results, sealed=results.end is None or bool(results.end.sha256)))


def check_source(source: Source) -> Source:
    """Return a source whose records are consistent with each other and with its last line, if it has one.

    Raises:
        InputError: The records are inconsistent.
    """
    results = source.results
    if results.end is not None:
        expected, actual = results.end, totals(results.layers, results.left_out)
        for name, n, total in (
            ("layers", actual.layers, expected.layers),
            ("left_out", actual.left_out, expected.left_out),
        ):
            if n != total:
                raise InputError(
                    f"{source.path}: has {n} {name}, but its last line states {total}, so it was truncated or edited; "
                    "measure again"
                )
    if problem := next(find_contradictions(results), None):
        raise InputError(f"{source.path}: {problem}; its records contradict each other; measure again")
    return source


def list_subjects(
    kind: str, source: Source, left_out: frozenset[str] = frozenset(), name_file: bool = False
) -> list[Subject]:
    """Return all existing and expected subjects of one kind in a file.

    Args:
        kind: The kind of record.
        source: The file.
        left_out: Reasons that excuse a tensor without a record.
        name_file: Whether groups include the file, because there are several.
    """
    results, cls = source.results, KINDS[kind]
    prefix = [source.path] if name_file else []
    if kind == "spectrum" and (metric := metric_of(results.layers)) != "weights":
        prefix.append(f"in {METRIC_NAMES[metric]}")
    if kind == "end":
        return [Subject(None, ", ".join(prefix), (), results.end, "" if results.end else "the run did not finish")]
    if kind not in LAYER_KINDS:
        whole = [record for record in results.whole if isinstance(record, cls)]
        return [Subject(None, ", ".join(prefix), (i,), record) for i, record in enumerate(whole)] or [
            Subject(None, ", ".join(prefix), (0,), None, f"the file has no {kind} record")
        ]
    records: list[Any] = [record for record in results.layers if isinstance(record, cls)]
    by_group: dict[tuple[Any, ...], list[Any]] = {values: [] for values in _list_expected(cls, source)}
    for record in records:
        by_group.setdefault(tuple(getattr(record, name) for name in _group_fields(type(record))), []).append(record)
    layers = dict.fromkeys(record.layer for record in records)
    norms = {record.layer: getattr(record, "fro", None) for record in records}
    subjects: list[Subject] = []
    for values, key in _pair_with_stable_keys(list(by_group) or [()]):
        names = [f"{name} {value}" for name, value in zip(_group_fields(cls), values, strict=True)]
        group = ", ".join((*prefix, *names))
        of_group = by_group.get(values, [])
        subjects += [Subject(record.layer, group, key, record, fro=norms[record.layer]) for record in of_group]
        missing = layers.keys() - {record.layer for record in of_group}
        subjects += [
            Subject(layer, group, key, None, "the file has no record of it", norms[layer])
            for layer in layers
            if layer in missing
        ]
        subjects += [
            Subject(item.layer, group, key, None, f"not measured: {item.detail}", item.fro)
            for item in results.left_out
            if item.reason not in NO_CANDIDATES | left_out and len(item.shape) != 1 and item.layer not in layers
        ]
    return subjects


def _group_fields(cls: type[Record]) -> tuple[str, ...]:
    return tuple(name for name in cls.key if name != "layer")


def _list_expected(cls: type[Record], source: Source) -> Iterator[tuple[Any, ...]]:
    """Yield the groups that the run was to measure: one per adapter."""
    if _group_fields(cls) == ("adapter",):
        roles = ("adapter", "reference")
        yield from ((run_input.path,) for run_input in source.results.run.inputs if run_input.role in roles)


def _pair_with_stable_keys(groups: Sequence[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Pair each group with a key in which text, such as paths, is replaced by its order in the file."""
    texts = list(dict.fromkeys(value for group in groups for value in group if isinstance(value, str)))
    for group in groups:
        yield group, tuple(texts.index(value) if isinstance(value, str) else value for value in group)


def value_of(field: Field, subject: Subject, floor: str = "inconclusive") -> tuple[float | str | None, str]:
    """Return the value of a subject for a rule, or None with the reason.

    Args:
        field: The judged field.
        subject: The subject.
        floor: ``ignore`` also uses values of layers that the files do not resolve.
    """
    record = subject.record
    if record is None:
        return None, subject.why
    value = field.of(record)
    if value is None:
        return None, _explain_null(field, subject)
    if value == "inconclusive":
        return None, f"{field.name} is inconclusive in the record itself"
    verdict = floor_of(record)
    if verdict != "resolved" and field.doubtful_at_floor and floor != "ignore":
        return None, f"{verdict}: {field.name} may be that of the files' rounding, not of the update"
    return (str(value).lower() if isinstance(value, bool) else value), ""


def floor_of(record: Record) -> str:
    """Return the resolution verdict of a record; ``resolved`` without one."""
    resolution = getattr(record, "resolution", None) or getattr(getattr(record, "spectrum", None), "resolution", None)
    verdict = getattr(resolution, "verdict", None) or getattr(record, "verdict", None)
    return verdict if isinstance(verdict, str) else "resolved"


def command_for(kind: str) -> str:
    """Return the command that writes records of a kind."""
    return f"loradiag {_COMMANDS.get(kind, kind)}"


def _explain_null(field: Field, subject: Subject) -> str:
    if subject.fro == 0:
        return f"the update is zero, so {field.name} does not exist"
    table = getattr(subject.record, field.path[0], None)
    if isinstance(table, dict) and field.path[1] not in table:
        return f"{field.name} was not measured; the record has {', '.join(table)}"
    return f"{field.name} is null: it was not computed"
