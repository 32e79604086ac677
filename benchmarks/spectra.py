"""Time and bound of the K largest values against all of them, over spectra; methods alone, in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import call, in_turn, print_table
from benchmarks.pairs import update
from lora_diag.linalg.difference import norm
from lora_diag.linalg.methods import decompose

TOP, TOLERANCES = 64, (5e-4, 1e-2)


def noisy(rows: int, columns: int, rank: int, noise: float, generator: torch.Generator) -> Tensor:
    """Return a matrix of ‖·‖_F = 1 with this rank, and Gaussian noise with this share of the
    energy.
    """
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(
        rank, columns, generator=generator
    )
    flat = torch.randn(rows, columns, generator=generator)
    return signal * ((1 - noise) ** 0.5 / signal.norm()) + flat * (noise**0.5 / flat.norm())


def spectra(rows: int, columns: int) -> dict[str, Callable[[], Tensor]]:
    """Return matrices by the name of their spectrum."""
    made: dict[str, Callable[[], Tensor]] = {}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    for exponent in (0.3, 0.5, 0.7, 1.0, 1.5):
        made[f"power law {exponent}"] = lambda e=exponent: update(rows, columns, seeded(), e)
    for noise in (0.001, 0.01, 0.1, 0.5):
        made[f"rank 8, {noise:.1%} noise"] = lambda e=noise: noisy(rows, columns, 8, e, seeded())
    for rank in (40, 60, 100):
        made[f"rank {rank}, 10% noise"] = lambda r=rank: noisy(rows, columns, r, 0.1, seeded())
    made["power law 0.7, half noise"] = lambda: (
        update(rows, columns, seeded()) / 2 + noisy(rows, columns, 1, 0.9999, seeded())
    )
    made["flat"] = lambda: torch.randn(rows, columns, generator=seeded())
    return made


def spectra_table(shapes: Sequence[tuple[int, int]], runs: int = 3) -> None:
    """Print a table for every shape, line by line: medians, with ratios of processor time."""
    for rows, columns in shapes:
        print(f"\n{rows}×{columns}, {torch.get_num_threads()} threads; svdvals is torch's, float32")
        head = "spectrum | all, s | svdvals ÷ all" + "".join(
            f" | top {TOP}, {t:g} | ÷ all | bound" for t in TOLERANCES
        )
        print_table(
            head, (_row(name, make(), runs) for name, make in spectra(rows, columns).items())
        )


def _row(name: str, matrix: Tensor, runs: int) -> list[str]:
    fro = norm([matrix])
    works = {"all": partial(decompose, matrix, fro=fro)}
    works |= {
        f"{tol:g}": partial(decompose, matrix, top=TOP, fro=fro, tol=tol) for tol in TOLERANCES
    }
    truth = np.cumsum(decompose(matrix, "gram", fro=fro).s.numpy()[:TOP] ** 2) / fro**2
    figures = in_turn({name: partial(call, work) for name, work in works.items()}, runs)
    plain, whole = call(partial(torch.linalg.svdvals, matrix)).cpu, figures["all"].median("cpu")
    row = [name, f"{figures['all'].median('wall'):.2f}", f"{plain / whole:.1f}"]
    for tol in TOLERANCES:
        own = figures[f"{tol:g}"]
        result = decompose(matrix, top=TOP, fro=fro, tol=tol)
        error = np.abs(np.cumsum(result.s.numpy() ** 2) / fro**2 - truth).max()
        assert error <= result.energy_error
        row += [
            f"{own.median('wall'):.2f} s, `{result.method}`",
            f"{own.median('cpu') / whole:.2f}",
        ]
        row.append(f"{result.energy_error:.1e}")
    return row


if __name__ == "__main__":
    import sys

    rows, columns, runs = map(int, sys.argv[1:4])
    spectra_table([(rows, columns)], runs)
