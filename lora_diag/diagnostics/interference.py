"""Do several updates of one layer fight? Their spaces pair by pair, and what their sum needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from lora_diag.deltas import Delta, FactoredDelta, footprint
from lora_diag.diagnostics.change import Change, load_change, on_device
from lora_diag.diagnostics.left_out import not_finite
from lora_diag.diagnostics.merging import Pair, factor_merges, ties_merge
from lora_diag.diagnostics.resolution import resolution
from lora_diag.diagnostics.spectrum import THRESHOLDS, record_of
from lora_diag.linalg import Factors, decompose, decompose_factored, resolve_device
from lora_diag.linalg.distance import principal_cosines
from lora_diag.linalg.stacked import Matrix, inner, total
from lora_diag.metrics import effective_rank, energy_curve, noise_edge, rank_at, signal_rank, verdict
from lora_diag.metrics.interference import near_chance, relation, task_interference, task_interference_at_random
from lora_diag.results import Agreement, Interference, LeftOut, Resolution, Union
from lora_diag.results.interference import EnergyOverlap, MergeLoss

RANKS = (4, 8, 16, 32, 64)

# Share of ‖S‖_F that the directions of the subspace alignment ratio may leave (Marczak et al. 2025).
ALIGNMENT_ERROR = 0.05

# Singular values below this share of the largest are rounding, and their vectors have no place in a space: of products
# of factors in float64, and of differences of stored matrices in float32.
ZERO_FACTORED, ZERO_DENSE = 1e-10, 1e-7

# The rank at which two updates are called apart or not: the asked one that is nearest to this.
RELATION_RANK = 8

OVERFLOW = "the product of its factors overflows float64"


@dataclass(frozen=True, slots=True)
class InterferenceSettings:
    """What is asked of every layer.

    Args:
        ranks: Ranks r at which spaces are compared and merges recompressed.
        weights: w_k > 0 of each update in the sum.
        density: Share of the entries of each update that TIES keeps; 0 for no TIES and no sign conflicts, which need
            every entry.
        method: ``auto``, ``exact``, ``gram`` or ``krylov``.
        tol: Bound to reach on the error of every energy fraction.
        seed: Of random starting vectors.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
    """

    ranks: tuple[int, ...] = RANKS
    weights: tuple[float, ...] = ()
    density: float = 0.2
    method: str = "auto"
    tol: float = 1e-4
    seed: int = 0
    device: str = "auto"


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
class Several:
    """One layer and all updates of it."""

    layer: str
    shape: tuple[int, int]
    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """One update, read and decomposed; ``s`` and ``fro`` have its weight."""

    update: Update
    change: Change
    matrix: Matrix
    factors: Factors
    rank: int
    resolution: Resolution

    @property
    def s(self) -> Tensor:
        return self.update.weight * self.factors.s[: self.rank]

    @property
    def fro(self) -> float:
        return self.update.weight * self.factors.fro

    @property
    def u(self) -> Tensor:
        assert self.factors.u is not None
        return self.factors.u[:, : self.rank]

    @property
    def v(self) -> Tensor:
        assert self.factors.vh is not None
        return self.factors.vh[: self.rank].T

    @property
    def curve(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return energy_curve(self.factors.s.numpy(), self.factors.fro, self.factors.complete)

    @property
    def effective(self) -> float:
        return effective_rank(self.factors.s.numpy())


def size(task: Several) -> int:
    """Return about how many bytes measuring a layer takes: every update and its vectors, and the sum."""
    dense = [u for u in task.updates if not isinstance(u.delta, FactoredDelta)]
    vectors = 8 * min(task.shape) * sum(task.shape)
    return (
        sum(footprint(u.delta) for u in task.updates)
        + (len(dense) + 1) * vectors * bool(dense)
        + 4 * math.prod(task.shape)
    )


def interference(task: Several, settings: InterferenceSettings) -> tuple[Interference | Union | LeftOut, ...]:
    """Hold all updates of one layer against each other.

    Args:
        task: The layer.
        settings: What is asked.

    Returns:
        One record for each pair of updates that are not zero, and one for all together; where an update is not finite,
        one ``left_out`` record instead.

    Raises:
        InputError: A file could not be read.
    """
    records, fallback = on_device(partial(_measure, task, settings), resolve_device(settings.device))
    if not fallback:
        return records
    return tuple(_on_the_cpu(record, fallback) for record in records)


def _on_the_cpu(record: Interference | Union | LeftOut, words: str) -> Interference | Union | LeftOut:
    if not isinstance(record, Union):
        return record
    return record.model_copy(
        update={"spectrum": record.spectrum.model_copy(update={"method": record.spectrum.method + words})}
    )


def _measure(
    task: Several, settings: InterferenceSettings, device: torch.device
) -> tuple[Interference | Union | LeftOut, ...]:
    parts: list[_Part] = []
    for update in task.updates:
        part = _part(update, settings, device)
        if isinstance(part, Change):
            left_out = not_finite(update.delta, part)
            return (left_out.model_copy(update={"detail": f"{update.name}: {left_out.detail}"}),)
        parts.append(part)
    moved = [part for part in parts if part.fro > 0]
    pairs = [_pair(task, first, second, settings) for first, second in combinations(moved, 2)]
    return (*pairs, _union(task, parts, moved, settings))


def _part(update: Update, settings: InterferenceSettings, device: torch.device) -> _Part | Change:
    """Read and decompose one update; return its change alone where it is not finite."""
    change = load_change(update.delta, device)
    if change.non_finite is not None:
        return change
    factors = change.decompose(settings.method, None, True, settings.tol, settings.seed)
    if not math.isfinite(factors.fro):
        return replace(change, non_finite=OVERFLOW)
    matrix = change.factors if change.factors is not None else change.matrix
    assert matrix is not None
    seen = resolution(change.rounding, update.delta.shape, factors.s.numpy(), factors.fro, factors.complete)
    return _Part(update, change, matrix, factors, _numerical_rank(factors, matrix), seen)


def _numerical_rank(factors: Factors, matrix: Matrix) -> int:
    zero = ZERO_FACTORED if isinstance(matrix, tuple) else ZERO_DENSE
    return int((factors.s > zero * factors.s[0]).sum()) if factors.fro > 0 else 0


def _pair(task: Several, first: _Part, second: _Part, settings: InterferenceSettings) -> Interference:
    cosine = inner(first.matrix, second.matrix) / first.factors.fro / second.factors.fro
    cosine = max(-1.0, min(1.0, cosine))
    by_chance = 1 / math.sqrt(math.prod(task.shape))
    # As far as either has directions; beyond that, every rank would say the same.
    ranks = [r for r in settings.ranks if r <= max(first.rank, second.rank)] or [min(settings.ranks)]
    energy = {str(r): _energy(task, first, second, r) for r in ranks}
    at = min(ranks, key=lambda rank: abs(rank - RELATION_RANK))
    near = _near(first.u, second, at) and _near(second.u, first, at)
    near = near and _near(first.v, second, at, rows=True) and _near(second.v, first, at, rows=True)
    noise = "unresolved" in {first.resolution.verdict, second.resolution.verdict}
    return Interference(
        layer=task.layer,
        shape=task.shape,
        first=first.update.name,
        second=second.update.name,
        first_fro=first.factors.fro,
        second_fro=second.factors.fro,
        cosine=cosine,
        cosine_random=by_chance,
        columns={str(r): _agreement(first.u[:, :r], second.u[:, :r]) for r in ranks},
        rows={str(r): _agreement(first.v[:, :r], second.v[:, :r]) for r in ranks},
        energy=energy,
        relation="noise" if noise else relation(near, cosine, by_chance),
    )


def _agreement(u: Tensor, v: Tensor) -> Agreement:
    cosines = principal_cosines(u, v)
    return Agreement(
        cosines=tuple(round(cosine, 6) for cosine in cosines.tolist()),
        overlap=min(1.0, float((cosines**2).mean())),
        random=max(u.shape[1], v.shape[1]) / len(u),
    )


def _within(u: Tensor, part: _Part, rows: bool = False) -> float:
    """Return ‖UᵀΔW‖²/‖ΔW‖², or ‖ΔW·U‖²/‖ΔW‖², from the singular vectors of ΔW."""
    vectors = part.v if rows else part.u
    inside = (u.T @ vectors) * part.s.to(u.device)
    return min(1.0, float((inside**2).sum() / (part.s**2).sum()))


def _energy(task: Several, first: _Part, second: _Part, rank: int) -> EnergyOverlap:
    u, w = first.u[:, :rank], second.u[:, :rank]
    return EnergyOverlap(
        second_in_first=_within(u, second),
        first_in_second=_within(w, first),
        random_first=u.shape[1] / task.shape[0],
        random_second=w.shape[1] / task.shape[0],
    )


def _near(vectors: Tensor, part: _Part, rank: int, rows: bool = False) -> bool:
    space = vectors[:, :rank]
    return near_chance(_within(space, part, rows), space.shape[1], len(space), part.effective)


def _union(task: Several, parts: Sequence[_Part], moved: Sequence[_Part], settings: InterferenceSettings) -> Union:
    weights = [part.update.weight for part in parts]
    summed = total([part.matrix for part in parts], weights)
    if isinstance(summed, tuple):
        factors = decompose_factored(*summed, vectors=True)
    else:
        factors = decompose(summed, settings.method, None, None, True, settings.tol, settings.seed)
    # A sum that cancels leaves rounding of the parts behind, and no update.
    largest = math.hypot(*(part.fro for part in parts))
    if factors.fro <= (ZERO_FACTORED if isinstance(summed, tuple) else ZERO_DENSE) * largest:
        factors = replace(factors, s=torch.zeros_like(factors.s), fro=0.0, energy_error=0.0)
    spectrum = record_of(
        task.layer,
        task.shape,
        (None, "float32" if isinstance(summed, tuple) else "float64"),
        None,
        factors,
        settings.ranks,
        _resolution(parts, factors, task.shape),
    )
    needed = {str(share): sum(rank_at(part.curve, share) or 0 for part in moved) for share in THRESHOLDS}
    effective = sum(part.effective for part in moved)
    several = len(moved) > 1 and factors.fro > 0
    fields = _together(moved, factors, spectrum.rank_at, task.shape, settings) if several else _alone()
    merges, conflicts = _merges(parts, summed, factors, weights, settings) if several else ({}, {})
    return Union(
        layer=task.layer,
        shape=task.shape,
        updates=tuple(part.update.name for part in moved),
        ranks=tuple(_columns(part) for part in moved),
        fro=factors.fro,
        parts_fro=tuple(part.fro for part in moved),
        spectrum=spectrum,
        parts_rank_at=needed,
        additive={share: _ratio(spectrum.rank_at[share], of) if several else None for share, of in needed.items()},
        parts_effective_rank=effective,
        additive_effective=_ratio(spectrum.effective_rank, effective) if several else None,
        energy_ratio=factors.fro**2 / largest**2 if len(moved) > 1 else None,
        merges=merges,
        recompressed={str(r): _left(factors, r) for r in _recompressed(moved, settings)} if several else {},
        **fields,
        **{name: conflicts.get(name) for name in _CONFLICTS},
    )


_CONFLICTS = ("sign_conflicts", "sign_conflicts_random", "trimmed_conflicts", "trimmed_conflicts_random")


def _columns(part: _Part) -> int | None:
    return part.matrix[0].shape[1] if isinstance(part.matrix, tuple) else None


def _ratio(value: float | None, of: float) -> float | None:
    return value / of if value is not None and of else None


def _resolution(parts: Sequence[_Part], factors: Factors, shape: tuple[int, int]) -> Resolution:
    """Bound the rounding of the sum by the sum of the roundings: those of one BASE are the same in every part."""
    noise = sum(part.update.weight * part.resolution.noise_fro for part in parts)
    edge = noise_edge(noise**2 / math.prod(shape), shape)
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


def _alone() -> dict[str, object]:
    """Return the fields that need two updates, for a layer that has not."""
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


def _together(
    moved: Sequence[_Part],
    factors: Factors,
    ranks: dict[str, int | None],
    shape: tuple[int, int],
    settings: InterferenceSettings,
) -> dict[str, object]:
    """Return what the sum needs and what its directions leave of the parts."""
    assert factors.u is not None
    assert factors.vh is not None
    # C_k(r) = ‖U_rᵀΔW_kV_r‖²/‖ΔW_k‖² for every r: sums over the leading r×r blocks of UᵀΔW_kV.
    kept = []
    for part in moved:
        core = ((factors.u.T @ part.u) * part.s.to(factors.u.device)) @ (part.v.T @ factors.vh.T)
        kept.append((core**2).cumsum(0).cumsum(1).diagonal().cpu() / (part.s**2).sum())
    weakest = torch.stack(kept).min(0).values.clamp(max=1.0).numpy()
    aligned = _alignment_rank(factors)
    alignments = [math.sqrt(_within(factors.u[:, :aligned], part)) for part in moved]
    return {
        "rank_for_all": {str(share): rank_at(weakest, share * (1 - 1e-9)) for share in THRESHOLDS},
        "weakest_kept": {share: float(weakest[r - 1]) if r else None for share, r in ranks.items()},
        **_singular_task_interference(moved, shape, max(settings.ranks)),
        "alignment": sum(alignments) / len(alignments),
        "alignments": tuple(alignments),
        "alignment_rank": aligned,
        "alignment_random": math.sqrt(aligned / shape[0]),
    }


def _alignment_rank(factors: Factors) -> int:
    """Return the smallest k with ‖S − S_k‖_F ≤ 0.05‖S‖_F (Marczak et al. 2025, arXiv 2502.04959)."""
    curve = energy_curve(factors.s.numpy(), factors.fro, factors.complete)
    return rank_at(curve, 1 - ALIGNMENT_ERROR**2) or len(curve)


def _singular_task_interference(moved: Sequence[_Part], shape: tuple[int, int], most: int) -> dict[str, float]:
    u = torch.cat([part.u[:, :most] for part in moved], dim=1)
    v = torch.cat([part.v[:, :most] for part in moved], dim=1)
    s = torch.cat([part.s[:most] for part in moved]).numpy()
    owner = np.repeat(np.arange(len(moved)), [min(part.rank, most) for part in moved])
    sti, relative = task_interference((u.T @ u).cpu().numpy(), (v.T @ v).cpu().numpy(), s)
    return {"sti": sti, "sti_relative": relative, "sti_random": task_interference_at_random(s, owner, shape)}


def _merges(
    parts: Sequence[_Part], summed: Matrix, factors: Factors, weights: Sequence[float], settings: InterferenceSettings
) -> tuple[dict[str, MergeLoss | None], dict[str, float | None]]:
    """Return the losses of merges, and the sign conflicts."""
    # A dead adapter is no update, but its A is part of PEFT's merges.
    density = settings.density or 0.2
    merges = factor_merges(summed, factors.fro, _pairs(parts), weights, density)
    if settings.density == 0:
        return {**merges, "ties": None, "ties_dense": None}, {}
    dense, before, after = ties_merge([part.matrix for part in parts], factors.fro, weights, density)
    found = (before.share, before.random, after.share, after.random)
    return {**merges, "ties_dense": dense}, dict(zip(_CONFLICTS, found, strict=True))


def _pairs(parts: Sequence[_Part]) -> list[Pair] | None:
    """Return the factors as the files have them; None where an update has none, or its scale is not known."""
    pairs = []
    for part in parts:
        delta = part.update.delta
        if not isinstance(part.matrix, tuple) or not isinstance(delta, FactoredDelta) or not delta.scale:
            return None
        b, a = (factor.to(torch.float64) for factor in part.matrix)
        pairs.append(Pair(b / delta.scale, a, delta.scale))
    return pairs


def _recompressed(moved: Sequence[_Part], settings: InterferenceSettings) -> list[int]:
    """Return the ranks to recompress to: those asked, and PEFT's own choice, the largest of the adapters'."""
    columns = [_columns(part) for part in moved]
    return sorted({*settings.ranks, *(rank for rank in [max((c for c in columns if c), default=0)] if rank)})


def _left(factors: Factors, rank: int) -> float:
    return math.hypot(*factors.s[rank:].flip(0).tolist()) / factors.fro
