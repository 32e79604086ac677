"""LoRA settings as trainers spell them: the part of their configuration that an ``adapter_config.json`` decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lora_diag.errors import UsageError
from lora_diag.files import Kind

Settings = dict[str, Any]

YAML = Kind("a trainer configuration", comment="# {}")
PYTHON = Kind("a training script", comment="# {}")


def axolotl(config: Mapping[str, Any]) -> Settings:
    """Return settings of axolotl (``utils/schemas/peft.py`` of 0.19, which has patterns of whole numbers)."""
    return {
        "adapter": "lora",
        "lora_r": config["r"],
        "lora_alpha": _require_integer_alpha(config["lora_alpha"], "axolotl"),
        "lora_dropout": config["lora_dropout"],
        "lora_target_modules": list(config["target_modules"]),
        **_make_argument("lora_target_parameters", config.get("target_parameters")),
        **_make_argument("lora_rank_pattern", config["rank_pattern"]),
        **_make_argument(
            "lora_alpha_pattern",
            {key: _require_integer_alpha(a, "axolotl") for key, a in config["alpha_pattern"].items()},
        ),
        **_make_argument("lora_modules_to_save", config.get("modules_to_save")),
        **_make_argument("peft_use_rslora", config["use_rslora"]),
        **_make_argument("peft_use_dora", config.get("use_dora")),
    }


def llamafactory(config: Mapping[str, Any]) -> Settings:
    """Return settings of LLaMA-Factory (``hparams/finetuning_args.py`` of 0.9.5)."""
    _refuse_patterns(config, "llamafactory")
    return {
        "finetuning_type": "lora",
        "lora_rank": config["r"],
        "lora_alpha": _require_integer_alpha(config["lora_alpha"], "llamafactory"),
        "lora_dropout": config["lora_dropout"],
        "lora_target": ",".join(config["target_modules"]),
        **_make_argument("additional_target", ",".join(config.get("modules_to_save") or ())),
        **_make_argument("use_rslora", config["use_rslora"]),
        **_make_argument("use_dora", config.get("use_dora")),
    }


def trl(config: Mapping[str, Any]) -> Settings:
    """Return settings of TRL's commands (``trainer/model_config.py`` of 1.16)."""
    _refuse_patterns(config, "trl")
    return {
        "use_peft": True,
        "lora_r": config["r"],
        "lora_alpha": _require_integer_alpha(config["lora_alpha"], "trl"),
        "lora_dropout": config["lora_dropout"],
        "lora_target_modules": list(config["target_modules"]),
        **_make_argument("lora_target_parameters", config.get("target_parameters")),
        **_make_argument("lora_modules_to_save", config.get("modules_to_save")),
        **_make_argument("lora_task_type", config["task_type"]),
        **_make_argument("use_rslora", config["use_rslora"]),
        **_make_argument("use_dora", config.get("use_dora")),
    }


def unsloth(config: Mapping[str, Any]) -> Settings:
    """Return arguments of ``FastLanguageModel.get_peft_model`` (``models/llama.py`` of 2026.10), which go to PEFT."""
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config["lora_dropout"],
        "target_modules": list(config["target_modules"]),
        **_make_argument("target_parameters", config.get("target_parameters")),
        **_make_argument("rank_pattern", config["rank_pattern"]),
        **_make_argument("alpha_pattern", config["alpha_pattern"]),
        **_make_argument("modules_to_save", config.get("modules_to_save")),
        **_make_argument("use_rslora", config["use_rslora"]),
    }


TRAINERS: dict[str, Callable[[Mapping[str, Any]], Settings]] = {
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "trl": trl,
    "unsloth": unsloth,
}


def written_for(trainer: str, config: Mapping[str, Any]) -> str:
    """Return the text of a trainer's settings: YAML, or Python for unsloth.

    Args:
        trainer: A key of ``TRAINERS``.
        config: Content of ``adapter_config.json``.

    Raises:
        UsageError: The trainer cannot express it.
    """
    settings = TRAINERS[trainer](config)
    if trainer != "unsloth":
        return f"# LoRA settings of {trainer}: merge them into your configuration\n{yaml_of(settings)}"
    arguments = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    call = f"model = FastLanguageModel.get_peft_model(\n    model,\n{arguments})\n"
    return f"# LoRA settings of unsloth: put them into your script\n{call}"


def yaml_of(values: Mapping[str, Any]) -> str:
    """Return YAML of settings, one per line: JSON is YAML, so values are written as JSON.

    >>> print(yaml_of({"lora_r": 8, "names": ["q_proj"]}), end="")
    lora_r: 8
    names: ["q_proj"]
    """
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def _make_argument(key: str, value: Any) -> Settings:
    """Return a setting as a mapping; an empty mapping if its value is empty or false."""
    return {key: value} if value else {}


def _require_integer_alpha(alpha: float, trainer: str) -> int:
    """Return alpha as an integer.

    Raises:
        UsageError: It is not a whole number.
    """
    if alpha != int(alpha):
        raise UsageError(f"--format {trainer}: lora_alpha must be an integer, not {alpha:g}; choose another --scaling")
    return int(alpha)


def _refuse_patterns(config: Mapping[str, Any], trainer: str) -> None:
    """Refuse settings that a trainer would ignore without a message.

    Raises:
        UsageError: Ranks differ by layer; or, for LLaMA-Factory, experts are adapted as parameters.
    """
    if config["rank_pattern"]:
        raise UsageError(f"--format {trainer}: has one rank for all layers; add --portable, or use --format peft")
    if trainer == "llamafactory" and config.get("target_parameters"):
        raise UsageError(f"--format {trainer}: has no target_parameters (fused experts); use --format peft")
