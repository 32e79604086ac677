"""TIES: keep the largest entries of each update, elect a sign for every entry, average the entries that agree with it.

Reference: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708, in the form
of PEFT 0.21's ``merge_utils.ties``: the sign is that of the unweighted sum of the trimmed updates, positive for zero;
agreeing entries are multiplied by their weights and averaged over their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.linalg.stacked import Matrix, rows_of, shape_of


@dataclass(slots=True)
class Conflicts:
    """Entries that several updates change, and the number with differing signs.

    Args:
        shared: Number of entries that at least two updates change.
        differing: Number of these with differing signs.
        by_chance: Expected number for random signs: Σ 1 − 2^(1−c), where c updates change an entry.
    """

    shared: int = 0
    differing: int = 0
    by_chance: float = 0.0

    def count(self, entries: Tensor) -> None:
        """Add the entries of a block, ``(K, rows, n)``."""
        positive, negative = (entries > 0).sum(0), (entries < 0).sum(0)
        changing = positive + negative
        self.shared += int((changing >= 2).sum())
        self.differing += int(((positive > 0) & (negative > 0)).sum())
        counts = torch.bincount(changing.flatten(), minlength=2).tolist()
        self.by_chance += sum(number * (1 - 2.0 ** (1 - c)) for c, number in enumerate(counts) if c >= 2)

    @property
    def share(self) -> float | None:
        """Fraction of the shared entries that differ; None without shared entries."""
        return self.differing / self.shared if self.shared else None

    @property
    def random(self) -> float | None:
        """Expected fraction if signs were random; None without shared entries."""
        return self.by_chance / self.shared if self.shared else None


def magnitude_threshold(matrix: Matrix, density: float) -> float:
    """Return the smallest magnitude among the ⌊density·mn⌋ largest; infinite if there are none.

    Args:
        matrix: X, ``(m, n)``. Its magnitudes are kept in float32 during the call.
        density: Fraction of the entries to keep.

    Example:
        >>> magnitude_threshold(torch.tensor([[3.0, -1.0], [2.0, 0.5]]), 0.5)
        2.0
    """
    m, n = shape_of(matrix)
    keep = int(density * m * n)
    if keep == 0:
        return float("inf")
    magnitudes = torch.cat([block.abs().to(torch.float32).flatten() for block in rows_of(matrix)])
    return float(magnitudes.kthvalue(m * n - keep + 1).values)


def merged(trimmed: Tensor, weights: Tensor) -> Tensor:
    """Return the elected, averaged entries of a block.

    Args:
        trimmed: ``(K, rows, n)``, with discarded entries set to zero.
        weights: ``(K,)``.

    Example:
        >>> merged(torch.tensor([[[3.0, 1.0]], [[-1.0, 2.0]]]), torch.ones(2)).tolist()
        [[3.0, 1.5]]
    """
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agreeing = trimmed.sign() == elected
    averaged: Tensor = (trimmed * agreeing * weights.view(-1, 1, 1)).sum(0) / agreeing.sum(0).clamp(min=1)
    return averaged


def ties_blocks(
    parts: Sequence[Matrix], weights: Sequence[float], density: float, before: Conflicts, after: Conflicts
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield Σ w_kX_k and its TIES merge in row blocks, and count the entries with differing signs.

    All entries with the magnitude of the threshold are kept, whereas PEFT keeps some of them.

    Args:
        parts: The X_k, ``(m, n)``.
        weights: The w_k.
        density: Fraction of the entries of each X_k to keep; 1 keeps all.
        before: Counts all entries.
        after: Counts the kept ones.
    """
    limits = [magnitude_threshold(part, density) if density < 1 else 0.0 for part in parts]
    for blocks in zip(*map(rows_of, parts), strict=True):
        entries = torch.stack(blocks)
        scale = torch.tensor(weights, dtype=torch.float64, device=entries.device)
        limit = torch.tensor(limits, dtype=torch.float32, device=entries.device)
        trimmed = entries * (entries.abs().to(torch.float32) >= limit.view(-1, 1, 1))
        before.count(entries)
        after.count(trimmed)
        yield (entries * scale.view(-1, 1, 1)).sum(0), merged(trimmed, scale)


def ties_factor(factors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return the TIES merge of one factor of several adapters; PEFT merges A and B separately.

    Args:
        factors: All of one shape.
        weights: One per factor.
        density: Fraction of the entries of each to keep.
    """
    ignored = Conflicts()
    return torch.cat([block for _, block in ties_blocks(factors, weights, density, ignored, ignored)])
