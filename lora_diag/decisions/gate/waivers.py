"""Application of waivers, and detection of obsolete ones."""

from __future__ import annotations

from datetime import date

from lora_diag.decisions.gate.policy import Policy, Waiver
from lora_diag.decisions.gate.record import Verdict


class Waivers:
    """The waivers of a policy on a date.

    Args:
        policy: The policy.
        today: The date; a waiver is valid to the end of its last day.

    Attributes:
        used: Waivers that were applied.
    """

    def __init__(self, policy: Policy, today: date) -> None:
        self.active = tuple(waiver for waiver in policy.waivers if today <= waiver.expires)
        self.expired = tuple(waiver for waiver in policy.waivers if today > waiver.expires)
        self.used: set[Waiver] = set()

    def of(self, rule: str, layer: str | None) -> Waiver | None:
        """Return the waiver of a rule for a layer; for the whole run only a waiver of all layers."""
        return next((waiver for waiver in self.active if waiver.covers(rule, layer or "")), None)

    def apply(self, verdict: Verdict) -> Verdict:
        """Return a verdict as waived if it does not pass and a waiver applies."""
        if verdict.status not in {"failed", "warned", "inconclusive"}:
            return verdict
        waiver = self.of(verdict.rule, verdict.layer)
        if waiver is None:
            return verdict
        self.used.add(waiver)
        return verdict.model_copy(update={"status": "waived", "message": self.reason(waiver)})

    def reason(self, waiver: Waiver) -> str:
        """Return the message of a waived verdict."""
        return f"waived to {waiver.expires}: {waiver.reason}"

    def reports(self) -> list[Verdict]:
        """Return a warning for every waiver that has expired or was not applied."""
        return [
            *(self._report(waiver, f"expired on {waiver.expires}, so it no longer applies") for waiver in self.expired),
            *(
                self._report(waiver, "has no effect any more: delete it")
                for waiver in self.active
                if waiver not in self.used
            ),
        ]

    def _report(self, waiver: Waiver, text: str) -> Verdict:
        return Verdict(
            rule="waiver",
            layer=None,
            measured=None,
            allowed=f"{waiver.rule} on {waiver.layers.pattern}",
            status="warned",
            severity="warning",
            message=f"the waiver of {waiver.rule} {text}",
            line=waiver.line,
        )
