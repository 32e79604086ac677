"""torch.distributed.checkpoint in safetensors: every rank's rows of every tensor, in files named ``shard-…-model-…``.

Each file says in its header, under ``DCP_SHARDING_INFO``, at which index of the whole tensor its piece begins. FSDP
cuts along the first dimension, so pieces put one after another are the tensor, and a range of entries is a range of
few pieces. Other cuts (tensor parallelism along columns) are refused. The headers do not say how long the whole is:
that the last pieces are missing shows only in the shape.

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
    """Rows of a tensor: the file that holds them, and the first of them."""

    file: SafetensorsFile
    row: int


class PiecesFolder:
    """A folder of such files, presented as one file of whole tensors.

    Args:
        folder: The folder; it holds at least one.

    Raises:
        InputError: A file is damaged, or the pieces of a tensor are not its rows without a gap.
    """

    label = "torch.distributed safetensors"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metadata: Mapping[str, str] = {}
        files = [SafetensorsFile(path) for path in sorted(folder.glob(PATTERN))]
        self.notes: tuple[str, ...] = (f"put together from the pieces in {len(files)} files",)
        pieces: dict[str, list[Piece]] = {}
        for file in files:
            for name, row in _first_rows(file):
                pieces.setdefault(name, []).append(Piece(file, row))
        self._pieces = {name: sorted(parts, key=lambda piece: piece.row) for name, parts in pieces.items()}
        self.tensors: Mapping[str, TensorInfo] = {name: self._whole(name) for name in self._pieces}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of a tensor (row-major, stored dtype, memory of its own)."""
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
        """Return shape and dtype of the whole tensor, holding its pieces against each other."""
        pieces = self._pieces[name]
        infos = [piece.file.tensors[name] for piece in pieces]
        row = 0
        for piece, info in zip(pieces, infos, strict=True):
            if piece.row != row or info.shape[1:] != infos[0].shape[1:] or info.dtype != infos[0].dtype:
                raise InputError(
                    f"{piece.file.path}: the piece of {name} from row {piece.row} on does not continue the {row} rows "
                    "before it; a file is missing, or the folder holds two checkpoints"
                )
            row += info.shape[0] if info.shape else 1
        shape = (row, *infos[0].shape[1:]) if infos[0].shape else ()
        return TensorInfo(name, shape, infos[0].dtype)


def _first_rows(file: SafetensorsFile) -> Iterator[tuple[str, int]]:
    """Yield the name of each piece in a file, and the row at which it begins."""
    try:
        info: Any = json.loads(file.metadata[INFO])
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file.path}: does not say which pieces it holds ({INFO} in its header)") from error
    for name, tensor in file.tensors.items():
        entry = info.get(name) if isinstance(info, dict) else None
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not _is_a_row(offsets, len(tensor.shape)):
            raise InputError(
                f"{file.path}: {name} begins at {offsets!r}, which is not the beginning of a row; only pieces cut "
                "along the first dimension are read: save the model in one piece (consolidate_safetensors_files)"
            )
        yield name, offsets[0] if offsets else 0


def _is_a_row(offsets: Any, dimensions: int) -> bool:
    if not isinstance(offsets, list) or len(offsets) != dimensions:
        return False
    return all(type(offset) is int and offset >= 0 for offset in offsets) and not any(offsets[1:])
