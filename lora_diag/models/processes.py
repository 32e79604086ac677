"""Environment of a backward pass: other processes with their parts of the batch, and the loss scale of fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_diag.models.weights import Frozen


def is_unscaled(scaler: Any) -> bool:
    """Return whether ``unscale_`` was already called for this update, as needed for clipping."""
    states = getattr(scaler, "_per_optimizer_states", {})
    return any(getattr(state.get("stage"), "name", "") == "UNSCALED" for state in states.values())


def is_main() -> bool:
    """Return whether this process writes the output."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def average_over_processes(weight: Frozen) -> Tensor | None:
    """Return the gradient of a weight, averaged in place over processes; all of them must call this.

    Each has summed over its part of the batch. None for a single process without a backward pass.
    """
    distributed, gradient = torch.distributed, weight.gradient()
    if not (distributed.is_available() and distributed.is_initialized()):
        return gradient
    if gradient is None:  # an expert that got no token of this process
        gradient = torch.zeros(weight.shape, device=next(weight.module.parameters()).device)
    distributed.all_reduce(gradient)
    return gradient.div_(distributed.get_world_size())
