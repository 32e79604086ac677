"""Records of ``gate``."""

from __future__ import annotations

from typing import Literal

from lora_diag.results.base import Record

Status = Literal["passed", "failed", "warned", "waived", "inconclusive"]


class Verdict(Record):
    """What one rule of a policy says of one layer, or of the whole.

    Args:
        rule: Its name in the policy.
        layer: The layer judged; null for an aggregate or a whole-model value.
        measured: The value found; null where there is none.
        allowed: The condition, as the policy writes it, such as ``epsilon <= 0.35``.
        status: ``warned`` is a failure whose severity is warning; ``inconclusive`` is never a pass.
        severity: Of the rule.
        message: One sentence: what is wrong and what to do.
    """

    record: Literal["verdict"] = "verdict"
    rule: str
    layer: str | None
    measured: float | str | None
    allowed: str
    status: Status
    severity: Literal["error", "warning"]
    message: str
