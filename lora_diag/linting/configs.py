"""Training configurations: one reader per trainer, each to the same plain data.

LoRA settings are read into the keys of ``adapter_config.json``, so that the rules use what reads
adapters. Unknown keys are ignored.

What decides the dtype of the trained weights, as read in November 2026:

- PEFT 0.21: factors in float32 where BASE is bf16 or fp16 (``autocast_adapter_dtype``).
- LLaMA-Factory 0.9.5, ``model/adapter.py``: float32, except with ``pure_bf16`` or BAdam.
- axolotl 0.19, ``utils/config``: weights are loaded in bf16 with ``bf16``, and trained so without
  FSDP and DeepSpeed.
- TRL 1.16, ``trainer/model_config.py``: ``dtype``, default float32; ``trainer/sft_trainer.py``: the
  factors of a model that is loaded in 4 or 8 bits are converted to bf16.
- torchtune 0.6: ``dtype`` for all weights, those of LoRA too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_diag.adapters.source import CONFIG, Config
from lora_diag.decisions.trainers import NAMES, TRAINERS
from lora_diag.errors import InputError, damaged
from lora_diag.linting.values import Values
from lora_diag.running.amounts import MAX_RATE
from lora_diag.running.fingerprint import legible

TRAINING_ARGS = "training_args.bin"
SUFFIXES = (".yaml", ".yml", ".json")

# Defaults of PEFT 0.21, LLaMA-Factory 0.9.5 and TRL 1.16; axolotl has none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "peft": {"r": 8, "lora_alpha": 8},
    "llamafactory": {"r": 8, "target_modules": "all-linear"},
    "trl": {"r": 16, "lora_alpha": 32},
}

# Parts of the names of Adams whose state is float32 whatever the weights are: bitsandbytes 0.50,
# optim/optimizer.py; apex, fused_adam.py; transformers 5, trainer_optimizer.py.
FLOAT32_STATE = ("32bit", "bitsandbytes", "bnb", "paged", "apex", "anyprecision")

# Setting -> its key in a Trainer's arguments; and the keys of other trainers.
_KEYS = {
    "lr": "learning_rate",
    "optimizer": "optim",
    "beta2": "adam_beta2",
    "steps": "max_steps",
    "length": "max_length",
}
_OWN_KEYS = {
    "axolotl": {"optimizer": "optimizer", "length": "sequence_len"},
    "llamafactory": {"length": "cutoff_len"},
    "torchtune": {
        "lr": "optimizer.lr",
        "optimizer": "optimizer._component_",
        "length": "tokenizer.max_seq_len",
        "beta2": "",
        "steps": "max_steps_per_epoch",
    },
}
# Setting of LoRA -> its type; tables of patterns are checked by a rule, which locates them in the
# file.
_LORA_TYPES: dict[str, Callable[[Values, str], Any]] = {
    "r": Values.whole,
    **dict.fromkeys(("lora_alpha", "lora_dropout"), Values.number),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"), Values.names
    ),
    "target_parameters": Values.names,
    "task_type": Values.text,
    **dict.fromkeys(("use_rslora", "use_dora"), Values.flag),
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Settings:
    """What a configuration says about training, independent of the trainer.

    Args:
        path: The file.
        family: The trainer: ``peft``, ``axolotl``, ``llamafactory``, ``trl``, ``torchtune``;
            ``options`` without a configuration; ``adapter`` for an adapter without one.
        peft: LoRA settings, with the keys of ``adapter_config.json``.
        finetuning_type: ``lora`` or ``full``, or another one's name; None if it is not given.
        lr: Peak learning rate.
        optimizer: A name of ``name_optimizer``; None if it is not given.
        beta2: Adam's β₂.
        dtype: Dtype of the trained weights; ``auto`` for that of BASE; None if unknown.
        steps: Number of steps, if it is fixed; of torchtune, that of an epoch.
        length: Tokens of a sequence.
        quantized: Whether BASE is loaded in 4 or 8 bits.
        keys: Setting, or key of ``peft`` -> its key in the file, or the option that gives it.
        defaults: The keys of ``peft`` whose values are the trainer's defaults.
    """

    path: Path
    family: str
    peft: Config
    finetuning_type: str | None = None
    lr: float | None = None
    optimizer: str | None = None
    beta2: float | None = None
    dtype: str | None = None
    steps: int | None = None
    length: int | None = None
    quantized: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: frozenset[str] = frozenset()

    def locate(self, key: str) -> tuple[str, int | None]:
        """Return the place of a setting for a reader, and its line; None if it is not in a text
        file.
        """
        name = self.keys.get(key, key)
        if name.startswith("--"):
            return name, None
        place = legible(self.path)
        if self.path.suffix in SUFFIXES:
            pattern = re.compile(rf"\s*[\"']?{re.escape(name.rpartition('.')[2])}[\"']?\s*:")
            lines = self.path.read_text("utf-8", "replace").splitlines()
            for number, text in enumerate(lines, 1):
                if pattern.match(text):
                    return f"{place}:{number} {name}".rstrip(), number
        return f"{place} {name}".rstrip(), None


def read_settings(path: Path) -> Settings:
    """Return the settings in a configuration, or in an adapter's folder with what a Trainer wrote
    into it.

    Raises:
        InputError: The file cannot be read, is not a configuration of a supported trainer, or a
            value is invalid.
    """
    if path.is_dir() and not (path / CONFIG).is_file():
        raise InputError(f"{path}: has no {CONFIG}; the order is: loradiag lint [BASE] CONFIG")
    if not path.is_dir():
        values = Values.read(path)
        for reader, keys in READERS.values():
            if keys & values.table.keys():
                return reader(values)
        fix = f"give one of {', '.join(READERS)}, or options such as $lr and $finetuning_type"
        raise damaged(path, "is not a training configuration that is known", fix)
    settings = _read_peft(Values.read(path / CONFIG))
    if not (path / TRAINING_ARGS).is_file():
        return settings
    run = _read_trl(Values.read(path / TRAINING_ARGS))
    same = {name: getattr(run, name) for name in ("lr", "optimizer", "beta2", "steps", "length")}
    return replace(settings, **same, keys={**run.keys, **settings.keys})


def _read_common(family: str, values: Values, peft: Mapping[str, Any]) -> Settings:
    """Return the settings that every trainer has, and LoRA settings with the trainer's defaults."""
    keys = _KEYS | _OWN_KEYS.get(family, {})
    optimizer, steps = values.text(keys["optimizer"]), values.whole(keys["steps"])
    given = {key: value for key, value in peft.items() if value is not None}
    defaults = {key: value for key, value in DEFAULTS.get(family, {}).items() if key not in given}
    return Settings(
        path=values.path,
        family=family,
        peft=Config(values.path, {"peft_type": "LORA", **defaults, **given}),
        lr=values.number(keys["lr"], 0, MAX_RATE),
        optimizer=name_optimizer(optimizer) if optimizer else None,
        beta2=values.number(keys["beta2"], 0, 1),
        steps=steps if steps and steps >= 1 else None,  # a Trainer's default is -1
        length=values.whole(keys["length"]),
        keys=keys,
        defaults=frozenset(defaults),
    )


def name_optimizer(text: str) -> str:
    """Return ``adamw`` for a trainer's name of an Adam; another name in lower case.

    Of bitsandbytes (paged too) and of others with a state of their own dtype: ``adamw8bit``, or
    ``adamw32bit``.

    >>> (
    ...     name_optimizer("bitsandbytes.optim.PagedAdamW8bit"),
    ...     name_optimizer("bitsandbytes.optim.PagedAdamW"),
    ... )
    ('adamw8bit', 'adamw32bit')
    >>> (
    ...     name_optimizer("adamw_torch_fused"),
    ...     name_optimizer("adamw_torch_4bit"),
    ...     name_optimizer("lion"),
    ... )
    ('adamw', 'adamw_torch_4bit', 'lion')
    """
    name = text.rpartition(".")[2].lower()
    if not re.search(r"adamw|^(paged)?adam(\d+bit)?$", name) or re.search("4bit|fp8|flash", name):
        return name
    if "8bit" in name:
        return "adamw8bit"
    return "adamw32bit" if any(word in text.lower() for word in FLOAT32_STATE) else "adamw"


def _read_peft(values: Values) -> Settings:
    _read_lora(values, {key: key for key in _LORA_TYPES})
    settings = _read_common("peft", Values(values.path, {}), values.table)
    method = (values.text("peft_type") or "").lower() or None
    return replace(settings, finetuning_type=method, dtype="float32", keys={})


def _read_lora(values: Values, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the LoRA settings of a file by the keys of ``adapter_config.json``, of which ``names``
    has the names.
    """
    settings = {}
    for key, name in names.items():
        if name:
            read = _LORA_TYPES.get(key, Values.get)
            settings[key] = read(values, name)
    return settings


def _read_trainer(family: str, values: Values) -> Settings:
    """Return the settings of a trainer whose names of LoRA settings ``decisions.trainers`` has."""
    names = {key: by_trainer[TRAINERS.index(family)] for key, by_trainer in NAMES.items()}
    peft = _read_lora(values, names)
    for key in ("target_modules", "modules_to_save"):
        text = peft[key]
        if isinstance(text, str) and re.fullmatch(r"[\w., ]+", text):  # LLaMA-Factory's list
            peft[key] = [part.strip() for part in text.split(",")]
    all_linear = (["all"], ["all-linear"], "all-linear")
    if values.flag("lora_target_linear") or peft["target_modules"] in all_linear:
        peft["target_modules"] = "all-linear"
    settings = _read_common(family, values, peft)
    in_bits = values.flag("load_in_4bit") or values.flag("load_in_8bit")
    quantized = bool(in_bits or values.number("quantization_bit"))
    return replace(settings, keys={**settings.keys, **names}, quantized=quantized)


def _read_axolotl(values: Values) -> Settings:
    settings = _read_trainer("axolotl", values)
    adapter = values.text("adapter", "full")
    method = "lora" if adapter == "qlora" else adapter
    half, key = "", "bf16"
    if values.has("bf16", "bfloat16"):
        half = "bfloat16"
    elif values.has("fp16"):
        half, key = "float16", "fp16"
    if method == "lora":
        stays_half = values.flag("peft_autocast_adapter_dtype") is False
    else:
        stays_half = not values.has("fsdp", "fsdp_config", "deepspeed")
    dtype = half if half and stays_half else "float32"
    return replace(
        settings, finetuning_type=method, dtype=dtype, keys={**settings.keys, "dtype": key}
    )


def _read_llamafactory(values: Values) -> Settings:
    settings = _read_trainer("llamafactory", values)
    method = values.text("finetuning_type", "lora")
    dtype = "bfloat16" if values.flag("pure_bf16") or values.flag("use_badam") else "float32"
    given = settings.peft.values
    peft = Config(values.path, {"lora_alpha": 2 * given["r"], **given})
    keys = {**settings.keys, "dtype": "pure_bf16"}
    return replace(settings, peft=peft, finetuning_type=method, dtype=dtype, keys=keys)


def _read_trl(values: Values) -> Settings:
    settings = _read_trainer("trl", values)
    # Else a Trainer's arguments, which do not say how the model is loaded.
    is_script = "model_name_or_path" in values.table
    key = next((name for name in ("dtype", "torch_dtype") if name in values.table), "dtype")
    dtype = values.text(key, "float32") if is_script or key in values.table else None
    method = "lora" if values.flag("use_peft") else "full" if is_script else None
    if method == "lora":
        dtype = "bfloat16" if settings.quantized else "float32"
    dtype = _DTYPES.get(str(dtype), dtype)
    return replace(
        settings, finetuning_type=method, dtype=dtype, keys={**settings.keys, "dtype": key}
    )


def _read_torchtune(values: Values) -> Settings:
    names = {
        "r": "model.lora_rank",
        "lora_alpha": "model.lora_alpha",
        "target_modules": "model.lora_attn_modules",
    }
    peft = _read_lora(values, names)
    given = peft["target_modules"] or []
    given = [given] if isinstance(given, str) else given
    targets = ["o_proj" if name == "output_proj" else name for name in given]
    if values.flag("model.apply_lora_to_mlp"):
        targets += ["gate_proj", "up_proj", "down_proj"]
    if values.flag("model.apply_lora_to_output"):
        targets.append("lm_head")
    settings = _read_common("torchtune", values, {**peft, "target_modules": targets or None})
    quantized = "qlora" in (values.text("model._component_") or "")
    dtype = values.text("dtype", "float32")
    dtype = _DTYPES.get(str(dtype), dtype)
    method = "lora" if peft["r"] else "full"
    keys = {**settings.keys, **names}
    return replace(settings, finetuning_type=method, dtype=dtype, quantized=quantized, keys=keys)


# The readers by trainer, with keys of which each configuration has one; the first that fits is
# taken.
READERS: dict[str, tuple[Callable[[Values], Settings], set[str]]] = {
    "peft": (_read_peft, {"peft_type"}),
    "torchtune": (_read_torchtune, {"optimizer._component_", "model._component_"}),
    "llamafactory": (
        _read_llamafactory,
        {"finetuning_type", "lora_rank", "lora_target", "cutoff_len", "stage"},
    ),
    "axolotl": (_read_axolotl, {"base_model", "sequence_len", "micro_batch_size", "adapter"}),
    "trl": (
        _read_trl,
        {
            "learning_rate",
            "use_peft",
            "lora_r",
            "per_device_train_batch_size",
            "model_name_or_path",
        },
    ),
}
