"""Where one ΔW lies in W: the statistics of ``geometry``, the same for an update and for its
baselines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from lora_diag.diagnostics.geometry.record import ALPHAS, DECILES, GeometryBaseline, Movement
from lora_diag.linalg.difference import norm
from lora_diag.linalg.methods import decompose
from lora_diag.linalg.rotation import (
    Spaces,
    leading_spaces,
    principal_angles,
    spectral_shift,
    split_update,
)


@dataclass(frozen=True, slots=True)
class MovementFrame:
    """W, and what updates are compared with.

    Args:
        weight: W, ``(m, n)`` float64.
        k: Dimension of the leading spaces.
        top: Number of leading vectors of W + ΔW.
        eta: η, the relative change up to which an entry counts as unchanged.
        method: As in ``decompose``.
        spaces: Singular values and all singular vectors of W.
        decile: Decile of |W| of each entry, from 0 for the smallest; equal magnitudes in the order
            of entries.
        principal: For each α of ``ALPHAS``, whether an entry is among the α largest magnitudes of
            the reconstruction of W from its k leading singular directions.
    """

    weight: Tensor
    k: int
    top: int
    eta: float
    method: str
    spaces: Spaces
    decile: Tensor
    principal: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: Tensor, k: int, top: int, eta: float, method: str) -> MovementFrame:
        """Return the frame of W."""
        spaces = leading_spaces(weight, min(weight.shape), method)
        entries = weight.numel()
        decile = torch.empty(entries, dtype=torch.int8, device=weight.device)
        positions = torch.arange(entries, device=weight.device) * DECILES // entries
        decile[weight.abs().reshape(-1).argsort(stable=True)] = positions.to(torch.int8)
        u, v = spaces.u[:, :k], spaces.v[:, :k]
        large = ((u * spaces.s[:k].to(u.device)) @ v.T).abs_()
        order = large.reshape(-1).sort().values
        principal = tuple(
            large >= order[entries - max(1, int(alpha * entries))] for alpha in ALPHAS
        )
        return cls(weight, k, top, eta, method, spaces, decile.view_as(weight), principal)


def measure_movement(
    frame: MovementFrame, update: Tensor, sigma: float | None = None
) -> tuple[Movement, Spaces]:
    """Measure where ΔW lies in W.

    Args:
        frame: W.
        update: ΔW ≠ 0, ``(m, n)`` float64.
        sigma: σ_1(ΔW), if known.

    Returns:
        The statistics; and the singular values and leading spaces of W + ΔW.
    """
    after = frame.weight + update
    changed = update.abs() > frame.eta * torch.maximum(frame.weight.abs(), after.abs())
    count = int(changed.sum())
    spaces = leading_spaces(after, frame.top, frame.method)
    k = frame.k
    u, v = frame.spaces.u[:, :k], frame.spaces.v[:, :k]
    split, fro = split_update(update, u, v), norm([update])
    sigma = float(decompose(update, top=1).s[0]) if sigma is None else sigma
    found = torch.bincount(frame.decile[changed].long(), minlength=DECILES)
    sizes = torch.bincount(frame.decile.reshape(-1).long(), minlength=DECILES)
    rows, columns = (changed.double().mean(dim) for dim in (1, 0))
    return Movement(
        unchanged=(changed.numel() - count) / changed.numel(),
        changed_by_decile=tuple((found / sizes.clamp(min=1)).tolist()),
        row_spread=float(rows.std(correction=0)),
        column_spread=float(columns.std(correction=0)),
        low_30=float(found[:3].sum()) / count if count else None,
        low_10=float(found[0]) / count if count else None,
        principal_30=float(changed[frame.principal[0]].sum()) / count if count else None,
        principal_10=float(changed[frame.principal[1]].sum()) / count if count else None,
        left_angles=tuple(principal_angles(u, spaces.u[:, :k]).tolist()),
        right_angles=tuple(principal_angles(v, spaces.v[:, :k]).tolist()),
        shift=spectral_shift(frame.spaces.s, spaces.s),
        scaling=split.scaling,
        mixing=split.mixing,
        outside=split.outside,
        energy_left=split.left,
        energy_right=split.right,
        spectral_ratio=sigma / float(frame.spaces.s[0]) if frame.spaces.s[0] > 0 else None,
        stable_rank=(fro / sigma) ** 2,
    ), spaces


def pool_draws(draws: Sequence[Movement]) -> GeometryBaseline:
    """Return the mean of the statistics over draws of a baseline, and their standard errors."""
    means: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for name in Movement.model_fields:
        values = [value for draw in draws if (value := getattr(draw, name)) is not None]
        if values and isinstance(values[0], tuple):
            means[name] = tuple(fmean(each) for each in zip(*values, strict=True))
        elif values:
            means[name] = fmean(values)
            if len(values) > 1:
                errors[name] = stdev(values) / math.sqrt(len(values))
        else:
            means[name] = None
    return GeometryBaseline(**means, draws=len(draws), errors=errors)
