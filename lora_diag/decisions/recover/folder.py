"""The folders that ``recover`` writes: of an adapter, or of a checkpoint in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lora_diag.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from lora_diag.checkpoints.tensors import FLOAT_DTYPES
from lora_diag.checkpoints.writing import write_safetensors
from lora_diag.decisions.extract.folder import CARD, CONFIG, WEIGHTS, OutputFolder
from lora_diag.deltas import StoredDelta
from lora_diag.files import write_whole

if TYPE_CHECKING:
    import torch

RECORDS, MODEL, MODEL_CONFIG = "recovery.jsonl", "model.safetensors", "config.json"


class AdapterFolder(OutputFolder):
    """The folder of an adapter made by ``recover``."""

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = frozenset({WEIGHTS, CONFIG, CARD, RECORDS})
    description: ClassVar[str] = "an adapter written by recover"


class CheckpointFolder(OutputFolder):
    """The folder of a checkpoint made by ``recover``."""

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = frozenset({MODEL, MODEL_CONFIG, CARD, RECORDS})
    description: ClassVar[str] = "a checkpoint written by recover"


def store(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors of one layer.

    Args:
        file: The file; replaced if it is there.
        tensors: Float32, contiguous.

    Raises:
        InputError: It cannot be written.
    """
    infos = {name: TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in tensors.items()}
    write_safetensors(file, infos, lambda name: tensors[name], {})


def load(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of one layer.

    Raises:
        InputError: It cannot be read.
    """
    checkpoint = open_checkpoint(file)
    return {name: checkpoint.read(name).view(checkpoint[name].shape) for name in checkpoint}


def write_checkpoint(
    folder: Path, tuned: Checkpoint, recovered: Iterable[StoredDelta], files: Mapping[str, Path]
) -> None:
    """Write ``model.safetensors`` in float32, one tensor in memory at a time, and ``config.json``.

    Args:
        folder: The folder, which exists.
        tuned: TUNED, whose values are used where nothing was recovered.
        recovered: The layers whose estimated weights replace those of TUNED.
        files: The file with the estimated weight of each of them.

    Raises:
        InputError: A file cannot be read or written.
    """
    parts: dict[str, list[tuple[int, StoredDelta]]] = {}
    for delta in recovered:
        parts.setdefault(delta.tuned.name, []).append((delta.tuned.offset, delta))
    infos = {
        name: TensorInfo(name, tuned[name].shape, "float32" if tuned[name].dtype in FLOAT_DTYPES else tuned[name].dtype)
        for name in tuned
    }
    write_safetensors(
        folder / MODEL, infos, partial(_read_weight, tuned=tuned, parts=parts, files=files), {"format": "pt"}
    )
    if tuned.config:
        config = {key: value for key, value in tuned.config.items() if key != "quantization_config"}
        config |= {key: "float32" for key in ("torch_dtype", "dtype") if key in config}
        write_whole(folder / MODEL_CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _read_weight(
    name: str, tuned: Checkpoint, parts: Mapping[str, list[tuple[int, StoredDelta]]], files: Mapping[str, Path]
) -> torch.Tensor:
    """Return one tensor of the checkpoint: TUNED's, with the matrices that were recovered in their places."""
    values = tuned.read(name)
    if tuned[name].dtype in FLOAT_DTYPES:
        values = values.float()
    for offset, delta in parts.get(name, ()):
        values[offset : offset + math.prod(delta.shape)] = open_checkpoint(files[delta.layer]).read("W")
    return values.view(tuned[name].shape)
