"""Choice among adapters: comparison of their held-out losses, paired by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_diag.metrics.equivalence import Estimate, freedom, paired_difference, runs_needed
from lora_diag.records import Probe


@dataclass(frozen=True, slots=True)
class Rival:
    """An adapter compared with the best one on the same sequences.

    Args:
        name: Its path.
        behind: Its loss minus that of the best.
        half: Half the interval of ``behind``, paired by sequence: Student's t, 95% for all rivals together
            (Bonferroni); None for one sequence.
        sequences: Estimated number of sequences that would separate them; None if already separated, or above 1000.
    """

    name: str
    behind: float
    half: float | None
    sequences: int | None

    @property
    def worse(self) -> bool:
        """Whether it is significantly worse than the best."""
        return self.half is not None and self.behind > self.half


@dataclass(frozen=True, slots=True)
class Choice:
    """The best of several adapters by their losses on one set.

    Args:
        set: Its name.
        best: The path of the adapter with the lowest loss.
        rivals: The others, by their losses.
    """

    set: str
    best: str
    rivals: tuple[Rival, ...]

    @property
    def equals(self) -> tuple[Rival, ...]:
        """Adapters that are not distinguishable from the best."""
        return tuple(rival for rival in self.rivals if not rival.worse)


def choices(records: Sequence[Probe]) -> list[Choice]:
    """Return for each set the adapter with the lowest loss, and the comparison with the others.

    Sets with fewer than two adapters are skipped, and results without losses of sequences.
    """
    results = []
    for name in dict.fromkeys(record.set for record in records):
        of_set = [record for record in records if record.set == name]
        counts = next((record.predictions for record in of_set if record.subject == "base"), ())
        adapters = sorted((r for r in of_set if r.subject == "adapter" and r.nll), key=lambda record: record.nats)
        if len(adapters) > 1 and counts:
            best, *others = adapters
            level = 1 - 0.05 / 2 / len(others)
            results.append(
                Choice(name, best.name, tuple(_compare_rival(other, best, counts, level) for other in others))
            )
    return results


def _compare_rival(other: Probe, best: Probe, counts: Sequence[int], level: float) -> Rival:
    gap, error = paired_difference(other.nll, best.nll, counts)
    if error is None:
        return Rival(other.name, gap, None, None)
    half = Estimate(gap, error, freedom(len(counts))).half(level)
    needed = None if gap > half else runs_needed(gap, error * len(counts) ** 0.5, 1, level=level)
    return Rival(other.name, gap, half, needed if needed is None else max(needed, len(counts) + 1))
