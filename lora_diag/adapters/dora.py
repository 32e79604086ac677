"""DoRA: the direction from W + s·B·A, the length of every row from a trained vector.

V = W + s·B·A, ΔW = (m / ‖V‖_row) ⊙ V − W. In general of full rank, so it is computed in full and needs W.

Reference: Liu et al. 2024, https://arxiv.org/abs/2402.09353; ``peft.tuners.lora.dora``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from lora_diag.adapters.source import Source
from lora_diag.adapters.updates import Site, Update, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors


def from_factors(update: Update, source: Source, magnitude: str, by_column: bool) -> Update:
    """Turn a low-rank update with a magnitude vector into DoRA's.

    Args:
        update: The low-rank update.
        source: The adapter.
        magnitude: Name of m in the file.
        by_column: Whether m holds the lengths of columns (an embedding's dimensions) and not of rows.

    Raises:
        InputError: m has another length than the weight has rows (or columns).
    """
    wanted = update.shape[1 if by_column else 0]
    shape = source.checkpoint[magnitude].shape
    if math.prod(shape) != wanted:
        raise InputError(f"{source.checkpoint.path}: {magnitude} has the shape {list(shape)}; {wanted} entries are due")
    factors = cast("Callable[[Site], Factors]", update.load)
    load = partial(delta, factors, source.checkpoint, magnitude, by_column)
    return replace(update, load=load, factored=False, needs_weight="DoRA", zero_if="")


def delta(
    factors: Callable[[Site], Factors], checkpoint: Checkpoint, magnitude: str, by_column: bool, site: Site
) -> torch.Tensor:
    """Return (m / n) ⊙ V − W, n the norms of V's rows (columns)."""
    import torch

    w, (b, a) = site.weight(), factors(site)
    v = w + b @ a
    axis = 0 if by_column else 1
    lengths = torch.linalg.vector_norm(v, dim=axis, keepdim=True)
    m = read(checkpoint, magnitude).reshape(lengths.shape)
    change: torch.Tensor = m / lengths * v - w
    return change
