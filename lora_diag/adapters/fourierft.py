"""FourierFT: ΔW = Re ifft2(S)·scaling, where S is zero except at n positions determined by a random seed.

Reference: Gao et al. 2024, https://arxiv.org/abs/2405.03003; ``peft.tuners.fourierft.layer``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.source import Source, by_module
from lora_diag.adapters.updates import Reading, Site, Update, add_stored_values, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch


def read_fourierft(source: Source) -> Reading:
    """Read a PEFT FourierFT adapter.

    Raises:
        InputError: ``scaling`` or ``random_loc_seed`` is missing or invalid.
    """
    config = source.settings
    modules, unclaimed = by_module(source.checkpoint, ("fourierft_spectrum",), source.path)
    scaling = config.number("scaling")
    seed = int(config.number("random_loc_seed", 777))
    if not 0 <= seed < 2**63:
        raise InputError(f"{config.path}: random_loc_seed {seed:g} is not a valid seed; correct the config")
    updates = [
        Update(
            weight=f"{module}.weight",
            shape=(None, None),
            load=partial(delta, source.checkpoint, parts["fourierft_spectrum"], scaling, seed),
            factored=False,
            dtype=source.checkpoint[parts["fourierft_spectrum"]].dtype,
            scale=scaling,
        )
        for module, parts in modules.items()
    ]
    kind = f"PEFT FourierFT, scaling={scaling:g}, {len(modules)} modules"
    reading = Reading(kind, tuple(updates), scaling=f"scaling, from {config.path.name}")
    return add_stored_values(reading, source, unclaimed)


def delta(checkpoint: Checkpoint, key: str, scaling: float, seed: int, site: Site) -> torch.Tensor:
    """Return Re ifft2(S)·scaling.

    Raises:
        InputError: There are more frequencies than entries of the weight.
    """
    import torch

    values = read(checkpoint, key).reshape(-1)
    out, columns = site.shape
    if len(values) > out * columns:
        raise InputError(
            f"{checkpoint.path}: {key} has more frequencies than the weight has entries; check that it belongs to this "
            "BASE"
        )
    positions = torch.randperm(out * columns, generator=torch.Generator().manual_seed(seed))[: len(values)]
    spectrum = torch.zeros(out * columns, dtype=torch.float64)
    spectrum[positions] = values
    change: torch.Tensor = torch.fft.ifft2(spectrum.view(out, columns)).real * scaling
    return change
