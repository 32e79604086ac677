"""What the records of several features are made of: rounding, truncation errors, principal angles, metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

from lora_diag.records.base import Norm, Record, Share


class Tail(Record):
    """Eckart–Young errors of the best rank-r approximation.

    Args:
        fro: √Σ_{i>r}σ_i²; its square is off by at most ``energy_error``·‖ΔW‖_F².
        spectral: σ_{r+1}; null if it was not computed.
        spectral_error: Bound on the error of ``spectral``, from ``energy_error``; null in results of older versions.
    """

    fro: Norm
    spectral: Norm | None
    spectral_error: Norm | None = None


class Resolution(Record):
    """What the files' rounding lets one see of ΔW.

    Args:
        unchanged: Share of the entries that are bit-identical on both sides; null for an adapter, which has no sides.
        mantissa: Mantissa bits that the stored values of base and tuned really use; null for an adapter.
        rounding_fro: Bound on ‖E‖_F, the norm of the rounding error of ΔW; by Mirsky Σ(σ_i − σ̂_i)² ≤ ‖E‖_F².
        noise_fro: Expected ‖E‖_F if E behaves like noise.
        edge: Where the singular values of such noise end: the largest stands above it in at most 1% of layers. Not
            below 1e-7 σ_1, where values are rounding of the decomposition.
        start: ``exact`` if ``base_rounding`` shows that the stored BASE is the start of training; ``unknown`` if it may
            be, or a rounded copy; ``rounded`` if it is a rounded copy, or TUNED is stored no more finely, so that both
            may be. The rounding of BASE counts unless the start is exact. Null for an adapter.
        base_noise_fro: Expected norm of the rounding error of BASE, if it was rounded after the start of training;
            null for an adapter.
        base_rounding: β of E[ΔW²] = β·ulp²/12 + f(|w|), f smooth, and its standard error: 1 if BASE was rounded after
            the start, 0 if not; null where TUNED is not stored more finely, or too few entries changed.
        untouched: Estimated share of entries that training left alone (a sparse update), as opposed to those that
            rounding left unchanged; null for an adapter.
        signal_rank: Singular values above the edge; null if all that were kept are and there are more.
        verdict: Whether the files can show this update.
    """

    unchanged: Share | None
    mantissa: tuple[int, int] | None
    rounding_fro: Norm
    noise_fro: Norm
    edge: Norm
    signal_rank: int | None
    verdict: Literal["resolved", "floor-limited", "unresolved"]
    start: Literal["exact", "rounded", "unknown"] | None = None
    base_noise_fro: Norm | None = None
    base_rounding: tuple[float, float] | None = None
    untouched: Share | None = None


def noise_mark(verdicts: Iterable[str]) -> str:
    """Return the mark of the worst verdict: ``!`` for unresolved updates, ``~`` for floor-limited ones."""
    found = set(verdicts)
    return "!" if "unresolved" in found else "~" if "floor-limited" in found else ""


# A fraction with its interval of about 95%.
Interval = tuple[float, float]


class Hidden(Record):
    """What the rounding cells of the files say about the update before rounding, X; an estimate.

    Each stored entry says in which interval X_ij lay. Model: X = L + noise of variance s², L of low rank. All
    intervals are of about 95% under it, wider where the model fits badly; they do not cover another model.

    Args:
        status: ``recovered``: directions of X stand above what rounding hides, and hidden cells confirm them.
            ``size_only``: only the size of X is estimated; no direction is significant. ``not_hidden``: the files
            resolve the update, D is the answer. ``refused``: nothing is estimated.
        reason: Why, in one sentence.
        unchanged: Share of the entries that are the same on both sides once BASE is rounded as TUNED is stored.
        fro_estimate: ‖X‖_F; null where refused.
        fro_interval: Of ``fro_estimate``.
        values_estimate: Singular values x_i of X in the directions that were found, descending; of ``not_hidden``
            those of D. Null where refused, of ``size_only`` and in older results.
        energy_estimate: C(r) = Σ_{i≤r}x_i²/‖X‖_F² of the directions that were found, a lower bound as far as they
            are right: energy in directions that rounding hides is not in it; null unless recovered.
        energy_interval: From that bound to what the rest of X could add.
        rank_at_estimate: Smallest r at which ``energy_estimate`` reaches the threshold; null if it does not.
        rank_at_interval: The same for the ends of ``energy_interval``, the smaller rank first.
        directions: How many directions of X were found.
        gain_z: Mean gain in log-likelihood of hidden cells over a model without directions, in standard errors; null
            where that was not tried.
        rule: How s followed from L: ``norm`` or ``debiased``, as hidden cells decided.
        start: ``stored``: BASE is where training started. ``rounded``: BASE was rounded after the start, which lay
            anywhere in its cells. The larger likelihood decides.
        start_gain: Log-likelihood of ``rounded`` minus that of ``stored``, over a sample of entries where there are
            many; null where BASE is stored more finely than TUNED.
        information: Share of the variance of an entry of X that its cell removes; 1 where rounding hides nothing.
        fit_chi: χ² per degree of freedom of the share of changed entries by binade of |W|.
        fit_misplaced: Changed entries in the wrong binade, as a share of the changed or the unchanged.
        scales: Whether rows and columns have variances of their own, a_i·b_j, because one did not fit.
        kurtosis: Of the likeliest distribution of the entries, 3 where it is normal; null where scales or directions
            were needed to fit, and in older results.
        iterations: Of the last fit.
        converged: Whether that ended by itself.
    """

    status: Literal["recovered", "size_only", "not_hidden", "refused"]
    reason: str
    unchanged: Share
    fro_estimate: Norm | None = None
    fro_interval: Interval | None = None
    values_estimate: tuple[Norm, ...] | None = None
    energy_estimate: dict[str, Share] | None = None
    energy_interval: dict[str, Interval] | None = None
    rank_at_estimate: dict[str, int | None] | None = None
    rank_at_interval: dict[str, tuple[int | None, int | None]] | None = None
    directions: int | None = None
    gain_z: float | None = None
    rule: Literal["norm", "debiased"] | None = None
    start: Literal["stored", "rounded"] | None = None
    start_gain: float | None = None
    information: Share | None = None
    fit_chi: float | None = None
    fit_misplaced: float | None = None
    scales: bool = False
    kurtosis: float | None = None
    iterations: int | None = None
    converged: bool | None = None


class Agreement(Record):
    """Principal angles between a space of the adapter's update and that of the top k singular vectors of D.

    Args:
        cosines: Of the principal angles, descending, min(k, rank of X) of them.
        overlap: Mean of their squares: 1 for the same space, 0 for orthogonal ones.
        random: What ``overlap`` is on average for a random space: k/m for column spaces, k/n for row spaces.
    """

    cosines: tuple[float, ...]
    overlap: Share
    random: Share


class SingularValues(Protocol):
    """The singular values of one layer's update, as a record has them."""

    @property
    def layer(self) -> str:
        """The weight's name in BASE."""
        ...

    @property
    def s(self) -> tuple[float, ...]:
        """Singular values, descending."""
        ...

    @property
    def complete(self) -> bool:
        """Whether all that can differ from zero are there."""
        ...


Metric = Literal["weights", "data", "kfac"]

# What ‖ΔW‖ and ‖W‖ are called in each metric, and it itself.
NORMS = {
    "weights": ("‖ΔW‖", "‖W‖"),
    "data": ("‖ΔW·C^½‖", "‖W·C^½‖"),
    "kfac": ("‖G^½·ΔW·C^½‖", "‖G^½·W·C^½‖"),
}
METRIC_NAMES = {"weights": "the weights' metric", "data": "the data's metric", "kfac": "K-FAC's metric"}


def metrics_of(records: Iterable[object]) -> list[Metric]:
    """Return the metrics of the spectra among some records, each once."""
    spectra: list[Any] = [record for record in records if getattr(record, "record", "") == "spectrum"]
    return list(dict.fromkeys(record.metric for record in spectra))


def metric_of(records: Iterable[object]) -> Metric:
    """Return the metric of the spectra among some records of one run, which mixes none; ``weights`` without any."""
    return next(iter(metrics_of(records)), "weights")
