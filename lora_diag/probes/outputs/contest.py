"""Comparison of an adapter with the full fine-tune by held-out losses.

A difference of two losses is significant above two paired standard errors, more with few sequences (``paired_half``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_diag.metrics.equivalence import paired_difference, paired_half
from lora_diag.records import Probe
from lora_diag.records.probe import main_sets
from lora_diag.rendering.losses import gap_half

# Fraction of the full fine-tune's gain from which an adapter is called as good.
SUFFICIENT_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Contest:
    """An adapter compared with the full fine-tune on held-out text.

    Args:
        name: The adapter's path.
        records: Its records on ``deciding_sets``, one per set.
        outcome: ``as good`` if it significantly keeps at least 90% of TUNED's gain on every set; else ``worse`` if it
            is significantly worse on any set; else ``not known``.
    """

    name: str
    records: tuple[Probe, ...]
    outcome: Literal["as good", "worse", "not known"]

    @property
    def worst(self) -> Probe:
        """Its record on the set with the largest gap to TUNED."""
        return max(self.records, key=lambda record: record.gap or 0.0)


def gains(base: Probe | None) -> float | None:
    """Return the gain of TUNED over BASE; None if it is not significant."""
    if base is None or base.gap is None or (half := gap_half(base)) is None or base.gap <= half:
        return None
    return base.gap


def is_tuned_worse(base: Probe | None) -> bool:
    """Return whether TUNED is significantly worse than BASE on a set, so that an adapter has no gain to keep."""
    return base is not None and base.gap is not None and (half := gap_half(base)) is not None and base.gap < -half


def deciding_sets(records: Sequence[Probe]) -> list[str]:
    """Return the sets on which adapters are compared with TUNED.

    They are not shifted unless there is no other, and not those where TUNED is worse than BASE.
    """
    bases = _find_bases(records)
    return [name for name in main_sets(records) if not is_tuned_worse(bases.get(name))]


def compare_with_base(record: Probe, base: Probe) -> tuple[float, float | None]:
    """Return a model's loss minus that of BASE, and half the interval outside which it is significant."""
    if not record.nll or not base.predictions:
        return record.nats - base.nats, None
    gap, error = paired_difference(record.nll, base.nll, base.predictions)
    return gap, paired_half(error, len(base.predictions))


def _find_bases(records: Sequence[Probe]) -> dict[str, Probe]:
    return {record.set: record for record in records if record.subject == "base"}


def contests_of(records: Sequence[Probe]) -> list[Contest]:
    """Return the comparison of every adapter with TUNED on ``deciding_sets``; empty without one, or without TUNED."""
    if not any(record.subject == "tuned" for record in records):
        return []
    sets, bases = deciding_sets(records), _find_bases(records)
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
    if any(record.gap is None or gap_half(record) is None for record in own_records):
        return "not known"
    if all(
        (gain := gained[record.set]) is not None
        and (record.gap or 0.0) + (gap_half(record) or 0.0) <= (1 - SUFFICIENT_SHARE) * gain
        for record in own_records
    ):
        return "as good"
    worse = any((record.gap or 0.0) > (gap_half(record) or 0.0) for record in own_records)
    return "worse" if worse else "not known"
