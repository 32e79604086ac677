"""What a policy lets pass for a while, and what of it no longer serves."""

from __future__ import annotations

from datetime import date

from lora_diag.decisions.gate.policy import Policy, Waiver
from lora_diag.decisions.gate.record import Verdict


class Waivers:
    """The waivers of a policy on a day.

    Args:
        policy: Where they are.
        today: A waiver serves to the end of its last day.

    Attributes:
        used: Those that let something pass.
    """

    def __init__(self, policy: Policy, today: date) -> None:
        self.active = tuple(waiver for waiver in policy.waivers if today <= waiver.expires)
        self.expired = tuple(waiver for waiver in policy.waivers if today > waiver.expires)
        self.used: set[Waiver] = set()

    def of(self, rule: str, layer: str | None) -> Waiver | None:
        """Return the waiver of a rule for a layer; for the whole run only one of all layers."""
        return next((waiver for waiver in self.active if waiver.covers(rule, layer or "")), None)

    def apply(self, verdict: Verdict) -> Verdict:
        """Return a verdict as waived if it is no pass and a waiver speaks of it."""
        if verdict.status not in {"failed", "warned", "inconclusive"}:
            return verdict
        waiver = self.of(verdict.rule, verdict.layer)
        if waiver is None:
            return verdict
        self.used.add(waiver)
        return verdict.model_copy(update={"status": "waived", "message": self.reason(waiver)})

    def reason(self, waiver: Waiver) -> str:
        """Return what is said of what a waiver lets pass."""
        return f"waived to {waiver.expires}: {waiver.reason}"

    def reports(self) -> list[Verdict]:
        """Return a warning for every waiver that has expired or lets nothing pass."""
        return [
            *(self._report(waiver, f"expired on {waiver.expires}, so it no longer applies") for waiver in self.expired),
            *(
                self._report(waiver, "lets nothing pass any more: delete it")
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
