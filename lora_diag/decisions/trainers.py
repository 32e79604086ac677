"""LoRA settings as trainers spell them: the part of their configuration that an
``adapter_config.json`` decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_diag.errors import Given, UsageError
from lora_diag.files import Kind

YAML = Kind("a trainer configuration", comment="# {}")
PYTHON = Kind("a training script", comment="# {}")

TRAINERS = ("axolotl", "llamafactory", "trl", "unsloth")

# Setting of ``adapter_config.json`` -> its name in each trainer, in the order of its file; empty if
# it has none. axolotl: ``utils/schemas/peft.py`` of 0.19, which has patterns of whole numbers.
# LLaMA-Factory: ``hparams/finetuning_args.py`` of 0.9.5. TRL's commands:
# ``trainer/model_config.py`` of 1.16. unsloth: arguments of ``FastLanguageModel.get_peft_model``
# (``models/llama.py`` of 2026.10), which go to PEFT.
NAMES = {
    "r": ("lora_r", "lora_rank", "lora_r", "r"),
    "lora_alpha": ("lora_alpha", "lora_alpha", "lora_alpha", "lora_alpha"),
    "lora_dropout": ("lora_dropout", "lora_dropout", "lora_dropout", "lora_dropout"),
    "target_modules": (
        "lora_target_modules",
        "lora_target",
        "lora_target_modules",
        "target_modules",
    ),
    "target_parameters": (
        "lora_target_parameters",
        "",
        "lora_target_parameters",
        "target_parameters",
    ),
    "rank_pattern": ("lora_rank_pattern", "", "", "rank_pattern"),
    "alpha_pattern": ("lora_alpha_pattern", "", "", "alpha_pattern"),
    "modules_to_save": (
        "lora_modules_to_save",
        "additional_target",
        "lora_modules_to_save",
        "modules_to_save",
    ),
    "task_type": ("", "", "lora_task_type", ""),
    "use_rslora": ("peft_use_rslora", "use_rslora", "use_rslora", "use_rslora"),
    "use_dora": ("peft_use_dora", "use_dora", "use_dora", "use_dora"),
}
# Those that are written even if they are empty or 0.
_REQUIRED = frozenset({"r", "lora_alpha", "lora_dropout", "target_modules"})
_CONSTANTS: dict[str, dict[str, Any]] = {
    "axolotl": {"adapter": "lora"},
    "llamafactory": {"finetuning_type": "lora"},
    "trl": {"use_peft": True},
}


def settings_of(trainer: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the LoRA settings of an adapter's config under a trainer's names, without empty
    optional ones.

    Args:
        trainer: One of ``TRAINERS``.
        config: Content of ``adapter_config.json``.

    Raises:
        UsageError: The config has ranks by layer or target_parameters and the trainer has none, or
            an alpha of the config is not whole and the trainer takes only integers.
    """
    names = {key: by_trainer[TRAINERS.index(trainer)] for key, by_trainer in NAMES.items()}
    if config["rank_pattern"] and not names["rank_pattern"]:
        raise UsageError(
            Given("format", trainer),
            "has one rank for all layers",
            "add $portable, or use $format peft",
        )
    if config.get("target_parameters") and not names["target_parameters"]:
        raise UsageError(
            Given("format", trainer), "has no target_parameters (fused experts)", "use $format peft"
        )
    settings: dict[str, Any] = dict(_CONSTANTS.get(trainer, {}))
    for key, name in names.items():
        value = config.get(key)
        if trainer != "unsloth" and key == "lora_alpha":
            value = _to_integer_alpha(config[key], trainer)
        elif trainer != "unsloth" and key == "alpha_pattern":
            value = {
                layer: _to_integer_alpha(alpha, trainer) for layer, alpha in config[key].items()
            }
        elif trainer == "llamafactory" and isinstance(value, list):
            value = ",".join(value)
        if name and (value or key in _REQUIRED):
            settings[name] = value
    return settings


def format_settings(trainer: str, config: Mapping[str, Any]) -> str:
    """Return the text of a trainer's settings: YAML, or Python for unsloth.

    Args:
        trainer: One of ``TRAINERS``.
        config: Content of ``adapter_config.json``.
    """
    settings = settings_of(trainer, config)
    if trainer != "unsloth":
        return (
            f"# LoRA settings of {trainer}: merge them into your "
            f"configuration\n{format_yaml(settings)}"
        )
    arguments = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    call = f"model = FastLanguageModel.get_peft_model(\n    model,\n{arguments})\n"
    return f"# LoRA settings of unsloth: put them into your script\n{call}"


def format_yaml(settings: Mapping[str, Any]) -> str:
    """Return settings as YAML, one per line; values are written as JSON, which is YAML.

    >>> print(format_yaml({"lora_r": 8, "names": ["q_proj"]}), end="")
    lora_r: 8
    names: ["q_proj"]
    """
    return "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items()
    )


def _to_integer_alpha(alpha: float, trainer: str) -> int:
    """Return lora_alpha as an integer.

    Raises:
        UsageError: It is not a whole number.
    """
    if alpha != int(alpha):
        raise UsageError(
            Given("format", trainer),
            f"lora_alpha must be an integer, not {alpha:g}",
            "choose another $scaling",
        )
    return int(alpha)
