"""Ranks from an existing ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_diag.adapters.keys import is_named
from lora_diag.adapters.patterns import find_targets, read_pattern
from lora_diag.adapters.scales import rank_of
from lora_diag.adapters.source import Config
from lora_diag.adapters.writing_targets import Target
from lora_diag.errors import InputError


def ranks_of_config(path: Path, targets: Mapping[str, Target]) -> dict[str, int]:
    """Return the rank of every layer that a PEFT config adapts, by PEFT's own rules.

    Args:
        path: ``adapter_config.json``.
        targets: PEFT's view of the layers.

    Raises:
        InputError: It is not a LoRA config, a rank is invalid, or no module is a layer here.
    """
    config = Config.read(path)
    modules = [target.module for target in targets.values()]
    adapted = find_targets(config, modules)
    parameters = config.names("target_parameters")
    pattern = read_pattern(config, "rank_pattern", modules)
    ranks: dict[str, int] = {}
    for layer, target in targets.items():
        by_name = any(is_named(target.module, name) for name in parameters)
        if not (by_name if target.kind == "parameter" else target.module in adapted):
            continue
        # A fused parameter has one rank; its halves are factored separately and share it.
        ranks[layer] = max(1, rank_of(config, pattern, target.module) // target.half[1])
    if not ranks:
        raise InputError(
            f"{path}: its target_modules match no layer of this model, which has layers like "
            f"{next(iter(targets.values())).module if targets else '(none)'}; give the config of this model"
        )
    return ranks
