"""Unsupported adapters, each with a fix.

They change no weight, or their change depends on the input, on random numbers that are not in the file, or on a base
that was changed at the start of training.
"""

from __future__ import annotations

from lora_diag.adapters.source import Source
from lora_diag.errors import InputError

MERGE = "merge it with peft (merge_and_unload) and pass the merged checkpoint"

CHANGES_NO_WEIGHT = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
}  # fmt: skip
DEPENDS_ON_INPUT = {"ADAPTION_PROMPT", "XLORA", "POLY", "LILY", "SHADOW"}
MERGE_FIRST = {
    "BOFT", "HRA", "DELORA", "MISS", "BONE", "GRALORA", "C3A", "HIRA", "SHIRA", "DEFT", "PVERA", "RANDLORA", "VBLORA",
    "TINYLORA", "FROD", "OSF", "PSOFT", "GLORA", "PEANUT", "SUPERTUNING", "UNILORA", "WAVEFT", "ROAD", "BEFT",
    "ADAMSS",
}  # fmt: skip

# LoRA initializations after which the base differs from the one named by the adapter.
CHANGED_BASE = {
    "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA", "pissa_niter": "PiSSA with a randomised SVD",
}  # fmt: skip


def refuse_unsupported(source: Source) -> None:
    """Refuse an adapter that no family reads.

    Raises:
        InputError: Always, with the kind of adapter and a fix.
    """
    name = source.peft_type
    if name in CHANGES_NO_WEIGHT:
        raise InputError(
            f"{source.path}: {name} adds virtual tokens or key-value prefixes and changes no weight, so there is no "
            "ΔW; give another adapter"
        )
    if name in DEPENDS_ON_INPUT:
        raise InputError(
            f"{source.path}: the change of a weight by {name} depends on the input, so there is no single ΔW; give "
            "another adapter"
        )
    if name in MERGE_FIRST:
        raise InputError(f"{source.path}: the adapter type {name} is not supported; {MERGE}")
    if name:
        raise InputError(f"{source.path}: unknown adapter type {name}; if peft supports it, {MERGE}")
    if source.config is not None:
        raise InputError(
            f"{source.config.path}: does not state its type of adapter (no peft_type), so r and alpha are not "
            'trusted; if it is a LoRA adapter, add "peft_type": "LORA" to it'
        )
    source.settings  # noqa: B018  raises: no config, so no scaling


def refuse_lora_variants(source: Source) -> None:
    """Refuse variants of PEFT LoRA without a ΔW, or with one that the files do not determine.

    Raises:
        InputError: The adapter is such a variant.
    """
    config = source.settings
    initialization = config.text("init_lora_weights").lower()
    for prefix, name in CHANGED_BASE.items():
        if initialization.startswith(prefix):
            raise InputError(
                f"{source.path}: was initialized with {name}, which changes the base weights without recording it, "
                "so ΔW relative to BASE is unknown; save it with path_initial_model_for_weight_conversion, or pass "
                "the merged checkpoint"
            )
    if config.flag("use_qalora"):
        raise InputError(f"{source.path}: QA-LoRA acts on pooled inputs; {MERGE}")
    if config.flag("arrow_config"):
        raise InputError(
            f"{source.path}: Arrow routes each token over several adapters, so there is no single ΔW; measure the "
            "adapters one by one"
        )
