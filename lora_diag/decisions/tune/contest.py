"""Decisions from losses: the rank, whether a challenger is kept, which trials the curves justify. Trains nothing.

A challenger is compared with the incumbent on the same seeds and the same sequences. It is kept only where its loss is
significantly lower in-domain (two standard errors of the paired differences, more with few seeds), and its mean loss is
not higher on the shifted sets: the incumbent wins ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from lora_diag.metrics.equivalence import errors_needed, paired_difference, paired_half
from lora_diag.probes.sweep.verdict import SweepVerdict

# Regularization is justified if the held-out loss fell less than the training loss by this fraction of the gain.
OVERFIT_SHARE = 0.25
# Fraction of full fine-tuning's gain below which more than LoRA within the budget is considered.
SHORT_OF_FULL = 0.9

Outcome = Literal["better", "tie", "worse", "not known"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run on one set.

    Args:
        loss: Mean, in nats.
        nll: Summed negative log-likelihood of each sequence.
    """

    loss: float
    nll: tuple[float, ...] = ()


# Runs of one configuration, by set and seed.
Runs = Mapping[str, Mapping[int, Measured]]


@dataclass(frozen=True, slots=True)
class Gap:
    """The challenger's loss minus the incumbent's, on the seeds that both have.

    Args:
        value: Mean over seeds, in nats.
        error: The larger of two standard errors: over paired seeds, and over paired sequences; None for one seed.
        seeds: Number of these seeds.
        half: Half the interval outside which it is significant, the larger of those of the two errors: two standard
            errors, more with few seeds or sequences (``errors_needed``).
    """

    value: float
    error: float | None
    seeds: int
    half: float | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """A challenger compared with the incumbent.

    Args:
        outcome: ``better``, ``worse``: significantly; ``tie``: neither; ``not known``: one seed or none.
        kept: Whether it replaces the incumbent.
        own: On the first set that is not shifted.
        shifted: Mean over the shifted sets; None without any.
    """

    outcome: Outcome
    kept: bool
    own: Gap | None
    shifted: Gap | None


def gap_of(
    incumbent: Mapping[int, Measured], challenger: Mapping[int, Measured], predictions: Sequence[int]
) -> Gap | None:
    """Return the difference on one set; None without a seed that both have.

    Args:
        incumbent: Runs by seed.
        challenger: Runs by seed.
        predictions: Number of predictions of each sequence.

    Example:
        >>> runs = {0: Measured(1.0), 1: Measured(1.2)}, {0: Measured(0.9), 1: Measured(1.12)}
        >>> found = gap_of(*runs, ())
        >>> round(found.value, 6), round(found.error, 6)
        (-0.09, 0.01)
    """
    seeds = sorted(incumbent.keys() & challenger.keys())
    if not seeds:
        return None
    gaps = [challenger[seed].loss - incumbent[seed].loss for seed in seeds]
    if len(seeds) < 2:
        return Gap(gaps[0], None, 1)
    errors = [stdev(gaps) / math.sqrt(len(gaps))]
    halves = [errors[0] * errors_needed(len(gaps) - 1)]
    challenger_nll, incumbent_nll = (_average_nll([runs[seed] for seed in seeds]) for runs in (challenger, incumbent))
    if len(challenger_nll) == len(incumbent_nll) == len(predictions) > 1:
        errors.append(paired_difference(challenger_nll, incumbent_nll, predictions)[1] or 0.0)
        halves.append(paired_half(errors[1], len(predictions)) or 0.0)
    return Gap(fmean(gaps), max(errors), len(seeds), max(halves))


def _average_nll(runs: Sequence[Measured]) -> list[float]:
    if len({len(run.nll) for run in runs}) > 1:
        return []
    return [fmean(values) for values in zip(*(run.nll for run in runs), strict=True)]


def contest(
    incumbent: Runs, challenger: Runs, own: str, shifted: Sequence[str], predictions: Mapping[str, Sequence[int]]
) -> Contest:
    """Return whether a challenger is kept.

    Args:
        incumbent: Its runs.
        challenger: Its runs.
        own: The set that decides.
        shifted: Sets of another kind.
        predictions: Number of predictions of each sequence, by set.
    """
    own_gap = gap_of(incumbent.get(own, {}), challenger.get(own, {}), predictions.get(own, ()))
    others = [
        gap
        for name in shifted
        if (gap := gap_of(incumbent.get(name, {}), challenger.get(name, {}), predictions.get(name, ()))) is not None
    ]
    shifted_gap = _pool_gaps(others)
    if own_gap is None or own_gap.half is None:
        return Contest("not known", False, own_gap, shifted_gap)
    is_better, is_worse = (
        own_gap.value < -own_gap.half,
        own_gap.value > own_gap.half,
    )
    outcome: Outcome = "better" if is_better else "worse" if is_worse else "tie"
    return Contest(outcome, is_better and all(gap.value <= 0 for gap in others), own_gap, shifted_gap)


def _pool_gaps(gaps: Sequence[Gap]) -> Gap | None:
    """Return the mean over sets; their errors are treated as independent."""
    if not gaps:
        return None
    errors = [gap.error for gap in gaps if gap.error is not None]
    error = math.sqrt(math.fsum(e**2 for e in errors)) / len(gaps) if len(errors) == len(gaps) else None
    return Gap(fmean(gap.value for gap in gaps), error, min(gap.seeds for gap in gaps))


@dataclass(frozen=True, slots=True)
class RankChoice:
    """The shared rank.

    Args:
        rank: r.
        lr: Its learning rate.
        significant: Whether it is shown to be enough; else it is the smallest whose mean loss is within tolerance.
        why: The reason as text.
    """

    rank: int
    lr: float
    significant: bool
    why: str


def choose_rank(verdict: SweepVerdict, rates: Mapping[int, float]) -> RankChoice:
    """Return the smallest rank shown to be enough; where none is, the smallest by the mean losses, marked.

    Not the smallest that is not shown to be too small: the noisier the seeds, the smaller that is. On the sample model
    and Python source (4 seeds) it was r=4, whose test loss was 0.030 ± 0.005 above that of r=16.

    Args:
        verdict: Verdict of a sweep.
        rates: The best learning rate of each rank tried.
    """
    if verdict.rank is not None:
        return RankChoice(
            verdict.rank, rates[verdict.rank], True, f"{verdict.outcome}: the smallest shown to be enough"
        )
    if verdict.answer is None:
        rank = min(rates)
        return RankChoice(rank, rates[rank], False, f"{verdict.outcome}: the smallest")
    why = f"{verdict.outcome}: the smallest whose mean loss is within tolerance of every other's, which is not shown"
    return RankChoice(verdict.answer, rates[verdict.answer], False, why)


def between(chosen: int, ranks: Iterable[int]) -> int | None:
    """Return the geometric mean of the chosen rank and the next lower one tried; None unless that is below its half.

    >>> between(16, [1, 4, 16]), between(4, [2, 4]), between(1, [1, 4]), between(24, [6, 24])
    (8, None, None, 12)
    """
    lower = max((rank for rank in ranks if rank < chosen), default=None)
    if lower is None:
        return None
    middle = round(math.sqrt(chosen * lower))
    return middle if lower < middle < chosen and 2 * lower < chosen else None


@dataclass(frozen=True, slots=True)
class Curves:
    """Losses of the chosen configuration from which its stability is judged.

    Args:
        base: BASE's held-out loss.
        loss: Its held-out loss, mean over seeds.
        base_train: BASE's loss on the training data.
        train: Its training loss at the end, mean over seeds.
        spread: Standard deviation of its held-out loss over seeds; None for one seed.
        tolerance: In nats.
        diverged: Runs that diverged at its rank, at any rate up to its own.
        base_shifted: BASE's loss on the first shifted set; None without one.
        shifted: Its own loss there.
    """

    base: float
    loss: float
    base_train: float
    train: float
    spread: float | None
    tolerance: float
    diverged: int = 0
    base_shifted: float | None = None
    shifted: float | None = None


def stability_trials(curves: Curves) -> dict[str, str]:
    """Return the stability trials that the curves justify, each with its reason; none where training is sound.

    Example:
        >>> stability_trials(Curves(base=2.0, loss=1.5, base_train=2.0, train=1.5, spread=0.001, tolerance=0.01))
        {}
        >>> overfit = Curves(base=2.0, loss=1.5, base_train=2.0, train=0.9, spread=0.001, tolerance=0.01)
        >>> sorted(stability_trials(overfit))
        ['dropout', 'fewer-steps', 'weight-decay']
    """
    reasons: dict[str, str] = {}
    gain, train_gain = curves.base - curves.loss, curves.base_train - curves.train
    if train_gain - gain > OVERFIT_SHARE * max(gain, 0.0) and train_gain > 0:
        why = f"training loss fell by {train_gain:.3f}, held-out loss by {gain:.3f}"
        reasons |= dict.fromkeys(("dropout", "weight-decay", "fewer-steps"), why)
    if curves.diverged:
        reasons["half-alpha"] = f"{curves.diverged} runs diverged at this rank"
    elif curves.spread is not None and curves.spread > 2 * curves.tolerance > 0:
        reasons["half-alpha"] = f"seeds differ by {curves.spread:.3f}, tolerance {curves.tolerance:.3f}"
    if curves.shifted is not None and curves.base_shifted is not None and curves.shifted > curves.base_shifted:
        rise = curves.shifted - curves.base_shifted
        reasons.setdefault("fewer-steps", f"the loss on the shifted set rises by {rise:.3f}")
    return reasons


def escalation_reason(chosen: int, ranks: Sequence[int], share_of_full: float | None) -> str:
    """Return why more than the chosen rank is considered; empty where there is no reason.

    >>> escalation_reason(4, [1, 4, 16], 0.95)
    ''
    >>> escalation_reason(16, [1, 4, 16], None)
    'the largest rank within the budget was chosen'
    """
    if chosen == max(ranks):
        return "the largest rank within the budget was chosen"
    if share_of_full is not None and share_of_full < SHORT_OF_FULL:
        return f"{share_of_full:.0%} of full fine-tuning's gain is below {SHORT_OF_FULL:.0%}"
    return ""
