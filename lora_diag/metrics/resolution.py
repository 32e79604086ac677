"""Can the files show this update? The rounding of the stored numbers, held against ‖ΔW‖."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["resolved", "floor-limited", "unresolved"]

# Share of ‖ΔW‖_F² that rounding is expected to make up. Measured on updates of planted rank 8, of a power-law spectrum
# and of full rank to bf16 weights (docs/benchmarks.md): at 0.3% the ranks at 90 and 95% are the true ones and that at
# 99% is a tenth too high; at 2.6% that at 99% is off by factors; at 20% that at 90% may be. Beyond 50% most entries are
# unchanged, what moved did so by whole spacings, and every rank is that of the rounding.
RESOLVED, UNRESOLVED = 0.01, 0.5


Gain = tuple[float, float]


def noise_edge(variance: float, shape: tuple[int, int], gains: tuple[Gain, Gain] | None = None) -> float:
    """Return σ̄(√m + √n): where the singular values of an m×n matrix of independent errors of variance σ̄² end.

    Between two matrices S and T, of which ``gains`` are ‖·‖_F and ‖·‖_2, the errors SET end by σ̄(‖S‖_2‖T‖_F +
    ‖S‖_F‖T‖_2) in expectation (Chevet 1978): an upper bound where entries are normal, sharp for S = T = 1.

    Reference: Davidson and Szarek 2001, theorem II.13 (Gaussian entries; the same limit for any, Bai and Yin 1993);
    Vershynin 2018, High-Dimensional Probability, section 8.7 (Chevet's inequality; a constant for other entries).

    Example:
        >>> noise_edge(4.0, (9, 16)), noise_edge(4.0, (9, 16), ((3.0, 1.0), (2.0, 0.5)))
        (14.0, 7.0)
    """
    (s_fro, s_top), (t_fro, t_top) = gains or ((math.sqrt(shape[0]), 1.0), (math.sqrt(shape[1]), 1.0))
    return math.sqrt(variance) * (s_top * t_fro + s_fro * t_top)


def signal_rank(s: NDArray[np.float64], edge: float, complete: bool) -> int | None:
    """Return how many singular values stand above the noise edge; None if all that were kept do and there are more.

    Example:
        >>> signal_rank(np.array([3.0, 2.0, 0.5]), 1.0, complete=True)
        2
    """
    count = int((s > edge).sum())
    return None if count == len(s) and not complete else count


def verdict(noise_fro: float, fro: float, signal: int | None) -> Verdict:
    """Judge whether the files can show the update.

    Args:
        noise_fro: Expected norm of the rounding error.
        fro: ‖ΔW‖_F as read from the files.
        signal: Singular values above the noise edge; None if more than were kept.

    Returns:
        ``unresolved`` for a zero update too: the files cannot tell it from one that rounding swallowed.

    Example:
        >>> verdict(0.03, 1.0, 8), verdict(0.3, 1.0, 8), verdict(0.9, 1.0, 8)
        ('resolved', 'floor-limited', 'unresolved')
    """
    if fro == 0.0 or signal == 0 or (noise_fro / fro) ** 2 >= UNRESOLVED:
        return "unresolved"
    return "resolved" if (noise_fro / fro) ** 2 <= RESOLVED else "floor-limited"
