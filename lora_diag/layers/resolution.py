"""What the files' rounding lets one see of a layer's ΔW."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lora_diag.linalg import Difference
from lora_diag.metrics import Gain, noise_edge, signal_rank, verdict
from lora_diag.records import Resolution

if TYPE_CHECKING:
    from numpy.typing import NDArray


def resolution(
    rounding: Difference | None,
    shape: tuple[int, int],
    s: NDArray[np.float64],
    fro: float,
    complete: bool,
    gains: tuple[Gain, Gain] | None = None,
) -> Resolution:
    """Hold an update against the rounding of the files. An adapter's factors are the update: nothing was rounded.

    Args:
        rounding: What one pass over the two stored sides gave; None for an update that has no two sides.
        shape: ``(out, in)``.
        s: The largest singular values of ΔW, descending.
        fro: ‖ΔW‖_F.
        complete: Whether ``s`` holds all of them.
        gains: In the metric of the data: ‖·‖_F and ‖·‖_2 of what stands left of ΔW and of what stands right. Rounding
            errors are then taken as independent and equally large in all entries, and E‖SET‖_F² = σ̄²‖S‖_F²‖T‖_F².
    """
    left, right = gains or ((math.sqrt(shape[0]), 1.0), (math.sqrt(shape[1]), 1.0))
    variance = rounding.rounding_variance if rounding else 0.0
    edge = noise_edge(variance, shape, gains)
    signal = signal_rank(s, edge, complete)
    noise_fro = math.sqrt(variance) * left[0] * right[0]
    return Resolution(
        unchanged=rounding.unchanged if rounding else None,
        mantissa=rounding.mantissa if rounding else None,
        rounding_fro=rounding.rounding_fro * left[1] * right[1] if rounding else 0.0,
        noise_fro=noise_fro,
        edge=edge,
        signal_rank=signal,
        verdict=verdict(noise_fro, fro, signal),
    )
