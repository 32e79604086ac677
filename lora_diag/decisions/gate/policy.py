"""A policy: the conditions for releasing a checkpoint. Each table of its file is a model that validates its keys.

Unknown keys are errors: a misspelled key would otherwise silently remove a rule.
"""

from __future__ import annotations

import difflib
import re
from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lora_diag.decisions.gate.fields import LAYER_KINDS, find
from lora_diag.decisions.gate.grammar import Condition, Value, parse
from lora_diag.decisions.gate.tables import QUOTED, Pattern, PlacedError, Share, Table, Text, is_a
from lora_diag.errors import UsageError
from lora_diag.records.names import depth_of, module_type_of
from lora_diag.records.run import Reason

# Policies included in the package.
READY = ("adapter-basic", "full-ft-drift", "merge")
# Fraction of ‖ΔW‖² in one direction above which a layer has a spike. It is 0.04 to 0.41 in the layers of
# sample_checkpoints/ and 0.88 in the head, which a byte-level model can change as a whole.
SPIKE = 0.9

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}

Severity = Literal["error", "warning"]
Level = Literal["error", "warning", "off"]
Fixed = Annotated[Literal["error"], is_a("always an error (a waiver names the layers that may pass)")]
Fingerprint = Annotated[
    str, Field(pattern="^[0-9a-f]{32}$"), is_a("a fingerprint of 32 hexadecimal digits, as gate prints them")
]
Depth = Annotated[
    list[Annotated[int, Field(ge=0)]],
    Field(min_length=2, max_length=2),
    is_a("the first and the last block, such as [0, 11]"),
]
Where = Annotated[dict[str, int | Value], is_a('a table of fields and their values, such as {role = "adapter"}')]


def read_age(text: object) -> timedelta:
    """Parse a maximum age: a whole number with ``h``, ``d`` or ``w``.

    >>> read_age("2w").days
    14

    Raises:
        ValueError: The text is not an age.
    """
    match = re.fullmatch(r"([0-9]{1,5})([hdw])", str(text))
    if match is None:
        raise ValueError(f"'{text}' is not an age; give hours, days or weeks, such as 12h, 7d or 2w")
    return int(match[1]) * _UNITS[match[2]]


class Criterion(Table):
    """Common fields of rules and comparisons with a baseline.

    Args:
        layers: The name contains a match; None for all names.
        exclude: The name contains none.
        type: The whole module type matches, such as ``self_attn.q_proj``.
        depth: First and last block.
        where: Required values of fields of the record, such as role = "adapter".
        severity: Severity of a failure.
        message: The fix for a failure.
        floor: ``ignore`` also judges layers that the files do not resolve.
        coverage: Minimum fraction of the selected subjects that must be judged; None for that of the policy.
        line: Its line in the file.
    """

    layers: Pattern | None = None
    exclude: Pattern | None = None
    type: Pattern | None = None
    depth: Depth | None = None
    where: Where = Field({})
    severity: Severity = "error"
    message: Text = ""
    floor: Literal["inconclusive", "ignore"] = "inconclusive"
    coverage: Share | None = None
    line: int = Field(1, exclude=True)

    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """Its name in reports and waivers."""

        @property
        def field(self) -> str:
            """Name of the judged field."""

    @field_validator("depth")
    @classmethod
    def _check_depth(cls, depth: Depth | None) -> Depth | None:
        if depth and depth[0] > depth[1]:
            raise ValueError(f"depth {depth} selects nothing; give the first block before the last")
        return depth

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: Where) -> Where:
        for name, value in where.items():
            parse(f"{name} == " + (f'"{value}"' if isinstance(value, str) else str(value).lower()))
        return where

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        selecting = sorted(self.model_fields_set & {"layers", "exclude", "type", "depth"})
        if selecting and not any(item.kind in LAYER_KINDS for item in find(self.field)):
            key = selecting[0]
            raise PlacedError(f"{self.field} is a value of the whole run, so {key} does not apply", key)
        return self

    def selects(self, layer: str) -> bool:
        """Return whether a name is selected."""
        depth = depth_of(layer)
        return (
            (self.layers is None or self.layers.search(layer) is not None)
            and (self.exclude is None or self.exclude.search(layer) is None)
            and (self.type is None or self.type.fullmatch(module_type_of(layer)) is not None)
            and (self.depth is None or (depth is not None and self.depth[0] <= depth <= self.depth[1]))
        )


class Rule(Criterion):
    """A condition.

    Args:
        name: Its name in reports and waivers.
        require: The condition.
    """

    name: Annotated[
        str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$"), is_a("text of letters, digits, '.', '_' and '-'")
    ]
    require: Annotated[Condition, BeforeValidator(parse), QUOTED]

    @property
    def field(self) -> str:
        """Name of the judged field."""
        return self.require.name

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in Checks.names() or name.startswith("baseline.") or name in {"about", "waiver"}:
            raise ValueError(f"'{name}' is a built-in name; choose another")
        return name


class Regression(Criterion):
    """A field that may not be worse than in the baseline.

    Args:
        field: Name of the field.
        worse: The direction that is worse.
        tolerance: Allowed change for the worse, in the field's unit; with a ``%``, as a fraction of the stored value.
    """

    field: Text
    worse: Literal["higher", "lower"]
    tolerance: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?%$")],
        is_a('a number from 0 up, or a percentage of the stored value such as "5%"'),
    ] = 0.0

    @property
    def name(self) -> str:
        """Its name in reports and waivers."""
        return f"baseline.{self.field}"

    @field_validator("field")
    @classmethod
    def _check_field(cls, name: str) -> str:
        if all(item.leaf != "number" for item in find(name)):
            parse(f"{name} <= 0.5")  # raises an error that describes the fault of a name
            raise ValueError(f"{name} is not a number")
        return name

    def allowed_increase(self, before: float) -> float:
        """Return by how much a value may be worse than a stored one."""
        if isinstance(self.tolerance, str):
            return float(self.tolerance.rstrip("%")) / 100 * abs(before)
        return self.tolerance


class Waiver(Table):
    """Layers that may break a rule until a date, with the reason."""

    rule: Text
    layers: Pattern
    reason: Annotated[str, Field(pattern=r"\S"), is_a("text in quotes that gives the reason")]
    expires: Annotated[date, is_a("a date without quotes, such as 2027-01-31")]
    line: int = Field(1, exclude=True)

    @field_validator("rule")
    @classmethod
    def _check_rule(cls, rule: str) -> str:
        if rule == "finished":
            raise ValueError("an unfinished run cannot be waived; continue it with --resume")
        if rule == "inputs":
            raise ValueError("results of other inputs cannot be waived; measure again")
        return rule

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: re.Pattern[str]) -> re.Pattern[str]:
        if not layers.pattern:
            raise ValueError('an empty pattern waives every layer; if that is meant, write ".*"')
        return layers

    def covers(self, rule: str, layer: str) -> bool:
        """Return whether it applies to a rule and a layer."""
        return self.rule == rule and self.layers.search(layer) is not None


class Checks(Table):
    """Built-in checks with their severity.

    Args:
        spike_above: Fraction of ‖ΔW‖² in one direction that the check ``spike`` allows.
    """

    inputs: Fixed = "error"
    finished: Fixed = "error"
    non_finite: Fixed = "error"
    mismatch: Level = "error"
    complete: Level = "error"
    base: Level = "error"
    dead: Level = "error"
    missing: Level = "error"
    unused_rank: Level = "warning"
    spike: Level = "warning"
    unresolved: Level = "warning"
    spike_above: Annotated[
        float,
        Field(gt=0, lt=1, allow_inf_nan=False),
        is_a("a number between 0 and 1, which are excluded, as the check would have no effect"),
    ] = SPIKE

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the checks."""
        return [name for name in cls.model_fields if name != "spike_above"]


class Coverage(Table):
    """Required coverage of the selected subjects.

    Args:
        by: Whether coverage is a fraction of ‖Δ‖² or of layers.
        minimum: Minimum coverage.
        left_out: Reasons that excuse a tensor without a record.
    """

    by: Literal["energy", "layers"] = "energy"
    minimum: Share = 1.0
    left_out: Annotated[list[Reason], is_a(f"a list out of {', '.join(get_args(Reason))}")] = Field([])

    @field_validator("left_out")
    @classmethod
    def _check_left_out(cls, reasons: list[Reason]) -> list[Reason]:
        if "non_finite" in reasons:
            raise ValueError("non_finite layers cannot be left out; waive them by name")
        return reasons


class Inputs(Table):
    """Required inputs of results.

    Args:
        base: Fingerprint of BASE.
        tuned: Fingerprint of TUNED.
        adapter: Fingerprint of the adapter.
        max_age: Maximum age of results.
        baseline: Results to compare with, unless others are given; paths are relative to the policy's folder.
    """

    base: Fingerprint | None = None
    tuned: Fingerprint | None = None
    adapter: Fingerprint | None = None
    max_age: Annotated[timedelta, BeforeValidator(read_age)] | None = None
    baseline: Annotated[list[Text], is_a("a list of results files")] = Field([])

    @property
    def pins(self) -> tuple[tuple[str, str], ...]:
        """Roles of inputs with their pinned fingerprints."""
        roles = (("base", self.base), ("tuned", self.tuned), ("adapter", self.adapter))
        return tuple((role, value) for role, value in roles if value is not None)


class Policy(Table):
    """A policy; see docs/reference/gate.md.

    Args:
        title: Its purpose.
        about: Required subject of some of the results: ``adapter``, or ``tuned`` for a full fine-tune; None for any.
        rules: Its rules.
        regressions: Comparisons with a baseline.
        checks: The built-in checks.
        inputs: Required inputs.
        coverage: Required coverage.
        waivers: The waivers.
        path: Its path.
        ready: Whether it is part of the package, so that users cannot edit its lines.
    """

    title: Text = ""
    about: Literal["adapter", "tuned"] | None = None
    rules: list[Rule] = Field([], alias="rule")
    regressions: list[Regression] = Field([], alias="baseline")
    checks: Checks = Checks()
    inputs: Inputs = Inputs()
    coverage: Coverage = Coverage()
    waivers: list[Waiver] = Field([], alias="waiver")
    path: str = Field("", exclude=True)
    ready: bool = Field(False, exclude=True)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if not self.rules and not self.regressions and "checks" not in self.model_fields_set:
            raise PlacedError("no [[rule]], so nothing could fail; add an empty [checks] for the built-in checks alone")
        names = [rule.name for rule in self.rules]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise PlacedError(f"a second rule is called '{name}'; give each its own name", "rule", i, "name")
        names += [item.name for item in self.regressions] + Checks.names()
        for i, waiver in enumerate(self.waivers):
            if waiver.rule not in names:
                close = difflib.get_close_matches(waiver.rule, sorted(names), n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise PlacedError(f"no rule is called '{waiver.rule}'{hint}", "waiver", i, "rule")
        return self

    def error(self, line: int, text: str) -> UsageError:
        """Return an error in this policy."""
        return UsageError(f"{self.path}: line {line}: {text}")
