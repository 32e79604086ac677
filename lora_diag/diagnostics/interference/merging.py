"""Distance of merges of several updates from their sum, without writing the merges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_diag.diagnostics.interference.record import MergeLoss
from lora_diag.linalg.distance import products
from lora_diag.linalg.stacked import Matrix, gap, inner, stack_products
from lora_diag.linalg.ties import Conflicts, ties_blocks, ties_factor
from lora_diag.metrics import distances


@dataclass(frozen=True, slots=True)
class Pair:
    """The stored factors of one adapter and their scale: ΔW = scale·B·A."""

    b: Tensor
    a: Tensor
    scale: float


def loss(total: Matrix, fro: float, merge: tuple[Tensor, Tensor]) -> MergeLoss:
    """Return the loss of a merge in factored form relative to the sum.

    Args:
        total: S.
        fro: ‖S‖_F > 0.
        merge: B and A of the merge.
    """
    norm_squared, along = inner(merge, merge), inner(total, merge)
    return as_loss(fro, math.sqrt(max(0.0, norm_squared)), gap(total, merge), along)


def as_loss(fro: float, norm: float, apart: float, along: float) -> MergeLoss:
    """Return a record from ‖S‖, ‖M‖, ‖S − M‖ and ⟨S, M⟩."""
    merge_distances = distances(fro, norm, apart, along, None)
    assert merge_distances.epsilon is not None
    assert merge_distances.norm_ratio is not None
    return MergeLoss(
        residual=merge_distances.epsilon,
        norm_ratio=merge_distances.norm_ratio,
        cosine=merge_distances.cosine,
        best_scale=merge_distances.best_scale,
        residual_best_scale=merge_distances.epsilon_best_scale,
    )


def factor_merges(
    total: Matrix, fro: float, pairs: Sequence[Pair] | None, weights: Sequence[float], density: float
) -> dict[str, MergeLoss | None]:
    """Return the losses of merges made from the factors.

    ``linear`` is (Σ√(w_ks_k)B_k)(Σ√(w_ks_k)A_k): its distance from S is that of its cross terms
    Σ_{k≠l} √(w_ks_kw_ls_l)·B_kA_l. ``ties`` merges the B_k and the A_k likewise. (``peft.tuners.lora.model``,
    ``_generalized_task_arithmetic_weighted_adapter`` of PEFT 0.21.)

    Args:
        total: S.
        fro: ‖S‖_F > 0.
        pairs: The factors; None if an update has none.
        weights: The w_k > 0.
        density: Fraction of the entries that ``ties`` keeps.
    """
    if pairs is None:
        return {"cat": None, "linear": None, "ties": None}
    weighted = [(weight * pair.scale * pair.b, pair.a) for pair, weight in zip(pairs, weights, strict=True)]
    concatenated = stack_products(weighted, [1.0] * len(pairs))
    merges: dict[str, MergeLoss | None] = {"cat": loss(total, fro, concatenated), "linear": None, "ties": None}
    roots = [math.sqrt(weight * pair.scale) for pair, weight in zip(pairs, weights, strict=True) if pair.scale > 0]
    if len({pair.b.shape[1] for pair in pairs}) == 1 and len(roots) == len(pairs):
        b, a = [pair.b for pair in pairs], [pair.a for pair in pairs]
        merges["linear"] = loss(total, fro, (_add_weighted(b, roots), _add_weighted(a, roots)))
        merges["ties"] = loss(total, fro, (ties_factor(b, roots, density), ties_factor(a, roots, density)))
    return merges


def ties_merge(
    parts: Sequence[Matrix], fro: float, weights: Sequence[float], density: float
) -> tuple[MergeLoss, Conflicts, Conflicts]:
    """Return the loss of TIES on the updates themselves, and their sign conflicts before and after trimming.

    Args:
        parts: The ΔW_k, without weights.
        fro: ‖Σ w_kΔW_k‖_F > 0.
        weights: The w_k.
        density: Fraction of the entries of each update to keep.
    """
    before, after = Conflicts(), Conflicts()
    apart, norm, along = products(ties_blocks(parts, weights, density, before, after))
    return as_loss(fro, norm, apart, along), before, after


def _add_weighted(factors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(
        (weight * factor.double() for factor, weight in zip(factors, weights, strict=True)),
        start=factors[0].double() * 0,
    )
