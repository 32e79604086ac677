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

from lora_diag.records import Probe
from lora_diag.records.probe import Subject
from lora_diag.running.rates import edge, lowest

Word = Literal["fast saturation", "gradual decline", "noisy", "no gain", "no verdict"]


@dataclass(frozen=True, slots=True)
class AtRank:
    """The runs of one rank, or of a reference line, at its best learning rate.

    Args:
        rank: r; None for full fine-tuning and BitFit.
        lr: The learning rate with the lowest loss at the first seed.
        losses: Of all seeds at that rate.
        edge: Whether the rate is the lowest or the highest tried, so that a better one may lie beyond.
    """

    rank: int | None
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


@dataclass(frozen=True, slots=True)
class Versus:
    """The best rank beside a reference line.

    Args:
        best: The rank with the lowest mean loss.
        other: The reference line.
        gap: Mean loss of the best rank minus that of the line.
        noise: Half the 95% interval of ``gap``; None where one seed shows no spread.
    """

    best: AtRank
    other: AtRank
    gap: float
    noise: float | None

    @property
    def word(self) -> Literal["as good", "better", "worse", "no verdict"]:
        """What LoRA is, as far as seeds can tell."""
        if self.noise is None:
            return "no verdict"
        if abs(self.gap) <= self.noise:
            return "as good"
        return "better" if self.gap < 0 else "worse"


def versus(rows: Sequence[AtRank], other: AtRank) -> Versus | None:
    """Return how the best rank compares with a reference line; None where no rank has a loss.

    The standard error is √(s²/n + s_o²/n_o), s² the variance over seeds pooled over ranks and s_o² that of the line;
    its degrees of freedom are Welch and Satterthwaite's. A line of which nothing depends on the seed has s_o = 0.

    Args:
        rows: One for each rank.
        other: The line.

    Reference: Welch 1947, "The generalization of Student's problem", equation 28.

    Example:
        >>> found = versus([AtRank(4, 1e-3, (1.00, 1.01), False)], AtRank(None, 1e-4, (0.80, 0.81), False))
        >>> found.word, round(found.gap, 3), round(found.noise, 3)
        ('worse', 0.2, 0.03)
    """
    if not rows:
        return None
    best = min(rows, key=lambda row: row.mean)
    pooled, runs = _pooled(rows)
    gap = best.mean - other.mean
    if not runs or len(best.losses) < 2 or len(other.losses) < 2:
        return Versus(best, other, gap, None)
    own, its = pooled / len(best.losses), variance(other.losses) / len(other.losses)
    if own + its == 0:
        return Versus(best, other, gap, 0.0)
    freedom = (own + its) ** 2 / (own**2 / runs + its**2 / (len(other.losses) - 1))
    return Versus(best, other, gap, float(stdtrit(freedom, 0.975)) * math.sqrt(own + its))


def best_rates(records: Sequence[Probe], choose: str, seed: int, subject: Subject = "lora") -> dict[int | None, float]:
    """Return, for every rank, the learning rate whose run of the first seed has the lowest loss on one set.

    Args:
        records: Of a sweep.
        choose: The set that decides.
        seed: The first seed.
        subject: ``lora``; or ``full`` or ``bitfit``, whose rank is None.
    """
    key = (subject, choose, seed)
    found = lowest((r.rank, r.loss, r.lr) for r in records if (r.subject, r.set, r.seed) == key)
    return dict(sorted(found.items(), key=lambda item: item[0] or 0))


def by_rank(
    records: Sequence[Probe], name: str, rates: dict[int | None, float], subject: Subject = "lora"
) -> list[AtRank]:
    """Return the runs of each rank, or of a reference line, at its rate, on one set."""
    mine = [record for record in records if record.subject == subject]
    rows = []
    for rank, lr in rates.items():
        tried = {record.lr for record in mine if record.rank == rank and record.lr is not None}
        runs = [r for r in mine if (r.rank, r.lr, r.set) == (rank, lr, name) and r.loss is not None]
        if losses := tuple(r.loss for r in sorted(runs, key=lambda r: r.seed) if r.loss is not None):
            rows.append(AtRank(rank, lr, losses, edge(tried, lr) != 0))
    return rows


def verdicts(records: Sequence[Probe], seed: int, share: float) -> dict[str, tuple[SweepVerdict, Probe]]:
    """Return what a sweep comes to on each set that BASE was measured on, with BASE's record there.

    Args:
        records: Of a sweep; the first set decides on the learning rates.
        seed: The first seed.
        share: Tolerance as a share of the gain.
    """
    found = {}
    rates = best_rates(records, records[0].set, seed) if records else {}
    for base in records:
        if base.subject == "base" and not base.name and base.loss is not None:
            rows = by_rank([record for record in records if record.set == base.set], base.set, rates)
            found[base.set] = (judge(rows, base.loss, share), base)
    return found


def _pooled(rows: Sequence[AtRank]) -> tuple[float, int]:
    """Return the variance over seeds, pooled over rows, and its degrees of freedom."""
    repeated = [row for row in rows if len(row.losses) > 1]
    runs = sum(len(row.losses) - 1 for row in repeated)
    return sum(variance(row.losses) * (len(row.losses) - 1) for row in repeated) / max(1, runs), runs


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
    pooled, runs = _pooled(rows)
    asked = max(0.0, share * gain)
    if gain <= 0:
        return SweepVerdict("no gain", None, best.rank, asked, None, spread, gain)
    if not runs:
        return SweepVerdict("no verdict", None, best.rank, asked, None, spread, gain)
    # Student's t, because few seeds say little about their own spread: 4.3 with two ranks of two seeds, not 2.
    noise = float(stdtrit(runs, 0.975)) * math.sqrt(pooled) * math.sqrt(2 / min(len(row.losses) for row in rows))
    tolerance = max(asked, noise)
    enough = next(row for row in rows if row.mean <= best.mean + tolerance)
    if noise > asked and noise >= spread:
        return SweepVerdict("noisy", None, best.rank, tolerance, noise, spread, gain)
    lower = 2 * list(rows).index(enough) < len(rows)
    return SweepVerdict(
        "fast saturation" if lower else "gradual decline", enough.rank, best.rank, tolerance, noise, spread, gain
    )
