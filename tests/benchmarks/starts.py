"""How often a BASE that was rounded after the start of training is distinguished from the start itself.

TUNED is float32, BASE bfloat16, so that its rounding, if it is none of the start, makes up a share of ‖ΔW‖² that is
given. Rows of a table: ``python -m tests.benchmarks.starts [SEEDS]``.
"""

import sys
from collections import Counter

import numpy as np
import torch

from lora_diag.linalg.difference import difference
from tests.benchmarks.false_positives import WEIGHTS

SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)


def update(kind: str, rng: np.random.Generator, w: np.ndarray) -> np.ndarray:
    moves = rng.standard_normal(w.shape)
    if kind == "rank 4":
        return rng.standard_normal((len(w), 4)) @ rng.standard_normal((4, w.shape[1]))
    if kind == "rows of different size":
        return moves * np.exp(rng.standard_normal((len(w), 1)))
    if kind == "in proportion to w":
        return moves * np.abs(w)
    if kind == "larger where w is small":
        return moves / (0.01 + np.abs(w))
    return moves


KINDS = ("Gaussian", "Student t, 3 degrees", "rows scaled by exp N(0, 1)")
UPDATES = ("rank 4", "full rank", "rows of different size", "in proportion to w", "larger where w is small")


def starts(kind: str, change: str, shape: tuple[int, int], seed: int) -> dict[tuple[float, str], str]:
    """Return the verdict on one simulated layer, by the share of the rounding and the true start."""
    rng = np.random.default_rng(seed)
    start = torch.from_numpy(WEIGHTS[kind](rng.standard_normal(shape), rng) * 0.02).float().double()
    base = start.bfloat16()
    moves = torch.from_numpy(update(change, rng, start.numpy()))
    moves *= (base.double() - start).norm() / moves.norm()
    text = {}
    for share in SHARES:
        for true, origin in (("rounded", start), ("exact", base.double())):
            tuned = (origin + moves * (1 / share - 1) ** 0.5).float()
            rounding = difference([(base, tuned)], shape, torch.device("cpu"), keep=False).rounding
            assert rounding is not None
            text[share, true] = rounding.start
    return text


def main(seeds: int) -> None:
    print("| shape | start | share of ‖ΔW‖² | " + " | ".join(("rounded", "unknown", "exact")) + " | layers |")
    print("|---|---|---:|---:|---:|---:|---:|")
    wrong: Counter[str] = Counter()
    for shape, times in (((384, 384), seeds), ((2048, 2048), max(1, seeds // 10))):
        counts = {key: Counter[str]() for key in ((share, true) for true in ("rounded", "exact") for share in SHARES)}
        for kind in KINDS:
            for change in UPDATES:
                for seed in range(times):
                    for key, word in starts(kind, change, shape, seed).items():
                        counts[key][word] += 1
                        if {key[1], word} == {"rounded", "exact"}:
                            wrong[f"{shape}, {kind}, {change}, {key[0]:.1%}: {key[1]} taken for {word}"] += 1
        for (share, true), result in counts.items():
            row = " | ".join(f"{result[word] / result.total():.1%}" for word in ("rounded", "unknown", "exact"))
            print(f"| {shape[0]}×{shape[1]} | {true} | {share:.1%} | {row} | {result.total()} |", flush=True)
    for case, times in wrong.items():
        print(case, times)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
