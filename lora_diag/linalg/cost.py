"""Cost model of the spectral methods: whether Krylov pays, and when to stop it.

Costs are in flops of a thin float32 product. Only ratios are used, never a clock, so that a choice, and with it every
byte of a record, is the same on every machine. Gflop/s on one core of an Intel Xeon (AVX-512, MKL): thin products
84–108, float64 products of the Gram matrix 57–76, its eigenvalues 40–48, the projected problem 62–65; on two cores of
an AMD EPYC (OpenBLAS) thin products 107, the full spectrum 65. The relative costs differ by less than 1.5 between them.
"""

from __future__ import annotations

from collections.abc import Sequence

# Costs of one flop relative to that of a thin product in float32. Eigenvalues of small matrices cost more: 95/18 at 512
# and 1024, 95/38 at 2048, 95/48 at 4096, fitted by EIGENVALUES·(1 + SMALL/n).
GRAM, EIGENVALUES, PROJECTED = 1.5, 2.0, 1.5
SMALL = 700

# Cost of a check over p³ (8 ms at p = 224, 64 ms at 448), and of the probe over mn (25 ms at 2048²).
CHECK, PROBE = 70, 550

# Eigenvectors besides the eigenvalues, over these alone: 1.7 for the largest, 4.9 where all are computed (4096²).
SOME_VECTORS = 2.5

# The first two checks, after which hopeless spectra are recognized, may cost this fraction of a full method.
LOSS = 0.12

# Columns of the basis over K with which power laws from exponent 0.5 on were certified, and the largest cost of trying.
TYPICAL, WORTH = 4.0, 0.75


def full_cost(shape: tuple[int, ...], vectors: bool = False) -> float:
    """Return the cost of all singular values by the Gram matrix.

    Args:
        shape: ``(m, n)``.
        vectors: Whether the largest singular vectors are computed, too.
    """
    n, m = sorted(shape)
    product = GRAM * 17 / 16 * m * n**2  # 17/32 of a full product: linalg.gram.PANELS
    return product + EIGENVALUES * (1 + SMALL / n) * (SOME_VECTORS if vectors else 1.0) * 4 / 3 * n**3


def krylov_cost(shape: tuple[int, ...], checks: Sequence[int], top: int = 0) -> float:
    """Return the cost of a Krylov basis that was checked at these numbers of columns, the last of which it has.

    Args:
        shape: ``(m, n)``.
        checks: Columns of the basis at every check.
        top: K, the number of values, to count the probe and the values in float64 as well; 0 before the end.
    """
    n, m = sorted(shape)
    columns = checks[-1]
    products = 4.0 * m * n * columns + 4 * n * columns**2
    projected = PROJECTED * (4 * n + m) * columns**2 + CHECK * sum(each**3 for each in checks)
    if not top:
        return products + projected
    return products + projected + PROBE * m * n + PROJECTED * (2 * m * n * top + 4 * (m + n) * top**2)


def is_worthwhile(shape: tuple[int, ...], checks: Sequence[int], top: int, vectors: bool = False) -> bool:
    """Return whether Krylov is worth trying: losing its first checks is cheap, and a typical success gains.

    Args:
        shape: ``(m, n)``.
        checks: Columns at the first two checks.
        top: K, the number of values.
        vectors: Whether to compute singular vectors.

    Example:
        >>> is_worthwhile((4096, 4096), (96, 128), 64), is_worthwhile((512, 512), (96, 128), 64)
        (True, False)
    """
    full = full_cost(shape, vectors)
    success = krylov_cost(shape, (*checks, max(checks[-1] + 32, round(TYPICAL * top))), top)
    return krylov_cost(shape, checks) <= LOSS * full and success <= WORTH * full
