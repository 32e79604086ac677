"""Initializations that subtract a part of the base weight before training: PiSSA, OLoRA, KaSA.

The trained update s·B·A is relative to W − P, so relative to the original base ΔW = s·B·A − P, with P recomputed from
W:

- PiSSA: P is the best rank-r approximation of W. Meng et al. 2024, https://arxiv.org/abs/2404.02948
- OLoRA: P = s·Q_r·R_r of the QR decomposition of W. Büyükakyüz 2024, https://arxiv.org/abs/2406.01775
- KaSA: P is the part of W in its r smallest singular values. Wang et al. 2024, https://arxiv.org/abs/2412.06071

P has rank r, so ΔW stays in factored form, with rank at most 2r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from lora_diag.adapters.source import Config
from lora_diag.adapters.updates import Site, Update

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors

NAMES = {"pissa": "PiSSA", "olora": "OLoRA"}


def name_of(config: Config) -> str:
    """Return the name of the initialization if it subtracts a part of W; else empty."""
    if config.values.get("kasa_config") is not None:
        return "KaSA"
    return NAMES.get(config.text("init_lora_weights").lower(), "")


def make_relative_to_base(update: Update, config: Config, scale: float, rank: int) -> Update:
    """Return the update relative to the original base; unchanged if the initialization did not change it."""
    name = name_of(config)
    if not name:
        return update
    factors = cast("Callable[[Site], Factors]", update.load)
    load = partial(subtract_part, factors, name, scale, rank)
    return replace(update, load=load, needs_weight=name, zero_if="", plain=factors, thin=None)


def subtract_part(factors: Callable[[Site], Factors], name: str, scale: float, rank: int, site: Site) -> Factors:
    """Return factors of s·B·A − P: ``[sB, −P_left]`` and ``[A; P_right]``."""
    import torch

    b, a = factors(site)
    left, right = _compute_part(site.weight(), name, scale, rank)
    return torch.cat([b, -left], dim=1), torch.cat([a, right])


def _compute_part(w: torch.Tensor, name: str, scale: float, rank: int) -> Factors:
    """Return the factors of P."""
    import torch

    if name == "OLoRA":
        q, r = torch.linalg.qr(w)
        return q[:, :rank] * scale, r[:rank]
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    components = slice(0, rank) if name == "PiSSA" else slice(max(0, len(s) - rank), None)
    return u[:, components] * s[components], vh[components]
