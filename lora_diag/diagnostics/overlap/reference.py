"""Reference subspaces for comparison with gradients in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_diag.checkpoints import Checkpoint
from lora_diag.diagnostics.overlap.measure import Subspaces
from lora_diag.records import LeftOut, RunInput


@dataclass(frozen=True)
class Reference:
    """The top singular subspaces of an update, layer by layer; made by ``lora_diag.subspaces``.

    Args:
        base: Checkpoint that gives the layer names.
        layers: The subspaces, by layer; 8·r·(out + in) bytes each.
        inputs: Inputs of the update, for the run record.
        settings: Settings of the computation, for the run record.
        left_out: Layers without subspaces, with the reason.
    """

    base: Checkpoint
    layers: Mapping[str, Subspaces]
    inputs: tuple[RunInput, ...]
    settings: Mapping[str, Any]
    left_out: tuple[LeftOut, ...] = ()
