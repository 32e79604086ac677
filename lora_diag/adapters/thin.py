"""Two stored factors and a scale, read with NumPy: ΔW = s·B·A where nothing else takes part in an update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.scales import Scale, scale_of
from lora_diag.adapters.updates import flat
from lora_diag.checkpoints import Checkpoint

if TYPE_CHECKING:
    from lora_diag.deltas import Thin


def thin_loader(
    checkpoint: Checkpoint, b: str, a: str, scale: Scale, turned: bool = False
) -> Callable[[], Thin] | None:
    """Return what loads two stored factors; None if their file or format needs torch.

    Args:
        checkpoint: The adapter's tensors.
        b: Name of B ``(out, r, 1, …)``.
        a: Name of A ``(r, in, …)``.
        scale: s.
        turned: Whether both are stored transposed.
    """
    keys = [b, a, scale.alpha] if scale.alpha else [b, a]
    if not all(checkpoint.decodes(key) for key in keys):
        return None
    return partial(thin_factors, checkpoint, b, a, scale, turned)


def thin_factors(checkpoint: Checkpoint, b: str, a: str, scale: Scale, turned: bool) -> Thin:
    """Return B ``(out, r)``, A ``(r, in·kh·kw)`` and s."""
    left, right = (checkpoint.read_array(key) for key in (b, a))
    left, right = left.reshape(flat(left.shape)), right.reshape(flat(right.shape))
    if turned:
        left, right = left.T, right.T
    return left, right, scale_of(checkpoint, scale)
