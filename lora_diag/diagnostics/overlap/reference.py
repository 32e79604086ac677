"""The subspaces that gradients are compared with while a model trains."""

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
        base: Whose names the layers have.
        layers: The subspaces, by layer; 8·r·(out + in) bytes each.
        inputs: What they are of, for the run record.
        settings: How they were computed, likewise.
        left_out: Layers without one, and why.
    """

    base: Checkpoint
    layers: Mapping[str, Subspaces]
    inputs: tuple[RunInput, ...]
    settings: Mapping[str, Any]
    left_out: tuple[LeftOut, ...] = ()
