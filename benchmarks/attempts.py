"""How often `krylov` certifies, and what its attempts cost in the model of flops, over 83 spectra.

    python -m benchmarks.attempts [ORDER VALUES]...      default: 1536 16, 1536 64, 2560 128

Matrices are diagonal, multiplied entry by entry: the Krylov space of a Gaussian start is that of
any matrix with these values, so seconds suffice for what takes minutes on matrices. "All values" is
1; an attempt that fails costs 1 and its own cost.
"""

import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from benchmarks.measure import print_table
from lora_diag.linalg import krylov

TOLERANCES = (5e-4, 1e-2)

# Number of values of 1, level of the next three times as many values, and of the last ones.
EQUAL = (
    (20, 0.3, 0.01),
    (20, 0.2, 0.01),
    (60, 0.5, 0.05),
    (10, 0.3, 0.1),
    (100, 0.5, 0.05),
    (64, 0.7, 0.02),
)


class Diagonal:
    """A square diagonal matrix with the attributes of a matrix that ``krylov`` reads."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = torch.from_numpy(values / np.linalg.norm(values)).float()[:, None]
        self.shape = (len(values), len(values))
        self.dtype, self.device, self.T = torch.float32, torch.device("cpu"), self


def times(a: "Diagonal | Tensor", x: Tensor) -> Tensor:
    """Return A·X in the dtype of X."""
    return a.values.to(x.dtype) * x if isinstance(a, Diagonal) else a.to(x.dtype) @ x


def noise(n: int) -> np.ndarray:
    """Return the singular values of an n×n Gaussian matrix, from its bidiagonal form (Dumitriu and
    Edelman 2002).
    """
    generator = np.random.default_rng(0)
    diagonal, upper = (np.sqrt(generator.chisquare(np.arange(k, 0, -1))) for k in (n, n - 1))
    squares = diagonal**2 + np.r_[0, upper**2]
    return np.sqrt(eigvalsh_tridiagonal(squares, diagonal[:-1] * upper)[::-1].clip(0))


def spectra(n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield 83 names and spectra."""
    i, flat = np.arange(1, n + 1.0), noise(n)

    def mixed(values: np.ndarray, energy: float) -> np.ndarray:
        parts = (values / np.linalg.norm(values), 1 - energy), (flat / np.linalg.norm(flat), energy)
        return np.sort(np.sqrt(sum(part**2 * share for part, share in parts)))[::-1]

    for power in (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2):
        yield f"power law {power}", i**-power
    for rank in (4, 8, 20, 40, 60, 80, 100, 150):
        values = np.r_[np.linspace(1.3, 0.8, rank), np.zeros(n - rank)]
        for energy in (0.001, 0.01, 0.1, 0.5):
            yield f"rank {rank}, {energy:.1%} noise", mixed(values, energy)
    for length in (5, 10, 20, 40, 80, 160, 320):
        yield f"exponential {length}", np.exp(-i / length)
        yield f"exponential {length}, 10% noise", mixed(np.exp(-i / length), 0.1)
    for length in (20, 50, 100, 300, 600):
        for drop in (0.5, 0.2, 0.05):
            level = np.minimum(i, max(4, length // 4)) ** -0.7
            tail = drop * level[-1] * (i / length) ** -0.5
            yield f"plateau to {length}, then {drop}", np.where(i <= length, level, tail)
    for count, second, last in EQUAL:
        steps = [np.full(k * count, value) for k, value in ((1, 1.0), (3, second), (12, second**2))]
        yield f"{count} equal, then {second}", np.r_[np.concatenate(steps), np.full(n, last)][:n]
    yield "equal", np.ones(n)
    yield "noise", flat
    yield "power law 0.7, half noise", mixed(i**-0.7, 0.5)


def attempt(values: np.ndarray, top: int, tol: float) -> tuple[bool, float]:
    """Return whether K values are certified, and the cost over that of all values, of the failed
    attempt alone.
    """
    matrix, checks, probes = Diagonal(values), list[int](), list[int]()
    solve, probe = krylov._rayleigh_ritz, krylov._bound_outside
    krylov._rayleigh_ritz = lambda qq, *rest: checks.append(len(qq)) or solve(qq, *rest)
    krylov._bound_outside = lambda *words: probes.append(1) or probe(*words)
    try:
        fro = float(matrix.values.double().norm())
        certified = krylov.decompose_krylov(matrix, fro, top, tol=tol) is not None
    finally:
        krylov._rayleigh_ritz, krylov._bound_outside = solve, probe
    cost = krylov.krylov_cost(matrix.shape, checks, top if certified else 0)
    cost += (len(probes) - certified) * krylov.PROBE * math.prod(matrix.shape)
    return certified, cost / krylov.full_cost(matrix.shape)


def rows(cases: list[tuple[int, int]]) -> Iterator[tuple[object, ...]]:
    """Yield a row of the table for every order and number of values."""
    for n, top in cases:
        found = [(*attempt(s, top, tol), name, tol) for name, s in spectra(n) for tol in TOLERANCES]
        failed = sorted((cost, name, tol) for certified, cost, name, tol in found if not certified)
        mean = sum(cost + (not certified) for certified, cost, *_ in found) / len(found)
        worst = max(cost for certified, cost, *_ in found if certified)
        over = sum(cost > krylov.LOSS for cost, *_ in failed)
        names = ", ".join(f"{cost:.2f} {name} at {tol:g}" for cost, name, tol in failed[:-4:-1])
        yield (
            f"{n}²",
            top,
            f"{len(found) - len(failed)} of {len(found)}",
            f"{mean:.3f}",
            f"{worst:.2f}",
            over,
            names,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = [int(word) for word in sys.argv[1:]] or [1536, 16, 1536, 64, 2560, 128]
    krylov.times = krylov.times_wide = times
    krylov.normal = lambda a, x: (times(a, x), times(a, times(a, x)))
    head = (
        "matrix | values | certified | mean cost | largest of a success | failures over 0.1 | "
        "largest failures"
    )
    print_table(head, rows(list(zip(numbers[::2], numbers[1::2], strict=True))))
