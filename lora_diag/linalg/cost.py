"""Cost model of the spectral methods: whether Krylov pays, and when to stop it.

Costs are in flops of a thin float32 product. Only ratios are used, never a clock, so that a choice, and with it every
byte of a record, is the same on every machine. They were measured on one core of an Intel Xeon (AVX-512, MKL), where
thin products run at 150 Gflop/s (docs/benchmarks.md has the table). On two cores of an AMD EPYC (OpenBLAS), thin
products ran at 107, the full spectrum at 65; the relative costs differ by less than 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence

# Costs of one flop of float64 products relative to that of a thin product in float32: 57 to 78 Gflop/s.
GRAM = PROJECTED = 2.3

# The same of eigenvalues, fitted by EIGENVALUES·(1 + FEW/n): 29 Gflop/s at order 1152, 42 at 2048, 48 at 4096. Up to
# order 1024 MKL runs at 16 to 19.
EIGENVALUES, FEW, SMALL, UP_TO = 2.4, 1150, 8.5, 1024

# Costs of a column over n: of its QR decompositions, and at every check of its copy in float64.
COLUMN, COPY = 2000, 450

# Cost of the problems of a check over p³ and p² (1.5 ms at p = 96, 15 at 256, 49 at 416), and of a probe over mn (22 ms
# at 2048², 85 at 8192×2048).
CHECK, SMALL_CHECK, PROBE = 56, 19000, 800

# Eigenvectors besides the eigenvalues, over these alone: 1.7 for the largest, 4.9 where all are computed (4096²).
SOME_VECTORS = 2.5

# The first two checks, after which hopeless spectra are recognized, may cost this fraction of a full method.
LOSS = 0.1

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
    eigenvalues = (SMALL if n <= UP_TO else EIGENVALUES * (1 + FEW / n)) * 4 / 3 * n**3
    return product + eigenvalues * (SOME_VECTORS if vectors else 1.0)


def krylov_cost(shape: tuple[int, ...], checks: Sequence[int], top: int = 0) -> float:
    """Return the cost of a Krylov basis that was checked at these numbers of columns, the last of which it has.

    Args:
        shape: ``(m, n)``.
        checks: Columns of the basis at every check.
        top: K, the number of values, to count the probe and the values as well; 0 before the end.
    """
    n, m = sorted(shape)
    columns = checks[-1]
    products = 4.0 * m * n * columns + 4 * n * columns**2 + COLUMN * n * columns
    projected = 4 * PROJECTED * n * columns**2
    checking = sum(CHECK * p**3 + SMALL_CHECK * p**2 + COPY * n * p for p in checks)
    if not top:
        return products + projected + checking
    return products + projected + checking + PROBE * m * n + 2 * PROJECTED * m * columns * top


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
