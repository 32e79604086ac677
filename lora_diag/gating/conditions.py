"""The conditions of a policy: fields of records, and a parser; nothing is evaluated as code.

    condition = test | share ;
    test      = [ aggregate ], comparison ;
    share     = "share of layers with", comparison, "is", operator, number ;
    comparison = field, operator, value | field, "in", "(", value, { ",", value }, ")" ;
    aggregate = "max" | "min" | "mean" | "median" | "sum" | "p", digit from 1 to 9, [ digit ] ;
    field     = word ;
    operator  = "<=" | "<" | ">=" | ">" | "==" | "!=" ;
    value     = number | "true" | "false" | word | quoted ;
    number    = [ "+" | "-" ], digits, [ ".", digits ], [ ( "e" | "E" ), [ "+" | "-" ], digits ] ;
    word      = letter, { letter | digit | "_" | "." | "-" } ;
    quoted    = '"', { any character but '"' }, '"' | "'", { any character but "'" }, "'" ;

Without an aggregate or a share every layer must meet the condition. A percentile is the smallest
measured value with at least that percentage of the values at or below it.

A field is a number, a word or a flag of any kind of record. Fields are derived from the definitions
of the records, so new kinds of records need no change here. Their name is the dotted path to the
value: ``epsilon``, ``energy.8``, ``rank_at.0.9``, ``tail.8.fro``, ``resolution.verdict``; prefixed
by the kind if several kinds of the results have it, and always for ``end``: ``spectrum.fro``,
``end.left_out``.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import statistics
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_diag.catalog import record_kinds
from lora_diag.records import End, LayerRecord
from lora_diag.records.base import Record, value_at

Value = float | str | bool

KINDS: dict[str, type[Record]] = {**record_kinds(), "end": End}
# Kinds of which a layer has records, by their name in a results file.
LAYER_KINDS = frozenset(name for name, kind in KINDS.items() if issubclass(kind, LayerRecord))

# Fields of the stored bytes or of the run, independent of the rounding of the update. Every other
# field of a record with a ``resolution`` describes the update, and is doubtful where the files do
# not resolve it.
FILE_FIELDS = frozenset(
    {
        "adapted",
        "adapter",
        "adapter_fro",
        "base_fro",
        "cap",
        "capped_by",
        "complete",
        "cosine_to_base",
        "dtype",
        "fro",
        "gradient_fro",
        "layer",
        "lineage",
        "method",
        "params",
        "rank",
        "relative",
        "resolution",
        "role",
        "source",
        "step",
        "verdict",
    }
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

    def of(self, record: Record) -> Value | None:
        """Return the value in a record; None if it is null or the record does not have the key."""
        value: Value | None = value_at(record, self.name)
        return value


def find(name: str) -> tuple[RecordField, ...]:
    """Return the fields with a name, at most one per kind of record; empty without one.

    >>> (
    ...     "residual" in [field.kind for field in find("epsilon")],
    ...     [field.kind for field in find("allocation.rank")],
    ... )
    (True, ['allocation'])
    >>> find("rank_at.0.9")[0].path, find("tail.8.fro")[0].path, find("s")
    (('rank_at', '0.9'), ('tail', '8', 'fro'), ())
    """
    first, *rest = name.split(".")
    field = _resolve(first, KINDS[first], (), tuple(rest), False) if first in KINDS else None
    if field is not None:
        return (field,)
    # ``end`` has counts; its norms repeat those of the layers' records, so they need their full
    # name.
    kinds = [kind for kind in KINDS if kind != "end"]
    fields = (_resolve(kind, KINDS[kind], (), (first, *rest), False) for kind in kinds)
    return tuple(field for field in fields if field is not None)


def similar(name: str) -> str | None:
    """Return a similar field name; None without one.

    >>> similar("epsilom"), similar("enrgy.16")
    ('epsilon', 'energy.16')
    """
    first, dot, rest = name.partition(".")
    known = dict.fromkeys(KINDS)
    for kind in KINDS.values():
        known.update(dict.fromkeys(_list_members(kind)))
    similar_first = difflib.get_close_matches(first, known, n=1)
    guesses = [f"{close}{dot}{rest}" for close in similar_first]
    guesses += difflib.get_close_matches(name, known, n=1)
    return next(filter(find, guesses), None)


def _resolve(
    kind: str, hint: Any, done: tuple[str, ...], rest: tuple[str, ...], share: bool
) -> RecordField | None:
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
        if not rest or rest[0] not in _list_members(hint):
            return None
        inner, is_share = _list_members(hint)[rest[0]]
        return _resolve(kind, inner, (*done, rest[0]), rest[1:], share or is_share)
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        for n in range(1, len(rest) + 1):
            key = ".".join(rest[:n])  # it may contain dots, as in rank_at.0.9
            field = _resolve(kind, inner, (*done, key), rest[n:], share)
            if field is not None:
                return field
        return None
    if rest:
        return None
    if get_origin(hint) is Literal:
        return RecordField(kind, done, "word", tuple(map(str, get_args(hint))))
    if hint in {int, float}:
        return RecordField(kind, done, "number", share=share)
    if hint is bool:
        return RecordField(kind, done, "flag")
    return RecordField(kind, done, "word") if hint is str else None


def _strip_annotation(hint: Any, share: bool) -> tuple[Any, bool]:
    """Return a type without ``| None`` and its annotations, and whether it is annotated as a
    fraction.

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
def _list_members(kind: type[Record]) -> dict[str, tuple[Any, bool]]:
    """Return the type of each field and property of a kind of record, and whether the field is a
    fraction.
    """
    fields = {name: info for name, info in kind.model_fields.items() if name != "record"}
    members = {name: (info.annotation, "share" in info.metadata) for name, info in fields.items()}
    for cls in kind.__mro__:
        if cls.__module__.startswith("pydantic"):
            continue
        for name, value in vars(cls).items():
            if isinstance(value, property):
                # A type that is imported for type checking alone is not a value for a policy.
                with suppress(NameError):
                    hints = get_type_hints(value.fget, include_extras=True)
                    members[name] = (hints.get("return"), False)
    return members


Tokens = list[tuple[str, str]]

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
    "in": lambda measured, values: measured in values,
}
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "min": min,
    "mean": statistics.fmean,
    "median": statistics.median,
    "sum": math.fsum,
}
_AGGREGATE = re.compile(rf"{'|'.join(AGGREGATES)}|p[1-9][0-9]?")

_TOKEN = re.compile(
    r"""\s*(?:(?P<operator><=|>=|==|!=|<|>)
          |(?P<number>[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![\w.]))
          |(?P<word>[A-Za-z][A-Za-z0-9_.-]*)
          |(?P<mark>[(),])
          |"(?P<double>[^"]*)"|'(?P<single>[^']*)')""",
    re.VERBOSE,
)
_NO_VALUES = frozenset({"operator", "mark"})


class ConditionError(ValueError):
    """A condition that cannot be parsed, names no field, does not fit its field, or can never fail
    or never be met.
    """


@dataclass(frozen=True, slots=True)
class ValueTest:
    """An operator and the values to compare with."""

    operator: str
    value: Value | tuple[Value, ...]

    def holds(self, measured: Value) -> bool:
        """Return whether a measured value meets it."""
        return OPERATORS[self.operator](measured, self.value)

    def __str__(self) -> str:
        listed = ", ".join(map(_format_value, self.values))
        if self.operator == "in":
            listed = f"({listed})"
        return f"{self.operator} {listed}"

    @property
    def values(self) -> tuple[Value, ...]:
        """The values to compare with."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition of a policy.

    Args:
        text: The condition as written.
        name: The field's name.
        test: The comparison for its value.
        aggregate: Aggregate of the values of all layers; empty without one.
        share: For ``share of layers with``: the comparison for the fraction of the layers that meet
            ``test``.
    """

    text: str
    name: str
    test: ValueTest
    aggregate: str = ""
    share: ValueTest | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer is judged separately."""
        return not self.aggregate and self.share is None

    def measure(self, values: Sequence[Value]) -> float:
        """Return the aggregate of the layers' values, or the fraction that meets ``test``; needs at
        least one value.

        >>> parse("p95 epsilon <= 1").measure([float(i) for i in range(1, 101)])
        95.0
        >>> parse("share of layers with limited_by == rank is >= 0.5").measure(["rank", "scale"])
        0.5
        """
        if self.share is not None:
            return sum(map(self.test.holds, values)) / len(values)
        numbers = sorted(map(float, values))
        if self.aggregate in AGGREGATES:
            return AGGREGATES[self.aggregate](numbers)
        return numbers[math.ceil(int(self.aggregate[1:]) * len(numbers) / 100) - 1]

    def holds(self, measured: float) -> bool:
        """Return whether an aggregate, or for ``share of layers with`` a fraction, meets the
        condition.
        """
        return (self.share or self.test).holds(measured)

    def problem_with(self, field: RecordField) -> str | None:
        """Return why the condition is invalid for a field; None if it is valid."""
        problem = self._find_problem(field)
        return problem and f"'{self.text}': {problem}"

    def _find_problem(self, field: RecordField) -> str | None:
        name, test = field.name, self.test
        if field.leaf == "number":
            return _describe_bad_limit(test, name, field.share and self.aggregate != "sum")
        if self.aggregate:
            return f"{name} is not a number, so it has no {self.aggregate}"
        if test.operator not in {"==", "!=", "in"}:
            return f"{name} is not a number; compare it with ==, != or in"
        if field.leaf == "flag":
            return None if isinstance(test.value, bool) else f"{name} is true or false"
        for word in test.values:
            if not isinstance(word, str):
                return f"{name} is a word and cannot be compared with {_format_value(word)}"
            if field.options and word not in field.options:
                return f"{name} is never '{word}'; it is one of {', '.join(field.options)}"
        if field.options and set(field.options) <= set(test.values):
            return f"{name} is always one of these, so the condition has no effect"
        return None


def parse(text: str) -> Condition:
    """Parse a condition.

    Raises:
        ConditionError: It cannot be parsed, names an unknown field, compares incompatible values,
            or has no effect.

    Example:
        >>> parse("max rank_at.0.9 <= 64").aggregate, str(parse("epsilon <= 0.35").test)
        ('max', '<= 0.35')
    """
    rest = _tokenize(text)
    aggregate, share = "", None
    is_share = [word for _, word in rest[:4]] == ["share", "of", "layers", "with"]
    if is_share:
        rest = rest[4:]
    elif [kind for kind, _ in rest[:2]] == ["word", "word"] and _AGGREGATE.fullmatch(rest[0][1]):
        aggregate, rest = rest[0][1], rest[1:]
    if not rest or rest[0][0] != "word":
        raise ConditionError(
            f"'{text}': write a field, an operator and a value, such as 'epsilon <= 0.35'"
        )
    name = rest[0][1]
    test, rest = _parse_comparison(rest[1:], text)
    if is_share:
        if not rest or rest[0][1] != "is":
            raise ConditionError(
                f"'{text}': write a comparison such as 'is >= 0.95' after 'share of layers with "
                f"{name} {test}'"
            )
        share, rest = _parse_comparison(rest[1:], text)
        problem = _describe_bad_limit(share, "the share of layers", is_share=True)
        if problem:
            raise ConditionError(f"'{text}': {problem}")
    if rest:
        raise ConditionError(
            f"'{text}': unexpected '{rest[0][1]}' after '{name} {test}'; remove it"
        )
    condition = Condition(text, name, test, aggregate, share)
    problems = [condition.problem_with(field) for field in find(name)]
    if not problems:
        raise ConditionError(_describe_unknown(name))
    if problems[0] is not None and all(problems):
        raise ConditionError(problems[0])
    return condition


def _tokenize(text: str) -> Tokens:
    tokens, position = [], 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ConditionError(f"'{text}': cannot be parsed from '{text[position:].strip()}' on")
        kind = match.lastgroup or ""
        tokens.append((kind, match[kind]))
        position = match.end()
    return tokens


def _parse_comparison(tokens: Tokens, text: str) -> tuple[ValueTest, Tokens]:
    """Return a comparison and the tokens after it.

    Raises:
        ConditionError: The tokens do not begin with a comparison.
    """
    if [word for _, word in tokens[:2]] == ["in", "("]:
        end = next((i for i, token in enumerate(tokens) if token == ("mark", ")")), 0)
        words, commas = tokens[2:end:2], tokens[3:end:2]
        is_list = len(words) == len(commas) + 1 and set(commas) <= {("mark", ",")}
        if not is_list or any(kind in _NO_VALUES for kind, _ in words):
            raise ConditionError(f"'{text}': write the words after 'in' as (ok, coarse)")
        values = tuple(_parse_value(word, text) for word in words)
        return ValueTest("in", values), tokens[end + 1 :]
    if len(tokens) < 2 or tokens[0][0] != "operator" or tokens[1][0] in _NO_VALUES:
        raise ConditionError(
            f"'{text}': an operator ({', '.join(OPERATORS)}) and a value are missing"
        )
    return ValueTest(tokens[0][1], _parse_value(tokens[1], text)), tokens[2:]


def _parse_value(token: tuple[str, str], text: str) -> Value:
    kind, word = token
    if kind == "word":
        return {"true": True, "false": False}.get(word, word)
    if kind != "number":
        return word
    number = float(word)
    if not math.isfinite(number):
        raise ConditionError(f"'{text}': {word} is too large for a number")
    return number


def _format_value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else value


def _describe_bad_limit(test: ValueTest, name: str, is_share: bool) -> str | None:
    """Return why a comparison of a number, or of a fraction, is invalid or has no effect; None if
    it is valid.
    """
    limit = test.value
    if not isinstance(limit, float):
        return f"{name} is a number and cannot be compared with '{_format_value(test.values[0])}'"
    if is_share and not 0 <= limit <= 1:
        return f"{name} lies between 0 and 1; {limit:g} cannot be its limit"
    results = {test.holds(0.0), test.holds(0.5), test.holds(1.0)}
    if is_share and test.operator not in {"==", "!="} and len(results) == 1:
        verb = "always" if True in results else "never"
        return f"{name} lies between 0 and 1, so this is {verb} true and has no effect"
    return None


def _describe_unknown(name: str) -> str:
    """Return the error about a name that is no field: a similar name, that it is a table, or where
    they are listed.
    """
    first = name.partition(".")[0]
    guess = similar(name)
    if guess not in {None, name}:
        return f"no record has a field '{name}'; did you mean '{guess}'?"
    if guess is None and any(first in kind.model_fields for kind in KINDS.values()):
        return (
            f"'{name}' is not one value: name one in it, such as energy.8, tail.8.fro or "
            "resolution.verdict"
        )
    return (
        f"no record has a field '{name}'; docs/reference/gate.md lists them; --plugins adds "
        "those of plugins"
    )
