"""Tensors whose parts are stored in several places: boxes of a tensor, each with its own file, assembled on reading.

A box is given by the index of its first entry in the whole tensor and its sizes. The boxes of a tensor must be disjoint
and cover it; FSDP cuts along the first dimension, tensor parallelism along any.

``PiecesFolder`` reads such tensors of torch.distributed.checkpoint in safetensors, in files named ``shard-…-model-…``.
The header of each file gives, under ``DCP_SHARDING_INFO``, the index of the whole tensor at which its piece begins. The
headers do not state the shape of the whole tensor: if the last pieces are missing, only the shape shows it.

Reference: ``HuggingFaceStorageWriter(save_distributed=True)`` of torch ≥ 2.8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_diag.checkpoints.archives import WIDTH
from lora_diag.checkpoints.safetensors import SafetensorsFile
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch


# Pairs of boxes that are compared with each other at most, per tensor: 1,000 ranks that cut along columns.
MAX_PAIRS = 1_000_000

PATTERN = "shard-*-model-*.safetensors"
INFO = "DCP_SHARDING_INFO"


class Source(Protocol):
    """Location of the entries of one box."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of the box, in its own row-major order."""
        ...

    def read_bytes(self) -> bytes:
        """Return the bytes of a small box, without torch."""
        ...


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor.

    Args:
        offsets: Index of its first entry in the whole tensor.
        sizes: Its shape.
        source: Location of its entries.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    source: Source


class Boxes:
    """The boxes of one tensor.

    Args:
        name: The tensor.
        shape: Its shape.
        boxes: Its parts.
        path: The file or folder, for messages.

    Raises:
        InputError: The boxes overlap, or do not cover the tensor.
    """

    def __init__(self, name: str, shape: tuple[int, ...], boxes: Sequence[Box], path: Path) -> None:
        self.shape = shape
        filled = [box for box in boxes if math.prod(box.sizes)]
        self.boxes = sorted(filled or boxes[:1], key=lambda box: box.offsets)
        self._check_coverage(name, path)
        # The last dimension that is cut: entries of one index up to it are contiguous.
        cut = [d for d in range(len(shape)) if any(box.sizes[d] != shape[d] for box in self.boxes)]
        self._cut = cut[-1] if cut else 0

    def _check_coverage(self, name: str, path: Path) -> None:
        """Refuse boxes that overlap, lie outside the tensor, or do not cover it."""
        covered = 0
        for box in self.boxes:
            ends = (offset + size for offset, size in zip(box.offsets, box.sizes, strict=True))
            if any(end > size for end, size in zip(ends, self.shape, strict=True)):
                raise InputError(
                    f"{path}: a part of {name} at {list(box.offsets)} with shape {list(box.sizes)} lies outside its "
                    f"shape {list(self.shape)}; save the checkpoint again"
                )
            covered += math.prod(box.sizes)
        if not self.boxes or covered != math.prod(self.shape) or self._has_overlap():
            raise InputError(
                f"{path}: the parts of {name} hold {covered:,} entries of {math.prod(self.shape):,}"
                f"{' and overlap' if covered == math.prod(self.shape) else ''}; a file is missing, or the folder holds "
                "files of two checkpoints"
            )

    def _has_overlap(self) -> bool:
        """Return whether two boxes have an entry in common, or there are too many pairs to compare.

        Boxes are sorted by their first index.
        """
        pairs = 0
        for index, box in enumerate(self.boxes):
            for other in self.boxes[index + 1 :]:
                if box.sizes and other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                    break
                pairs += 1
                if pairs > MAX_PAIRS or _are_overlapping(box, other):
                    return True
        return False

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of the whole tensor (row-major)."""
        import torch

        if len(self.boxes) == 1:
            return self.boxes[0].source.read(start, stop)
        if start >= stop:
            return self.boxes[0].source.read(0, 0)
        if self._cut == 0:
            return self._read_rows(start, stop)
        # Rows of width: all indices up to the cut dimension, and the entries after them.
        width = math.prod(self.shape[self._cut :])
        inner = math.prod(self.shape[self._cut + 1 :])
        first, last = start // width, -(-stop // width)
        out: torch.Tensor | None = None
        for box in self.boxes:
            left, box_width = box.offsets[self._cut] * inner, box.sizes[self._cut] * inner
            for row, index, count in _find_runs(box, self.shape, self._cut, first, last):
                part = box.source.read(index * box_width, (index + count) * box_width).view(count, box_width)
                if out is None:
                    out = torch.empty((last - first, width), dtype=part.dtype)
                out[row - first : row - first + count, left : left + box_width] = part
        assert out is not None
        return out.view(-1)[start - first * width : stop - first * width].clone()

    def _read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Return a range of a tensor that is cut along its first dimension only: the boxes follow each other."""
        import torch

        width = math.prod(self.shape[1:])
        parts = []
        for box in self.boxes:
            begin = box.offsets[0] * width if box.offsets else 0
            low, high = max(start, begin), min(stop, begin + math.prod(box.sizes))
            if low < high:
                parts.append(box.source.read(low - begin, high - begin))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_bytes(self, width: int) -> bytes:
        """Return the bytes of a small tensor, without torch; ``width`` are the bytes of an entry."""
        if self._cut == 0:
            return b"".join(box.source.read_bytes() for box in self.boxes)
        out = bytearray(math.prod(self.shape) * width)
        row_bytes = math.prod(self.shape[self._cut :]) * width
        inner = math.prod(self.shape[self._cut + 1 :]) * width
        for box in self.boxes:
            content = box.source.read_bytes()
            left, box_width = box.offsets[self._cut] * inner, box.sizes[self._cut] * inner
            for row, index, count in _find_runs(box, self.shape, self._cut, 0, len(out) // max(1, row_bytes)):
                for i in range(count):
                    position = (row + i) * row_bytes + left
                    out[position : position + box_width] = content[
                        (index + i) * box_width : (index + i + 1) * box_width
                    ]
        return bytes(out)


def _are_overlapping(first: Box, second: Box) -> bool:
    edges = zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in edges)


def _find_runs(box: Box, shape: tuple[int, ...], cut: int, first: int, last: int) -> Sequence[tuple[int, int, int]]:
    """Return the rows of a box among the rows ``first:last`` of the tensor, as runs of neighbours.

    A row is an index of the dimensions before ``cut``.

    Returns:
        Of each run: its first row in the tensor, its first row in the box, and the number of rows.
    """
    height = shape[cut - 1]  # rows of one slab: neighbours in the tensor and in the box
    slabs, box_slabs = shape[: cut - 1], box.sizes[: cut - 1]
    top, box_height = box.offsets[cut - 1], box.sizes[cut - 1]
    runs = []
    for slab in range(first // height, -(-last // height)):
        index = _find_index_in_box(slab, slabs, box.offsets, box_slabs)
        if index is None:
            continue
        low, high = max(first, slab * height + top), min(last, slab * height + top + box_height)
        if low < high:
            runs.append((low, index * box_height + low - slab * height - top, high - low))
    return runs


def _find_index_in_box(
    index: int, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> int | None:
    """Return the index within a box of an index of the tensor, both row-major; None if it is outside."""
    box_index, step = 0, 1
    for size, offset, box_size in zip(reversed(shape), reversed(offsets[: len(shape)]), reversed(sizes), strict=True):
        index, coordinate = divmod(index, size)
        if not offset <= coordinate < offset + box_size:
            return None
        box_index, step = box_index + (coordinate - offset) * step, step * box_size
    return box_index


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
