"""The sufficient rank of a sweep, and its confidence, from the losses over ranks.

Every rank has the learning rate with its lowest loss of the first seed, since a common rate would
compare rates instead of ranks. A rank is *sufficient* if it keeps 1 − δ of the gain of every other
rank, where δ is the tolerance:

    θ_rk = μ_r − (1 − δ)·μ_k − δ·L_base ≤ 0    for every rank k

with μ the mean loss over seeds. This is a claim of equivalence, so it must be demonstrated: the
upper confidence limit of every θ_rk is at or below 0. If neither this nor the contrary is
demonstrated, the rank is ``not known``, with an estimate of the number of seeds needed. Noisier
seeds widen the limits and never make a smaller rank sufficient.

``swept_rate`` gives the best learning rate to the commands that suggest the next training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from lora_diag.catalog import read_results
from lora_diag.errors import Given, UsageError
from lora_diag.metrics import statistics as stats
from lora_diag.records import Probe, Results
from lora_diag.records.base import Shown
from lora_diag.records.probe import Subject, main_sets, set_names
from lora_diag.running.amounts import edge, find_best_rates
from lora_diag.running.fingerprint import legible

Outcome = Literal["fast saturation", "gradual decline", "not resolved", "no gain", "no verdict"]
Answer = Literal["yes", "no", "not known"]

# Reference lines, with their names.
LINES: dict[Subject, str] = {"full": "full", "bitfit": "BitFit"}
# A run that ends above this multiple of BASE's loss, while another seed at its rank and rate ends
# below it, has diverged.
DIVERGED_RATIO = 1.1
# A reference line with a standard deviation below this fraction of that of the ranks is independent
# of the seed.
FIXED_RATIO = 0.1
# Fraction of the gain that a smaller rank may lose if the run does not record it: the command's
# default.
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class AtRank:
    """The runs of one rank, or of a reference line, at its best learning rate.

    Args:
        rank: r; None for full fine-tuning and BitFit.
        lr: The learning rate with the lowest loss of the first seed.
        runs: Loss of each seed at that rate, without runs that diverged.
        edge: Whether the rate is the lowest or the highest of several tried, so that a better one
            may be beyond.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown(
            "lr", "lr", "Learning rate with the lowest loss at the first seed", main=True, form="g"
        ),
        Shown("seeds", "seeds", "Runs at that rate that did not diverge", main=True),
        Shown("mean", "loss", "Mean over seeds, in nats", main=True, form=".4f"),
        Shown("losses", "min to max", "Over seeds", main=True, form=".4f", pool="ends"),
    )
    rank: int | None
    lr: float
    runs: Mapping[int, float]
    edge: bool = False

    @property
    def losses(self) -> tuple[float, ...]:
        """Losses of all seeds that did not diverge."""
        return tuple(self.runs.values())

    @property
    def seeds(self) -> int:
        """Number of seeds that did not diverge."""
        return len(self.runs)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.losses)


@dataclass(frozen=True, slots=True)
class RankStanding:
    """Whether one rank is sufficient.

    Args:
        rank: r.
        lr: Best learning rate of the rank.
        behind: Mean loss of the rank minus the lowest of any rank, in nats, on common seeds if
            there are any.
        share: ``behind`` as a fraction of the gain of the best rank.
        half: Half-width of the interval of ``behind``, each of whose limits holds with 95%
            confidence; 0 for the best rank, None without a spread over seeds.
        enough: ``yes`` if ``confidence`` reaches 95%, ``no`` if ``against`` does; else
            ``not known``.
        confidence: Confidence that the rank is sufficient, the smallest over all θ; None without a
            spread.
        against: Confidence that the rank is not sufficient, with Bonferroni correction over the
            compared ranks; None without a spread.
        seeds: Estimated number of seeds to decide, for these means and spread; None if decided,
            without a spread, or above 1000.
    """

    rank: int
    lr: float
    behind: float
    share: float
    half: float | None
    enough: Answer
    confidence: float | None
    against: float | None
    seeds: int | None


@dataclass(frozen=True, slots=True)
class SweepVerdict:
    """The verdict of a sweep on one set.

    Args:
        outcome: ``fast saturation`` if a rank in the lower half is shown to be sufficient;
            ``gradual decline`` if a higher one is, and all of the lower half are shown not to be;
            ``not resolved`` if seeds are too few or too noisy to show either; ``no gain`` if no
            mean loss is below BASE's; ``no verdict`` with fewer than two ranks, or without a spread
            over seeds.
        best: The rank with the lowest mean loss; None without a loss.
        tolerance: Tolerance in nats: the fraction δ of ``gain``, at least 0.
        gain: Loss of BASE minus the lowest mean loss.
        seeds: The fewest runs of a rank.
        rank: The smallest rank shown to be sufficient; None without one.
        answer: The smallest rank whose mean loss is within tolerance of every other's, shown or
            not, else ``best``; None without a gain or with fewer than two ranks.
        confidence: Lower bound on the confidence that ``answer`` is sufficient and every smaller
            rank is not; None without a spread. By Bonferroni's inequality.
        standings: Standing of every rank, ascending; empty without a gain or with fewer than two
            ranks.
    """

    outcome: Outcome
    best: int | None = None
    tolerance: float = 0.0
    gain: float = 0.0
    seeds: int = 0
    rank: int | None = None
    answer: int | None = None
    confidence: float | None = None
    standings: tuple[RankStanding, ...] = ()

    @property
    def chosen(self) -> RankStanding | None:
        """Standing of the rank to train at: the smallest shown to be sufficient, else ``answer``;
        None without both.
        """
        rank = self.rank if self.rank is not None else self.answer
        return next((standing for standing in self.standings if standing.rank == rank), None)

    @property
    def needed_seeds(self) -> int | None:
        """Estimated number of seeds that decide one open rank; None without an open rank whose
        number is known.

        Open are the ranks below ``rank``, or all without it, that the seeds do not decide.
        """
        needed = []
        for standing in self.standings:
            is_open = self.rank is None or standing.rank < self.rank
            if is_open and standing.enough == "not known" and standing.seeds is not None:
                needed.append(standing.seeds)
        return min(needed, default=None)


def format_confidence(confidence: float) -> str:
    """Return a confidence in whole percent, rounded down, so that one below the required level is
    never shown as it.

    >>> format_confidence(0.9472), format_confidence(0.998)
    ('94%', '>99%')
    """
    return ">99%" if confidence > 0.99 else f"{math.floor(100 * confidence)}%"


def list_reasons(verdict: SweepVerdict, share: float) -> list[str]:
    """Return a line for every rank up to the chosen one that is not shown to be sufficient; none
    without a spread.

    Args:
        verdict: Verdict on a set.
        share: Tolerance as a fraction of the gain.
    """
    chosen, lines = verdict.chosen, []
    if chosen is None:
        return []
    for standing in verdict.standings:
        rank, behind, half = standing.rank, standing.behind, standing.half or 0
        if rank > chosen.rank or standing.confidence is None or standing.enough == "yes":
            continue
        if rank == verdict.best:
            confidence = format_confidence(standing.confidence)
            finding = (
                f"r={rank} has the lowest mean loss, {confidence} confidence that it is enough"
            )
        else:
            finding = (
                f"r={rank} is {100 * standing.share:.2g}% of the gain behind r={verdict.best} "
                f"({behind:+.4f} nats [{behind - half:.4f}, {behind + half:.4f}]; tolerance "
                f"{100 * share:.3g}%, {verdict.tolerance:.4f})"
            )
        decision = "not enough" if standing.enough == "no" else describe_needed(standing.seeds)
        lines.append(f"{finding}: {decision}")
    return lines


def describe_needed(seeds: int | None) -> str:
    """State that a comparison is undecided, and the number of seeds needed; None for more than
    ``MAX_RUNS``.
    """
    count = f"more than {stats.MAX_RUNS} seeds" if seeds is None else f"about {seeds} seeds"
    return f"undecided with these seeds, needs {count}"


@dataclass(frozen=True, slots=True)
class ReferenceComparison:
    """The best rank compared with a reference line.

    Args:
        best: The rank with the lowest mean loss.
        other: The reference line.
        gap: Mean loss of the best rank minus that of the line.
        half: Half-width of the interval of ``gap``, corrected for the choice of the best among K
            ranks (Bonferroni); None without a spread over seeds.
        outcome: ``as good`` if each is shown to keep 1 − δ of the other's gain; ``better`` or
            ``worse`` if the interval is on one side of 0; else ``not known``; ``no verdict``
            without a spread.
        fixed: Whether the line is independent of the seed: one run, with the assumed error of one
            LoRA run.
        seeds: Estimated number of seeds to decide; None if decided, without a spread, or above
            1000.
    """

    best: AtRank
    other: AtRank
    gap: float
    half: float | None
    outcome: Literal["as good", "better", "worse", "not known", "no verdict"]
    fixed: bool = False
    seeds: int | None = None


def compare_with_reference(
    rows: Sequence[AtRank], other: AtRank, base: float, share: float
) -> ReferenceComparison | None:
    """Return the comparison of the best rank with a reference line; None if no rank has a loss.

    The variance of a LoRA run is that within ranks, pooled over them. A line that depends on the
    seed (dropout) has its own variance, with Welch–Satterthwaite degrees of freedom. Otherwise all
    its seeds are one run, whose variance is *assumed* to be that of one LoRA run, since another
    order of the data would give another loss.

    Args:
        rows: One per rank.
        other: The line.
        base: BASE's loss.
        share: Tolerance δ as a fraction of the gain.

    Reference: Welch 1947, "The generalization of Student's problem", equation 28.

    Example:
        >>> rows = [AtRank(4, 1e-3, {0: 1.00, 1: 1.01, 2: 1.005})]
        >>> found = compare_with_reference(
        ...     rows, AtRank(None, 1e-4, {0: 0.80, 1: 0.80}), base=2.0, share=0.02
        ... )
        >>> found.outcome, found.fixed, round(found.gap, 3), round(found.half, 3)
        ('worse', True, 0.205, 0.017)
    """
    if not rows:
        return None
    best = min(rows, key=lambda row: row.mean)
    gap = best.mean - other.mean
    variance, freedom = stats.variance_within([row.losses for row in rows])
    if not variance:
        return ReferenceComparison(best, other, gap, None, "no verdict")
    line_variance, line_freedom = stats.variance_within([other.losses])
    fixed = line_variance < FIXED_RATIO**2 * variance
    level = 1 - (1 - stats.LEVEL) / len(rows)
    # Variances of the two means; of a line that is one run, that of one run.
    ours = variance / len(best.runs)
    theirs = variance if fixed else line_variance / len(other.runs)

    def estimate(value: float, a: float, b: float) -> stats.Estimate:
        """Return the estimate of a·μ_best − b·μ_line + constant from its value, with
        either sign.
        """
        if fixed:  # one variance for both
            return stats.Estimate(value, math.sqrt(a**2 * ours + b**2 * theirs), freedom)
        parts = (a**2 * ours, freedom), (b**2 * theirs, line_freedom)
        return stats.Estimate(value, *stats.welch_error(*parts))

    # Each keeps 1 − δ of the other's gain if θ = μ − (1 − δ)·μ_other − δ·L_base ≤ 0.
    half, kept = estimate(gap, 1, 1).half(level), 1 - share
    theta_best = estimate(best.mean - kept * other.mean - share * base, 1, kept)
    theta_line = estimate(other.mean - kept * best.mean - share * base, kept, 1)
    result = partial(ReferenceComparison, best, other, gap, half, fixed=fixed)
    if all(theta.value + theta.half(level) <= 0 for theta in (theta_best, theta_line)):
        return result("as good")
    if abs(gap) > half:
        return result("better" if gap < 0 else "worse")
    distance = max(abs(gap), -max(theta_best.value, theta_line.value))
    # More seeds narrow the ranks' mean, and the line's unless it is one run.
    spread, fixed_error = math.sqrt(variance + line_variance), 0.0
    if fixed:
        spread, fixed_error = math.sqrt(variance), math.sqrt(theirs)
    needed = stats.runs_needed(distance, spread, len(rows), fixed_error, level)
    return result("not known", seeds=needed)


def find_diverged(records: Sequence[Probe]) -> set[tuple[Subject, int | None, float | None, int]]:
    """Return the runs that diverged, by subject, rank, rate and seed, which are excluded on all
    sets.

    A run has diverged if its loss on any set is not finite, or if on the first set it ends more
    than 10% above BASE while another seed at the same rank and rate ends below BASE. Such a run
    shows the stability of the rate, not the spread over seeds.
    """
    if not records:
        return set()
    first = records[0].set
    base = _find_base(records, first)
    base_loss = math.inf if base is None else base.nats
    stable = set()
    for r in records:
        if r.set == first and r.loss is not None and r.loss < base_loss:
            stable.add((r.subject, r.rank, r.lr))
    diverged: set[tuple[Subject, int | None, float | None, int]] = set()
    for r in records:
        if r.lr is None:
            continue
        is_far = r.set == first and r.loss is not None and r.loss > DIVERGED_RATIO * base_loss
        if r.loss is None or (is_far and (r.subject, r.rank, r.lr) in stable):
            diverged.add((r.subject, r.rank, r.lr, r.seed))
    return diverged


def _find_base(records: Iterable[Probe], name: str) -> Probe | None:
    """Return the record of the unrounded BASE on a set; None without a finite loss."""
    key = ("base", "", name)
    bases = (r for r in records if (r.subject, r.name, r.set) == key and r.loss is not None)
    return next(bases, None)


def best_rates(
    records: Sequence[Probe], deciding_set: str, seed: int, subject: Subject = "lora"
) -> dict[int | None, float]:
    """Return, for every rank, the learning rate with the lowest loss of the first seed on one set.

    Args:
        records: Records of a sweep.
        deciding_set: The set that decides.
        seed: The first seed.
        subject: ``lora``; or ``full`` or ``bitfit``, whose rank is None.
    """
    key = (subject, deciding_set, seed)
    rates = find_best_rates(
        (r.rank, r.loss, r.lr) for r in records if (r.subject, r.set, r.seed) == key
    )
    return dict(sorted(rates.items(), key=lambda item: item[0] or 0))


def by_rank(
    records: Sequence[Probe],
    name: str,
    rates: Mapping[int | None, float],
    subject: Subject = "lora",
) -> list[AtRank]:
    """Return the runs of each rank, or of a reference line, at its rate, on one set.

    Ranks without a run on the set, or whose runs all diverged, are left out.

    Args:
        records: All of a sweep, for ``find_diverged``.
        name: The set.
        rates: The rate of each rank.
        subject: The trained parameters.
    """
    diverged_runs = find_diverged(records)
    rows = []
    for rank, lr in rates.items():
        of_rank = [r for r in records if (r.subject, r.rank) == (subject, rank)]
        tried = {record.lr for record in of_rank if record.lr is not None}
        runs = [r for r in of_rank if (r.lr, r.set) == (lr, name)]
        loss_by_seed = {}
        for run in sorted(runs, key=lambda run: run.seed):
            if run.loss is not None and (subject, rank, lr, run.seed) not in diverged_runs:
                loss_by_seed[run.seed] = run.loss
        if loss_by_seed:
            rows.append(AtRank(rank, lr, loss_by_seed, edge(tried, lr) != 0))
    return rows


def judge_sweep(rows: Sequence[AtRank], base: float, share: float) -> SweepVerdict:
    """Return the verdict on the losses of a sweep.

    Args:
        rows: One for each rank, ascending.
        base: BASE's loss on the same set.
        share: Tolerance δ as a fraction of the gain.

    Example:
        >>> rows = [AtRank(4, 1e-3, {0: 1.00, 1: 1.01}), AtRank(8, 1e-3, {0: 0.80, 1: 0.812})]
        >>> found = judge_sweep(rows, base=2.0, share=0.02)
        >>> (
        ...     found.outcome,
        ...     found.rank,
        ...     round(found.tolerance, 3),
        ...     [one.enough for one in found.standings],
        ... )
        ('gradual decline', 8, 0.024, ['no', 'yes'])
    """
    ranked = [(row.rank, row) for row in rows if row.rank is not None]
    if not ranked:
        return SweepVerdict("no verdict")
    best = min((row for _, row in ranked), key=lambda row: row.mean)
    gain, seeds = base - best.mean, min(len(row.runs) for _, row in ranked)
    result = partial(
        SweepVerdict, best=best.rank, tolerance=max(0.0, share * gain), gain=gain, seeds=seeds
    )
    if len(ranked) < 2:
        return result("no verdict")
    if gain <= 0:
        return result("no gain")
    noise = _Noise(
        *stats.blocked_variance([row.runs for _, row in ranked]),
        *stats.variance_within([row.losses for _, row in ranked]),
    )
    standings: list[RankStanding] = []
    # With missing seeds, the best rank may not be the best on the seeds that two ranks share.
    chosen = best.rank
    for rank, row in reversed(ranked):
        standings.insert(0, _rank_standing(rank, row, ranked, base, gain, share, noise))
        if max(_compute_theta(row, rival, base, share) for _, rival in ranked) <= 0:
            chosen = rank
    answer = next(standing for standing in standings if standing.rank == chosen)
    confidence = answer.confidence
    if confidence is not None:
        # P(sufficient and no smaller one is) ≥ 1 − Σ P(one of these does not hold): Bonferroni.
        smaller = (standing for standing in standings if standing.rank < answer.rank)
        doubts = math.fsum(1 - (standing.against or 0.0) for standing in smaller)
        confidence = max(0.0, confidence - doubts)
    sufficient = next((standing for standing in standings if standing.enough == "yes"), None)
    return result(
        _choose_outcome(standings, sufficient, noise),
        rank=None if sufficient is None else sufficient.rank,
        answer=answer.rank,
        confidence=confidence,
        standings=tuple(standings),
    )


@dataclass(frozen=True, slots=True)
class _Noise:
    """Variance of one run: ``paired`` by seed, and ``plain``, within ranks; each with its degrees
    of freedom.
    """

    paired: float
    freedom: int
    plain: float
    plain_freedom: int

    @property
    def known(self) -> bool:
        """Whether both variances are positive."""
        return self.paired > 0 and self.plain > 0

    def paired_variance(self, first: AtRank, second: AtRank) -> float:
        """Return the paired variance for two ranks: the pooled one, or their own if larger.

        Spreads differ between ranks. With the pooled variance alone, two noisy ranks among quiet
        ones were judged equal in 14% of simulated sweeps instead of 5% (spreads 5 times apart, 5
        ranks); with the maximum it is 7 to 10%, and 4% for equal spreads.
        """
        return max(self.paired, stats.blocked_variance([first.runs, second.runs])[0])

    def theta(self, value: float, variance: float, share: float, n: int, m: int) -> stats.Estimate:
        """Return the estimate of θ for means of n and m runs.

        The loss that common seeds share cancels, except for its fraction δ, from the margin.
        """
        common = max(0.0, self.plain - self.paired)
        error = math.sqrt(variance * (1 / n + (1 - share) ** 2 / m) + share**2 * common / min(n, m))
        return stats.Estimate(value, error, self.freedom)


def _pair(first: AtRank, second: AtRank) -> tuple[float, float, int, int]:
    """Return the mean losses at two ranks and their numbers of runs, on common seeds if there are
    any.
    """
    seeds = first.runs.keys() & second.runs.keys()
    ours, theirs = first.losses, second.losses
    if seeds:
        ours = tuple(loss for seed, loss in first.runs.items() if seed in seeds)
        theirs = tuple(loss for seed, loss in second.runs.items() if seed in seeds)
    return fmean(ours), fmean(theirs), len(ours), len(theirs)


def _compute_theta(row: AtRank, other: AtRank, base: float, share: float) -> float:
    """Return θ of a rank and another, on common seeds if there are any."""
    ours, theirs, _, _ = _pair(row, other)
    return ours - (1 - share) * theirs - share * base


def _rank_standing(
    rank: int,
    row: AtRank,
    ranked: Sequence[tuple[int, AtRank]],
    base: float,
    gain: float,
    share: float,
    noise: _Noise,
) -> RankStanding:
    """Return the standing of one rank among all ``ranked`` ones."""
    best = min((other for _, other in ranked), key=lambda other: other.mean)
    ours, theirs, n, m = _pair(row, best)
    behind = ours - theirs
    result = partial(RankStanding, rank, row.lr, behind, behind / gain)
    if not noise.known:
        return result(None, "not known", None, None, None)
    # Each θ ≤ 0, with the error that it has with one run of each rank.
    thetas: list[tuple[stats.Estimate, float]] = []
    for _, other in ranked:
        theta = _compute_theta(row, other, base, share)
        _, _, a, b = _pair(row, other)
        if other is row:
            # θ_rr = δ·(μ_r − L_base): the rank must have a gain.
            error = share * math.sqrt(noise.plain)
            error_of_mean = share * math.sqrt(noise.plain / a)
            thetas.append((stats.Estimate(theta, error_of_mean, noise.plain_freedom), error))
        else:
            variance = noise.paired_variance(row, other)
            error = noise.theta(theta, variance, share, 1, 1).error
            thetas.append((noise.theta(theta, variance, share, a, b), error))
    confidences = [estimate.confidence_below(0.0) for estimate, _ in thetas]
    confidence = min(confidences)
    against = max(0.0, 1 - (len(thetas) - 1) * confidence)
    half = 0.0
    if row is not best:
        error = math.sqrt(noise.paired_variance(row, best) * (1 / n + 1 / m))
        half = stats.Estimate(behind, error, noise.freedom).half()
    if confidence >= stats.LEVEL:
        return result(half, "yes", confidence, against, None)
    if against >= stats.LEVEL:
        return result(half, "no", confidence, against, None)
    worst, error_of_one = thetas[confidences.index(confidence)]
    level = stats.LEVEL if worst.value <= 0 else 1 - (1 - stats.LEVEL) / (len(thetas) - 1)
    needed = stats.runs_needed(worst.value, error_of_one, len(ranked) - 1, level=level)
    if needed is not None:
        needed = max(needed, min(n, m) + 1)
    return result(half, "not known", confidence, against, needed)


def _choose_outcome(
    standings: Sequence[RankStanding], sufficient: RankStanding | None, noise: _Noise
) -> Outcome:
    """Return the outcome, as in ``SweepVerdict``, of a sweep with a gain at several ranks."""
    if not noise.known:
        return "no verdict"
    lower = standings[: (len(standings) + 1) // 2]
    if sufficient is None:
        return "not resolved"
    if sufficient in lower:
        return "fast saturation"
    if all(standing.enough == "no" for standing in lower):
        return "gradual decline"
    return "not resolved"


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep on one evaluation set.

    Args:
        set: The set.
        records: All records of the sweep.
        rows: The runs of each rank at its best learning rate, ascending.
        lines: Those of each reference line.
        base: BASE's record on the set; None without a finite loss.
        verdict: The verdict; without ``base`` there is none, whatever the losses.
        tolerance: Fraction of the gain that a smaller rank may lose.
    """

    set: str
    records: Sequence[Probe]
    rows: Sequence[AtRank]
    lines: Mapping[Subject, AtRank]
    base: Probe | None
    verdict: SweepVerdict
    tolerance: float

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks tried, ascending."""
        tried = {record.rank or 0 for record in self.records if record.subject == "lora"}
        return tuple(sorted(tried - {0}))

    def compare(self, subject: Subject) -> ReferenceComparison | None:
        """Return the comparison of the best rank with a reference line; None without a loss of
        either or of BASE.
        """
        if self.base is None or subject not in self.lines:
            return None
        return compare_with_reference(
            self.rows, self.lines[subject], self.base.nats, self.tolerance
        )


def list_swept(records: Sequence[Probe], settings: Mapping[str, Any]) -> list[Swept]:
    """Return a sweep on each of its sets; the first set decides on the learning rates.

    Args:
        records: Records of the sweep.
        settings: Settings of its run.
    """
    seed, share = settings.get("seed", 0), settings.get("gain_tolerance", TOLERANCE)
    sets = set_names(records)
    found = []
    for name in sets:
        base = _find_base(records, name)
        rows = by_rank(records, name, best_rates(records, sets[0], seed))
        lines: dict[Subject, AtRank] = {}
        for subject in LINES:
            rates = best_rates(records, sets[0], seed, subject)
            for row in by_rank(records, name, rates, subject):
                lines[subject] = row
        verdict = SweepVerdict("no verdict")
        if base is not None:
            verdict = judge_sweep(rows, base.nats, share)
        found.append(Swept(name, records, rows, lines, base, verdict, share))
    return found


def swept_of(results: Results[Any]) -> Swept | None:
    """Return a sweep on its deciding set (``main_sets``); None without BASE's loss on such a set.

    Args:
        results: Results of ``probe sweep``.
    """
    records = [record for record in results.whole_of(Probe) if record.probe == "sweep"]
    sets = main_sets(records)
    for swept in list_swept(records, results.run.settings):
        if swept.set in sets and swept.base is not None:
            return swept
    return None


def swept_rate(path: Path | str) -> str:
    """Return as text the best learning rate of a sweep's chosen rank, and its origin.

    Args:
        path: Results of ``probe sweep``.

    Raises:
        UsageError: No rank is chosen: none has a gain, fewer than two have a loss, BASE has none,
            or the results are of another command.
    """
    name, results = legible(path), read_results(path)
    swept = swept_of(results)
    chosen = None if swept is None else swept.verdict.chosen
    if chosen is None:
        raise UsageError(
            Given("sweep", name),
            "names no learning rate",
            "give results of probe sweep in which a rank gains",
        )
    settings = results.run.settings
    kind, steps = settings.get("kind", "LoRA, alpha = 2r"), settings.get("steps")
    steps_text = f", {steps} steps" if steps else ""
    return (
        f"{chosen.lr:g}, the best at r={chosen.rank} in {name} (fresh factors, {kind}{steps_text})"
    )
