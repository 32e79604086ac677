"""Resolution of a layer's ΔW under the rounding of the files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diag.metrics.resolution import Gain, Noise, signal_rank, verdict, weighted_edge
from lora_diag.records import Resolution

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_diag.linalg.difference import Difference
    from lora_diag.linalg.exact import Factors
    from lora_diag.linalg.rounding import Profile


@dataclass(frozen=True, slots=True)
class Gains:
    """Effect of a metric on the errors of ΔW, with variances approximated by aᵢbⱼ.

    Args:
        left: ‖·‖_F and ‖·‖_2 of the left factor of the metric, times diag(√a).
        right: ‖·‖_F and ‖·‖_2 of diag(√b) times the right factor.
        base: ‖·‖_F of the left factor times that of the right factor, over √(mn).
        bound: ‖·‖_2 of the left factor times that of the right factor.
    """

    left: Gain
    right: Gain
    base: float
    bound: float


def noise_of(profile: Profile, terms: int) -> Noise:
    """Return the noise of a profile of variances, in NumPy.

    Args:
        profile: Sums of the variances of the rounding errors over each row and each column; on the
            CPU.
        terms: Maximum number of rounding errors in an entry.
    """
    return Noise(
        rows=profile.rows.numpy(),
        columns=profile.columns.numpy(),
        rows_fourth=profile.rows_fourth.numpy(),
        columns_fourth=profile.columns_fourth.numpy(),
        unit=profile.unit,
        terms=terms,
    )


def resolution(
    difference: Difference | None, factors: Factors, gains: Gains | None = None
) -> Resolution:
    """Return the resolution of an update under the rounding of its files; an adapter's factors have
    no rounding.

    Args:
        difference: Result of one pass over the two stored sides; None for an update without two
            sides.
        factors: The largest singular values of ΔW. Those that are rounding of the method count as
            noise.
        gains: Effect of the data metric on the errors; None in the plain metric.
    """
    from lora_diag.linalg.exact import rounding_threshold

    s, fro, complete = factors.s.numpy(), factors.fro, factors.complete
    rounding = difference.rounding if difference else None
    if difference is None or rounding is None:
        return make_resolution(s, fro, complete)
    noise = noise_of(rounding.noise, rounding.sides)
    noise_fro, edge = noise.fro, noise.edge if gains is None else 0.0
    if gains is not None:
        noise_fro, edge = gains.left[0] * gains.right[0], weighted_edge(gains.left, gains.right)
    edge = max(edge, rounding_threshold(factors))
    signal = signal_rank(s, edge, complete)
    return Resolution(
        unchanged=difference.unchanged,
        mantissa=difference.mantissa,
        rounding_fro=rounding.bound * (gains.bound if gains else 1.0),
        noise_fro=noise_fro,
        edge=edge,
        signal_rank=signal,
        verdict=verdict(noise_fro, fro, signal),
        start=rounding.start,
        base_noise_fro=rounding.base_fro * (gains.base if gains else 1.0),
        base_rounding=rounding.base_rounding,
        untouched=rounding.untouched,
    )


def make_resolution(
    s: NDArray[np.float64],
    fro: float,
    complete: bool,
    rounding_fro: float = 0.0,
    noise_fro: float = 0.0,
    edge: float = 0.0,
) -> Resolution:
    """Return the resolution under given noise; by default under none, as for an adapter or an
    estimate.

    Args:
        s: The largest singular values of the update.
        fro: ‖ΔW‖_F.
        complete: Whether ``s`` are all that can be nonzero.
        rounding_fro: Bound on ‖E‖_F of the rounding error E.
        noise_fro: Expected ‖E‖_F.
        edge: Upper edge of the singular values of E.
    """
    signal = signal_rank(s, edge, complete)
    return Resolution(
        unchanged=None,
        mantissa=None,
        rounding_fro=rounding_fro,
        noise_fro=noise_fro,
        edge=edge,
        signal_rank=signal,
        verdict=verdict(noise_fro, fro, signal),
    )
