"""Training configurations: one reader per trainer, each to the same plain data.

LoRA settings are read into the keys of ``adapter_config.json``, so that the rules use what reads adapters. Unknown keys
are ignored. Nothing in a file is run: YAML is read by PyYAML's safe loader, ``training_args.bin`` as inert data.

What decides the dtype of the trained weights, as read in November 2026:

- PEFT 0.21: factors in float32 where BASE is bf16 or fp16 (``autocast_adapter_dtype``).
- LLaMA-Factory 0.9.5, ``model/adapter.py``: float32, except with ``pure_bf16`` or BAdam.
- axolotl 0.19, ``utils/config``: weights are loaded in bf16 with ``bf16``, and trained so without FSDP and DeepSpeed.
- TRL 1.16, ``trainer/model_config.py``: ``dtype``, default float32; ``trainer/sft_trainer.py``: the factors of a model
  that is loaded in 4 or 8 bits are converted to bf16.
- torchtune 0.6: ``dtype`` for all weights, those of LoRA too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_diag.adapters.source import CONFIG, Config, is_number
from lora_diag.checkpoints.documents import read_object
from lora_diag.checkpoints.file_bytes import FileBytes
from lora_diag.checkpoints.inert import Record
from lora_diag.checkpoints.parts import Archive
from lora_diag.decisions.trainers import NAMES, TRAINERS
from lora_diag.errors import InputError, damaged, require
from lora_diag.files import open_regular
from lora_diag.running.fingerprint import legible

# Bytes of a configuration, and aliases of YAML in it: 8 make it at most 18 times as large.
MAX_BYTES, MAX_ALIASES = 1_000_000, 8
TRAINING_ARGS = "training_args.bin"
SUFFIXES = (".yaml", ".yml", ".json")

# Defaults of PEFT 0.21, LLaMA-Factory 0.9.5 and TRL 1.16; axolotl has none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "peft": {"r": 8, "lora_alpha": 8},
    "llamafactory": {"r": 8, "target_modules": "all-linear"},
    "trl": {"r": 16, "lora_alpha": 32},
}

# Parts of the names of Adams whose state is float32 whatever the weights are: bitsandbytes 0.50, optim/optimizer.py;
# apex, fused_adam.py; transformers 5, trainer_optimizer.py.
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
    "torchtune": {"lr": "optimizer.lr", "optimizer": "optimizer._component_", "length": "tokenizer.max_seq_len"}
    | {"beta2": "", "steps": "max_steps_per_epoch"},
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Settings:
    """What a configuration says about training, independent of the trainer.

    Args:
        path: The file.
        family: The trainer: ``peft``, ``axolotl``, ``llamafactory``, ``trl``, ``torchtune``; ``options``
            without a configuration; ``adapter`` for an adapter without one.
        peft: LoRA settings, with the keys of ``adapter_config.json``.
        method: ``lora`` or ``full``, or another one's name; None if it is not given.
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
    method: str | None = None
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
        """Return the place of a setting for a reader, and its line; None if it is not in a text file."""
        name = self.keys.get(key, key)
        if name.startswith("--"):
            return name, None
        lines = self.path.read_text("utf-8", "replace").splitlines() if self.path.suffix in SUFFIXES else []
        pattern = re.compile(rf"\s*[\"']?{re.escape(name.rpartition('.')[2])}[\"']?\s*:")
        line = next((number for number, text in enumerate(lines, 1) if pattern.match(text)), None)
        return f"{legible(self.path)}{f':{line}' if line else ''} {name}".rstrip(), line


def read_settings(path: Path) -> Settings:
    """Return the settings in a configuration, or in an adapter's folder with what a Trainer wrote into it.

    Raises:
        InputError: The file cannot be read, is not a configuration of a supported trainer, or a value is invalid.
        UsageError: It is YAML, and PyYAML is not installed.
    """
    if path.is_dir() and not (path / CONFIG).is_file():
        raise InputError(f"{path}: has no {CONFIG}; give a configuration or a PEFT adapter before BASE")
    if not path.is_dir():
        values = _read_values(path)
        reader = next((reader for reader, keys in READERS.values() if keys & values.keys()), None)
        if reader is None:
            fix = f"give one of {', '.join(READERS)}, or options such as --lr and --method"
            raise damaged(path, "is not a training configuration that is known", fix)
        return reader(path, values)
    settings = _read_peft(path / CONFIG, _read_values(path / CONFIG))
    if not (path / TRAINING_ARGS).is_file():
        return settings
    run = _read_trl(path / TRAINING_ARGS, _read_values(path / TRAINING_ARGS))
    same = {name: getattr(run, name) for name in ("lr", "optimizer", "beta2", "steps", "length")}
    return replace(settings, **same, keys={**run.keys, **settings.keys})


def _read_values(path: Path) -> dict[str, Any]:
    """Return a configuration as a table; nested tables also under ``outer.inner``."""
    if path.suffix == ".bin":
        content = Archive(FileBytes(path)).value
        values = content.state if isinstance(content, Record) and isinstance(content.state, dict) else {}
    elif path.suffix == ".json":
        values = read_object(path, "training configuration", MAX_BYTES)
    else:
        values = _read_yaml(path)
    # A word of an enum in a pickle is a record with one argument.
    plain = {str(key): v.args[0] if isinstance(v, Record) and v.args else v for key, v in values.items()}
    tables = {key: value for key, value in plain.items() if isinstance(value, dict)}
    return plain | {f"{key}.{inner}": value for key, table in tables.items() for inner, value in table.items()}


def _read_yaml(path: Path) -> dict[Any, Any]:
    """Return the table in a YAML file, by the safe loader.

    Raises:
        InputError: The file cannot be read, is too large, or holds no table.
        UsageError: PyYAML is not installed.
    """
    with require(f"{path}: reading YAML", "hub"):
        import yaml
    try:
        with open_regular(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise damaged(path, f"is larger than {MAX_BYTES:,} bytes, too large for a configuration", "check the path")
        if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)) > MAX_ALIASES:
            raise ValueError(f"more than {MAX_ALIASES} aliases, which can multiply its values without limit")
        values = yaml.safe_load(text)
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise damaged(path, problem, "check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise damaged(path, f"is not readable YAML ({reason[:300]})", "correct it") from error
    if not isinstance(values, dict):
        held = "is empty" if values is None else f"holds a {type(values).__name__}, not a table of settings"
        raise damaged(path, held, "give a configuration")
    return values


def _number(path: Path, key: str, value: Any) -> Any:
    """Return a number, also one that YAML reads as text (``2e-5``); None for null and for a reference (``${lr}``).

    Raises:
        InputError: It is no finite number.
    """
    if value is None or (isinstance(value, str) and value.startswith("${")):
        return None
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    if not is_number(value):
        raise damaged(path, f"{key} must be a number, not {str(value)[:80]!r}", "correct it")
    return value


def _read_common(family: str, path: Path, values: Mapping[str, Any], peft: Mapping[str, Any]) -> Settings:
    """Return the settings that every trainer has, and LoRA settings with the trainer's defaults."""
    keys = _KEYS | _OWN_KEYS.get(family, {})
    optimizer = values.get(keys["optimizer"])
    found = {name: _number(path, key, values.get(key)) for name, key in keys.items() if name != "optimizer"}
    found |= {"optimizer": name_optimizer(str(optimizer)) if optimizer else None}
    found["steps"] = found["steps"] if (found["steps"] or 0) >= 1 else None  # a Trainer's default is -1
    given = {key: value for key, value in peft.items() if value is not None}
    defaults = {key: value for key, value in DEFAULTS.get(family, {}).items() if key not in given}
    config = Config(path, {"peft_type": "LORA", **defaults, **given})
    return Settings(path, family, config, keys=keys, defaults=frozenset(defaults), **found)


def name_optimizer(text: str) -> str:
    """Return ``adamw`` for a trainer's name of an Adam; another name in lower case.

    Of bitsandbytes (paged too) and of others with a state of their own dtype: ``adamw8bit``, or ``adamw32bit``.

    >>> name_optimizer("bitsandbytes.optim.PagedAdamW8bit"), name_optimizer("bitsandbytes.optim.PagedAdamW")
    ('adamw8bit', 'adamw32bit')
    >>> name_optimizer("adamw_torch_fused"), name_optimizer("adamw_torch_4bit"), name_optimizer("lion")
    ('adamw', 'adamw_torch_4bit', 'lion')
    """
    name = text.rpartition(".")[2].lower()
    if not re.search(r"adamw|^(paged)?adam(\d+bit)?$", name) or re.search("4bit|fp8|flash", name):
        return name
    if "8bit" in name:
        return "adamw8bit"
    return "adamw32bit" if any(word in text.lower() for word in FLOAT32_STATE) else "adamw"


def _read_peft(path: Path, values: Mapping[str, Any]) -> Settings:
    method = str(values.get("peft_type")).lower()
    return replace(_read_common("peft", path, {}, values), method=method, dtype="float32", keys={})


def _read_trainer(family: str, path: Path, values: Mapping[str, Any]) -> Settings:
    """Return the settings of a trainer whose names of LoRA settings ``decisions.trainers`` has."""
    names = {key: by_trainer[TRAINERS.index(family)] for key, by_trainer in NAMES.items()}
    peft: dict[str, Any] = {key: values.get(name) for key, name in names.items() if name}
    for key in ("target_modules", "modules_to_save"):
        if isinstance(peft[key], str) and re.fullmatch(r"[\w., ]+", peft[key]):  # LLaMA-Factory's list
            peft[key] = [part.strip() for part in peft[key].split(",")]
    if values.get("lora_target_linear") is True or peft["target_modules"] in (["all"], ["all-linear"], "all-linear"):
        peft["target_modules"] = "all-linear"
    peft |= {key: _number(path, names[key], peft[key]) for key in ("r", "lora_alpha")}
    settings = _read_common(family, path, values, peft)
    quantized = any(values.get(key) for key in ("load_in_4bit", "load_in_8bit", "quantization_bit"))
    return replace(settings, keys={**settings.keys, **names}, quantized=quantized)


def _read_axolotl(path: Path, values: Mapping[str, Any]) -> Settings:
    settings = _read_trainer("axolotl", path, values)
    adapter = str(values.get("adapter") or "full")
    method = "lora" if adapter == "qlora" else adapter
    half = "bfloat16" if values.get("bf16") or values.get("bfloat16") else "float16" if values.get("fp16") else ""
    has_masters = any(values.get(key) for key in ("fsdp", "fsdp_config", "deepspeed"))
    stays_half = values.get("peft_autocast_adapter_dtype") is False if method == "lora" else not has_masters
    keys = {**settings.keys, "dtype": "fp16" if half == "float16" else "bf16"}
    return replace(settings, method=method, dtype=half if half and stays_half else "float32", keys=keys)


def _read_llamafactory(path: Path, values: Mapping[str, Any]) -> Settings:
    settings = _read_trainer("llamafactory", path, values)
    method = str(values.get("finetuning_type") or "lora")
    dtype = "bfloat16" if values.get("pure_bf16") or values.get("use_badam") else "float32"
    peft = Config(path, {"lora_alpha": 2 * settings.peft.values["r"], **settings.peft.values})
    return replace(settings, peft=peft, method=method, dtype=dtype, keys={**settings.keys, "dtype": "pure_bf16"})


def _read_trl(path: Path, values: Mapping[str, Any]) -> Settings:
    settings = _read_trainer("trl", path, values)
    is_script = "model_name_or_path" in values  # else a Trainer's arguments, which do not say how the model is loaded
    key = next((name for name in ("dtype", "torch_dtype") if name in values), "dtype")
    dtype = str(values.get(key) or "float32") if is_script or key in values else None
    method = "lora" if values.get("use_peft") else "full" if is_script else None
    if method == "lora":
        dtype = "bfloat16" if settings.quantized else "float32"
    dtype = _DTYPES.get(str(dtype), dtype)
    return replace(settings, method=method, dtype=dtype, keys={**settings.keys, "dtype": key})


def _read_torchtune(path: Path, values: Mapping[str, Any]) -> Settings:
    targets = ["o_proj" if name == "output_proj" else name for name in values.get("model.lora_attn_modules") or ()]
    targets += ["gate_proj", "up_proj", "down_proj"] if values.get("model.apply_lora_to_mlp") else []
    targets += ["lm_head"] if values.get("model.apply_lora_to_output") else []
    names = {"r": "model.lora_rank", "lora_alpha": "model.lora_alpha"}
    peft = {key: _number(path, name, values.get(name)) for key, name in names.items()}
    settings = _read_common("torchtune", path, values, {**peft, "target_modules": targets or None})
    keys = {**settings.keys, **names, "target_modules": "model.lora_attn_modules"}
    quantized, dtype = "qlora" in str(values.get("model._component_")), _DTYPES.get(str(values.get("dtype")), "float32")
    return replace(settings, method="lora" if peft["r"] else "full", dtype=dtype, quantized=quantized, keys=keys)


# The readers by trainer, with keys of which each configuration has one; the first that fits is taken.
READERS: dict[str, tuple[Callable[[Path, dict[str, Any]], Settings], set[str]]] = {
    "peft": (_read_peft, {"peft_type"}),
    "torchtune": (_read_torchtune, {"optimizer._component_", "model._component_"}),
    "llamafactory": (_read_llamafactory, {"finetuning_type", "lora_rank", "lora_target", "cutoff_len", "stage"}),
    "axolotl": (_read_axolotl, {"base_model", "sequence_len", "micro_batch_size", "adapter"}),
    "trl": (_read_trl, {"learning_rate", "use_peft", "lora_r", "per_device_train_batch_size", "model_name_or_path"}),
}
