"""``interference``: measure angles between several updates of one model, the rank of their sum, and
losses of merges.

Merges are not written: only their distance from the sum is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from lora_diag.adapters import locate
from lora_diag.deltas import DenseDelta, FactoredDelta, footprint
from lora_diag.diagnostics.interference import InterferenceOptions
from lora_diag.diagnostics.interference.record import EnergyOverlap, Interference, MergeLoss, Union
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.values import record_of
from lora_diag.errors import Given, UsageError
from lora_diag.files import RESULTS, check_outputs
from lora_diag.layers.change import (
    COMPUTED_ENTRY_BYTES,
    Change,
    append_note,
    compute_on_device,
    load_change,
    why_not_comparable,
)
from lora_diag.layers.metric import agreement
from lora_diag.layers.resolution import make_resolution, resolution
from lora_diag.layers.task import LayerSettings, not_finite
from lora_diag.linalg import exact
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.distance import (
    Conflicts,
    Matrix,
    compare_blocks,
    frobenius_distance,
    frobenius_inner,
    stack_products,
    sum_matrices,
    ties_blocks,
    ties_factor,
)
from lora_diag.linalg.methods import (
    EXACT_UP_TO,
    Allowance,
    check_request,
    decompose,
    require_memory,
    whole_bytes,
)
from lora_diag.linalg.streamed import times_in_float64
from lora_diag.metrics import subspaces
from lora_diag.metrics.energy import RANKS, THRESHOLDS, effective_rank, energy_curve, rank_at
from lora_diag.records import LeftOut, Resolution, Results, totals
from lora_diag.records.file import write_results
from lora_diag.running.inputs import open_base, refuse_repeated
from lora_diag.running.layers import LayerRun, check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.updates import (
    LayerUpdates,
    Update,
    align_layers,
    list_unmeasured,
    split_base,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InterferenceSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        ranks: Ranks r at which spaces are compared and merges recompressed.
        weights: w_k > 0 of each update in the sum.
        density: Fraction of the entries of each update that TIES keeps; 0 to skip TIES and sign
            conflicts, which need every entry.
    """

    ranks: tuple[int, ...] = RANKS
    weights: tuple[float, ...] = ()
    density: float = 0.2


@dataclass(frozen=True, slots=True)
class DecomposedUpdate:
    """One decomposed update of a layer; ``s`` and ``fro`` include its weight.

    Args:
        update: The update.
        change: Its ΔW as read.
        matrix: ΔW without the weight, dense or as factors.
        factors: The decomposition of ΔW: all singular values, and the vectors that are compared.
        rank: Number of singular values above rounding.
        resolution: Resolution of ΔW under the rounding of the files.
    """

    update: Update
    change: Change
    matrix: Matrix
    factors: exact.Factors
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
        """Left singular vectors of the largest values in ``s``, as columns."""
        return self.factors.vectors[0][:, : self.rank]

    @property
    def v(self) -> Tensor:
        """Right singular vectors of the largest values in ``s``, as columns."""
        return self.factors.vectors[1][: self.rank].T

    @property
    def curve(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Energy fractions C(r) at every rank."""
        return energy_curve(self.factors.s.numpy(), self.factors.fro, self.factors.complete)

    @property
    def effective_rank(self) -> float:
        """Effective rank of ΔW."""
        return effective_rank(self.factors.s.numpy())


def read_part(
    update: Update, settings: InterferenceSettings, device: torch.device
) -> DecomposedUpdate | Change:
    """Read and decompose one update; if an entry is not finite or the norm out of range, return its
    change.
    """
    change = load_change(update.delta, device)
    if change.non_finite is not None:
        return change
    method = settings.method
    if method == "auto" and min(update.delta.shape) > EXACT_UP_TO:
        method = "gram"  # all values are needed, few vectors
    top = None if change.factors else max(settings.ranks)
    factors = change.decompose(method, top, True, settings.tol, settings.seed)
    rest = factors.rest
    if rest is None and factors.method == "gram":  # its largest vectors were computed alone
        rest = change.decompose("gram").s[len(factors.s) :]
    if rest is not None:
        factors = replace(factors, s=torch.cat([factors.s, rest]), complete=True, rest=None)
    if problem := why_not_comparable(factors.fro):
        return replace(change, non_finite=problem)
    matrix = change.factors if change.factors is not None else change.matrix
    assert matrix is not None
    return DecomposedUpdate(
        update,
        change,
        matrix,
        factors,
        exact.numerical_rank(factors),
        resolution(change.rounding, factors),
    )


def _project(space: Tensor, part: DecomposedUpdate, rows: bool = False) -> Tensor:
    """Return UᵀΔW, or with ``rows`` (ΔW·U)ᵀ, without the weight, for orthonormal columns U."""
    if isinstance(part.matrix, tuple):
        b, a = (factor.to(torch.float64) for factor in part.matrix)
        return (b @ (a @ space)).T if rows else (space.T @ b) @ a
    return times_in_float64(part.matrix if rows else part.matrix.T, space).T


def _compute_energy_within(space: Tensor, part: DecomposedUpdate, rows: bool = False) -> Tensor:
    """Return ‖U_rᵀΔW‖²/‖ΔW‖², or with ``rows`` ‖ΔW·U_r‖²/‖ΔW‖², for the first r of orthonormal
    columns, each r.
    """
    energies = _project(space, part, rows).div_(part.factors.fro).square_().sum(1)
    return energies.cumsum(0).clamp(max=1.0).cpu()


# B, A and s of one adapter: ΔW = s·B·A.
AdapterFactors = tuple[Tensor, Tensor, float]


def _measure_loss(summed: Matrix, fro: float, merge: tuple[Tensor, Tensor]) -> MergeLoss:
    """Return the loss of a merge in factored form relative to S, given ‖S‖_F > 0."""
    norm = math.sqrt(max(0.0, frobenius_inner(merge, merge)))
    return _make_loss(fro, norm, frobenius_distance(summed, merge), frobenius_inner(summed, merge))


def _make_loss(fro: float, norm: float, distance: float, inner_product: float) -> MergeLoss:
    """Return a record from ‖S‖ > 0, ‖M‖, ‖S − M‖ and ⟨S, M⟩."""
    merge_distances = subspaces.compute_distances(fro, norm, distance, inner_product, None)
    assert merge_distances.epsilon is not None
    assert merge_distances.norm_ratio is not None
    return MergeLoss(
        residual=merge_distances.epsilon,
        norm_ratio=merge_distances.norm_ratio,
        cosine=merge_distances.cosine,
        best_scale=merge_distances.best_scale,
        residual_best_scale=merge_distances.epsilon_best_scale,
    )


def measure_factor_merges(
    summed: Matrix,
    fro: float,
    adapters: Sequence[AdapterFactors] | None,
    weights: Sequence[float],
    density: float,
) -> dict[str, MergeLoss | None]:
    """Return the losses of merges made from the factors by name; None for a merge that does not
    exist.

    ``ties_dense``, which is not made from the factors, is None, too. ``linear`` is
    (Σ√(w_ks_k)B_k)(Σ√(w_ks_k)A_k): its distance from S is the norm of its cross terms Σ_{k≠l}
    √(w_ks_kw_ls_l)·B_kA_l. ``ties`` merges the B_k and the A_k likewise.
    (``peft.tuners.lora.model``, ``_generalized_task_arithmetic_weighted_adapter`` of PEFT 0.21.)

    Args:
        summed: S.
        fro: ‖S‖_F > 0.
        adapters: The factors of all updates; None if an update has none, or its scale is unknown or
            0.
        weights: The w_k > 0.
        density: Fraction of the entries that ``ties`` keeps; 0 for no ``ties``.
    """
    merges: dict[str, MergeLoss | None] = dict.fromkeys(("cat", "linear", "ties", "ties_dense"))
    if adapters is None:
        return merges
    b = [b for b, _, _ in adapters]
    a = [a for _, a, _ in adapters]
    scales = [weight * scale for (_, _, scale), weight in zip(adapters, weights, strict=True)]
    merges["cat"] = _measure_loss(summed, fro, stack_products(list(zip(b, a, strict=True)), scales))
    if len({factor.shape[1] for factor in b}) == 1 and min(scales) > 0:
        roots = list(map(math.sqrt, scales))
        linear = _add_weighted(b, roots), _add_weighted(a, roots)
        merges["linear"] = _measure_loss(summed, fro, linear)
        if density:
            ties = ties_factor(b, roots, density), ties_factor(a, roots, density)
            merges["ties"] = _measure_loss(summed, fro, ties)
    return merges


def _add_weighted(factors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_k F_k."""
    return sum(
        (weight * factor for factor, weight in zip(factors, weights, strict=True)),
        start=torch.zeros_like(factors[0]),
    )


# Relative residual ‖S − S_k‖_F/‖S‖_F of the directions in the subspace alignment ratio (Marczak et
# al. 2025).
ALIGNMENT_ERROR = 0.05


def measure_union(
    task: LayerUpdates,
    parts: Sequence[DecomposedUpdate],
    changed: Sequence[DecomposedUpdate],
    settings: InterferenceSettings,
) -> Union:
    """Return the record of all updates of a layer together.

    Args:
        task: The layer.
        parts: The decomposed updates of the layer.
        changed: Those that are not zero.
        settings: Settings of the measurement.
    """
    weights = [part.update.weight for part in parts]
    summed = sum_matrices([part.matrix for part in parts], weights)
    if isinstance(summed, tuple):
        factors = exact.decompose_factored(*summed, vectors=True)
        zero, dtype = exact.ZERO_FACTORED, "float32"
    else:
        factors = decompose(summed, settings.method, None, None, True, settings.tol, settings.seed)
        zero, dtype = exact.ZERO_DENSE, "float64"
    # A sum that cancels leaves only rounding of the parts.
    parts_norm = math.hypot(*(part.fro for part in parts))
    if factors.fro <= zero * parts_norm:
        factors = replace(factors, s=torch.zeros_like(factors.s), fro=0.0, energy_error=0.0)
    spectrum = record_of(
        task.layer,
        task.shape,
        (None, dtype),
        None,
        factors,
        settings.ranks,
        _bound_resolution(parts, factors),
    )
    parts_rank_at = {
        str(share): sum(rank_at(part.curve, share) or 0 for part in changed) for share in THRESHOLDS
    }
    parts_effective_rank = sum(part.effective_rank for part in changed)
    fields: dict[str, Any] = {"additive": dict.fromkeys(parts_rank_at), "additive_effective": None}
    if len(changed) > 1 and factors.fro > 0:
        fields = _measure_sum(changed, factors, spectrum.rank_at, task.shape, settings)
        fields |= _measure_merges(parts, summed, factors.fro, weights, settings.density)
        # To the requested ranks, and to PEFT's default, the largest of the adapters'.
        ranks = {*settings.ranks, max(_count_columns(part) or 0 for part in changed)} - {0}
        fields["recompressed"] = {
            str(rank): math.hypot(*factors.s[rank:].flip(0).tolist()) / factors.fro
            for rank in sorted(ranks)
        }
        fields["additive"] = {
            share: _divide(spectrum.rank_at[share], ranks_sum)
            for share, ranks_sum in parts_rank_at.items()
        }
        fields["additive_effective"] = _divide(spectrum.effective_rank, parts_effective_rank)
    return Union(
        layer=task.layer,
        shape=task.shape,
        updates=tuple(part.update.name for part in changed),
        ranks=tuple(_count_columns(part) for part in changed),
        fro=factors.fro,
        parts_fro=tuple(part.fro for part in changed),
        spectrum=spectrum,
        parts_rank_at=parts_rank_at,
        parts_effective_rank=parts_effective_rank,
        energy_ratio=factors.fro**2 / parts_norm**2 if len(changed) > 1 else None,
        **fields,
    )


def _count_columns(part: DecomposedUpdate) -> int | None:
    """Return the number of columns of an update's factors; None if it has none."""
    return part.matrix[0].shape[1] if isinstance(part.matrix, tuple) else None


def _divide(value: float | None, divisor: float) -> float | None:
    """Return the ratio; None if the value is None or the divisor is 0."""
    return value / divisor if value is not None and divisor else None


def _bound_resolution(parts: Sequence[DecomposedUpdate], factors: exact.Factors) -> Resolution:
    """Return the resolution of the sum; roundings are added, because that of a common BASE is equal
    in all.
    """
    noise = sum(part.update.weight * part.resolution.noise_fro for part in parts)
    edge = sum(part.update.weight * part.resolution.edge for part in parts)
    if edge:  # not of adapters, whose factors are the update
        edge = max(edge, exact.rounding_threshold(factors))
    bound = sum(part.update.weight * part.resolution.rounding_fro for part in parts)
    return make_resolution(factors.s.numpy(), factors.fro, factors.complete, bound, noise, edge)


def _measure_sum(
    changed: Sequence[DecomposedUpdate],
    factors: exact.Factors,
    rank_at_share: dict[str, int | None],
    shape: tuple[int, int],
    settings: InterferenceSettings,
) -> dict[str, object]:
    """Return the fields of a nonzero sum: what its directions keep, STI, and alignment."""
    u, vh = factors.vectors
    # ‖U_rᵀΔW_kV_r‖²/‖ΔW_k‖² for every r: sums over the leading r×r blocks of UᵀΔW_kV.
    kept_by_part, within = [], []
    for part in changed:
        inside = _project(u, part).div_(part.factors.fro)
        core = (inside @ vh.T).square_()
        # Row r up to r, and column r up to r − 1, are what the block of r has more than that of r −
        # 1.
        kept_by_part.append((core.tril().sum(1) + core.triu(1).sum(0)).cumsum(0).cpu())
        within.append(inside.square_().sum(1).cumsum(0).clamp(max=1.0).cpu())
    # Beyond the rank of S its vectors are arbitrary, and an adapter for S has no columns.
    weakest = torch.stack(kept_by_part).min(0).values.clamp(max=1.0).numpy()
    weakest = weakest[: exact.numerical_rank(factors)]
    # The smallest k with ‖S − S_k‖_F ≤ 0.05‖S‖_F (Marczak et al. 2025, arXiv 2502.04959).
    curve = energy_curve(factors.s.numpy(), factors.fro, factors.complete)
    alignment_rank = rank_at(curve, 1 - ALIGNMENT_ERROR**2) or len(curve)
    alignments = [math.sqrt(energies[alignment_rank - 1]) for energies in within]
    rank_for_all = {str(share): rank_at(weakest, share * (1 - 1e-9)) for share in THRESHOLDS}
    weakest_kept = {
        share: float(weakest[r - 1]) if r else None for share, r in rank_at_share.items()
    }
    return {
        "rank_for_all": rank_for_all,
        "weakest_kept": weakest_kept,
        **_measure_task_interference(changed, shape, max(settings.ranks)),
        "alignment": sum(alignments) / len(alignments),
        "alignments": tuple(alignments),
        "alignment_rank": alignment_rank,
        "alignment_random": math.sqrt(alignment_rank / shape[0]),
    }


def _measure_task_interference(
    changed: Sequence[DecomposedUpdate], shape: tuple[int, int], limit: int
) -> dict[str, float]:
    """Return the fields of STI, from at most ``limit`` directions of each update."""
    u = torch.cat([part.u[:, :limit] for part in changed], dim=1)
    v = torch.cat([part.v[:, :limit] for part in changed], dim=1)
    s = torch.cat([part.s[:limit] for part in changed]).numpy()
    owner = np.repeat(np.arange(len(changed)), [min(part.rank, limit) for part in changed])
    sti, relative = subspaces.task_interference((u.T @ u).cpu().numpy(), (v.T @ v).cpu().numpy(), s)
    return {
        "sti": sti,
        "sti_relative": relative,
        "sti_random": subspaces.task_interference_at_random(s, owner, shape),
    }


def _measure_merges(
    parts: Sequence[DecomposedUpdate],
    summed: Matrix,
    fro: float,
    weights: Sequence[float],
    density: float,
) -> dict[str, object]:
    """Return the fields of merges: their losses, and, unless ``density`` is 0, those of TIES and
    sign conflicts.
    """
    # A zero adapter is not an update, but its A enters PEFT's merges.
    merges = measure_factor_merges(summed, fro, _get_adapter_factors(parts), weights, density)
    if density == 0:
        return {"merges": merges}
    before, after = Conflicts(), Conflicts()  # of signs, before and after TIES trims the updates
    blocks = ties_blocks([part.matrix for part in parts], weights, density, before, after)
    distance, norm, inner_product = compare_blocks(blocks)
    return {
        "merges": {**merges, "ties_dense": _make_loss(fro, norm, distance, inner_product)},
        "sign_conflicts": before.share,
        "sign_conflicts_random": before.random,
        "trimmed_conflicts": after.share,
        "trimmed_conflicts_random": after.random,
    }


def _get_adapter_factors(parts: Sequence[DecomposedUpdate]) -> list[AdapterFactors] | None:
    """Return the stored factors in float64 and their scales; None if an update lacks factors or a
    nonzero scale.
    """
    adapters = []
    for part in parts:
        scale = part.update.delta.scale if isinstance(part.update.delta, FactoredDelta) else None
        if not isinstance(part.matrix, tuple) or not scale:
            return None
        b, a = (factor.to(torch.float64) for factor in part.matrix)
        adapters.append((b / scale, a, scale))
    return adapters


# The relation of two updates is judged at the requested rank nearest to this.
RELATION_RANK = 8

# Bytes of an entry whose magnitude is sorted (two copies and its index), and of one that TIES
# compares in a block.
_SORTED, _COMPARED = 16, 96


def max_bytes(task: LayerUpdates, settings: InterferenceSettings) -> int:
    """Return the largest memory of a layer in bytes: the stored part of every update, and the most
    expensive step.

    An update without factors keeps ΔW and the vectors of its largest values; all are counted, which
    leaves room for UᵀΔW. The steps are decomposing one update, decomposing the sum in float64,
    products of the sum's vectors with each update, and TIES, which sorts the entries of one update
    at a time.
    """
    entries = math.prod(task.shape)
    smaller_side = min(task.shape)
    vectors = 8 * smaller_side * sum(task.shape)
    requested = Allowance(0, settings.method, None, vectors=True)
    stored_bytes = sum_bytes = 0
    steps = []
    for update in task.updates:
        delta = update.delta
        if isinstance(delta, FactoredDelta):
            stored_bytes += footprint(delta)
            continue
        is_wide = isinstance(delta, DenseDelta) or "float64" in delta.dtypes
        entry = 8 if is_wide else 4
        stored_bytes += entries * entry + vectors
        if isinstance(delta, DenseDelta):
            entry = COMPUTED_ENTRY_BYTES
        steps.append(whole_bytes(task.shape, requested, entry))
    if steps:
        sum_bytes = 8 * entries + vectors
        steps += [whole_bytes(task.shape, requested, 8), sum_bytes + 6 * 8 * smaller_side**2]
    if settings.density > 0:
        sorting = _SORTED * entries * (settings.density < 1)
        steps.append(sum_bytes + sorting + _COMPARED * min(2**20, entries) * len(task.updates))
    return stored_bytes + max(steps, default=0)


def _check_memory(task: LayerUpdates, settings: InterferenceSettings) -> None:
    """Refuse a layer that does not fit into the memory limit."""
    if settings.memory is None:
        return
    fix = "$exclude it"
    if max_bytes(task, replace(settings, density=0.0)) <= settings.memory:
        fix = "$density 0, which leaves out TIES and sign conflicts"
    description = "its updates with all their singular vectors"
    if all(isinstance(update.delta, FactoredDelta) for update in task.updates):
        description = "the entries of its updates, for TIES,"
    needed = max_bytes(task, settings)
    require_memory(needed, settings.memory, task.shape, f"{description} take", fix)


def measure_layer(
    task: LayerUpdates, settings: InterferenceSettings
) -> tuple[Interference | Union | LeftOut, ...]:
    """Compare all updates of one layer.

    Args:
        task: The layer.
        settings: Settings of the measurement.

    Returns:
        One record for each pair of nonzero updates, and one for all together; if an update is not
            finite or its norm
        is out of range, one ``left_out`` record instead.
    """
    (*records, last), fallback = compute_on_device(
        partial(_measure_on, task, settings), resolve_device(settings.device)
    )
    if isinstance(last, Union):
        spectrum = append_note(last.spectrum, fallback)
        last = last.model_copy(update={"spectrum": spectrum})
    return (*records, last)


def _measure_on(
    task: LayerUpdates, settings: InterferenceSettings, device: torch.device
) -> tuple[Interference | Union | LeftOut, ...]:
    """Return the records of a layer as ``measure_layer``, computed on a device."""
    if device.type == "cpu":  # the limit applies to the machine's memory
        _check_memory(task, settings)
    parts: list[DecomposedUpdate] = []
    for update in task.updates:
        part = read_part(update, settings, device)
        if isinstance(part, Change):
            left_out = not_finite(update.delta, part.non_finite or "")
            return (left_out.model_copy(update={"detail": f"{update.name}: {left_out.detail}"}),)
        parts.append(part)
    changed = [part for part in parts if part.fro > 0]
    pairs = [
        _compare_pair(task, first, second, settings) for first, second in combinations(changed, 2)
    ]
    return (*pairs, measure_union(task, parts, changed, settings))


def _compare_pair(
    task: LayerUpdates,
    first: DecomposedUpdate,
    second: DecomposedUpdate,
    settings: InterferenceSettings,
) -> Interference:
    """Return the record of two nonzero updates of a layer."""
    cosine = frobenius_inner(first.matrix, second.matrix) / first.factors.fro / second.factors.fro
    cosine = max(-1.0, min(1.0, cosine))
    cosine_random = 1 / math.sqrt(math.prod(task.shape))
    # Up to the larger number of directions; larger ranks give the same.
    limit = max(first.rank, second.rank)
    ranks = [rank for rank in settings.ranks if rank <= limit] or [min(settings.ranks)]
    relation_rank = min(ranks, key=lambda rank: abs(rank - RELATION_RANK))
    rows, columns = task.shape
    left, right = [], []
    near = True
    for one, other in ((first, second), (second, first)):
        in_columns = _compute_energy_within(one.u, other)
        in_rows = _compute_energy_within(one.v, other, rows=True)
        near &= _is_near_chance(in_columns, relation_rank, rows, other)
        near &= _is_near_chance(in_rows, relation_rank, columns, other)
        left.append(in_columns)
        right.append(in_rows)
    noise = "unresolved" in {first.resolution.verdict, second.resolution.verdict}
    return Interference(
        layer=task.layer,
        shape=task.shape,
        first=first.update.name,
        second=second.update.name,
        first_fro=first.factors.fro,
        second_fro=second.factors.fro,
        cosine=cosine,
        cosine_random=cosine_random,
        columns={str(r): agreement(first.u[:, :r], second.u[:, :r]) for r in ranks},
        rows={str(r): agreement(first.v[:, :r], second.v[:, :r]) for r in ranks},
        energy={str(r): _make_energy_overlap(left, r, rows) for r in ranks},
        relation="noise" if noise else subspaces.classify_relation(near, cosine, cosine_random),
    )


def _make_energy_overlap(within: Sequence[Tensor], rank: int, rows: int) -> EnergyOverlap:
    """Return the overlap of the ``rank`` largest directions of each of two updates with the other
    update.
    """
    first, second = (min(rank, len(energies)) for energies in within)
    return EnergyOverlap(
        second_in_first=float(within[0][first - 1]),
        first_in_second=float(within[1][second - 1]),
        random_first=first / rows,
        random_second=second / rows,
    )


def _is_near_chance(within: Tensor, rank: int, dimension: int, part: DecomposedUpdate) -> bool:
    """Return whether an update's energy in a space of ``rank`` directions is near that in a random
    one.
    """
    columns = min(rank, len(within))
    return subspaces.is_near_chance(
        float(within[columns - 1]), columns, dimension, part.effective_rank
    )


@show_options
def interference(
    updates: Sequence[Path | str],
    *,
    base: Path | str | None = None,
    **options: Unpack[InterferenceOptions],
) -> Results[Interference | Union]:
    r"""Compare several updates of one model, pair by pair and all together, layer by layer.

    Args:
        updates: Two or more checkpoints or adapters.
        base: Base checkpoint; not needed for adapters.
        weights: w_k > 0 of each update in the sum Σ w_kΔW_k; all 1 by default.
        ranks: Ranks at which spaces are compared, and to which merges are recompressed.
        density: Fraction of the entries of each update that TIES keeps; 0 to skip TIES and sign
            conflicts, which need every entry of every layer.
        **options: ``InterferenceOptions``.

    Returns:
        One ``interference`` record for each layer and pair of updates that change it, and one
            ``union`` record for each
        layer that any of them has; tensors that cannot be measured are in ``left_out``.

    Raises:
        UsageError: An option is invalid, there are fewer than two updates, one is given twice, one
            is a checkpoint and no ``base`` is given, ``base`` is an adapter, or ``output`` may be
            neither replaced nor resumed.
        InputError: An input cannot be read, does not fit ``base`` or needs one, two updates are not
            of one model, or the results file cannot be written.
        NothingComparedError: An update has no selected weight, or no weight is in two of them.

    Example:
        >>> adapters = ["sample_checkpoints/lora_r4", "sample_checkpoints/lora_r16"]
        >>> found = interference(adapters, layers=r"0\.mlp\.up_proj")
        >>> [record.record for record in found], found.layers[1].ranks
        (['interference', 'union'], (4, 16))
    """
    run = LayerRun("interference", options, InterferenceOptions)
    density = run.options["density"]
    settings = run.settings(
        InterferenceSettings,
        ranks=check_ranks(run.options["ranks"]),
        weights=_check_weights(run.options["weights"], len(updates)),
        density=density,
    )
    check_request(settings.method, 1, settings.tol)
    if not 0 <= density <= 1:
        raise UsageError(Given("density", density), "must lie between 0 and 1")
    if len(updates) < 2:
        raise UsageError(
            "interference: fewer than two updates; give BASE and at least two updates, or at least "
            "two adapters"
        )
    refuse_repeated(updates)
    opened = None if base is None else open_base(locate(base))
    comparisons = [
        run.compare(path, None) if opened is None else run.compare(opened, path) for path in updates
    ]
    tasks = align_layers(comparisons, settings.weights)
    return run.over(
        tasks,
        measure_layer,
        max_bytes,
        settings,
        list_unmeasured(comparisons, {task.layer for task in tasks}),
        (*comparisons[0].inputs[:-1], *(comparison.inputs[-1] for comparison in comparisons)),
        {"weights": list(settings.weights), "ranks": list(settings.ranks), "density": density},
    )


def compare_updates(
    inputs: Sequence[Path | str],
    spectrum: Path | None = None,
    **options: Unpack[InterferenceOptions],
) -> Results[Interference | Union]:
    """Compare updates, of which the first may be BASE; with ``spectrum``, also write the spectra of
    their sums.
    """
    overwrite = options.get("overwrite", False)
    check_outputs([*inputs, options.get("output")], [(spectrum, RESULTS)], overwrite)
    base, updates = split_base(inputs)
    results = interference(updates, base=base, **options)
    if spectrum is not None:
        write_results(select_spectra(results), spectrum, overwrite)
    return results


def select_spectra(results: Results[Interference | Union]) -> Results[Spectrum]:
    """Return the spectra of the sums as results of ``spectrum``, for ``allocate``, ``plot`` and
    ``gate``.

    Args:
        results: Results of ``interference``.
    """
    spectra = tuple(record.spectrum for record in results if isinstance(record, Union))
    end = totals(spectra, results.left_out) if results.end is not None else None
    return Results(
        results.run.model_copy(update={"command": "spectrum"}), spectra, results.left_out, end
    )


def _check_weights(requested: Sequence[float] | None, update_count: int) -> tuple[float, ...]:
    """Return the weights, all 1 by default.

    Raises:
        UsageError: There is not one for each update, or one is not positive and finite.
    """
    weights = tuple(requested) if requested is not None else (1.0,) * update_count
    if len(weights) != update_count:
        raise UsageError(
            Given("weights"),
            f"{len(weights)} weights for {update_count} updates",
            "give one for each, in their order",
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise UsageError(
            Given("weights"), "must be positive", "subtraction of updates is not measured"
        )
    return weights
