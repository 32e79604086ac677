"""The values that a rule can name: every number, word and flag of every kind of record.

They are derived from the definitions of the records, so new kinds of records need no change here. A name is the dotted
path to the value: ``epsilon``, ``energy.8``, ``rank_at.0.9``, ``tail.8.fro``, ``resolution.verdict``; prefixed by the
kind if several kinds have it: ``spectrum.fro``, ``end.left_out``.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_diag.catalog import record_kinds
from lora_diag.records import End, LayerRecord
from lora_diag.records.base import Record

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
class Field:
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


def find(name: str) -> tuple[Field, ...]:
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
    """Return a similar field name.

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


def _resolve(kind: str, hint: Any, done: tuple[str, ...], rest: tuple[str, ...], share: bool) -> Field | None:
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
        splits: Iterator[Field | None] = (
            _resolve(kind, get_args(hint)[1], (*done, ".".join(rest[:n])), rest[n:], share)
            for n in range(1, len(rest) + 1)
        )
        return next((field for field in splits if field is not None), None)
    return None if rest else _make_leaf(kind, hint, done, share)


def _make_leaf(kind: str, hint: Any, path: tuple[str, ...], share: bool) -> Field | None:
    if get_origin(hint) is Literal:
        return Field(kind, path, "word", tuple(map(str, get_args(hint))))
    if hint is bool:
        return Field(kind, path, "flag")
    if hint in {int, float}:
        return Field(kind, path, "number", share=share)
    return Field(kind, path, "word") if hint is str else None


def _strip_annotation(hint: Any, share: bool) -> tuple[Any, bool]:
    """Return a type without ``| None`` and its annotations, and whether it is annotated as a fraction."""
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
