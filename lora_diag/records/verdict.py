"""Records of ``gate``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Record, Shown, WholeRecord

Status = Literal["passed", "failed", "warned", "waived", "inconclusive", "not judged"]
Outcome = Literal["passed", "failed", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Display:
    """How reports show a status.

    Args:
        style: Style of its row in a terminal; empty for no row.
        annotation: Level of an annotation on GitHub; empty for none.
        element: Element of a JUnit case, empty for none. No server counts an ``error`` as a pass.
    """

    style: str = ""
    annotation: str = ""
    element: str = ""


# The statuses in the order of every report, the most severe first.
STATUSES: dict[Status, Display] = {
    "failed": Display("bold red", "error", "failure"),
    "inconclusive": Display("bold yellow", "error", "error"),
    "warned": Display("yellow", "warning"),
    "waived": Display(element="skipped"),
    "not judged": Display(element="skipped"),
    "passed": Display(),
}
WORST_FIRST = tuple(STATUSES)


class Verdict(WholeRecord):
    """The verdict of one rule on one layer, or on the whole.

    Args:
        rule: Its name in the policy, or that of a built-in check.
        layer: The layer judged; null for an aggregate or a whole-model value.
        group: Identifies one of several records of the layer, such as ``adapter lora_r4`` or
            ``step 40, rank 8``; for the check ``inputs``, the input.
        measured: The measured value; null without one.
        allowed: The condition of a rule as written in the policy, such as ``epsilon <= 0.35``. Of a
            built-in check, what is required.
        status: Whether the rule holds. ``passed``: the value meets the condition. ``failed``: it
            does not; the gate fails. ``warned``: likewise, with the severity warning; the gate
            passes. ``waived``: it does not, or no verdict is possible, and a waiver of the policy
            allows that until a date. ``inconclusive``: no verdict is possible; with the severity
            error the gate does not pass then: measure what the message names. ``not judged``: a
            layer without a value, permitted by the policy's coverage, a check that does not apply,
            or an input that was not compared.
        severity: Severity of the rule: ``error`` fails the gate, ``warning`` does not.
        message: Problem and fix, in one sentence; empty if there is nothing to say.
        line: Line of the rule or the waiver in the policy; null for a built-in check.
    """

    key: ClassVar[tuple[str, ...]] = ("rule", "layer", "group")
    table: ClassVar[tuple[Shown | str, ...]] = ("status",)
    record: Literal["verdict"] = "verdict"
    rule: str
    layer: str | None = None
    group: str = ""
    measured: Annotated[float | str | None, Shown(main=True)] = None
    allowed: Annotated[str, Shown(main=True)]
    status: Annotated[Status, Shown(main=True)]
    severity: Literal["error", "warning"] = "error"
    message: str = ""
    line: int | None = None

    @property
    def condition(self) -> str:
        """``allowed`` without the value in the baseline."""
        return re.sub(r" \([^()]* in the baseline\)$", "", self.allowed)

    @property
    def limit(self) -> float | None:
        """The number at the end of the condition; None where it ends in a word."""
        try:
            return float(self.condition.rpartition(" ")[2])
        except ValueError:
            return None

    @property
    def blocks(self) -> bool:
        """Whether it keeps a gate from passing; a warning never does."""
        return self.severity == "error" and self.status in {"failed", "inconclusive"}

    @property
    def display(self) -> Display:
        """How machines are shown its status; one that is inconclusive and does not block is a
        warning.
        """
        return STATUSES[self.status if self.blocks or self.status != "inconclusive" else "warned"]


def outcome(records: Iterable[Record]) -> Outcome:
    """Return the outcome of verdicts: a blocking failure fails, any other blocking one or none
    judged is inconclusive.

    Example:
        >>> outcome([])
        'inconclusive'
    """
    verdicts = [record for record in records if isinstance(record, Verdict)]
    if any(verdict.blocks and verdict.status == "failed" for verdict in verdicts):
        return "failed"
    judged = any(verdict.status in {"passed", "warned", "waived"} for verdict in verdicts)
    return (
        "passed" if judged and not any(verdict.blocks for verdict in verdicts) else "inconclusive"
    )
