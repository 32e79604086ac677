"""Parts of records used by several features: rounding, truncation errors, principal angles,
metrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lora_diag.records.base import Count, Norm, Record, Share

# In ``method``, before the reason why a layer was not computed on the device of the run.
ON_CPU = " on the CPU: "


class Tail(Record):
    """Eckart–Young errors of the best rank-r approximation.

    Args:
        fro: √Σ_{i>r}σ_i²; its square has an error of at most ``energy_error``·‖ΔW‖_F².
        spectral: σ_{r+1}; null if it was not computed.
        spectral_error: Bound on the error of ``spectral``, from ``energy_error``; null in results
            of older versions.
    """

    fro: Norm
    spectral: Norm | None
    spectral_error: Norm | None = None


class Resolution(Record):
    """Resolution of ΔW under the rounding of the files.

    Args:
        unchanged: Fraction of the entries that are bit-identical on both sides; null for an
            adapter.
        mantissa: Mantissa bits in use by the stored values of base and tuned; 0 for a quantized
            format, also of values that were dequantized from 4 bits; null for an adapter.
        rounding_fro: Bound on ‖E‖_F, the norm of the rounding error of ΔW; by Mirsky Σ(σ_i − σ̂_i)²
            ≤ ‖E‖_F².
        noise_fro: Expected ‖E‖_F if E behaves like noise.
        edge: Upper edge of the singular values of such noise: the largest exceeds it in at most 1%
            of layers. Not below 1e-7 σ_1, where values are rounding of the decomposition.
        start: ``exact`` if ``base_rounding`` shows that the stored BASE is the start of training;
            ``unknown`` if it may be, or a rounded copy; ``rounded`` if it is a rounded copy, or
            TUNED is stored no more finely, so that both may be. The rounding of BASE counts unless
            the start is exact. Null for an adapter.
        base_noise_fro: Expected norm of the rounding error of BASE, if it was rounded after the
            start of training; null for an adapter.
        base_rounding: β of E[ΔW²] = β·ulp²/12 + f(|w|), f smooth, and its standard error: 1 if BASE
            was rounded after the start, 0 if not; null where TUNED is not stored more finely, too
            few entries changed, the model does not fit, or BASE was dequantized from 4 bits: its
            copies fit 0, too.
        untouched: Estimated fraction of entries that training did not change (a sparse update),
            excluding those that rounding left unchanged; null for an adapter.
        signal_rank: Number of singular values above the edge; null if all kept values are and there
            are more. A lower count: weights of unequal rows or columns raise the edge, so that it
            misses weaker directions.
        verdict: Whether the files resolve the update. ``resolved``: rounding is expected to have at
            most 1% of ‖ΔW‖², and a singular value is above the noise edge. ``floor-limited``:
            neither resolved nor unresolved: its weak directions may be rounding; trust the signal
            rank, not r@99%. ``unresolved``: rounding is expected to have at least half of ‖ΔW‖², or
            no singular value is above the edge, or ΔW = 0: ranks and spectra describe the file
            format; measure float32 files or the adapter itself, or run ``recover``.
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


# Marks of verdicts in tables, the worst first.
NOISE_MARKS = {"unresolved": "!", "floor-limited": "~"}


def noise_mark(verdicts: Iterable[str]) -> str:
    """Return the mark of the worst verdict; empty if all are resolved."""
    present = set(verdicts)
    return next((mark for verdict, mark in NOISE_MARKS.items() if verdict in present), "")


# A fraction with its interval of about 95%.
Interval = tuple[float, float]


class Hidden(Record):
    """Estimate of the update before rounding, X, from the rounding cells of the files.

    Each stored entry gives an interval for X_ij. Model: X = L + noise of variance s², L of low
    rank. All intervals have about 95% coverage under it, and are wider if the model fits badly;
    they do not cover other models.

    Args:
        status: ``recovered``: directions of X are above the rounding noise, and held-out cells
            confirm them. ``size_only``: only the size of X is estimated; no direction is
            significant, or their fit is no result. ``not_hidden``: the files resolve the update, D
            is the answer. ``refused``: nothing is estimated.
        reason: The reason of the status as one sentence; not for comparison by code.
        unchanged: Fraction of the entries that are equal on both sides after rounding BASE to the
            format of TUNED; 0 where the cells of a format are unknown.
        fro_estimate: ‖X‖_F, in the unit of the weights; null where refused.
        fro_interval: Interval of about 95% of ``fro_estimate``, in the same unit; null where
            refused or ``not_hidden``.
        values_estimate: Singular values x_i of X in the directions that were found, descending; of
            ``not_hidden`` those of D. Null where refused, of ``size_only`` and in older results,
            except where a budget was distributed: there those of D and of E[X | cells].
        energy_estimate: C(r) = Σ_{i≤r}x_i²/‖X‖_F² of the detected directions, a lower bound if they
            are correct: energy in hidden directions is not included; null unless recovered.
        energy_interval: From that bound to the maximum, which includes the part of X outside the
            directions.
        rank_at_estimate: Smallest r at which ``energy_estimate`` reaches the threshold; null if it
            does not.
        rank_at_interval: The same for the ends of ``energy_interval``, the smaller rank first.
        directions: Number of detected directions of X; null where refused or ``not_hidden``.
        gain_z: Mean gain in log-likelihood of held-out cells over a model without directions, in
            standard errors; null if not tested.
        rule: Rule for s given L: ``norm``, ``debiased`` or ``held_out``, chosen by held-out cells.
        start: ``stored``: BASE is where training started. ``rounded``: BASE was rounded after the
            start, which may be anywhere in its cells. The larger likelihood decides.
        start_gain: Log-likelihood of ``rounded`` minus that of ``stored``, over a sample if there
            are many entries; null if BASE is stored more finely than TUNED, or if nothing was
            fitted.
        information: Fraction of the variance of an entry of X that its cell removes; 1 without
            hidden information.
        fit_chi: χ² per degree of freedom of the fraction of changed entries by binade of |W|.
        fit_misplaced: Changed entries in the wrong binade, as a fraction of the changed or the
            unchanged.
        fit_uneven: Standard deviation over binades of |W| of the logarithm of the size of X, beyond
            its error; null in older results.
        scales: Whether rows and columns have separate variances, a_i·b_j, because a common one did
            not fit.
        kurtosis: Kurtosis of the likeliest distribution of the entries, 3 where it is normal; null
            where scales or directions were needed to fit, and in older results.
        iterations: Iterations of the last fit.
        converged: Whether the last fit converged.
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
    directions: Count | None = None
    gain_z: float | None = None
    rule: Literal["norm", "debiased", "held_out"] | None = None
    start: Literal["stored", "rounded"] | None = None
    start_gain: float | None = None
    information: Share | None = None
    fit_chi: float | None = None
    fit_misplaced: float | None = None
    fit_uneven: float | None = None
    scales: bool = False
    kurtosis: float | None = None
    iterations: Count | None = None
    converged: bool | None = None


class Agreement(Record):
    """Principal angles between two spaces of singular vectors, of dimensions k and j.

    Args:
        cosines: Cosines of the min(k, j) principal angles, descending.
        overlap: Mean of their squares: 1 if one space contains the other, 0 for orthogonal ones.
        random: Mean of ``overlap`` for a random space: max(k, j)/m for column spaces, max(k, j)/n
            for row spaces.
    """

    cosines: tuple[float, ...]
    overlap: Share
    random: Share


Metric = Literal["weights", "data", "kfac"]

# Names of ‖ΔW‖ and ‖W‖ in each metric, and of the metric.
NORMS = {
    "weights": ("‖ΔW‖", "‖W‖"),
    "data": ("‖ΔW·C^½‖", "‖W·C^½‖"),
    "kfac": ("‖G^½·ΔW·C^½‖", "‖G^½·W·C^½‖"),
}
METRIC_NAMES = {
    "weights": "the weights' metric",
    "data": "the data's metric",
    "kfac": "K-FAC's metric",
}


def metrics_of(records: Iterable[object]) -> list[Metric]:
    """Return the distinct metrics of the spectra among records."""
    metrics: list[Metric | None] = [getattr(record, "metric", None) for record in records]
    return list(dict.fromkeys(metric for metric in metrics if metric is not None))


def metric_of(records: Iterable[object]) -> Metric:
    """Return the metric of the spectra among records of one run, which are all equal; ``weights``
    without any.
    """
    return next(iter(metrics_of(records)), "weights")
