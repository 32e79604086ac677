"""What the parts of the comparison share: an empty folder each, and how figures of all layers become a table's cell."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.compare.inputs import Weights, best, error

FOLDER = Path(".bench/compare")
RANK = 16  # of every adapter with a rank that is given


def fresh(name: str) -> Path:
    """Return an empty folder."""
    path = FOLDER / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def table(head: str, rows: Iterable[Iterable[object]]) -> None:
    print(f"| {head} |\n|{'---|' * len(head.split(' | '))}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def spread(values: Iterable[float | None]) -> str:
    """Return a figure of all layers: one number, or the least and the largest."""
    result = sorted(float(f"{value:.3g}") for value in values if value is not None)
    return "none" if not result else f"{result[0]:g}" if result[0] == result[-1] else f"{result[0]:g} to {result[-1]:g}"


def about(rows: Iterable[dict[str, Any]], key: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of a tool that are about these weights."""
    wanted = {name.removesuffix(".weight") for name in names}
    return [row for row in rows if str(row[key]).removesuffix(".weight") in wanted]


def worst(found: Weights, truth: Weights) -> float:
    """Return the largest relative error over the layers."""
    return max(error(found[name], update) for name, update in truth.items())


def excess(found: Weights, truth: Weights, spectra: Mapping[str, np.ndarray]) -> str:
    """Return by how much, relatively, the worst layer's error exceeds that of the best matrix of its rank."""
    return f"{max(error(found[name], t) / best(spectra[name], RANK) - 1 for name, t in truth.items()):.0e}"
