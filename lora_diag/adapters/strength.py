"""An adapter → a copy whose update is t·ΔW, in the format of the adapter.

Where one t applies to all of a PEFT LoRA, α of its config is multiplied (``lora_alpha`` and ``alpha_pattern``), which
is exact: s = α/r and α/√r are linear in α. In other formats, and where t differs between layers, the factor B is
multiplied, as in ``portable``, because not every program reads ``alpha_pattern``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_diag.adapters.adapter import Adapter
from lora_diag.adapters.contents import LOW_RANK_PARTS, read_contents
from lora_diag.adapters.layouts import PEFT
from lora_diag.adapters.portable import convert
from lora_diag.adapters.writing import WEIGHTS, write_config
from lora_diag.checkpoints import Checkpoint
from lora_diag.checkpoints.safetensors import write_safetensors
from lora_diag.errors import damaged


def write_strength(
    adapter: Adapter,
    folder: Path,
    scratch: Path,
    base: Checkpoint,
    strength: float,
    layers: Collection[str] | None = None,
) -> None:
    """Write the files of a copy with another strength into an existing folder.

    Args:
        adapter: The adapter.
        folder: The existing folder.
        scratch: A folder for factors that are computed by a decomposition.
        base: Its BASE.
        strength: t.
        layers: Layers, by their names in BASE, whose update is multiplied by t; None for all.

    Raises:
        InputError: The update of a weight is not proportional to a factor, a file cannot be read or written, or BASE
            does not fit the adapter.
        NothingComparedError: No ΔW can be measured against BASE.
    """
    source, checkpoint = adapter.source, adapter.checkpoint
    by_alpha = layers is None and adapter.form == PEFT and source.config is not None and source.stored is None
    supported = LOW_RANK_PARTS | ({"experts"} if by_alpha else set())
    for item in read_contents(adapter, base).items:
        if item.part not in supported:
            problem = f"the update of {item.layer} ({item.part}) is not a product of factors that t could multiply"
            raise damaged(adapter.path, problem, "merge the adapter at this strength instead")
    if not by_alpha:
        chosen = {*layers} if layers is not None else None
        convert(
            adapter,
            folder,
            scratch,
            base,
            adapter.form,
            strengths=lambda layer: strength if chosen is None or layer in chosen else 1.0,
        )
        return
    assert source.config is not None
    config = source.config
    alphas = {key: _shorten(strength * value) for key, value in config.table("alpha_pattern").items()}
    alpha = _shorten(strength * config.number("lora_alpha"))
    write_safetensors(
        folder / WEIGHTS,
        {name: checkpoint[name] for name in checkpoint},
        lambda name: checkpoint.read(name).view(checkpoint[name].shape),
        {"format": "pt"},
    )
    write_config(folder, {**config.values, "lora_alpha": alpha, "alpha_pattern": alphas})


def _shorten(alpha: float) -> float | int:
    """Return an α as an integer if it is one: some programs read no other."""
    return int(alpha) if float(alpha).is_integer() else alpha
