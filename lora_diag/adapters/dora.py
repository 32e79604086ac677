"""DoRA: the direction of W + D, with the length of every row (or column) from a trained vector.

V = W + D with D = s·B·A, or in LyCORIS that of a LoHa or LoKr; ΔW = (m / ‖V‖) ⊙ V − W. It generally has full rank,
so it is computed in full and needs W.

Reference: Liu et al. 2024, https://arxiv.org/abs/2402.09353; ``peft.tuners.lora.dora``; LyCORIS ``weight_decompose``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.source import Source
from lora_diag.adapters.updates import Site, Update, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors


def add_magnitude(update: Update, source: Source, magnitude: str, by_column: bool) -> Update:
    """Return the DoRA update for an update with a magnitude vector.

    Args:
        update: D.
        source: The adapter.
        magnitude: Name of m in the file.
        by_column: Whether m holds lengths of columns (an embedding's dimensions, a layer's inputs) instead of rows. A
            column of a convolution includes all kernels of an input.

    Raises:
        InputError: The length of m differs from the number of rows (or columns).
    """
    expected = update.shape[1 if by_column else 0]
    shape = source.checkpoint[magnitude].shape
    size = math.prod(shape)
    spans_kernels = by_column and len(shape) > 2 and expected is not None and size and expected % size == 0
    if size != expected and not spans_kernels:
        raise InputError(
            f"{source.checkpoint.path}: {magnitude} has shape {list(shape)} instead of {expected} entries; save the "
            "adapter again"
        )
    load = partial(delta, update.load, source.checkpoint, magnitude, by_column)
    plain = update.load if update.factored else None
    return replace(update, load=load, factored=False, needs_weight="DoRA", zero_if="", plain=plain, thin=None)


def delta(
    load: Callable[[Site], Factors | torch.Tensor],
    checkpoint: Checkpoint,
    magnitude: str,
    by_column: bool,
    site: Site,
) -> torch.Tensor:
    """Return (m / n) ⊙ V − W, where n are the norms of V's rows (columns)."""
    import torch

    w, change = site.weight(), load(site)
    v = w + (change[0] @ change[1] if isinstance(change, tuple) else change)
    m = read(checkpoint, magnitude).reshape(-1)
    if by_column:
        kernels = v.reshape(len(v), len(m), -1)
        ratio = (m / torch.linalg.vector_norm(kernels, dim=(0, 2))).repeat_interleave(kernels.shape[2])
    else:
        ratio = (m / torch.linalg.vector_norm(v, dim=1))[:, None]
    tuned: torch.Tensor = ratio * v
    return tuned - w
