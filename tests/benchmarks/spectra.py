"""Time and bound of the K largest values against all of them, over spectra; methods alone, in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lora_diag.linalg import Factors, decompose, norm

TOP, TOLERANCES = 64, (5e-4, 1e-2)


def power(rows: int, columns: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Return a matrix with σ_i near i^−exponent."""
    k = min(rows, columns)
    left = torch.randn(rows, k, generator=generator) / rows**0.5
    return (left * torch.arange(1, k + 1) ** -exponent) @ torch.randn(k, columns, generator=generator) / columns**0.5


def noisy(rows: int, columns: int, rank: int, noise: float, generator: torch.Generator) -> Tensor:
    """Return a matrix of ‖·‖_F = 1 with this rank, and Gaussian noise with this share of the energy."""
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    flat = torch.randn(rows, columns, generator=generator)
    return signal * ((1 - noise) ** 0.5 / signal.norm()) + flat * (noise**0.5 / flat.norm())


def spectra(rows: int, columns: int) -> dict[str, Callable[[], Tensor]]:
    """Return matrices by the name of their spectrum."""
    made: dict[str, Callable[[], Tensor]] = {}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    for exponent in (0.3, 0.5, 0.7, 1.0, 1.5):
        made[f"power law {exponent}"] = lambda e=exponent: power(rows, columns, e, seeded())
    for noise in (0.001, 0.01, 0.1, 0.5):
        made[f"rank 8, {noise:.1%} noise"] = lambda e=noise: noisy(rows, columns, 8, e, seeded())
    for rank in (40, 60, 100):
        made[f"rank {rank}, 10% noise"] = lambda r=rank: noisy(rows, columns, r, 0.1, seeded())
    made["power law 0.7, half noise"] = lambda: (
        power(rows, columns, 0.7, seeded()) / 2 + noisy(rows, columns, 1, 0.9999, seeded())
    )
    made["flat"] = lambda: torch.randn(rows, columns, generator=seeded())
    return made


def in_turn(works: list[Callable[[], Factors]], runs: int) -> list[tuple[float, float]]:
    """Run works in turn; return the medians of wall time and processor time of each."""
    times: list[list[tuple[float, float]]] = [[] for _ in works]
    for _ in range(runs):
        for work, own in zip(works, times, strict=True):
            wall, processor = time.perf_counter(), time.process_time()
            work()
            own.append((time.perf_counter() - wall, time.process_time() - processor))
    return [(statistics.median(w for w, _ in own), statistics.median(p for _, p in own)) for own in times]


def spectra_table(shapes: list[tuple[int, int]], runs: int = 3, only: str = "") -> None:
    """Print the table, line by line."""
    print("| matrix | spectrum | all values, s | `--tol` | top 64, s | ÷ all | method | bound | largest error |")
    print("|---|---|---:|---:|---:|---:|---|---:|---:|")
    for shape in shapes:
        for name, make in spectra(*shape).items():
            if only not in name:
                continue
            matrix = make()
            fro = norm([matrix])
            full = decompose(matrix, "gram", fro=fro)
            truth = np.cumsum(full.s.numpy()[:TOP] ** 2) / fro**2
            works = [partial(decompose, matrix, fro=fro)]
            works += [partial(decompose, matrix, top=TOP, fro=fro, tol=tol) for tol in TOLERANCES]
            times = in_turn(works, runs)
            for tol, work, (wall, processor) in zip(TOLERANCES, works[1:], times[1:], strict=True):
                found = work()
                error = np.abs(np.cumsum(found.s.numpy() ** 2) / fro**2 - truth).max()
                print(
                    f"| {shape[0]}×{shape[1]} | {name} | {times[0][0]:.2f} | {tol:g} | {wall:.2f} | "
                    f"{processor / times[0][1]:.2f} | {found.method} | {found.energy_error:.1e} | {error:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    import sys

    rows, columns, runs = map(int, sys.argv[1:4])
    spectra_table([(rows, columns)], runs, *sys.argv[4:])
