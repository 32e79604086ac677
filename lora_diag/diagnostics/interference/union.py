"""All updates of one layer together: rank of their sum, interference, and losses of merges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lora_diag.deltas import FactoredDelta
from lora_diag.diagnostics.interference.merging import Pair, factor_merges, ties_merge
from lora_diag.diagnostics.interference.parts import InterferenceSettings, LayerUpdates, Part, within
from lora_diag.diagnostics.interference.record import MergeLoss, Union
from lora_diag.diagnostics.spectrum.values import record_of
from lora_diag.linalg import Factors, decompose, decompose_factored, numerical_rank, rounding_threshold
from lora_diag.linalg.factors import ZERO_DENSE, ZERO_FACTORED
from lora_diag.linalg.stacked import Matrix, total
from lora_diag.metrics import THRESHOLDS, energy_curve, rank_at, signal_rank, verdict
from lora_diag.metrics.interference import task_interference, task_interference_at_random
from lora_diag.records import Resolution

# Relative residual ‖S − S_k‖_F/‖S‖_F of the directions in the subspace alignment ratio (Marczak et al. 2025).
ALIGNMENT_ERROR = 0.05


def union(task: LayerUpdates, parts: Sequence[Part], changed: Sequence[Part], settings: InterferenceSettings) -> Union:
    """Return the record of all updates of a layer together.

    Args:
        task: The layer.
        parts: Its updates.
        changed: The nonzero updates.
        settings: Settings of the measurement.
    """
    weights = [part.update.weight for part in parts]
    summed = total([part.matrix for part in parts], weights)
    if isinstance(summed, tuple):
        factors = decompose_factored(*summed, vectors=True)
    else:
        factors = decompose(summed, settings.method, None, None, True, settings.tol, settings.seed)
    # A sum that cancels leaves only rounding of the parts.
    parts_norm = math.hypot(*(part.fro for part in parts))
    if factors.fro <= (ZERO_FACTORED if isinstance(summed, tuple) else ZERO_DENSE) * parts_norm:
        factors = replace(factors, s=torch.zeros_like(factors.s), fro=0.0, energy_error=0.0)
    spectrum = record_of(
        task.layer,
        task.shape,
        (None, "float32" if isinstance(summed, tuple) else "float64"),
        None,
        factors,
        settings.ranks,
        _bound_resolution(parts, factors),
    )
    needed = {str(share): sum(rank_at(part.curve, share) or 0 for part in changed) for share in THRESHOLDS}
    effective = sum(part.effective for part in changed)
    has_sum = len(changed) > 1 and factors.fro > 0
    fields = _measure_sum(changed, factors, spectrum.rank_at, task.shape, settings) if has_sum else _make_null_fields()
    merges, conflicts = _measure_merges(parts, summed, factors, weights, settings) if has_sum else ({}, {})
    return Union(
        layer=task.layer,
        shape=task.shape,
        updates=tuple(part.update.name for part in changed),
        ranks=tuple(_count_columns(part) for part in changed),
        fro=factors.fro,
        parts_fro=tuple(part.fro for part in changed),
        spectrum=spectrum,
        parts_rank_at=needed,
        additive={
            share: _ratio(spectrum.rank_at[share], ranks_sum) if has_sum else None
            for share, ranks_sum in needed.items()
        },
        parts_effective_rank=effective,
        additive_effective=_ratio(spectrum.effective_rank, effective) if has_sum else None,
        energy_ratio=factors.fro**2 / parts_norm**2 if len(changed) > 1 else None,
        merges=merges,
        recompressed={str(r): _compute_residual(factors, r) for r in _list_recompression_ranks(changed, settings)}
        if has_sum
        else {},
        **fields,
        **{name: conflicts.get(name) for name in _CONFLICTS},
    )


_CONFLICTS = ("sign_conflicts", "sign_conflicts_random", "trimmed_conflicts", "trimmed_conflicts_random")


def _count_columns(part: Part) -> int | None:
    return part.matrix[0].shape[1] if isinstance(part.matrix, tuple) else None


def _ratio(value: float | None, total: float) -> float | None:
    return value / total if value is not None and total else None


def _bound_resolution(parts: Sequence[Part], factors: Factors) -> Resolution:
    """Bound the rounding of the sum by the sum of the roundings: the rounding of a common BASE is equal in all."""
    noise = sum(part.update.weight * part.resolution.noise_fro for part in parts)
    edge = sum(part.update.weight * part.resolution.edge for part in parts)
    if edge:  # not of adapters, whose factors are the update
        edge = max(edge, rounding_threshold(factors))
    signal = signal_rank(factors.s.numpy(), edge, factors.complete)
    return Resolution(
        unchanged=None,
        mantissa=None,
        rounding_fro=sum(part.update.weight * part.resolution.rounding_fro for part in parts),
        noise_fro=noise,
        edge=edge,
        signal_rank=signal,
        verdict=verdict(noise, factors.fro, signal),
    )


def _make_null_fields() -> dict[str, object]:
    """Return null fields for a layer with fewer than two updates, or whose updates cancel."""
    return {
        "rank_for_all": {},
        "weakest_kept": {},
        "sti": None,
        "sti_relative": None,
        "sti_random": None,
        "alignment": None,
        "alignments": (),
        "alignment_rank": None,
        "alignment_random": None,
    }


def _measure_sum(
    changed: Sequence[Part],
    factors: Factors,
    ranks: dict[str, int | None],
    shape: tuple[int, int],
    settings: InterferenceSettings,
) -> dict[str, object]:
    """Return the rank of the sum, and the fraction of the parts that its directions keep."""
    assert factors.u is not None
    assert factors.vh is not None
    # C_k(r) = ‖U_rᵀΔW_kV_r‖²/‖ΔW_k‖² for every r: sums over the leading r×r blocks of UᵀΔW_kV.
    kept = []
    for part in changed:
        core = ((factors.u.T @ part.u) * part.s.to(factors.u.device)) @ (part.v.T @ factors.vh.T)
        kept.append((core**2).cumsum(0).cumsum(1).diagonal().cpu() / (part.s**2).sum())
    # Beyond the rank of S its vectors are arbitrary, and an adapter for S has no columns.
    weakest = torch.stack(kept).min(0).values.clamp(max=1.0).numpy()[: numerical_rank(factors)]
    alignment_rank = _find_alignment_rank(factors)
    alignments = [math.sqrt(within(factors.u[:, :alignment_rank], part)) for part in changed]
    return {
        "rank_for_all": {str(share): rank_at(weakest, share * (1 - 1e-9)) for share in THRESHOLDS},
        "weakest_kept": {share: float(weakest[r - 1]) if r else None for share, r in ranks.items()},
        **_measure_task_interference(changed, shape, max(settings.ranks)),
        "alignment": sum(alignments) / len(alignments),
        "alignments": tuple(alignments),
        "alignment_rank": alignment_rank,
        "alignment_random": math.sqrt(alignment_rank / shape[0]),
    }


def _find_alignment_rank(factors: Factors) -> int:
    """Return the smallest k with ‖S − S_k‖_F ≤ 0.05‖S‖_F (Marczak et al. 2025, arXiv 2502.04959)."""
    curve = energy_curve(factors.s.numpy(), factors.fro, factors.complete)
    return rank_at(curve, 1 - ALIGNMENT_ERROR**2) or len(curve)


def _measure_task_interference(changed: Sequence[Part], shape: tuple[int, int], limit: int) -> dict[str, float]:
    u = torch.cat([part.u[:, :limit] for part in changed], dim=1)
    v = torch.cat([part.v[:, :limit] for part in changed], dim=1)
    s = torch.cat([part.s[:limit] for part in changed]).numpy()
    owner = np.repeat(np.arange(len(changed)), [min(part.rank, limit) for part in changed])
    sti, relative = task_interference((u.T @ u).cpu().numpy(), (v.T @ v).cpu().numpy(), s)
    return {"sti": sti, "sti_relative": relative, "sti_random": task_interference_at_random(s, owner, shape)}


def _measure_merges(
    parts: Sequence[Part], summed: Matrix, factors: Factors, weights: Sequence[float], settings: InterferenceSettings
) -> tuple[dict[str, MergeLoss | None], dict[str, float | None]]:
    """Return the losses of merges, and the sign conflicts."""
    # A zero adapter is not an update, but its A enters PEFT's merges.
    density = settings.density or 0.2
    merges = factor_merges(summed, factors.fro, _factor_pairs(parts), weights, density)
    if settings.density == 0:
        return {**merges, "ties": None, "ties_dense": None}, {}
    dense, before, after = ties_merge([part.matrix for part in parts], factors.fro, weights, density)
    shares = (before.share, before.random, after.share, after.random)
    return {**merges, "ties_dense": dense}, dict(zip(_CONFLICTS, shares, strict=True))


def _factor_pairs(parts: Sequence[Part]) -> list[Pair] | None:
    """Return the stored factors; None if an update has none or its scale is unknown."""
    pairs = []
    for part in parts:
        delta = part.update.delta
        if not isinstance(part.matrix, tuple) or not isinstance(delta, FactoredDelta) or not delta.scale:
            return None
        b, a = (factor.to(torch.float64) for factor in part.matrix)
        pairs.append(Pair(b / delta.scale, a, delta.scale))
    return pairs


def _list_recompression_ranks(changed: Sequence[Part], settings: InterferenceSettings) -> list[int]:
    """Return the recompression ranks: the requested ones, and PEFT's default, the largest of the adapters'."""
    columns = [_count_columns(part) for part in changed]
    return sorted({*settings.ranks, *(rank for rank in [max((c for c in columns if c), default=0)] if rank)})


def _compute_residual(factors: Factors, rank: int) -> float:
    return math.hypot(*factors.s[rank:].flip(0).tolist()) / factors.fro
