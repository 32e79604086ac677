"""Check that an adapter's file has factors for every module targeted by its config.

PEFT adapts each module of the model that ``target_modules`` matches, and saves factors for all of them. Missing factors
were lost later: PEFT fills them with zeros without an error.
"""

from __future__ import annotations

import re

from lora_diag.adapters.adapter import Adapter
from lora_diag.adapters.patterns import find_targets
from lora_diag.adapters.source import Config, is_named
from lora_diag.adapters.writing_targets import EXPERT_LIKE_NAMES, FUSED_MODELS, ROUTER, Model, names_in_memory
from lora_diag.checkpoints import Checkpoint
from lora_diag.deltas import Pairing, natural_order

_WORD = re.compile(r"\w+")


def targets_of(adapter: Adapter, base: Checkpoint, pairing: Pairing) -> tuple[int, tuple[str, ...]] | None:
    """Return the number of weights of BASE that an adapter's config targets, and the names of those without factors.

    Args:
        adapter: The adapter.
        base: Its BASE.
        pairing: The adapted weights of BASE, selected or not.

    Returns:
        None if the config does not determine it: there is none or it has no ``target_modules``, it names parameters or
        all linear layers, it replicates layers, or none of the modules that it targets has factors, since modules in
        memory have other names than in BASE.

    Raises:
        InputError: ``target_modules`` or ``exclude_modules`` is invalid, or takes too long to match.
    """
    config = adapter.source.config
    if config is None or not config.values.get("target_modules") or config.values["target_modules"] == "all-linear":
        return None
    if any(config.values.get(key) for key in ("target_parameters", "layer_replication")):
        return None
    in_memory = names_in_memory(adapter, base)
    layers = (item.layer for item in (*pairing.deltas, *pairing.unpaired))
    adapted = {re.sub(r"\[\d+\]$", "", layer) for layer in layers} | {*in_memory}
    modules = _list_modules(base, adapted, Model(base, in_memory), config)
    targeted = find_targets(config, modules.values())
    targeted -= find_targets(config, targeted, "exclude_modules")
    saved = config.names("modules_to_save")
    targets = [
        name
        for name, module in modules.items()
        if module in targeted and not any(is_named(module, key) for key in saved) and _is_in_layers(module, config)
    ]
    if not any(name in adapted for name in targets):
        return None
    missing = [name for name in targets if name not in adapted]
    return len(targets), tuple(sorted(missing, key=natural_order))


def _list_modules(base: Checkpoint, adapted: set[str], model: Model, config: Config) -> dict[str, str]:
    """Return the modules in memory that PEFT could adapt, by the names of their weights in BASE."""
    min_dimensions = 1 if config.text("peft_type").upper() == "LN_TUNING" else 2
    modules: dict[str, str] = {}
    for name in base:
        parameter = model.parameter(name)
        module = parameter.removesuffix(".weight")
        if module == parameter or len(base[name].shape) < min_dimensions:
            continue
        # Experts and routers are parameters in memory, which PEFT does not adapt as modules.
        is_parameter = ROUTER.match(parameter) or (
            model.type in FUSED_MODELS and module.rpartition(".")[2] in EXPERT_LIKE_NAMES
        )
        if name in adapted or not is_parameter:
            modules[name] = module
    return modules


def _is_in_layers(module: str, config: Config) -> bool:
    """Return whether a module is in one of ``layers_to_transform``, by PEFT's rule; True if the config has none."""
    layers = config.values.get("layers_to_transform")
    if layers is None:
        return True
    indices = layers if isinstance(layers, list) else [layers]
    pattern = config.values.get("layers_pattern") or []
    patterns = [text for text in ([pattern] if isinstance(pattern, str) else pattern) if _WORD.fullmatch(str(text))]
    for pattern in patterns or [r"[^.]*"]:
        if match := re.match(rf".*\.{pattern}\.(\d+)\.", module):
            return int(match[1]) in indices
    return False
