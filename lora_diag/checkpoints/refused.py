"""Weights that are not stored as floats and are not dequantized here: told by their names, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_diag.checkpoints.tensors import FLOAT_DTYPES, Checkpoint
from lora_diag.errors import InputError

# Endings of tensor names that only one method uses, most telling first.
PACKED = (
    (".g_idx", "GPTQ"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".bitmask", "compressed-tensors (sparse)"),
    ("_blocks", "MXFP4"),
    (".weight_scale_2", "NVFP4"),
    (".weight_global_scale", "NVFP4"),
    (".W_q", "HQQ"),
    (".codebooks", "AQLM"),
    ("._data", "quanto"),
)
# Names whose tensors may be floats in an ordinary model, and are a sign only where something else is packed.
AMBIGUOUS = frozenset({"_blocks", "._data", ".bitmask"})

# Methods of ``quantization_config`` whose weights are dequantized here, as far as the tensors say that they can be.
READ = ("bitsandbytes", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")

WAY_OUT = "W is not stored as a float. Give the unquantized checkpoint, or analyse the adapter alone"

# A factor of PEFT in a running model carries the adapter's name, which a saved adapter does not.
WRAPPED = re.compile(r"(.+)\.lora_(?:A|B|embedding_A|embedding_B)\.(?!weight$)[^.]+(?:\.weight)?")


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``quantization_config``, under any of the names it has had; empty if there is none."""
    for key in ("quantization_config", "compression_config"):
        if isinstance(value := config.get(key), dict):
            return value
    return {}


def refuse_packed(source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse methods of quantization that are not read.

    Args:
        source: The checkpoint as it is stored.
        config: Its ``quantization_config``.

    Raises:
        InputError: A tensor's name or the configuration betrays one.
    """
    method = config.get("quant_method")
    for suffix, label in PACKED:
        for name in source:
            if name.endswith(suffix) and (suffix not in AMBIGUOUS or source[name].dtype not in FLOAT_DTYPES):
                label = str(method).upper() if method and str(method).upper() in label else label
                raise InputError(f"{source.file_of(name)}: is {label}-quantized ({name}); {WAY_OUT}")
    if method is not None and method not in READ:
        raise InputError(
            f"{source.path}: is quantized with {method!r} (quant_method in config.json), which is not read; {WAY_OUT}; "
            "or, if these weights are plain floats, take quantization_config out of config.json"
        )


def refuse_integer_weights(presented: Checkpoint) -> None:
    """Refuse matrices of integers that no known format explains, rather than leave them out.

    Args:
        presented: The checkpoint after dequantization.

    Raises:
        InputError: There is one.
    """
    for name in presented:
        info = presented[name]
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype.startswith(("int", "uint", "F4", "F6")):
            raise InputError(
                f"{presented.file_of(name)}: {name} is stored as {info.dtype}, quantized in a way that nothing beside "
                f"it explains; {WAY_OUT}"
            )


def refuse_unmerged(source: Checkpoint) -> None:
    """Refuse the state dict of a running PEFT model, which lacks ``lora_alpha``.

    Raises:
        InputError: A weight and the factors of its adapter are both there.
    """
    for name in source:
        found = WRAPPED.fullmatch(name)
        if found and any(f"{found[1]}.{own}" in source for own in ("base_layer.weight", "weight")):
            raise InputError(
                f"{source.file_of(name)}: is an unmerged PEFT state dict ({name} lies beside its weight), and holds no "
                "lora_alpha; save the adapter with peft's save_pretrained(), or the model after merge_and_unload()"
            )
