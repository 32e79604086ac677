"""torch.distributed.checkpoint in safetensors: row pieces of tensors, in files named ``shard-…-model-…``.

The header of each file gives, under ``DCP_SHARDING_INFO``, the index of the whole tensor at which its piece begins.
FSDP cuts along the first dimension, so the concatenated pieces are the tensor, and a range of entries lies in few
pieces. Other cuts (tensor parallelism along columns) are refused. The headers do not state the length of the whole
tensor: if the last pieces are missing, only the shape shows it.

Reference: ``HuggingFaceStorageWriter(save_distributed=True)`` of torch ≥ 2.8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.safetensors import SafetensorsFile
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

PATTERN = "shard-*-model-*.safetensors"
INFO = "DCP_SHARDING_INFO"


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor: the file that holds them, and the index of the first row."""

    file: SafetensorsFile
    row: int


class PiecesFolder:
    """A folder of piece files, presented as one file of whole tensors.

    Args:
        folder: The folder, with at least one piece file.

    Raises:
        InputError: A file is damaged, or the pieces of a tensor do not cover its rows without a gap.
    """

    label = "torch.distributed safetensors"
    config_folder = ""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metadata: Mapping[str, str] = {}
        files = [SafetensorsFile(path) for path in sorted(folder.glob(PATTERN))]
        self.notes: tuple[str, ...] = (f"assembled from the pieces in {len(files)} files",)
        pieces: dict[str, list[Piece]] = {}
        for file in files:
            for name, row in _first_rows(file):
                pieces.setdefault(name, []).append(Piece(file, row))
        self._pieces = {name: sorted(parts, key=lambda piece: piece.row) for name, parts in pieces.items()}
        self.tensors: Mapping[str, TensorInfo] = {name: self._whole(name) for name in self._pieces}

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether a folder holds such files."""
        return any(folder.glob(PATTERN))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        import torch

        width = math.prod(self.tensors[name].shape[1:])
        parts = []
        for piece in self._pieces[name]:
            first = piece.row * width
            low, high = max(start, first), min(stop, first + piece.file.tensors[name].numel)
            if low < high:
                parts.append(piece.file.read(name, low - first, high - first))
        return torch.cat(parts) if parts else self._pieces[name][0].file.read(name, 0, 0)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        return b"".join(piece.file.read_bytes(name) for piece in self._pieces[name])

    def _whole(self, name: str) -> TensorInfo:
        """Return shape and dtype of the whole tensor, after checking that its pieces fit together."""
        pieces = self._pieces[name]
        infos = [piece.file.tensors[name] for piece in pieces]
        row = 0
        for piece, info in zip(pieces, infos, strict=True):
            if piece.row != row or info.shape[1:] != infos[0].shape[1:] or info.dtype != infos[0].dtype:
                raise InputError(
                    f"{piece.file.path}: the piece of {name} starts at row {piece.row}, not at row {row}; "
                    "a file is missing, or the folder holds two checkpoints"
                )
            row += info.shape[0] if info.shape else 1
        shape = (row, *infos[0].shape[1:]) if infos[0].shape else ()
        return TensorInfo(name, shape, infos[0].dtype)


def _first_rows(file: SafetensorsFile) -> Iterator[tuple[str, int]]:
    """Yield the name and the first row of each piece in a file."""
    try:
        info: Any = json.loads(file.metadata[INFO])
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file.path}: {INFO} is missing from the header or invalid; save the model again") from error
    for name, tensor in file.tensors.items():
        entry = info.get(name) if isinstance(info, dict) else None
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not _is_a_row(offsets, len(tensor.shape)):
            raise InputError(
                f"{file.path}: the piece of {name} starts at {offsets!r}, not at the start of a row; only pieces cut "
                "along the first dimension are supported: merge the files (consolidate_safetensors_files)"
            )
        yield name, offsets[0] if offsets else 0


def _is_a_row(offsets: Any, dimensions: int) -> bool:
    if not isinstance(offsets, list) or len(offsets) != dimensions:
        return False
    return all(type(offset) is int and offset >= 0 for offset in offsets) and not any(offsets[1:])
