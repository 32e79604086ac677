"""A policy: what has to hold before a checkpoint may ship. Plain data; ``reading`` makes it of a file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Literal

from lora_diag.decisions.gate.grammar import Condition, Value
from lora_diag.errors import UsageError
from lora_diag.records.names import depth_of, module_type_of

Severity = Literal["error", "warning"]

# Policies that come with the package.
READY = ("adapter-basic", "full-ft-drift", "merge")
# Built-in checks with their usual severity; those in FIXED cannot be turned down.
CHECKS: dict[str, Literal["error", "warning", "off"]] = {
    "inputs": "error",
    "finished": "error",
    "non_finite": "error",
    "mismatch": "error",
    "complete": "error",
    "base": "error",
    "dead": "error",
    "missing": "error",
    "unused_rank": "warning",
    "spike": "warning",
    "unresolved": "warning",
}
FIXED = ("inputs", "finished", "non_finite")
# Share of ‖ΔW‖² in one direction from which on a layer is called a spike. The layers of sample_checkpoints/ lie between
# 0.04 and 0.41, its head, which a byte-level model can move as a whole, at 0.88.
SPIKE = 0.9


@dataclass(frozen=True, slots=True)
class Selector:
    """Which records a rule is about.

    Args:
        layers: The name contains a match; None for all names.
        exclude: The name contains none.
        type: The whole module type matches, such as ``self_attn.q_proj``.
        depth: First and last block.
        where: Values that fields of the record have, such as role = "adapter".
    """

    layers: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    type: re.Pattern[str] | None = None
    depth: tuple[int, int] | None = None
    where: tuple[tuple[str, Value], ...] = ()

    def takes(self, layer: str) -> bool:
        """Say whether a name is selected."""
        depth = depth_of(layer)
        return (
            (self.layers is None or self.layers.search(layer) is not None)
            and (self.exclude is None or self.exclude.search(layer) is None)
            and (self.type is None or self.type.fullmatch(module_type_of(layer)) is not None)
            and (self.depth is None or (depth is not None and self.depth[0] <= depth <= self.depth[1]))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What rules and comparisons with a baseline have in common.

    Args:
        name: By which it is reported and waived.
        field: Name of the field that it judges.
        selector: Which records it is about.
        severity: What it means if it does not hold.
        message: What to do then.
        floor: ``ignore`` judges layers that the files cannot show, too.
        coverage: Least share of what is selected that has to be judged; None for that of the policy.
        line: Where it stands.
    """

    name: str
    field: str
    selector: Selector = Selector()
    severity: Severity = "error"
    message: str = ""
    floor: Literal["inconclusive", "ignore"] = "inconclusive"
    coverage: float | None = None
    line: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Demand):
    """A condition that has to hold."""

    condition: Condition


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression(Demand):
    """A field that may not be worse than it is in the baseline.

    Args:
        worse: Which way is worse.
        tolerance: By how much it may be worse, in the field's unit.
        relative: Whether the tolerance is a share of the stored value instead.
    """

    worse: Literal["higher", "lower"]
    tolerance: float = 0.0
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Waiver:
    """Layers that may break a rule until a day, and why."""

    rule: str
    layers: re.Pattern[str]
    reason: str
    expires: date
    line: int

    def covers(self, rule: str, layer: str) -> bool:
        """Say whether it speaks of a rule and a layer."""
        return self.rule == rule and self.layers.search(layer) is not None


@dataclass(frozen=True, slots=True)
class Policy:
    """What has to hold, see docs/reference/gate.md.

    Args:
        path: Where it is.
        title: What it is for.
        rules: Its rules.
        regressions: What is compared with a baseline.
        waivers: What is let pass.
        checks: Severity of each built-in check.
        spike: Share of ‖ΔW‖² in one direction that the check ``spike`` allows.
        by: Whether coverage is a share of ‖Δ‖² or of layers.
        minimum: Least coverage.
        left_out: Reasons for which a tensor without a record does not count against coverage.
        ready: Whether it comes with the package, so that its lines are nobody's to change.
        about: What some of the results must be of: an ``adapter`` or, ``tuned``, a full fine-tune; None: anything.
        pins: Roles of inputs, and the fingerprints that they must have.
        max_age: How old results may be.
    """

    path: str
    title: str
    rules: tuple[Rule, ...]
    regressions: tuple[Regression, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    checks: dict[str, str] = field(default_factory=lambda: dict(CHECKS))
    spike: float = SPIKE
    by: Literal["energy", "layers"] = "energy"
    minimum: float = 1.0
    left_out: frozenset[str] = frozenset()
    ready: bool = False
    about: Literal["adapter", "tuned"] | None = None
    pins: tuple[tuple[str, str], ...] = ()
    max_age: timedelta | None = None

    def error(self, line: int, text: str) -> UsageError:
        """Return an error in this policy."""
        return UsageError(f"{self.path}: line {line}: {text}")
