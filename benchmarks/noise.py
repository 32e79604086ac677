"""Rounding of planted updates and of none: the noise floor, its edge, and whether BASE was rounded
after the start.

    python -m benchmarks.noise floor           the rounding floor on planted updates
    python -m benchmarks.noise edge [SEEDS]    how often noise has a singular value above the noise edge
    python -m benchmarks.noise starts [SEEDS]  how often a BASE that was rounded after the start is recognised

The noise of ``edge`` is the rounding error itself: what the two files hold less what was true.
``one side`` is BASE rounded to bf16 and TUNED in float32 (no training at all); ``both sides`` are
bf16 roundings of W and of W plus a planted rank 4. In ``starts``, TUNED is float32 and BASE bf16,
so that its rounding, if it is none of the start, makes up a share of ‖ΔW‖² that is given.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta

from benchmarks.measure import print_table
from benchmarks.recovery import update as planted
from lora_diag.layers.resolution import noise_of
from lora_diag.linalg.difference import difference
from lora_diag.metrics.resolution import signal_rank, verdict
from tests import oracles

CPU = torch.device("cpu")
SIDE = 768
SHAPES = ((128, 128), (512, 128), (384, 384))
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)
Weights = NDArray[np.float64]


def floor() -> None:
    """Print true values, values of the files, and verdicts of loradiag."""
    head = (
        "update | rms | unchanged | ‖E‖/‖ΔW‖ | noise stated | true ranks 90, 95, 99% | read | "
        "signal | verdict"
    )
    kinds = (("rank 8", "rank 8"), ("power law 1/i", "1/i"), ("full rank", "noise"))
    sizes = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
    print_table(head, (_floor_row(label, kind, rms) for label, kind in kinds for rms in sizes))


def _floor_row(label: str, kind: str, rms: float) -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((SIDE, SIDE)) * 0.02).bfloat16()
    delta = planted(SIDE, SIDE, kind, rms, rng).double().numpy()
    tuned = (base.double() + torch.from_numpy(delta)).bfloat16()
    result = difference([(base, tuned)], (SIDE, SIDE), CPU)
    assert result.rounding is not None
    seen = (tuned.double() - base.double()).numpy()
    s, true = (np.linalg.svd(matrix, compute_uv=False) for matrix in (seen, delta))
    noise = noise_of(result.rounding.noise, result.rounding.sides)
    signal = signal_rank(s, noise.edge, complete=True)
    error = np.linalg.norm(seen - delta) / np.linalg.norm(delta)
    ranks = (
        ", ".join(str(oracles.rank_at(values, share)) for share in (0.9, 0.95, 0.99))
        for values in (true, s)
    )
    stated = (f"{result.unchanged:.2f}", f"{error:.2f}", f"{noise.fro / result.fro:.2f}")
    return label, f"{rms:g}", *stated, *ranks, str(signal), verdict(noise.fro, result.fro, signal)


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
        w
        * np.exp(rng.standard_normal((len(w), 1)))
        * np.exp(0.7 * rng.standard_normal((1, w.shape[1])))
    ),
    "2% of columns 20 times larger": _columns,
    "one entry 1000 times larger": _entry,
}


def sample_noise(
    weights: Weights, rng: np.random.Generator, both: bool
) -> tuple[float, float, float]:
    """Return the largest singular value of the rounding error, the edge, and σ̄(√m + √n), the edge
    of even noise.
    """
    m, n = weights.shape
    start = torch.from_numpy(weights).float().double()
    update = rng.standard_normal((m, 4)) @ rng.standard_normal((4, n)) * float(start.std()) * 0.05
    true = torch.from_numpy(update) if both else torch.zeros(m, n, dtype=torch.float64)
    tuned = (start + true).bfloat16() if both else start.float()
    base = start.bfloat16()
    result = difference([(base, tuned)], (m, n), CPU, keep=False)
    assert result.rounding is not None
    error = tuned.double() - base.double() - true
    seen = noise_of(result.rounding.noise, result.rounding.sides)
    return float(torch.linalg.matrix_norm(error, 2)), seen.edge, seen.fro * (m**-0.5 + n**-0.5)


def edge(seeds: int = 200) -> None:
    """Print how often noise is above the edge; the upper limit is Clopper and Pearson's (1934),
    one-sided at 95%.
    """
    head = (
        "weights | shape | rounded | seeds | above the edge | at most (95%) | median top/edge | "
        "above σ̄(√m+√n)"
    )
    print_table(head, _edge_rows(seeds))


def _edge_rows(seeds: int) -> Iterator[tuple[object, ...]]:
    def at_most(found: int, of: int) -> str:
        return f"{beta.ppf(0.95, found + 1, of - found):.2%}"

    total = count = 0
    for name, make in WEIGHTS.items():
        for m, n in SHAPES:
            for both in (False, True):
                drawn = seeds if m * n < 1e5 else max(1, seeds // 5)
                rngs = (np.random.default_rng([seed, m, n, both]) for seed in range(drawn))
                sampled = [
                    sample_noise(make(rng.standard_normal((m, n)), rng) * 0.02, rng, both)
                    for rng in rngs
                ]
                tops, edges, even = np.array(sampled).T
                above = int((tops > edges).sum())
                total, count = total + above, count + drawn
                found = (drawn, above, at_most(above, drawn), f"{np.median(tops / edges):.2f}")
                yield (
                    name,
                    f"{m}×{n}",
                    ("both sides" if both else "one side"),
                    *found,
                    f"{(tops > even).mean():.0%}",
                )
    yield "all", "", "", count, total, at_most(total, count), "", ""


UPDATES: dict[str, Callable[[Weights, Weights, np.random.Generator], Weights]] = {
    "rank 4": lambda moves, w, rng: (
        rng.standard_normal((len(w), 4)) @ rng.standard_normal((4, w.shape[1]))
    ),
    "full rank": lambda moves, w, rng: moves,
    "rows of different size": lambda moves, w, rng: (
        moves * np.exp(rng.standard_normal((len(w), 1)))
    ),
    "in proportion to w": lambda moves, w, rng: moves * np.abs(w),
    "larger where w is small": lambda moves, w, rng: moves / (0.01 + np.abs(w)),
}


def judge_starts(
    kind: str, change: str, shape: tuple[int, int], seed: int
) -> dict[tuple[float, str], str]:
    """Return the verdict on one simulated layer, by the share of the rounding and the
    true start.
    """
    rng = np.random.default_rng(seed)
    start = torch.from_numpy(WEIGHTS[kind](rng.standard_normal(shape), rng) * 0.02).float().double()
    base = start.bfloat16()
    moves = torch.from_numpy(UPDATES[change](rng.standard_normal(shape), start.numpy(), rng))
    moves *= (base.double() - start).norm() / moves.norm()
    verdicts = {}
    for share in SHARES:
        for true, origin in (("rounded", start), ("exact", base.double())):
            tuned = (origin + moves * (1 / share - 1) ** 0.5).float()
            rounding = difference([(base, tuned)], shape, CPU, keep=False).rounding
            assert rounding is not None
            verdicts[share, true] = rounding.start
    return verdicts


def starts(seeds: int = 20) -> None:
    """Print how often each start is recognised, and the cases in which one is taken for
    the other.
    """
    wrong: Counter[str] = Counter()
    head = "shape | start | share of ‖ΔW‖² | rounded | unknown | exact | layers"
    print_table(head, _start_rows(seeds, wrong))
    for case, times in wrong.items():
        print(case, times)


def _start_rows(seeds: int, wrong: Counter[str]) -> Iterator[tuple[object, ...]]:
    for shape, times in (((384, 384), seeds), ((2048, 2048), max(1, seeds // 10))):
        counts = {
            (share, true): Counter[str]() for true in ("rounded", "exact") for share in SHARES
        }
        for kind in ("Gaussian", "Student t, 3 degrees", "rows scaled by exp N(0, 1)"):
            for change in UPDATES:
                for seed in range(times):
                    for key, word in judge_starts(kind, change, shape, seed).items():
                        counts[key][word] += 1
                        if {key[1], word} == {"rounded", "exact"}:
                            wrong[
                                f"{shape}, {kind}, {change}, {key[0]:.1%}: {key[1]} taken for "
                                f"{word}"
                            ] += 1
        for (share, true), found in counts.items():
            fractions = (
                f"{found[word] / found.total():.1%}" for word in ("rounded", "unknown", "exact")
            )
            yield f"{shape[0]}×{shape[1]}", true, f"{share:.1%}", *fractions, found.total()


if __name__ == "__main__":
    {"floor": floor, "edge": edge, "starts": starts}[sys.argv[1]](*map(int, sys.argv[2:]))
