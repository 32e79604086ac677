"""Overlap records joined into one track per layer over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.metrics.overlap import TREND_RATIO, is_near
from lora_diag.records import Results

# Default rank to show; for an adapter, its own rank.
USUAL_RANK = 16


@dataclass(frozen=True, slots=True)
class Track:
    """One layer at one rank, over the steps.

    Args:
        layer: The weight's name in BASE.
        rank: r.
        records: In the order of the steps.
    """

    layer: str
    rank: int
    records: tuple[Overlap, ...]

    @property
    def known(self) -> tuple[Overlap, ...]:
        """The records of gradients that are not zero."""
        return tuple(record for record in self.records if record.kappa is not None)

    @property
    def last(self) -> Overlap:
        """The record of the last step with a gradient that is not zero, if there is one."""
        return self.known[-1] if self.known else self.records[-1]

    @property
    def near_since(self) -> int | None:
        """First step from which κ stayed near its baseline to the end; None if it did not end there."""
        first_step = None
        for record in reversed(self.known):
            if not near(record):
                break
            first_step = record.step
        return first_step

    @property
    def ends(self) -> tuple[float, float] | None:
        """Mean κ of the first and of the last quarter of the steps; None for a single step."""
        kappas = [record.kappa for record in self.known if record.kappa is not None]
        quarter = max(1, len(kappas) // 4)
        return (mean(kappas[:quarter]), mean(kappas[-quarter:])) if len(kappas) > 1 else None


def near(record: Overlap) -> bool:
    """Return whether κ is near its value for a random subspace."""
    return record.kappa is not None and is_near(record.kappa, record.kappa_random)


def trend(ends: tuple[float, float] | None) -> str:
    """Return the trend of κ as a word; empty for a single step.

    >>> trend((0.4, 0.2)), trend((0.4, 0.39)), trend((0.2, 0.4)), trend(None)
    ('falls', 'steady', 'rises', '')
    """
    if ends is None:
        return ""
    first, last = ends
    return "falls" if last < TREND_RATIO * first else "rises" if first < TREND_RATIO * last else "steady"


def tracks(results: Results[Overlap], rank: int | None = None) -> list[Track]:
    """Return every layer at the shown rank, in the order of the file.

    Args:
        results: The results.
        rank: The rank to show; default 16, or that of a reference adapter. A smaller layer is shown at its largest
            rank.
    """
    rank_shown = rank if rank is not None else None if reference_is_adapter(results) else _default_rank(results)
    by_layer: dict[str, dict[int, list[Overlap]]] = {}
    for record in results:
        by_layer.setdefault(record.layer, {}).setdefault(record.rank, []).append(record)
    followed = []
    for layer, by_rank in by_layer.items():
        shown = max((r for r in by_rank if rank_shown is None or r <= rank_shown), default=min(by_rank))
        followed.append(Track(layer, shown, tuple(sorted(by_rank[shown], key=lambda record: record.step))))
    return followed


def reference_is_adapter(results: Results[Overlap]) -> bool:
    """Return whether the subspaces are those of an adapter."""
    return any(side.role == "adapter" for side in results.run.inputs)


def _default_rank(results: Results[Overlap]) -> int:
    ranks = sorted({record.rank for record in results})
    return USUAL_RANK if USUAL_RANK in ranks else ranks[len(ranks) // 2] if ranks else USUAL_RANK


def steps_of(some_tracks: Sequence[Track]) -> list[int]:
    """Return all steps, ascending."""
    return sorted({record.step for track in some_tracks for record in track.records})
