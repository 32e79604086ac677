"""What a rule is about: the values it can name, the records that have them, and missing records.

The values are every number, word and flag of every kind of record. They are derived from the definitions of the
records, so new kinds of records need no change here. A name is the dotted path to the value: ``epsilon``, ``energy.8``,
``rank_at.0.9``, ``tail.8.fro``, ``resolution.verdict``; prefixed by the kind if several kinds have it:
``spectrum.fro``, ``end.left_out``.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_diag.catalog import read_results, record_kinds
from lora_diag.errors import InputError
from lora_diag.records import End, LayerRecord, Results, totals
from lora_diag.records.base import Record
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of

KINDS: dict[str, type[Record]] = {**record_kinds(), "end": End}
# Kinds of which a layer has records, by their name in a results file.
LAYER_KINDS = frozenset(name for name, kind in KINDS.items() if issubclass(kind, LayerRecord))

# Fields of the stored bytes or of the run, independent of the rounding of the update. Every other field of a record
# with a ``resolution`` describes the update, and is doubtful where the files do not resolve it.
FILE_FIELDS = frozenset(
    {"adapted", "adapter", "adapter_fro", "base_fro", "cap", "capped_by", "complete", "dtype", "fro", "gradient_fro"}
    | {"layer", "method", "params", "rank", "relative", "resolution", "role", "source", "step", "verdict"}
)


@dataclass(frozen=True, slots=True)
class RecordField:
    """One value of one kind of record.

    Args:
        kind: The kind's name in a results file.
        path: Path to the value: names of fields and keys of tables.
        leaf: Type of the value.
        options: Allowed words; empty for any.
        share: Whether it is a fraction in [0, 1].
    """

    kind: str
    path: tuple[str, ...]
    leaf: Literal["number", "word", "flag"]
    options: tuple[str, ...] = ()
    share: bool = False

    @property
    def name(self) -> str:
        """The path in the form of a policy."""
        return ".".join(self.path)

    @property
    def doubtful_at_floor(self) -> bool:
        """Whether the value may be due to rounding of the files."""
        return self.path[0] not in FILE_FIELDS

    def of(self, record: Record) -> float | str | bool | None:
        """Return the value in a record; None if it is null or the record does not have the key."""
        value: Any = record
        for step in self.path:
            value = value.get(step) if isinstance(value, dict) else getattr(value, step, None)
        assert value is None or isinstance(value, float | int | str)
        return value


def find(name: str) -> tuple[RecordField, ...]:
    """Return the fields with a name, at most one per kind of record; empty without one.

    >>> "residual" in [field.kind for field in find("epsilon")], [field.kind for field in find("allocation.rank")]
    (True, ['allocation'])
    >>> find("rank_at.0.9")[0].path, find("tail.8.fro")[0].path, find("s")
    (('rank_at', '0.9'), ('tail', '8', 'fro'), ())
    """
    first, *rest = name.split(".")
    if first in KINDS and (field := _resolve(first, KINDS[first], (), tuple(rest), False)):
        return (field,)
    # ``end`` has counts; its norms repeat those of the layers' records, so they need their full name.
    kinds = [kind for kind in KINDS if kind != "end"]
    fields = (_resolve(kind, KINDS[kind], (), (first, *rest), False) for kind in kinds)
    return tuple(field for field in fields if field is not None)


def similar(name: str) -> str | None:
    """Return a similar field name; None without one.

    >>> similar("epsilom"), similar("enrgy.16")
    ('epsilon', 'energy.16')
    """
    first, dot, rest = name.partition(".")
    if close := difflib.get_close_matches(first, _list_first_names(), n=1):
        guess = f"{close[0]}{dot}{rest}"
        if find(guess):
            return guess
    close = difflib.get_close_matches(name, _list_first_names(), n=1)
    return close[0] if close and find(close[0]) else None


@cache
def _list_first_names() -> tuple[str, ...]:
    names = (name for kind in KINDS.values() for name in (*kind.model_fields, *_list_properties(kind)))
    return tuple(dict.fromkeys((*KINDS, *names)))


def _resolve(kind: str, hint: Any, done: tuple[str, ...], rest: tuple[str, ...], share: bool) -> RecordField | None:
    """Return the field at the end of a path through the types of the records; None without one.

    Args:
        kind: The kind's name.
        hint: The type reached.
        done: The path up to it.
        rest: The keys that are left.
        share: Whether the value is a fraction, as far as the path is known.
    """
    hint, share = _strip_annotation(hint, share)
    if isinstance(hint, type) and issubclass(hint, Record):
        if not rest or rest[0] == "record":
            return None
        step, *further = rest
        if step in hint.model_fields:
            info = hint.model_fields[step]
            inner, marked = info.annotation, share or "share" in info.metadata
        elif step in _list_properties(hint):
            inner, marked = _list_properties(hint)[step], share
        else:
            return None
        return _resolve(kind, inner, (*done, step), tuple(further), marked)
    if get_origin(hint) is dict:
        # A key may contain dots, as in rank_at.0.9.
        splits: Iterator[RecordField | None] = (
            _resolve(kind, get_args(hint)[1], (*done, ".".join(rest[:n])), rest[n:], share)
            for n in range(1, len(rest) + 1)
        )
        return next((field for field in splits if field is not None), None)
    return None if rest else _make_leaf(kind, hint, done, share)


def _make_leaf(kind: str, hint: Any, path: tuple[str, ...], share: bool) -> RecordField | None:
    if get_origin(hint) is Literal:
        return RecordField(kind, path, "word", tuple(map(str, get_args(hint))))
    if hint is bool:
        return RecordField(kind, path, "flag")
    if hint in {int, float}:
        return RecordField(kind, path, "number", share=share)
    return RecordField(kind, path, "word") if hint is str else None


def _strip_annotation(hint: Any, share: bool) -> tuple[Any, bool]:
    """Return a type without ``| None`` and its annotations, and whether it is annotated as a fraction.

    The type is None for a union of several types.
    """
    if get_origin(hint) in {Union, types.UnionType}:
        kept = [part for part in get_args(hint) if part is not type(None)]
        return _strip_annotation(kept[0], share) if len(kept) == 1 else (None, share)
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return _strip_annotation(inner, share or "share" in marks)
    return hint, share


@cache
def _list_properties(kind: type[Record]) -> dict[str, Any]:
    """Return the derived values of a kind of record, such as ``relative``, with their types."""
    members = {name: value for cls in kind.__mro__ for name, value in vars(cls).items() if isinstance(value, property)}
    declared = {
        name: value for name, value in members.items() if value.fget and value.fget.__module__.startswith("lora_diag")
    }
    hints = {}
    for name, value in declared.items():
        with suppress(NameError):  # a type that is imported for type checking alone: not a value for a policy
            hints[name] = get_type_hints(value.fget, include_extras=True).get("return")
    return hints


# Reasons of left-out tensors that need no record: 1-D tensors have no rank; of the others the remaining rows are
# measured.
NO_CANDIDATES = frozenset({"vector", "added_rows", "removed_rows", "empty"})

# Kinds that a command of another name writes.
_COMMAND_BY_KIND = {
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
        state: ``same``, ``changed`` (also if it can no longer be read), or ``unknown`` if it was not found or has no
            fingerprint.
        why: Reason for another state than ``same``; for equal inputs, their path if different.
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
        if kind == "end" or self.results.run.command == _COMMAND_BY_KIND.get(kind, kind):
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
    """Read a results file and check it against its last line: the hash of its lines and their number.

    Raises:
        InputError: The file cannot be read, was edited, or records are missing.
    """
    results = read_results(path)
    return check_source(Source(str(path), results, sealed=results.end is None or bool(results.end.sha256)))


def check_source(source: Source) -> Source:
    """Return the source after a check of the totals in its last line, which its hash does not cover.

    Raises:
        InputError: It has other totals.
    """
    results = source.results
    if results.end is not None:
        actual = totals(results.layers, results.left_out)
        for name in ("layers", "left_out", *(("fro", "base_fro") if results.layers else ())):
            total, stated = getattr(actual, name), getattr(results.end, name)
            if total != stated and (total is None or stated is None or not math.isclose(total, stated)):
                raise InputError(
                    f"{source.path}: has {_format_total(total)} {name}, but its last line states "
                    f"{_format_total(stated)}, so it was truncated or edited; measure again"
                )
    return source


def _format_total(value: float | None) -> str:
    return "no" if value is None else f"{value:.9g}"


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
    norm_by_layer = {record.layer: getattr(record, "fro", None) for record in records}
    subjects: list[Subject] = []
    for values, key in _pair_with_stable_keys(list(by_group) or [()]):
        names = [f"{name} {value}" for name, value in zip(_group_fields(cls), values, strict=True)]
        group = ", ".join((*prefix, *names))
        of_group = by_group.get(values, [])
        subjects += [Subject(record.layer, group, key, record, fro=norm_by_layer[record.layer]) for record in of_group]
        missing = layers.keys() - {record.layer for record in of_group}
        subjects += [
            Subject(layer, group, key, None, "the file has no record of it", norm_by_layer[layer])
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


def value_of(field: RecordField, subject: Subject, floor: str = "inconclusive") -> tuple[float | str | None, str]:
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
    return f"loradiag {_COMMAND_BY_KIND.get(kind, kind)}"


def _explain_null(field: RecordField, subject: Subject) -> str:
    if subject.fro == 0:
        return f"the update is zero, so {field.name} does not exist"
    table = getattr(subject.record, field.path[0], None)
    if isinstance(table, dict) and field.path[1] not in table:
        return f"{field.name} was not measured; the record has {', '.join(table)}"
    return f"{field.name} is null: it was not computed"
