"""torch.distributed.checkpoint in safetensors: pieces of tensors, in files named ``shard-…-model-…``.

The header of each file gives, under ``DCP_SHARDING_INFO``, the index of the whole tensor at which its piece begins. The
headers do not state the shape of the whole tensor: if the last pieces are missing, only the shape shows it.

Reference: ``HuggingFaceStorageWriter(save_distributed=True)`` of torch ≥ 2.8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.archives import WIDTH
from lora_diag.checkpoints.chunks import Box, Boxes
from lora_diag.checkpoints.safetensors import SafetensorsFile
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

PATTERN = "shard-*-model-*.safetensors"
INFO = "DCP_SHARDING_INFO"


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a tensor: the file that holds it, and the tensor's name."""

    file: SafetensorsFile
    name: str

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of the piece."""
        return self.file.read(self.name, start, stop)

    def read_bytes(self) -> bytes:
        """Return its bytes, without torch."""
        return self.file.read_bytes(self.name)


class PiecesFolder:
    """A folder of piece files, presented as one file of whole tensors.

    Args:
        folder: The folder, with at least one piece file.

    Raises:
        InputError: A file is damaged, or the pieces of a tensor overlap or do not cover it.
    """

    label = "torch.distributed safetensors"
    config_folder = ""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metadata: Mapping[str, str] = {}
        files = [SafetensorsFile(path) for path in sorted(folder.glob(PATTERN))]
        self.notes: tuple[str, ...] = (f"assembled from the pieces in {len(files)} files",)
        pieces: dict[str, list[Box]] = {}
        dtypes: dict[str, str] = {}
        for file in files:
            for name, offsets in _read_offsets(file):
                info = file.tensors[name]
                pieces.setdefault(name, []).append(Box(offsets, info.shape, Piece(file, name)))
                if dtypes.setdefault(name, info.dtype) != info.dtype or len(pieces[name][0].sizes) != len(info.shape):
                    raise InputError(f"{file.path}: {name} is another tensor than in the files before; copy them again")
        self._boxes = {name: Boxes(name, _infer_shape(boxes), boxes, folder) for name, boxes in pieces.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, boxes.shape, dtypes[name]) for name, boxes in self._boxes.items()
        }

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether a folder holds such files."""
        return any(folder.glob(PATTERN))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        return self._boxes[name].read(start, stop)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        return self._boxes[name].read_bytes(WIDTH[self.tensors[name].dtype])


def _infer_shape(boxes: Sequence[Box]) -> tuple[int, ...]:
    """Return the smallest shape that holds all pieces of a tensor."""
    ends = [[start + size for start, size in zip(box.offsets, box.sizes, strict=True)] for box in boxes]
    return tuple(max(sizes) for sizes in zip(*ends, strict=True))


def _read_offsets(file: SafetensorsFile) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the first index of each piece in a file."""
    try:
        info: Any = json.loads(file.metadata[INFO])
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file.path}: {INFO} is missing from the header or invalid; save the model again") from error
    for name, tensor in file.tensors.items():
        entry = info.get(name) if isinstance(info, dict) else None
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != len(tensor.shape)
            or not all(type(offset) is int and 0 <= offset < 2**63 for offset in offsets)
        ):
            raise InputError(
                f"{file.path}: the piece of {name} starts at {offsets!r}, which is not an index of a tensor with "
                f"{len(tensor.shape)} dimensions; save the model again"
            )
        yield name, tuple(offsets)
