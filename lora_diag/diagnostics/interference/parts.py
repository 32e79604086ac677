"""Reading and decomposing several updates of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lora_diag.deltas import Delta
from lora_diag.layers.change import Change, load_change, why_not_comparable
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import LayerSettings
from lora_diag.linalg import Factors, numerical_rank
from lora_diag.linalg.stacked import Matrix
from lora_diag.metrics import RANKS, effective_rank, energy_curve
from lora_diag.records import Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class InterferenceSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        ranks: Ranks r at which spaces are compared and merges recompressed.
        weights: w_k > 0 of each update in the sum.
        density: Fraction of the entries of each update that TIES keeps; 0 to skip TIES and sign conflicts, which need
            every entry.
    """

    ranks: tuple[int, ...] = RANKS
    weights: tuple[float, ...] = ()
    density: float = 0.2


@dataclass(frozen=True, slots=True)
class Update:
    """One of several updates of a layer.

    Args:
        name: The input's path.
        weight: w_k.
        delta: Its ΔW.
    """

    name: str
    weight: float
    delta: Delta


@dataclass(frozen=True, slots=True)
class LayerUpdates:
    """One layer and all its updates."""

    layer: str
    shape: tuple[int, int]
    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One decomposed update; ``s`` and ``fro`` include its weight."""

    update: Update
    change: Change
    matrix: Matrix
    factors: Factors
    rank: int
    resolution: Resolution

    @property
    def s(self) -> Tensor:
        """Singular values above rounding, times the weight."""
        return self.update.weight * self.factors.s[: self.rank]

    @property
    def fro(self) -> float:
        """‖wΔW‖_F."""
        return self.update.weight * self.factors.fro

    @property
    def u(self) -> Tensor:
        """Their left singular vectors, as columns."""
        assert self.factors.u is not None
        return self.factors.u[:, : self.rank]

    @property
    def v(self) -> Tensor:
        """Their right singular vectors, as columns."""
        assert self.factors.vh is not None
        return self.factors.vh[: self.rank].T

    @property
    def curve(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Energy fractions C(r) at every rank."""
        return energy_curve(self.factors.s.numpy(), self.factors.fro, self.factors.complete)

    @property
    def effective(self) -> float:
        """Effective rank."""
        return effective_rank(self.factors.s.numpy())


def read_part(update: Update, settings: InterferenceSettings, device: torch.device) -> Part | Change:
    """Read and decompose one update; return only its change if it is not finite."""
    change = load_change(update.delta, device)
    if change.non_finite is not None:
        return change
    factors = change.decompose(settings.method, None, True, settings.tol, settings.seed)
    if problem := why_not_comparable(factors.fro):
        return replace(change, non_finite=problem)
    matrix = change.factors if change.factors is not None else change.matrix
    assert matrix is not None
    file_resolution = resolution(change.rounding, factors)
    return Part(update, change, matrix, factors, numerical_rank(factors), file_resolution)


def within(u: Tensor, part: Part, rows: bool = False) -> float:
    """Return ‖UᵀΔW‖²/‖ΔW‖², or ‖ΔW·U‖²/‖ΔW‖², from the singular vectors of ΔW."""
    vectors = part.v if rows else part.u
    inside = (u.T @ vectors) * part.s.to(u.device)
    return min(1.0, float((inside**2).sum() / (part.s**2).sum()))
