"""Overlap of a layer's gradients with an update's subspaces: ΔW and G_t → overlaps by step and rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lora_diag.deltas import Delta, FactoredDelta, StoredDelta
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.gradients import Snapshot
from lora_diag.layers.change import PRODUCT_OVERFLOW, Change, append_note, bytes_of, compute_on_device, load_change
from lora_diag.layers.left_out import not_finite
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import LayerSettings, LayerTask
from lora_diag.linalg import Allowance, numerical_rank, resolve_device
from lora_diag.linalg.subspace import orthonormalize, shares
from lora_diag.metrics import RANKS
from lora_diag.metrics.overlap import overlap_by_chance
from lora_diag.metrics.resolution import Verdict
from lora_diag.records import LeftOut

# Bound on energy fractions that ``krylov`` has to reach before its vectors are used; else all of them are computed.
# Measured at 1024² and 2048×1024, r up to 64, spectra i^-1 to i^-3 and planted ranks: where it meets this bound, κ and
# the others are within 1e-6 of those from ``gram``. At i^-4 they are 1.5e-5 off, but there σ_64 is below the float32
# rounding of ΔW.
TOL = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        ranks: Ranks r of the subspaces. Ranks above that of ΔW or of an adapter are skipped; an adapter's own rank is
            always measured.
    """

    ranks: tuple[int, ...] = RANKS


@dataclass(frozen=True, slots=True)
class GradientTask(LayerTask):
    """One layer's update and its gradients."""

    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True)
class Subspaces:
    """The top singular subspaces of one layer's update.

    Args:
        layer: The weight's name in BASE.
        u: U, ``(out, R)`` float64, orthonormal columns, the most important direction first.
        v: V, ``(in, R)``, likewise.
        ranks: Ranks of the measured overlaps, ascending; the last is R.
        method: Method of the computation.
        verdict: Whether the files resolve the update.
        blocks: Number of row blocks in which ΔW was read, because memory did not hold it; None if it did.
    """

    layer: str
    u: Tensor
    v: Tensor
    ranks: tuple[int, ...]
    method: str
    verdict: Verdict
    blocks: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.u.shape[0], self.v.shape[0]


def size(task: GradientTask, settings: OverlapSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: its decomposition; gradients are read in blocks."""
    return bytes_of(task.delta, _make_allowance(task.delta, settings))


def _make_allowance(delta: Delta, settings: OverlapSettings) -> Allowance | None:
    """Return the memory available for ΔW next to the vectors of the largest requested rank."""
    top = max((rank for rank in settings.ranks if rank <= min(delta.shape)), default=1)
    return None if settings.memory is None else Allowance(settings.memory, settings.method, top, vectors=True)


def overlap(task: GradientTask, settings: OverlapSettings) -> tuple[Overlap | LeftOut, ...]:
    """Measure the overlap of every gradient of a layer with the subspaces of its update.

    Args:
        task: The layer.
        settings: Settings of the measurement.

    Returns:
        One record for each step and rank. If ΔW is zero or not finite, one ``left_out`` record instead; if a gradient
        is not finite, one instead of the records of its step.

    Raises:
        InputError: A file could not be read.
    """
    records, fallback = compute_on_device(partial(_measure_overlap, task, settings), resolve_device(settings.device))
    return tuple(append_note(record, fallback) for record in records)


def _measure_overlap(
    task: GradientTask, settings: OverlapSettings, device: torch.device
) -> tuple[Overlap | LeftOut, ...]:
    spaces = subspaces(task.delta, settings, device)
    if isinstance(spaces, LeftOut):
        return (spaces,)
    return tuple(
        record for snapshot in task.snapshots for record in overlaps(spaces, snapshot.step, snapshot.blocks(task.shape))
    )


def subspaces(delta: Delta, settings: OverlapSettings, device: torch.device) -> Subspaces | LeftOut:
    """Compute the top singular subspaces of one ΔW.

    Args:
        delta: The layer.
        settings: Settings of the measurement.
        device: Device of the computation and of the result.

    Returns:
        The subspaces; for an adapter, those spanned by its factors. A ``left_out`` record if there are none.
    """
    if not isinstance(delta, StoredDelta):
        delta = replace(delta, base=None)  # the update is known without W_base, which would be read for its norm alone
    change = load_change(delta, device, allowance=_make_allowance(delta, settings))
    if change.non_finite is not None:
        return not_finite(delta, change)
    ranks = _choose_ranks(delta, change, settings.ranks)
    if not ranks:
        return _leave_out_narrow(delta, settings)
    factors = change.decompose(settings.method, ranks[-1], True, TOL, settings.seed)
    if not math.isfinite(factors.fro):
        return not_finite(delta, replace(change, non_finite=PRODUCT_OVERFLOW))
    if factors.fro == 0.0:
        detail = "ΔW is zero, so it has no singular subspaces"
        return LeftOut(layer=delta.layer, shape=delta.shape, reason="no_reference", detail=detail)
    assert factors.u is not None
    assert factors.vh is not None
    directions = numerical_rank(factors)
    if directions < ranks[-1]:  # the vectors beyond it are arbitrary
        own_ranks = {directions} if isinstance(delta, FactoredDelta) else set[int]()
        ranks = tuple(sorted({*(rank for rank in ranks if rank <= directions), *own_ranks}))
        factors = replace(factors, u=factors.u[:, :directions], vh=factors.vh[:directions])
    if not ranks:
        return _leave_out_narrow(delta, settings)
    assert factors.u is not None
    assert factors.vh is not None
    file_resolution = resolution(change.rounding, factors)
    return Subspaces(
        delta.layer,
        orthonormalize(factors.u),
        orthonormalize(factors.vh.T),
        ranks,
        factors.method,
        file_resolution.verdict,
        change.row_blocks,
    )


def _leave_out_narrow(delta: Delta, settings: OverlapSettings) -> LeftOut:
    detail = f"has fewer directions than {min(settings.ranks)}, the smallest of the ranks asked for"
    return LeftOut(layer=delta.layer, shape=delta.shape, reason="no_reference", detail=detail)


def _choose_ranks(delta: Delta, change: Change, requested: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ranks that have subspaces, including an adapter's own."""
    if not isinstance(delta, FactoredDelta) or change.factors is None:
        return tuple(rank for rank in requested if rank <= min(delta.shape))
    own_rank = min(change.factors[0].shape[1], *delta.shape)
    return tuple(sorted({*(rank for rank in requested if rank < own_rank), own_rank}))


def overlaps(spaces: Subspaces, step: int, blocks: Iterable[Tensor]) -> tuple[Overlap | LeftOut, ...]:
    """Measure the overlap of one gradient with the subspaces of an update.

    Args:
        spaces: The subspaces.
        step: t.
        blocks: The rows of G_t, ``(rows, in)`` each, from the first row to the last.

    Returns:
        One record for each rank; if G_t is not finite, one ``left_out`` record.
    """
    parts = shares(blocks, spaces.u, spaces.v, spaces.ranks)
    if isinstance(parts, str):
        detail = f"step {step}: {parts}"
        return (LeftOut(layer=spaces.layer, shape=spaces.shape, reason="non_finite", detail=detail),)
    is_zero = parts.fro == 0.0
    records = []
    for index, rank in enumerate(spaces.ranks):
        random = overlap_by_chance(spaces.shape, rank)
        records.append(
            Overlap(
                layer=spaces.layer,
                shape=spaces.shape,
                step=step,
                rank=rank,
                kappa=None if is_zero else parts.both[index],
                kappa_random=random.kappa,
                tangent=None if is_zero else parts.tangent[index],
                tangent_random=random.tangent,
                left=None if is_zero else parts.left[index],
                left_random=random.left,
                right=None if is_zero else parts.right[index],
                right_random=random.right,
                gradient_fro=parts.fro,
                method=spaces.method,
                blocks=spaces.blocks,
                verdict=spaces.verdict,
            )
        )
    return tuple(records)
