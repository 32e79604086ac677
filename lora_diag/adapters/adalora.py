"""AdaLoRA: ΔW = B·diag(E)·A·α/(r + 1e-5), where r is the number of rows remaining in the file.

Reference: Zhang et al. 2023, https://arxiv.org/abs/2303.10512; ``peft.tuners.adalora.layer.SVDLinear``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.source import Source, by_module, check_rank, pair_of
from lora_diag.adapters.updates import Reading, Site, Update, add_stored_values, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    from lora_diag.adapters.updates import Factors

PARTS = ("lora_A", "lora_B", "lora_E")


def read_adalora(source: Source) -> Reading:
    """Read an AdaLoRA adapter.

    Raises:
        InputError: A part is missing, the parts are inconsistent, or the config is invalid.
    """
    config = source.settings
    modules, unclaimed = by_module(source.checkpoint, PARTS, source.path)
    updates = [_read_update(source, module, parts) for module, parts in modules.items()]
    kind = f"PEFT AdaLoRA, init_r={config.values.get('init_r')}, alpha={config.values.get('lora_alpha')}"
    scaling = f"lora_alpha / (r + 1e-5), from {config.path.name}"
    reading = Reading(f"{kind}, {len(modules)} modules", tuple(updates), scaling=scaling)
    return add_stored_values(reading, source, unclaimed)


def _read_update(source: Source, module: str, parts: dict[str, str]) -> Update:
    a_key, b_key = pair_of(source, module, parts)
    if "lora_E" not in parts:
        raise InputError(f"{source.checkpoint.path}: {module} has no lora_E, so the file is incomplete; save it again")
    a, b, e = (source.shape(key, 2) for key in (a_key, b_key, parts["lora_E"]))
    if e != (a[0], 1):
        raise InputError(
            f"{source.checkpoint.path}: {module}: lora_E {list(e)} does not fit lora_A {list(a)}; save it again"
        )
    # After the last pruning the removed rows are absent from the file, and rank_pattern has their indices.
    expected_rank = e[0] if source.settings.values.get("rank_pattern") else source.settings.integer("init_r")
    check_rank(source, module, a[0], expected_rank, b[1])
    alpha = source.settings.number("lora_alpha")
    scale = (alpha if alpha > 0 else a[0]) / (a[0] + 1e-5)
    load = partial(factors, source.checkpoint, b_key, a_key, parts["lora_E"], scale)
    dtype, zero_if = source.checkpoint[b_key].dtype, parts["lora_E"]
    shape = b[0], a[1]
    return Update(f"{module}.weight", shape, load, True, dtype, zero_if=zero_if, rank=a[0], scale=scale, diagonal=True)


def factors(checkpoint: Checkpoint, b_key: str, a_key: str, e_key: str, scale: float, site: Site) -> Factors:
    """Return s·B and diag(E)·A."""
    return read(checkpoint, b_key) * scale, read(checkpoint, a_key) * read(checkpoint, e_key).reshape(-1, 1)
