"""A model's ``config.json``: checked, then read by transformers without the code that it may name.

transformers asks the package ``kernels`` for the repository in
``attn_implementation: "owner/kernel"``, and for one of its own choice if the value is
``flash_attention_2``; it applies an ``adapter_config.json`` in the model's folder, or opens the
model that this names. timm asks the Hub for an ``architecture: "hf_hub:owner/model"``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_diag.errors import InputError, damaged
from lora_diag.storage.documents import MAX_CONFIG_BYTES, read_object

# Sizes of a model, with those names of older architectures that transformers maps to them.
SIZES = (
    *(
        "hidden_size",
        "n_embd",
        "num_attention_heads",
        "n_head",
        "num_hidden_layers",
        "n_layer",
        "num_layers",
    ),
    *("max_position_embeddings", "n_positions", "vocab_size"),
)
# Far above published decoders. Building a block took 4 ms without its weights: 4 s for as many.
MAX_BLOCKS = 1_000
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")

# Names by which timm finds a model outside its own list.
TIMM_SOURCE = re.compile(r"\s*(hf[-_]hub|local[-_]dir):", re.IGNORECASE)


def read_config(
    read: Callable[..., Any], path: Path, where: str, options: Mapping[str, Any]
) -> Any:
    """Return a model's configuration as transformers reads it, with transformers' own choice of
    implementations.

    Args:
        read: ``AutoConfig.from_pretrained``.
        path: The local ``config.json``, which need not exist.
        where: A folder, or a name on the Hub.
        options: Options of ``read``.

    Raises:
        InputError: A value in the file is invalid.
        Exception: transformers cannot read it.
    """
    if path.is_file():
        check_config(path)
    config = read(where, trust_remote_code=False, **options)
    # These setters change the parts of a composite model, too.
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def check_config(path: Path) -> None:
    """Refuse values on which transformers or its models fail without the name of the file, or run
    for minutes.

    Raises:
        InputError: The file cannot be read, or a value is invalid.
    """
    for values in _iterate_parts(read_object(path, "model configuration", MAX_CONFIG_BYTES)):
        for key in SIZES:
            _check_size(path, key, values.get(key))
        for key in ("dtype", "torch_dtype"):
            _check_dtype(path, key, values.get(key))
        for key, value in values.items():
            if isinstance(value, str) and TIMM_SOURCE.match(value):
                raise damaged(
                    path, f"{key} names a model outside this folder, {value!r}", "remove it"
                )
        names = values.get("architectures")
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            raise damaged(
                path, f"architectures must be a list of names, not {names!r}", "correct it"
            )


def _iterate_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration, and those of the parts of a composite model (``text_config``)."""
    waiting = [config]
    while waiting:
        values = waiting.pop()
        yield values
        waiting += [
            part
            for key, part in values.items()
            if key.endswith("_config") and isinstance(part, dict)
        ]


def _check_size(path: Path, key: str, value: Any) -> None:
    """Refuse a size that is not a whole number from 1 up, or an implausible number of blocks; lists
    are not checked.

    Raises:
        InputError: The value is invalid.
    """
    if value is None or isinstance(value, list):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise damaged(path, f"{key} must be a whole number from 1 up, not {value!r}", "correct it")
    if key in BLOCKS and value > MAX_BLOCKS:
        raise damaged(
            path,
            f"{key} is {value:,}, and at most {MAX_BLOCKS:,} blocks are supported",
            "correct it",
        )


def _check_dtype(path: Path, key: str, value: Any) -> None:
    """Refuse a text that is not the name of a dtype of torch.

    Raises:
        InputError: The value is invalid.
    """
    if not isinstance(value, str) or value == "auto":
        return
    if not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        raise damaged(
            path, f"{key} must be the name of a dtype of torch, not {value!r}", "correct it"
        )


def check_unquantized(base: Path | str, config: Any) -> None:
    """Refuse the configuration of a quantized model, also where only its text model is.

    Raises:
        InputError: It is quantized.
    """
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            raise InputError(
                base,
                "is quantized, and probes need weights that can be changed",
                "give the unquantized BASE, whose rounded weights probe sweep and tune "
                "train on with $quantized",
            )
