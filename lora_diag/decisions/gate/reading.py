"""TOML → policy, checked to the line.

Whatever is not understood is an error: a misspelled key would otherwise be a rule that is not there.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, cast, get_args

from lora_diag.decisions.gate.fields import LAYER_KINDS, find
from lora_diag.decisions.gate.grammar import ConditionError, Value, parse
from lora_diag.decisions.gate.lines import line_of
from lora_diag.decisions.gate.policy import CHECKS, FIXED, READY, SPIKE, Policy, Regression, Rule, Selector, Waiver
from lora_diag.decisions.gate.tables import Table, is_finite
from lora_diag.errors import UsageError
from lora_diag.records.run import Reason

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def read_age(text: str) -> timedelta:
    """Read how old results may be: a whole number with ``h``, ``d`` or ``w``.

    >>> read_age("2w").days
    14

    Raises:
        ValueError: It is something else.
    """
    found = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if found is None:
        raise ValueError(f"'{text}': an age is a number of hours, days or weeks, such as 12h, 7d or 2w")
    return int(found[1]) * _UNITS[found[2]]


def read_policy(path: Path | str, content: str | None = None) -> Policy:
    """Read a policy.

    Args:
        path: Its file.
        content: Its text; read from the file if it is not given.

    Raises:
        UsageError: It cannot be read or is not valid; the message names the line.
    """
    if content is None:
        try:
            content = Path(path).read_bytes().decode("utf-8")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "is not UTF-8 text"
            own = f"; the package has one of this name: --policy {path}" if str(path) in READY else ""
            raise UsageError(f"{path}: cannot be read as a policy: {why}{own}") from error
    if content.startswith('{"record"'):
        raise UsageError(f"{path}: holds results and is no policy; the order is: loradiag gate POLICY RESULTS...")
    content = content.replace("\r\n", "\n")
    try:
        document = tomllib.loads(content)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        place = f"line {at[1]}" if at else f"line {content.count(chr(10)) + 1}"
        raise UsageError(f"{path}: {place}: is not TOML: {str(error)[: at.start() if at else None]}") from error
    return _Reader(str(path), content).policy(document)


class _Reader:
    """Turns the tables of a document into a policy, or says which line is wrong."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text

    def error(self, place: tuple[str | int, ...], text: str) -> UsageError:
        return UsageError(f"{self.path}: line {self.line(*place)}: {text}")

    def line(self, *place: str | int) -> int:
        return line_of(self.text, place)

    def policy(self, document: dict[str, Any]) -> Policy:
        top = Table(document, (), self.error)
        title = top.word("title", "")
        about = top.choice("about", ("adapter", "tuned"), None)
        rules = tuple(self.rule(table) for table in top.tables("rule"))
        regressions = tuple(self.regression(table) for table in top.tables("baseline"))
        checks, spike = self.checks(top.table("checks"))
        pins, max_age = self.inputs(top.table("inputs"))
        coverage = top.table("coverage")
        by = coverage.choice("by", ("energy", "layers"), "energy")
        minimum = coverage.share("minimum", 1.0)
        left_out = coverage.words("left_out", get_args(Reason))
        coverage.close()
        self.unique([rule.name for rule in rules])
        names = {rule.name for rule in rules} | {item.name for item in regressions} | set(checks)
        waivers = tuple(self.waiver(table, names) for table in top.tables("waiver"))
        top.close()
        if not rules and not regressions and "checks" not in document:
            raise self.error(
                (), "no [[rule]]: nothing could fail; an empty [checks] asks for the built-in checks alone"
            )
        if "non_finite" in left_out:
            raise self.error(("coverage", "left_out"), "non_finite layers cannot be left out; waive them by name")
        return Policy(
            path=self.path,
            title=title,
            rules=rules,
            regressions=regressions,
            waivers=waivers,
            checks=checks,
            spike=spike,
            by=by,
            minimum=minimum,
            left_out=frozenset(left_out),
            about=about,
            pins=pins,
            max_age=max_age,
        )

    def rule(self, table: Table) -> Rule:
        name = self.name(table)
        try:
            condition = parse(table.word("require"))
        except ConditionError as error:
            raise table.error("require", str(error)) from error
        return Rule(name=name, condition=condition, **self.common(table, condition.name))

    def regression(self, table: Table) -> Regression:
        field_name = table.word("field")
        if not (found := find(field_name)) or all(item.leaf != "number" for item in found):
            try:
                parse(f"{field_name} <= 0.5")
            except ConditionError as error:
                raise table.error("field", str(error)) from error
            raise table.error("field", f"{field_name} is no number")
        worse = table.choice("worse", ("higher", "lower"))
        tolerance, relative = self.tolerance(table)
        common = self.common(table, field_name)
        name = f"baseline.{field_name}"
        return Regression(name=name, worse=worse, tolerance=tolerance, relative=relative, **common)

    def tolerance(self, table: Table) -> tuple[float, bool]:
        value = table.value("tolerance", 0.0)
        if isinstance(value, str) and (percent := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", value)):
            return float(percent[1]) / 100, True
        if not is_finite(value) or value < 0:
            raise table.error("tolerance", 'a tolerance is a number from 0 up, or a share of the stored value: "5%"')
        return float(value), False

    def common(self, table: Table, field_name: str) -> dict[str, Any]:
        """Read what rules and baseline entries have in common."""
        layers, exclude, module = (table.pattern(key) for key in ("layers", "exclude", "type"))
        selector = Selector(layers, exclude, module, self.depth(table), self.where(table))
        if not any(item.kind in LAYER_KINDS for item in find(field_name)):
            for key in ("layers", "exclude", "type", "depth"):
                if key in table.values:
                    raise table.error(key, f"{field_name} is a value of the whole run; {key} selects nothing of it")
        common = {
            "field": field_name,
            "selector": selector,
            "severity": table.choice("severity", ("error", "warning"), "error"),
            "message": table.word("message", ""),
            "floor": table.choice("floor", ("inconclusive", "ignore"), "inconclusive"),
            "coverage": table.share("coverage", None),
            "line": self.line(*table.place),
        }
        table.close()
        return common

    def name(self, table: Table) -> str:
        name = table.word("name")
        if not _NAME.fullmatch(name):
            raise table.error("name", f"'{name}': a name is letters, digits, '.', '_' and '-'")
        if name in CHECKS or name.startswith("baseline.") or name in {"about", "waiver"}:
            raise table.error("name", f"'{name}' is the name of something built in; choose another")
        return name

    def depth(self, table: Table) -> tuple[int, int] | None:
        value = table.value("depth", None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or any(type(n) is not int or n < 0 for n in value):
            raise table.error("depth", "depth is the first and the last block, such as [0, 11]")
        if value[0] > value[1]:
            raise table.error("depth", f"depth {value} selects nothing: the first block comes first")
        return value[0], value[1]

    def where(self, table: Table) -> tuple[tuple[str, Value], ...]:
        wanted = table.value("where", {})
        if not isinstance(wanted, dict):
            raise table.error("where", 'where is a table of fields and their values, such as {role = "adapter"}')
        for name, value in wanted.items():
            shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
            try:
                parse(f"{name} == {shown}")
            except ConditionError as error:
                raise table.error("where", str(error)) from error
        return tuple((name, value) for name, value in wanted.items())

    def checks(self, table: Table) -> tuple[dict[str, str], float]:
        found: dict[str, str] = {}
        for name, usual in CHECKS.items():
            found[name] = table.choice(name, ("error", "warning", "off"), usual)
            if name in FIXED and found[name] != "error":
                raise table.error(name, f"{name} is always an error; a waiver names the layers that may pass")
        spike = table.share("spike_above", SPIKE)
        if spike in {0.0, 1.0}:
            raise table.error("spike_above", "spike_above lies between 0 and 1; at either end the check says nothing")
        table.close()
        return found, cast(float, spike)

    def inputs(self, table: Table) -> tuple[tuple[tuple[str, str], ...], timedelta | None]:
        pins = []
        for role in ("base", "tuned", "adapter"):
            if (value := table.word(role, "")) or role in table.values:
                if not _FINGERPRINT.fullmatch(value):
                    raise table.error(role, "a fingerprint is 32 hexadecimal digits, as gate prints them")
                pins.append((role, value))
        age = table.word("max_age", "")
        try:
            max_age = read_age(age) if "max_age" in table.values else None
        except ValueError as error:
            raise table.error("max_age", str(error)) from error
        table.close()
        return tuple(pins), max_age

    def waiver(self, table: Table, names: set[str]) -> Waiver:
        rule = table.word("rule")
        if rule not in names:
            close = difflib.get_close_matches(rule, sorted(names), n=1)
            meant = f"; did you mean '{close[0]}'?" if close else ""
            raise table.error("rule", f"no rule is called '{rule}'{meant}")
        if rule == "finished":
            raise table.error("rule", "an unfinished run cannot be waived; continue it with --resume")
        if rule == "inputs":
            raise table.error("rule", "results of other inputs cannot be waived; measure again")
        layers = table.pattern("layers", needed=True)
        reason = table.word("reason")
        if not reason.strip():
            raise table.error("reason", "a waiver needs its reason")
        expires = table.value("expires")
        if not isinstance(expires, date) or isinstance(expires, datetime):
            raise table.error("expires", "expires is a date without quotes, such as 2027-01-31")
        table.close()
        assert layers is not None
        if not layers.pattern:
            raise table.error("layers", 'an empty pattern waives every layer; if that is meant, write ".*"')
        return Waiver(rule, layers, reason, expires, self.line(*table.place))

    def unique(self, names: list[str]) -> None:
        for i, name in enumerate(names):
            if name in names[:i]:
                raise self.error(("rule", i, "name"), f"a second rule is called '{name}'; give each its own name")
