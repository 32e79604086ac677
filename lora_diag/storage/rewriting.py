"""A checkpoint with some of its weights replaced, written as one safetensors file with
``config.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.files import write_whole
from lora_diag.storage.documents import loads
from lora_diag.storage.reading import open_checkpoint
from lora_diag.storage.safetensors import write_safetensors
from lora_diag.storage.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# Key of the recipe of a merge in the metadata of its file.
RECIPE = "loradiag.merge"

MODEL, MODEL_CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, slots=True)
class Replacement:
    """New values of a tensor, or of a part of it.

    Args:
        name: The tensor.
        offset: Its first entry that is replaced.
        shape: Shape of the new values.
        file: A safetensors file that holds them as ``W``.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    file: Path


def read_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the recipe of a merge from the metadata of its file; empty without one, or with one
    that is damaged.
    """
    for file in checkpoint.files:
        try:
            recipe = loads(file.metadata.get(RECIPE, "null"))
        except ValueError:
            continue
        if isinstance(recipe, dict) and isinstance(recipe.get("updates"), list):
            return recipe
    return {}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of one layer.

    Args:
        file: The file; replaced if it exists.
        tensors: Contiguous.
    """
    infos = {
        name: TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }
    write_safetensors(file, infos, lambda name: tensors[name], {})


def write_changed(
    folder: Path,
    source: Checkpoint,
    replaced: Iterable[Replacement],
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``model.safetensors``, one tensor in memory at a time; and ``config.json`` if the
    source has one.

    Args:
        folder: An existing folder.
        source: The checkpoint whose values are used where nothing is replaced; quantized ones are
            dequantized.
        replaced: The new values.
        dtype: Dtype of all floating-point tensors; None for that in which each is read.
        metadata: Metadata of the file, besides its format.
    """
    by_name: dict[str, list[Replacement]] = {}
    for part in replaced:
        by_name.setdefault(part.name, []).append(part)
    infos = {}
    for name in source:
        info = source[name]
        written = dtype if dtype and info.dtype in FLOAT_DTYPES else info.dtype
        infos[name] = TensorInfo(name, info.shape, written)

    def read(name: str) -> Tensor:
        import torch

        values = source.read(name).to(getattr(torch, infos[name].dtype))
        for part in by_name.get(name, ()):
            end = part.offset + math.prod(part.shape)
            values[part.offset : end] = open_checkpoint(part.file).read("W")
        return values.view(infos[name].shape)

    write_safetensors(folder / MODEL, infos, read, {"format": "pt", **(metadata or {})})
    if source.config:
        config = {
            key: value for key, value in source.config.items() if key != "quantization_config"
        }
        config |= {key: dtype for key in ("torch_dtype", "dtype") if dtype and key in config}
        write_whole(
            folder / MODEL_CONFIG,
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        )
