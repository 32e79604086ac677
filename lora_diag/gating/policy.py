"""A policy: the conditions for releasing a checkpoint.

Each table of its file is a model that validates its keys.

Unknown keys are errors: a misspelled key would otherwise silently remove a rule. An error in a
table names its line.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)

from lora_diag.errors import UsageError
from lora_diag.gating.conditions import LAYER_KINDS, Condition, RecordField, Value, find, parse
from lora_diag.records.names import depth_of, module_type_of
from lora_diag.records.run import Reason
from lora_diag.records.verdict import Verdict

# Policies included in the package.
READY = ("adapter-basic", "full-ft-drift", "merge")
# Fraction of ‖ΔW‖² in one direction above which a layer has a spike. It is 0.04 to 0.41 in the
# layers of sample_checkpoints/ and 0.88 in the head, which a byte-level model can change as a
# whole.
SPIKE = 0.9

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
# About 1,000 rules. The parser takes the square of the depth of a key, and no key of a policy is
# deeper than 3.
MAX_CHARACTERS, MAX_DEPTH = 100_000, 16
_KEY_PART = r"""(?:[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*\.[ \t]*"""
_DEEP_KEY = re.compile(rf"(?<![\w\\-])(?:{_KEY_PART}){{{MAX_DEPTH}}}", re.ASCII)

KeyPath = tuple[str | int, ...]

# A comment, a string, a bracket or the end of a line of a valid file.
_TOKEN = re.compile(
    r"""#[^\n]*|"{3}(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}|'{3}(?:[^']|'{1,2}(?!'))*'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*'"""
    r"""|[][{}\n]""",
    re.DOTALL,
)


class PlacedError(ValueError):
    """An invalid value, and where it is in a policy.

    Args:
        text: The problem.
        place: Keys and indices that lead to it from the checked table.
    """

    def __init__(self, text: str, *place: str | int) -> None:
        super().__init__(text)
        self.place = place


class PolicyTable(
    BaseModel, frozen=True, strict=True, json_schema_extra={"additionalProperties": False}
):
    """A table of a policy. Excluded fields are not read from the file."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        known = [
            field.alias or name for name, field in cls.model_fields.items() if not field.exclude
        ]
        unknown = [key for key in values if key not in known] if isinstance(values, dict) else []
        if unknown:
            key = unknown[0]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys are {', '.join(known)}"
            raise PlacedError(f"unknown key '{key}'; {hint}", key)
        return values


def describe_valid(description: str) -> WrapValidator:
    """Return a validator that replaces pydantic's message by a description of the valid values."""

    def check(value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(
                f"{info.field_name} is {description}, not {quote_text(value)}"
            ) from None

    return WrapValidator(check)


def quote_text(value: object) -> str:
    """Return a value for a message, with text in quotes."""
    return f'"{value}"' if isinstance(value, str) else str(value)


def _check_text(value: Any, info: ValidationInfo) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{info.field_name} is text in quotes, not {value}")
    return value


def _compile(text: str, info: ValidationInfo) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{info.field_name}: {quote_text(text)} is not a valid regular expression ({error}); "
            "correct it"
        ) from error


# Applied before the validator that reads the text, as in ``Pattern``.
QUOTED = BeforeValidator(_check_text)
PolicyText = Annotated[str, QUOTED]
Share = Annotated[
    float, Field(ge=0, le=1, allow_inf_nan=False), describe_valid("a number from 0 to 1")
]
Pattern = Annotated[re.Pattern[str], BeforeValidator(_compile), QUOTED]
Severity = Literal["error", "warning"]
Level = Literal["error", "warning", "off"]
Fixed = Annotated[
    Literal["error"], describe_valid("always an error (a waiver names the layers that may pass)")
]
Fingerprint = Annotated[
    str,
    Field(pattern="^[0-9a-f]{32}$"),
    describe_valid("a fingerprint of 32 hexadecimal digits, as gate prints them"),
]


def _check_depth(depth: list[int]) -> list[int]:
    if depth[0] > depth[1]:
        raise ValueError(f"depth {depth} selects nothing; give the first block before the last")
    return depth


def _check_where(where: dict[str, int | Value]) -> dict[str, int | Value]:
    for name, value in where.items():
        parse(
            f"{name} == "
            + (f'"{value.replace(chr(34), "")}"' if isinstance(value, str) else str(value).lower())
        )
    return where


def _check_rule_name(name: str) -> str:
    if name in Checks.names() or name.startswith("baseline.") or name in {"about", "waiver"}:
        raise ValueError(f"'{name}' is a built-in name; choose another")
    return name


def _check_number_field(name: str) -> str:
    if all(item.leaf != "number" for item in find(name)):
        parse(f"{name} <= 0.5")  # raises an error that describes the fault of a name
        raise ValueError(f"{name} is not a number")
    return name


def _check_waived_rule(rule: str) -> str:
    fixed = {"finished": "an unfinished run", "inputs": "results of other inputs"}
    if rule in fixed:
        raise ValueError(
            f"{fixed[rule]} cannot be waived; continue the run with --resume, or measure again"
        )
    return rule


def _check_waived_layers(layers: re.Pattern[str]) -> re.Pattern[str]:
    if not layers.pattern:
        raise ValueError('an empty pattern waives every layer; if that is meant, write ".*"')
    return layers


def _check_left_out(reasons: list[Reason]) -> list[Reason]:
    if "non_finite" in reasons:
        raise ValueError("non_finite layers cannot be left out; waive them by name")
    return reasons


Depth = Annotated[
    list[Annotated[int, Field(ge=0)]],
    Field(min_length=2, max_length=2),
    describe_valid("the first and the last block, such as [0, 11]"),
    AfterValidator(_check_depth),
]
Where = Annotated[
    dict[str, int | Value],
    describe_valid('a table of fields and their values, such as {role = "adapter"}'),
    AfterValidator(_check_where),
]


def read_age(text: object) -> timedelta:
    """Parse a maximum age: a whole number with ``h``, ``d`` or ``w``.

    >>> read_age("2w").days
    14

    Raises:
        ValueError: The text is not an age.
    """
    match = re.fullmatch(r"([0-9]{1,5})([hdw])", str(text))
    if match is None:
        raise ValueError(
            f"'{text}' is not an age; give hours, days or weeks, such as 12h, 7d or 2w"
        )
    return int(match[1]) * _UNITS[match[2]]


class Criterion(PolicyTable):
    """Common fields of rules and comparisons with a baseline.

    A condition on names that is None selects all names.

    Args:
        layers: The name contains a match.
        exclude: The name contains none.
        type: The whole module type matches, such as ``self_attn.q_proj``.
        depth: First and last block.
        where: Required values of fields of the record, such as role = "adapter".
        severity: Severity of a failure.
        message: The fix for a failure.
        floor: ``ignore`` also judges layers that the files do not resolve.
        coverage: Minimum coverage of the selected subjects, as in ``Coverage``; None for that of
            the policy.
        line: Its line in the file.
    """

    layers: Pattern | None = None
    exclude: Pattern | None = None
    type: Pattern | None = None
    depth: Depth | None = None
    where: Where = Field({})
    severity: Severity = "error"
    message: PolicyText = ""
    floor: Literal["inconclusive", "ignore"] = "inconclusive"
    coverage: Share | None = None
    line: int = Field(1, exclude=True)

    def selects(self, layer: str) -> bool:
        """Return whether a name is selected."""
        depth = depth_of(layer)
        return (
            (self.layers is None or self.layers.search(layer) is not None)
            and (self.exclude is None or self.exclude.search(layer) is None)
            and (self.type is None or self.type.fullmatch(module_type_of(layer)) is not None)
            and (
                self.depth is None
                or (depth is not None and self.depth[0] <= depth <= self.depth[1])
            )
        )


class PolicyRule(Criterion):
    """A condition.

    Args:
        name: Its name in reports and waivers.
        require: The condition.
    """

    name: Annotated[
        str,
        Field(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$"),
        describe_valid("text of letters, digits, '.', '_' and '-'"),
        AfterValidator(_check_rule_name),
    ]
    require: Annotated[Condition, BeforeValidator(parse, json_schema_input_type=str), QUOTED]

    @property
    def field(self) -> str:
        """Name of the judged field."""
        return self.require.name

    @property
    def allowed(self) -> str:
        """The condition, as reports show it."""
        return self.require.text

    def problem_with(self, field: RecordField) -> str | None:
        """Return why the condition does not fit a field; None if it does."""
        return self.require.problem_with(field)


class Regression(Criterion):
    """A field that may not be worse than in the baseline.

    Args:
        field: Name of the field.
        worse: The direction that is worse.
        tolerance: Allowed change for the worse, in the field's unit; with a ``%``, as a fraction of
            the stored value.
    """

    field: Annotated[PolicyText, AfterValidator(_check_number_field)]
    worse: Literal["higher", "lower"]
    tolerance: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)]
        | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?%$")],
        describe_valid('a number from 0 up, or a percentage of the stored value such as "5%"'),
    ] = 0.0

    @property
    def name(self) -> str:
        """Its name in reports and waivers."""
        return f"baseline.{self.field}"

    @property
    def allowed(self) -> str:
        """The condition, as reports show it where no value could be compared; else see
        ``compare``.
        """
        return f"{self.field} not {self.worse} than in the baseline"

    def problem_with(self, field: RecordField) -> str | None:
        """Return why the comparison does not fit a field; None if it does."""
        return None if field.leaf == "number" else f"{field.kind}.{field.name} is not a number"

    def compare(self, value: float, before: float) -> tuple[bool, str]:
        """Return whether a value is within the tolerance of a stored one, and the condition."""
        tolerance = self.tolerance
        margin = (
            float(tolerance.rstrip("%")) / 100 * abs(before)
            if isinstance(tolerance, str)
            else tolerance
        )
        limit, sign = (before + margin, "<=") if self.worse == "higher" else (before - margin, ">=")
        ok = value <= limit if sign == "<=" else value >= limit
        return ok, f"{self.field} {sign} {limit:.6g} ({before:.6g} in the baseline)"


Demand = PolicyRule | Regression


class Waiver(PolicyTable):
    """Layers that may break a rule until a date, with the reason."""

    rule: Annotated[PolicyText, AfterValidator(_check_waived_rule)]
    layers: Annotated[Pattern, AfterValidator(_check_waived_layers)]
    reason: Annotated[
        str, Field(pattern=r"\S"), describe_valid("text in quotes that gives the reason")
    ]
    expires: Annotated[date, describe_valid("a date without quotes, such as 2027-01-31")]
    line: int = Field(1, exclude=True)

    def covers(self, rule: str, layer: str) -> bool:
        """Return whether it applies to a rule and a layer."""
        return self.rule == rule and self.layers.search(layer) is not None

    def waive(self, verdict: Verdict) -> Verdict:
        """Return a verdict as waived, with the reason."""
        text = f"waived to {self.expires}: {self.reason}"
        return verdict.model_copy(update={"status": "waived", "message": text})

    def report(self, problem: str) -> Verdict:
        """Return a warning about the waiver."""
        return Verdict(
            rule="waiver",
            allowed=f"{self.rule} on {self.layers.pattern}",
            status="warned",
            severity="warning",
            message=f"the waiver of {self.rule} {problem}",
            line=self.line,
        )


class Checks(PolicyTable):
    """Built-in checks: what each requires, and what to do otherwise.

    Values are severities, or ``off``.

    Args:
        inputs: The results are those of the files as they are now. If not: measure again.
        finished: Every run finished. If not: continue it with ``--resume``.
        non_finite: No entry is NaN or Inf. If one is: training diverged or the file is damaged; do
            not ship it.
        mismatch: Every tensor of the adapter fits BASE. If not: give the base it was trained on, or
            correct its target modules.
        complete: The file has factors for every module that the config targets. If not: save the
            adapter again.
        base: BASE is the model that the adapter names. If not: measure it on its own base, or pin
            this one by its fingerprint.
        dead: The update is not zero. If it is: the layer was not trained, or not saved; compare
            target names and the optimizer. An update that underflows to zero where it is served
            counts as zero.
        negative: No adapter has a negative scaling. If one has: it is subtracted, which no training
            does; correct lora_alpha.
        unrelated: TUNED descends from BASE, by the cosine of their weights. If not: give the BASE
            it was trained from.
        missing: Every layer of the baseline has a result. If not: measure all layers.
        unused_rank: Every direction of the rank is used. If not: a smaller rank is the same adapter
            at less cost.
        spike: No direction dominates an update, and none is larger than its base weight. If one
            does: training diverged or has just begun; lower the learning rate.
        unresolved: The files can show the update. If not: save the checkpoint in float32, or judge
            the adapter itself.
        spike_above: Fraction of ‖ΔW‖² in one direction that the check ``spike`` allows.
    """

    inputs: Fixed = "error"
    finished: Fixed = "error"
    non_finite: Fixed = "error"
    mismatch: Level = "error"
    complete: Level = "error"
    base: Level = "error"
    dead: Level = "error"
    negative: Level = "error"
    unrelated: Level = "error"
    missing: Level = "error"
    unused_rank: Level = "warning"
    spike: Level = "warning"
    unresolved: Level = "warning"
    spike_above: Annotated[
        float,
        Field(gt=0, lt=1, allow_inf_nan=False),
        describe_valid(
            "a number between 0 and 1, which are excluded, as the check would have no effect"
        ),
    ] = SPIKE

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the checks."""
        return [name for name in cls.model_fields if name != "spike_above"]


class Coverage(PolicyTable):
    """Required coverage of the selected subjects.

    Args:
        by: Whether coverage is a fraction of ‖Δ‖² or of layers.
        minimum: Minimum coverage.
        left_out: Reasons that excuse a tensor without a record.
    """

    by: Literal["energy", "layers"] = "energy"
    minimum: Share = 1.0
    left_out: Annotated[
        list[Reason],
        describe_valid(f"a list out of {', '.join(get_args(Reason))}"),
        AfterValidator(_check_left_out),
    ] = Field([])


class Inputs(PolicyTable):
    """Required inputs of results; None for any.

    Args:
        base: Fingerprint of BASE.
        tuned: Fingerprint of TUNED.
        adapter: Fingerprint of the adapter.
        max_age: Maximum age of results.
        baseline: Results to compare with, unless others are given; paths are relative to the
            policy's folder.
    """

    base: Fingerprint | None = None
    tuned: Fingerprint | None = None
    adapter: Fingerprint | None = None
    max_age: Annotated[timedelta, BeforeValidator(read_age)] | None = None
    baseline: Annotated[list[PolicyText], describe_valid("a list of results files")] = Field([])

    @property
    def pins(self) -> tuple[tuple[str, str], ...]:
        """Roles of inputs with their pinned fingerprints."""
        pins = {"base": self.base, "tuned": self.tuned, "adapter": self.adapter}
        return tuple((role, pinned) for role, pinned in pins.items() if pinned)


class Policy(PolicyTable):
    """A policy; see docs/reference/gate.md.

    Args:
        title: Its purpose.
        about: Required subject of some of the results: ``adapter``, or ``tuned`` for a full
            fine-tune; None for any.
        rules: Its rules.
        regressions: Comparisons with a baseline.
        checks: The built-in checks.
        inputs: Required inputs.
        coverage: Required coverage.
        waivers: The waivers.
        path: Its path.
        ready: Whether it is part of the package, so that users cannot edit its lines.
    """

    title: PolicyText = ""
    about: Literal["adapter", "tuned"] | None = None
    rules: list[PolicyRule] = Field([], alias="rule")
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
            raise PlacedError(
                "no [[rule]], so nothing could fail; add an empty [checks] for the built-in checks "
                "alone"
            )
        tables: dict[str, Sequence[Demand]] = {"rule": self.rules, "baseline": self.regressions}
        for table, demands in tables.items():
            for i, demand in enumerate(demands):
                selecting = sorted(demand.model_fields_set & {"layers", "exclude", "type", "depth"})
                if selecting and not any(item.kind in LAYER_KINDS for item in find(demand.field)):
                    text = (
                        f"{demand.field} is a value of the whole run, so {selecting[0]} does "
                        "not apply"
                    )
                    raise PlacedError(text, table, i, selecting[0])
        names = [rule.name for rule in self.rules]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise PlacedError(
                    f"a second rule is called '{name}'; give each its own name", "rule", i, "name"
                )
        names += [item.name for item in self.regressions] + Checks.names()
        for i, waiver in enumerate(self.waivers):
            if waiver.rule not in names:
                close = difflib.get_close_matches(waiver.rule, sorted(names), n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise PlacedError(f"no rule is called '{waiver.rule}'{hint}", "waiver", i, "rule")
        return self

    @property
    def demands(self) -> list[Demand]:
        """The rules and the comparisons with a baseline."""
        return [*self.rules, *self.regressions]

    def error(self, demand: Demand, text: str) -> UsageError:
        """Return an error in one of the rules or comparisons, with its line."""
        return UsageError(f"{self.path}: line {demand.line}: {demand.name}: {text}")


def read_policy(path: Path | str, content: str | None = None) -> Policy:
    """Read a policy.

    Args:
        path: Its file.
        content: Its text; default read from the file.

    Raises:
        UsageError: The file cannot be read, is too long, contains results or is invalid; the
            message names the line of an invalid key or value.
    """
    if content is None:
        content = _read_file(path)
    if len(content) > MAX_CHARACTERS:
        raise UsageError(
            f"{path}: has more than {MAX_CHARACTERS:,} characters, too many for a policy; use "
            "fewer rules"
        )
    if content.startswith('{"record"'):
        raise UsageError(
            f"{path}: contains results, not a policy; the order is: loradiag gate POLICY RESULTS..."
        )
    content = content.replace("\r\n", "\n")
    deep = _DEEP_KEY.search(content)
    if deep is not None:
        line = content.count("\n", 0, deep.start()) + 1
        raise UsageError(
            f"{path}: line {line}: has a key of more than {MAX_DEPTH} parts; correct it"
        )
    try:
        policy = Policy.model_validate(tomllib.loads(content))
    except ValidationError as error:
        where, text = _describe_error(error)
        raise UsageError(f"{path}: line {line_of(content, where)}: {text}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        position = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = int(position[1]) if position else content.count("\n") + 1
        problem = str(error)[: position.start() if position else None]
        raise UsageError(f"{path}: line {line}: is not valid TOML: {problem}") from error
    except ValueError as error:  # of Python, for integers of more than 4,300 digits
        raise UsageError(
            f"{path}: is not valid TOML: a number has too many digits; correct it"
        ) from error

    def add_lines(key: str, tables: list[Any]) -> list[Any]:
        lines = lines_of_tables(content, key)
        if len(lines) != len(tables):  # they are written inline, in one statement
            lines = [line_of(content, (key,))] * len(tables)
        return [
            table.model_copy(update={"line": line})
            for table, line in zip(tables, lines, strict=True)
        ]

    return policy.model_copy(
        update={
            "path": str(path),
            "rules": add_lines("rule", policy.rules),
            "regressions": add_lines("baseline", policy.regressions),
            "waivers": add_lines("waiver", policy.waivers),
        }
    )


def _read_file(path: Path | str) -> str:
    """Return the text of a policy file, as far as its length is allowed.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(4 * MAX_CHARACTERS + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        problem = f"cannot be read as a policy: {why}"
        if isinstance(error, FileNotFoundError):
            problem = "no such file"
        fix = "the order is: loradiag gate POLICY RESULTS..."
        if str(path) in READY:
            fix = f"for the built-in policy use --policy {path} (in Python ready_policy)"
        raise UsageError(f"{path}: {problem}; {fix}") from error


def _describe_error(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """Return the path of keys and indices to the first error, and its description."""
    first = error.errors()[0]
    location, value, details = first["loc"], quote_text(first["input"]), first.get("ctx", {})
    key = next(step for step in reversed(("", *location)) if isinstance(step, str))
    match first["type"]:
        case "missing":
            return location, f"{location[0]}: '{key}' is missing"
        case "literal_error":
            expected = details["expected"].replace("'", '"')
        case "list_type":
            expected = f"a list of tables: write [[{key}]]"
        case "model_type" if isinstance(location[-1], int):
            expected = f"a list of tables: write [[{key}]]"
        case "model_type":
            expected = f"a table, [{key}]"
        case _:
            cause = details.get("error")
            if isinstance(cause, PlacedError):
                location = (*location, *cause.place)
            return location, str(cause or first["msg"])
    return location, f"{key} is {expected}, not {value}"


def find_policy(name: str) -> Policy:
    """Return a built-in policy, or that of a file, which is written as a path: with a folder, or
    ending in ``.toml``.

    So no file in the current folder, such as one that a pull request adds, stands for a built-in
    policy.

    Raises:
        UsageError: The name is neither; or as ``read_policy``.
    """
    if name in READY:
        return ready_policy(name)
    if Path(name).name == name and not name.endswith(".toml"):
        raise UsageError(
            f"{name}: is no built-in policy ({', '.join(READY)}); give the path of a policy file, "
            f"such as ./{name}, in the order: loradiag gate POLICY RESULTS..."
        )
    return read_policy(name)


def ready_policy(name: str) -> Policy:
    """Return a built-in policy.

    Raises:
        UsageError: The name is unknown.

    Example:
        >>> ready_policy("adapter-basic").title
        'Is this adapter sound?'
    """
    if name not in READY:
        raise UsageError(f"{name}: is no built-in policy; give one of {', '.join(READY)}")
    return read_policy(name, read_text(f"{name}.toml")).model_copy(update={"ready": True})


def read_text(name: str) -> str:
    """Return the text of a file in the folder of built-in policies."""
    return files("lora_diag.gating").joinpath("policies", name).read_text(encoding="utf-8")


def line_of(text: str, path: KeyPath) -> int:
    r"""Return the line, counted from 1, on which the statement that gives the value at a path
    begins.

    Where no value is at the path, that of the longest part of the path that has one.

    ``tomllib`` gives no positions. The first statements of a file are a valid file; of two such
    files, one statement apart, the longer has the value, and the shorter does not.

    Args:
        text: The text of a valid file.
        path: Keys of tables and indices of arrays.

    Example:
        >>> line_of("a = 1\n\n[[rule]]\nname = 'x'\n", ("rule", 0, "name"))
        4
    """
    document = tomllib.loads(text)
    while not _has_path(document, path):
        path = path[:-1]
    starts = list(_statements(text))

    def has_value(start: int) -> bool:
        return _has_path(tomllib.loads(text[:start]), path)

    with_value = bisect_left(starts, True, key=has_value)
    return text.count("\n", 0, starts[max(with_value - 1, 0)]) + 1


def lines_of_tables(text: str, key: str) -> list[int]:
    r"""Return the lines, counted from 1, of the headers ``[[key]]`` of a valid file.

    >>> lines_of_tables("[[rule]]\nx = '''\n[[rule]]\n'''\n [[ \"rule\" ]] # two\n", "rule")
    [1, 5]
    """
    header = re.compile(rf"""[ \t]*\[\[[ \t]*(["']?){re.escape(key)}\1[ \t]*\]\]""")
    lines, line, before = [], 1, 0
    for start in _statements(text):
        line, before = line + text.count("\n", before, start), start
        if header.match(text, start):
            lines.append(line)
    return lines


def _statements(text: str) -> Iterator[int]:
    """Yield the positions at which the statements of a valid file begin, and its end."""
    depth = 0
    yield 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if token[0] == "\n" and not depth:
            yield token.end()
    yield len(text)


def _has_path(document: Any, path: KeyPath) -> bool:
    for step in path:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True
