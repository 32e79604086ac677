"""Ranks that someone else decided, from the ``adapter_config.json`` that they were written to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_diag.adapters.patterns import is_target, module_targets, read_pattern
from lora_diag.adapters.scales import rank_of
from lora_diag.adapters.source import Config
from lora_diag.adapters.writing_targets import Target
from lora_diag.errors import InputError


def ranks_of_config(path: Path, targets: Mapping[str, Target]) -> dict[str, int]:
    """Return the rank of every layer that a PEFT config adapts, by PEFT's own rules.

    Args:
        path: ``adapter_config.json``.
        targets: What the layers are to PEFT.

    Raises:
        InputError: It is no LoRA config, a rank is none, or none of its modules is a layer here.
    """
    config = Config.read(path)
    names = module_targets(config, [target.module for target in targets.values()])
    parameters = config.names("target_parameters")
    pattern = read_pattern(config, "rank_pattern", [target.module for target in targets.values()])
    ranks: dict[str, int] = {}
    for layer, target in targets.items():
        wanted = parameters if target.kind == "parameter" else names
        if not is_target(target.module, wanted, path):
            continue
        # A fused parameter has one rank; its halves are factored by themselves and share it.
        ranks[layer] = max(1, rank_of(config, pattern, target.module) // target.half[1])
    if not ranks:
        raise InputError(
            f"{path}: none of its target_modules is a layer here; layers here are modules like "
            f"{next(iter(targets.values())).module if targets else '(none)'}"
        )
    return ranks
