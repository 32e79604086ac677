"""Comparison of an adapter with the full fine-tune by held-out losses.

A difference of two losses is significant above two paired standard errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_diag.records import Probe
from lora_diag.records.probe import main_sets

# Fraction of the full fine-tune's gain from which an adapter is called as good.
SUFFICIENT_SHARE = 0.9
# Number of standard errors of a significant difference.
ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Contest:
    """An adapter compared with the full fine-tune on held-out text.

    Args:
        name: The adapter's path.
        records: Its records, one per set; shifted sets are ignored unless there is no other.
        outcome: ``as good`` if it keeps at least 90% of TUNED's gain on every set after subtracting two standard
            errors; else ``worse`` if it is worse by more than two standard errors on any set; else ``not known``.
    """

    name: str
    records: tuple[Probe, ...]
    outcome: Literal["as good", "worse", "not known"]

    @property
    def worst(self) -> Probe:
        """Its record on the set with the largest gap to TUNED."""
        return max(self.records, key=lambda record: record.gap or 0.0)


def gains(base: Probe | None) -> float | None:
    """Return the gain of TUNED over BASE; None if it is within two standard errors of zero."""
    if base is None or base.gap is None or base.gap_error is None or base.gap <= ERRORS * base.gap_error:
        return None
    return base.gap


def contests_of(records: Sequence[Probe]) -> list[Contest]:
    """Return the comparison of every adapter with TUNED, if there is one; shifted sets count only without others."""
    if not any(record.subject == "tuned" for record in records):
        return []
    sets = main_sets(records)
    bases = {record.set: record for record in records if record.subject == "base"}
    names = dict.fromkeys(record.name for record in records if record.subject == "adapter")
    results = []
    for name in names:
        own_records = tuple(r for r in records if (r.subject, r.name) == ("adapter", name) and r.set in sets)
        if own_records:
            results.append(
                Contest(
                    name, own_records, _judge(own_records, {set_name: gains(bases.get(set_name)) for set_name in sets})
                )
            )
    return results


def _judge(own_records: tuple[Probe, ...], gained: dict[str, float | None]) -> Literal["as good", "worse", "not known"]:
    if any(record.gap is None or record.gap_error is None for record in own_records):
        return "not known"
    if all(
        (gain := gained[record.set]) is not None
        and (record.gap or 0.0) + ERRORS * (record.gap_error or 0.0) <= (1 - SUFFICIENT_SHARE) * gain
        for record in own_records
    ):
        return "as good"
    worse = any((record.gap or 0.0) > ERRORS * (record.gap_error or 0.0) for record in own_records)
    return "worse" if worse else "not known"
