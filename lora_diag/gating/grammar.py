"""Parser of the conditions of a policy; nothing is evaluated as code.

    condition = test | share ;
    test      = [ aggregate ], comparison ;
    share     = "share of layers with", comparison, "is", operator, number ;
    comparison = field, operator, value | field, "in", "(", value, { ",", value }, ")" ;
    aggregate = "max" | "min" | "mean" | "median" | "sum" | "p", digit, [ digit ] ;
    field     = word ;                                       (* lora_diag.gating.evidence *)
    operator  = "<=" | "<" | ">=" | ">" | "==" | "!=" ;
    value     = number | "true" | "false" | word | quoted ;
    number    = [ "+" | "-" ], digits, [ ".", digits ], [ "e", [ "+" | "-" ], digits ] ;
    word      = letter, { letter | digit | "_" | "." | "-" } ;
    quoted    = '"', { any character but '"' }, '"' | "'", { any character but "'" }, "'" ;

Without an aggregate every layer must meet the condition. A percentile is the smallest measured value with at least that
percentage of the values at or below it.
"""

from __future__ import annotations

import math
import operator
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from lora_diag.gating.evidence import KINDS, RecordField, find, similar

Value = float | str | bool
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

_TOKEN = re.compile(
    r"""\s*(?:(?P<operator><=|>=|==|!=|<|>)
          |(?P<number>[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![\w.]))
          |(?P<word>[A-Za-z][A-Za-z0-9_.-]*)
          |(?P<mark>[(),])
          |"(?P<double>[^"]*)"|'(?P<single>[^']*)')""",
    re.VERBOSE,
)


class ConditionError(ValueError):
    """A condition that cannot be parsed, does not fit its field, or can never fail or never be met."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An operator and the values to compare with."""

    operator: str
    value: Value | tuple[Value, ...]

    def holds(self, measured: Value) -> bool:
        """Return whether a measured value meets it."""
        return OPERATORS[self.operator](measured, self.value)

    def __str__(self) -> str:
        listed = ", ".join(map(_format_value, self.values))
        return f"{self.operator} ({listed})" if self.operator == "in" else f"{self.operator} {listed}"

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
        aggregate: Aggregate of the values of all layers; empty if every layer is judged separately.
        share: For ``share of layers with``: the comparison for the fraction of the layers that meet ``test``.
    """

    text: str
    name: str
    test: Comparison
    aggregate: str = ""
    share: Comparison | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer is judged separately."""
        return not self.aggregate and self.share is None

    def measure(self, values: Sequence[Value]) -> float:
        """Return the aggregate of the layers' values, at least one.

        >>> parse("p95 epsilon <= 1").measure([float(i) for i in range(1, 101)])
        95.0
        >>> parse("share of layers with limited_by == rank is >= 0.5").measure(["rank", "scale"])
        0.5
        """
        if self.share is not None:
            return sum(map(self.test.holds, values)) / len(values)
        numbers = [float(value) for value in values]
        if self.aggregate in AGGREGATES:
            return AGGREGATES[self.aggregate](numbers)
        percent = int(self.aggregate[1:])
        return sorted(numbers)[max(0, math.ceil(percent * len(numbers) / 100) - 1)]

    def holds(self, measured: float) -> bool:
        """Return whether an aggregate meets the condition."""
        return (self.share or self.test).holds(measured)


def parse(text: str) -> Condition:
    """Parse a condition.

    Raises:
        ConditionError: It cannot be parsed, names an unknown field, or compares incompatible values.

    Example:
        >>> parse("max rank_at.0.9 <= 64").aggregate, str(parse("epsilon <= 0.35").test)
        ('max', '<= 0.35')
    """
    tokens = _tokenize(text)
    is_share = [word for _, word in tokens[:4]] == ["share", "of", "layers", "with"]
    rest = tokens[4:] if is_share else tokens
    aggregate = ""
    if not is_share and rest and _is_aggregate(rest[0][1]) and len(rest) > 1 and rest[1][0] == "word":
        aggregate, rest = rest[0][1], rest[1:]
    name, test, rest = _parse_test(rest, text)
    share = None
    if is_share:
        if not rest or rest[0][1] != "is":
            raise ConditionError(
                f"'{text}': write a comparison such as 'is >= 0.95' after 'share of layers with {name} {test}'"
            )
        share, rest = _parse_comparison(rest[1:], text)
        _check_share(share, "the share of layers", text)
    if rest:
        raise ConditionError(f"'{text}': unexpected '{rest[0][1]}' after '{name} {test}'; remove it")
    condition = Condition(text, name, test, aggregate, share)
    candidates = find(name)
    if not candidates:
        raise ConditionError(_describe_unknown(name))
    problems = [problem for field in candidates if (problem := problem_with(condition, field))]
    if len(problems) == len(candidates):
        raise ConditionError(problems[0])
    return condition


def problem_with(condition: Condition, field: RecordField) -> str | None:
    """Return why a condition is invalid for a field; None if it is valid."""
    test, text = condition.test, condition.text
    if field.leaf == "number":
        if not _is_number(test.value):
            return f"'{text}': {field.name} is a number and cannot be compared with '{_format_value(test.values[0])}'"
        try:
            if field.share and condition.aggregate != "sum":
                _check_share(test, field.name, text)
        except ConditionError as error:
            return str(error)
        return None
    if condition.aggregate:
        return f"'{text}': {field.name} is not a number, so it has no {condition.aggregate}"
    if test.operator not in {"==", "!=", "in"}:
        return f"'{text}': {field.name} is not a number; compare it with ==, != or in"
    if field.leaf == "flag":
        return None if isinstance(test.value, bool) else f"'{text}': {field.name} is true or false"
    for word in test.values:
        if not isinstance(word, str):
            return f"'{text}': {field.name} is a word and cannot be compared with {_format_value(word)}"
        if field.options and word not in field.options:
            return f"'{text}': {field.name} is never '{word}'; it is one of {', '.join(field.options)}"
    if field.options and set(field.options) <= set(test.values):
        return f"'{text}': {field.name} is always one of these, so the condition has no effect"
    return None


def _tokenize(text: str) -> Tokens:
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ConditionError(f"'{text}': cannot be parsed from '{text[position:].strip()}' on")
        kind = match.lastgroup or ""
        tokens.append(("quoted" if kind in {"double", "single"} else kind, match[kind]))
        position = match.end()
    return tokens


def _parse_test(tokens: Tokens, text: str) -> tuple[str, Comparison, Tokens]:
    if not tokens or tokens[0][0] != "word":
        raise ConditionError(f"'{text}': write a field, an operator and a value, such as 'epsilon <= 0.35'")
    test, rest = _parse_comparison(tokens[1:], text)
    return tokens[0][1], test, rest


def _parse_comparison(tokens: Tokens, text: str) -> tuple[Comparison, Tokens]:
    if [word for _, word in tokens[:2]] == ["in", "("]:
        return _parse_membership(tokens[2:], text)
    if len(tokens) < 2 or tokens[0][0] != "operator" or tokens[1][0] in {"operator", "mark"}:
        raise ConditionError(f"'{text}': an operator ({', '.join(OPERATORS)}) and a value are missing")
    return Comparison(tokens[0][1], _parse_value(tokens[1], text)), tokens[2:]


def _parse_membership(tokens: Tokens, text: str) -> tuple[Comparison, Tokens]:
    values: list[Value] = []
    while len(tokens) >= 2 and tokens[0][0] not in {"mark", "operator"}:
        values.append(_parse_value(tokens[0], text))
        mark, tokens = tokens[1], tokens[2:]
        if mark == ("mark", ")"):
            return Comparison("in", tuple(values)), tokens
        if mark != ("mark", ","):
            break
    raise ConditionError(f"'{text}': write the words after 'in' as (ok, coarse)")


def _parse_value(token: tuple[str, str], text: str) -> Value:
    kind, word = token
    if kind != "number":
        return {"true": True, "false": False}.get(word, word) if kind == "word" else word
    number = float(word)
    if not math.isfinite(number):
        raise ConditionError(f"'{text}': {word} is too large for a number")
    return number


def _format_value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else value


def _is_aggregate(word: str) -> bool:
    return word in AGGREGATES or re.fullmatch(r"p[1-9][0-9]?", word) is not None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float)


def _check_share(test: Comparison, description: str, text: str) -> None:
    """Refuse a threshold outside [0, 1], and a condition that every fraction meets or none does.

    Raises:
        ConditionError: The condition is invalid.
    """
    if not _is_number(test.value):
        raise ConditionError(
            f"'{text}': {description} is a number and cannot be compared with '{_format_value(test.values[0])}'"
        )
    if not 0 <= test.value <= 1:
        raise ConditionError(f"'{text}': {description} lies between 0 and 1; {test.value:g} cannot be its limit")
    ends = [test.holds(0.0), test.holds(1.0), test.holds(0.5)]
    if test.operator not in {"==", "!="} and (all(ends) or not any(ends)):
        verb = "always" if all(ends) else "never"
        raise ConditionError(f"'{text}': {description} lies between 0 and 1, so this is {verb} true and has no effect")


def _describe_unknown(name: str) -> str:
    first = name.partition(".")[0]
    if guess := similar(name):
        if guess != name:
            return f"no record has a field '{name}'; did you mean '{guess}'?"
    elif any(first in kind.model_fields for kind in KINDS.values()):
        return f"'{name}' is not one value: name one in it, such as energy.8, tail.8.fro or resolution.verdict"
    return f"no record has a field '{name}'; docs/reference/gate.md lists them"
