"""How often real rounding noise has a singular value above the noise edge, by size, weights and dtypes.

    python -m tests.benchmarks.false_positives [SEEDS]

The noise is the rounding error itself: what the two files hold less what was true. ``one side`` is BASE rounded to
bf16 and TUNED in float32 (no training at all); ``both sides`` are bf16 roundings of W and of W plus a planted rank 4.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta

from lora_diag.layers.resolution import noise_of
from lora_diag.linalg.difference import difference

SHAPES = ((128, 128), (512, 128), (384, 384))
Weights = NDArray[np.float64]


def _columns(w: Weights, rng: np.random.Generator) -> Weights:
    return w * np.where(rng.random((1, w.shape[1])) < 0.02, 20.0, 1.0)


def _entry(w: Weights, rng: np.random.Generator) -> Weights:
    w[tuple(rng.integers(0, w.shape))] *= 1000
    return w


WEIGHTS: dict[str, Callable[[Weights, np.random.Generator], Weights]] = {
    "Gaussian": lambda w, rng: w,
    "Student t, 3 degrees": lambda w, rng: rng.standard_t(3, w.shape),
    "rows scaled by exp N(0, 1)": lambda w, rng: w * np.exp(rng.standard_normal((len(w), 1))),
    "rows and columns scaled": lambda w, rng: (
        w * np.exp(rng.standard_normal((len(w), 1))) * np.exp(0.7 * rng.standard_normal((1, w.shape[1])))
    ),
    "2% of columns 20 times larger": _columns,
    "one entry 1000 times larger": _entry,
}


def noise(weights: Weights, rng: np.random.Generator, both: bool) -> tuple[float, float, float]:
    """Return the largest singular value of the rounding error, the edge, and σ̄(√m + √n), the edge of even noise."""
    m, n = weights.shape
    start = torch.from_numpy(weights).float().double()
    planted = rng.standard_normal((m, 4)) @ rng.standard_normal((4, n)) * float(start.std()) * 0.05
    true = torch.from_numpy(planted) if both else torch.zeros(m, n, dtype=torch.float64)
    tuned = (start + true).bfloat16() if both else start.float()
    base = start.bfloat16()
    result = difference([(base, tuned)], (m, n), torch.device("cpu"), keep=False)
    assert result.rounding is not None
    error = tuned.double() - base.double() - true
    top = float(torch.linalg.eigvalsh(error.T @ error if n <= m else error @ error.T)[-1]) ** 0.5
    seen = noise_of(result.rounding.noise, result.rounding.sides)
    return top, seen.edge, seen.fro * (m**-0.5 + n**-0.5)


def false_positive_table(seeds: int = 200) -> str:
    """Return the table; the upper limit is that of Clopper and Pearson (1934), one-sided at 95%."""
    lines = [
        "| weights | shape | rounded | seeds | above the edge | at most (95%) | median top/edge | above σ̄(√m+√n) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    total = count = 0
    for name, make in WEIGHTS.items():
        for m, n in SHAPES:
            for both in (False, True):
                drawn = seeds if m * n < 1e5 else seeds // 5
                rngs = (np.random.default_rng([seed, m, n, both]) for seed in range(drawn))
                tops, edges, even = np.array(
                    [noise(make(rng.standard_normal((m, n)), rng) * 0.02, rng, both) for rng in rngs]
                ).T
                above = int((tops > edges).sum())
                total, count = total + above, count + drawn
                row = (name, f"{m}×{n}", "both sides" if both else "one side", str(drawn), str(above))
                row += (f"{_upper(above, drawn):.2%}", f"{np.median(tops / edges):.2f}", f"{(tops > even).mean():.0%}")
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
    lines.append(f"| all | | | {count} | {total} | {_upper(total, count):.2%} | | |")
    return "\n".join(lines)


def _upper(found: int, of: int) -> float:
    return float(beta.ppf(0.95, found + 1, of - found))


if __name__ == "__main__":
    print(false_positive_table(*map(int, sys.argv[1:])).splitlines()[-1])
