"""Losses of a sweep over ranks → which rank is enough, and whether the seeds allow to say so.

Knows records only. At every rank the learning rate with the lowest loss counts, because one rate for all ranks would
compare rates and not ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal

from scipy.special import stdtrit

from lora_diag.results import Probe

Word = Literal["fast saturation", "gradual decline", "noisy", "no gain", "no verdict"]


@dataclass(frozen=True, slots=True)
class AtRank:
    """The runs of one rank at its best learning rate.

    Args:
        rank: r.
        lr: The learning rate with the lowest loss at the first seed.
        losses: Of all seeds at that rate.
        edge: Whether the rate is the lowest or the highest tried, so that a better one may lie beyond.
    """

    rank: int
    lr: float
    losses: tuple[float, ...]
    edge: bool

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.losses)


@dataclass(frozen=True, slots=True)
class SweepVerdict:
    """What a sweep says on one set.

    Args:
        word: ``fast saturation`` where a rank in the lower half of those tried is within tolerance of the best,
            ``gradual decline`` where only a higher one is, ``noisy`` where seeds differ by more than both the tolerance
            and the ranks, ``no gain`` where no rank is better than BASE, ``no verdict`` where there are too few runs.
        rank: The smallest rank within tolerance; None where the seeds do not allow to say.
        best: The rank with the lowest mean loss.
        tolerance: In nats: the share of the gain asked for, or ``noise`` where that is more.
        noise: Half the 95% interval of a difference of two means, t·s·√(2/n) with s² the variance over seeds, pooled
            over ranks; None with one seed.
        spread: Highest mean loss of a rank minus lowest.
        gain: Loss of BASE minus the lowest mean loss.
    """

    word: Word
    rank: int | None
    best: int | None
    tolerance: float
    noise: float | None
    spread: float
    gain: float


def best_rates(records: Sequence[Probe], choose: str, seed: int) -> dict[int, float]:
    """Return, for every rank, the learning rate whose run of the first seed has the lowest loss on one set.

    Args:
        records: Of a sweep.
        choose: The set that decides.
        seed: The first seed.
    """
    found: dict[int, tuple[float, float]] = {}
    for record in records:
        if record.subject == "lora" and record.set == choose and record.seed == seed and record.loss is not None:
            assert record.rank is not None
            assert record.lr is not None
            found[record.rank] = min(found.get(record.rank, (math.inf, 0.0)), (record.loss, record.lr))
    return {rank: lr for rank, (_, lr) in sorted(found.items())}


def by_rank(records: Sequence[Probe], name: str, rates: dict[int, float]) -> list[AtRank]:
    """Return the runs of each rank at its rate, on one set."""
    tried = sorted({record.lr for record in records if record.lr is not None})
    rows = []
    for rank, lr in rates.items():
        runs = [r for r in records if (r.rank, r.lr, r.set) == (rank, lr, name) and r.loss is not None]
        if losses := tuple(r.loss for r in sorted(runs, key=lambda r: r.seed) if r.loss is not None):
            rows.append(AtRank(rank, lr, losses, len(tried) > 1 and lr in {tried[0], tried[-1]}))
    return rows


def judge(rows: Sequence[AtRank], base: float, share: float) -> SweepVerdict:
    """Return what the losses of a sweep come to.

    Args:
        rows: One for each rank, ascending.
        base: BASE's loss on the same set.
        share: Tolerance as a share of the gain.

    Example:
        >>> rows = [AtRank(4, 1e-3, (1.00, 1.01), False), AtRank(8, 1e-3, (0.80, 0.81), False)]
        >>> found = judge(rows, base=2.0, share=0.02)
        >>> found.word, found.rank, round(found.noise, 3)
        ('gradual decline', 8, 0.03)
    """
    if len(rows) < 2:
        return SweepVerdict("no verdict", None, rows[0].rank if rows else None, 0.0, None, 0.0, 0.0)
    best = min(rows, key=lambda row: row.mean)
    spread, gain = max(row.mean for row in rows) - best.mean, base - best.mean
    repeated = [row for row in rows if len(row.losses) > 1]
    asked = max(0.0, share * gain)
    if gain <= 0:
        return SweepVerdict("no gain", None, best.rank, asked, None, spread, gain)
    if not repeated:
        return SweepVerdict("no verdict", None, best.rank, asked, None, spread, gain)
    runs = sum(len(row.losses) - 1 for row in repeated)
    pooled = math.sqrt(sum(variance(row.losses) * (len(row.losses) - 1) for row in repeated) / runs)
    # Student's t, because few seeds say little about their own spread: 4.3 with two ranks of two seeds, not 2.
    noise = float(stdtrit(runs, 0.975)) * pooled * math.sqrt(2 / min(len(row.losses) for row in rows))
    tolerance = max(asked, noise)
    enough = next(row for row in rows if row.mean <= best.mean + tolerance)
    if noise > asked and noise >= spread:
        return SweepVerdict("noisy", None, best.rank, tolerance, noise, spread, gain)
    lower = 2 * list(rows).index(enough) < len(rows)
    return SweepVerdict(
        "fast saturation" if lower else "gradual decline", enough.rank, best.rank, tolerance, noise, spread, gain
    )
