"""PEFT's result for an adapter's config: build the model without weights, apply the adapter, read
the ranks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from lora_diag.errors import Given, InputError, LoradiagError, require
from lora_diag.models.config import read_config
from lora_diag.storage.remote import RemotePath


def adapted_by_peft(config: Mapping[str, Any], base: Path) -> dict[str, tuple[int, float]]:
    """Return the rank and scaling of each module that PEFT adapts, in a model built on the meta
    device.

    Args:
        config: Content of ``adapter_config.json``.
        base: The model's folder or its ``config.json``; weights are not read, and its code is not
            run.

    Returns:
        Rank and scaling by module, or by parameter other than ``weight``.

    Raises:
        InputError: ``base`` is remote, transformers cannot build the model, or PEFT rejects the
            config.
    """
    with require(Given("check"), "train"):
        import peft
        import torch
        import transformers
    if isinstance(base, RemotePath):
        raise InputError(
            base, "$check builds the model from its config.json, which must be on this machine"
        )
    folder = base if base.is_dir() else base.parent
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # warnings on unmatched names: missing ranks report them
        try:
            path, local = folder / "config.json", {"local_files_only": True}
            model_config = read_config(
                transformers.AutoConfig.from_pretrained, path, str(folder), local
            )
            model_class: Any = getattr(transformers, (model_config.architectures or [""])[0], None)
            # A name from the file: only model classes of transformers are accepted.
            auto_class: Any = transformers.AutoModelForCausalLM
            if isinstance(model_class, type) and issubclass(
                model_class, transformers.PreTrainedModel
            ):
                model: Any = model_class(model_config)
            else:
                model = auto_class.from_config(model_config)
        except (LoradiagError, MemoryError):
            raise
        except Exception as error:  # whatever transformers raises for a damaged config.json
            raise InputError(f"{base}: transformers cannot build this model: {error}") from error
        try:
            options = {key: deepcopy(value) for key, value in config.items() if key != "peft_type"}
            wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
        except (ValueError, TypeError, AttributeError) as error:
            reason = re.sub(
                r"\(\n.*\n\)", "", str(error), flags=re.DOTALL
            ).strip()  # without its dump of the module
            raise InputError(
                f"{base}: PEFT does not accept these ranks for this model: {reason}"
            ) from error
    return {
        _name_adapted(name, module): (module.r["default"], module.scaling["default"])
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A") and "default" in module.r
    }


def _name_adapted(name: str, module: Any) -> str:
    """Return the path of a module in the unwrapped model, with the parameter that is adapted if it
    is no ``weight``.
    """
    path = name.removeprefix("base_model.model.").replace(".base_layer", "")
    parameter = getattr(module, "parameter_name", None)
    return path if parameter in {None, "weight"} else f"{path}.{parameter}"
