"""Torch files read as data, and tensors that are put together from parts in several files.

An ``Archive`` is a torch file (``torch.save``, zip format) whose pickle is read by ``inert`` and
whose tensors are located, not loaded: pieces of distributed tensors may be at any position of a
larger file, and ``torch.load`` reads some of them only with the library that wrote them. Nothing in
the file is run.

``Boxes`` are the parts of one tensor. A box is given by the index of its first entry in the whole
tensor and its sizes. Boxes must be disjoint and cover the tensor; FSDP cuts along the first
dimension, tensor parallelism along any.

Reference: ``torch.serialization``; a tensor is
``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, …)``, and a storage the persistent
id ``("storage", class, key, location, entries)`` of the archive's entry ``data/KEY``.
"""

from __future__ import annotations

import io
import math
import operator
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_diag.errors import InputError, damaged
from lora_diag.storage.documents import check_unicode
from lora_diag.storage.file_bytes import FileBytes, StoredTensor
from lora_diag.storage.inert import Persistent, PickledObject, describe, load
from lora_diag.storage.remote import RangeStream
from lora_diag.storage.tensors import WIDTH, TensorFile, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# Class of a storage -> dtype. ``UntypedStorage`` counts bytes; then the tensor names its dtype.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
# Functions that build a tensor from its storage.
REBUILD_TENSOR = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_tensor")
# Functions that build a parameter: their first argument is the tensor itself.
REBUILD_PARAMETER = ("_rebuild_parameter", "_rebuild_parameter_with_state")
# Keys under which trainers store the weights in a larger dictionary.
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")

# Dimensions of a tensor or of a device mesh at most, as in NumPy.
MAX_DIMENSIONS = 64
# Pairs of boxes that are compared with each other at most, per tensor: 1,000 ranks that cut along
# columns.
MAX_PAIRS = 1_000_000


class Archive:
    """A torch file, or a part of a larger file that is one.

    Args:
        file: The file.
        span: First byte of the archive and its number of bytes; None for the whole file.
        description: Description of its content for messages; default the name of the file.

    Attributes:
        value: Content of the pickle, as data.
        pickle_bytes: Bytes of the pickle.

    Raises:
        InputError: It is no torch file in zip format, is damaged, has compressed entries, or was
            saved on a big-endian machine.
    """

    def __init__(
        self, file: FileBytes, span: tuple[int, int] | None = None, description: str = ""
    ) -> None:
        self.file, description = file, description or file.path.name
        self._offset, size = span or (0, file.size)
        stream = RangeStream(
            lambda buffer, start: file.fill(buffer, self._offset + start, description), size
        )
        try:
            with zipfile.ZipFile(io.BufferedReader(stream)) as archive:
                check_entries(archive.infolist(), size, file.path, description)
                self._entries = {
                    info.filename.partition("/")[2]: info for info in archive.infolist()
                }
                order = self._entries.get("byteorder")
                if order and archive.read(order) != b"little":
                    raise damaged(file.path, f"{description} was saved on a big-endian machine")
                content = archive.read(self._entries["data.pkl"])
        except KeyError as error:
            raise InputError(
                f"{file.path}: {description} holds no data.pkl; save it again with torch.save"
            ) from error
        except (
            zipfile.BadZipFile,
            ValueError,
            EOFError,
            NotImplementedError,
            RuntimeError,
            OSError,
        ) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            problem = f"{description} is not a readable torch file: {reason}"
            raise damaged(file.path, problem, "copy or save it again") from error
        self.pickle_bytes = len(content)
        self.value = load(content, file.path, description)

    def tensor(self, value: Any, name: str) -> StoredTensor | None:
        """Return the location of a tensor; None if the value is no tensor.

        Args:
            value: A value of ``self.value``.
            name: Its name, for messages.

        Raises:
            InputError: The tensor has an invalid shape, an unsupported dtype or no storage, is not
                inside its storage, or is not in row-major order.
        """
        value = unwrap_parameter(value)
        if (
            not isinstance(value, PickledObject)
            or value.name not in REBUILD_TENSOR
            or not value.args
            or len(value.args) < 4
        ):
            return None
        storage, offset, shape, strides = value.args[:4]
        if not (
            are_sizes(shape)
            and are_sizes(strides)
            and are_sizes((offset,))
            and len(shape) == len(strides)
        ):
            raise damaged(self.file.path, f"{name} has an invalid shape")
        dtype, begin, size = self._locate_storage(storage, name)
        named_dtype = (
            value.args[6] if value.name == "_rebuild_tensor_v3" and len(value.args) > 6 else None
        )
        if isinstance(named_dtype, PickledObject):
            dtype = named_dtype.name
        if dtype not in WIDTH:
            raise damaged(self.file.path, f"{name} has the unsupported dtype {dtype}")
        count, width = math.prod(shape), WIDTH[dtype]
        if count and not _is_row_major(shape, strides):
            raise damaged(
                self.file.path, f"{name} is not stored in row-major order (strides {list(strides)})"
            )
        if (needed := (offset + count) * width) > size:
            raise damaged(
                self.file.path, f"{name} needs {needed:,} bytes, but its storage has {size:,}"
            )
        return StoredTensor(self.file, name, dtype, tuple(shape), begin + offset * width)

    def _locate_storage(self, storage: Any, name: str) -> tuple[str, int, int]:
        """Return the dtype of a storage, the position of its first byte in the file, and its number
        of bytes.
        """
        id_ = storage.id if isinstance(storage, Persistent) else None
        if (
            not isinstance(id_, tuple)
            or len(id_) < 3
            or id_[0] != "storage"
            or not isinstance(id_[1], PickledObject)
        ):
            raise damaged(self.file.path, f"{name} has no storage in the file")
        info = self._entries.get(f"data/{id_[2]}") if isinstance(id_[2], str) else None
        if info is None:
            raise damaged(
                self.file.path,
                f"{name} has its storage in data/{describe(id_[2])}, which is missing",
            )
        # The entry's data follows its own header: 30 bytes, its name, and padding.
        header = self.file.read_bytes(30, self._offset + info.header_offset, name)
        if header[:4] != b"PK\3\4":
            raise damaged(self.file.path, f"{name} has its storage at a wrong position")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return (
            STORAGES.get(id_[1].name, id_[1].name),
            self._offset + info.header_offset + 30 + lengths,
            info.file_size,
        )


def check_entries(
    entries: Sequence[zipfile.ZipInfo], size: int, path: Path, description: str
) -> None:
    """Refuse entries that are compressed, or together larger than the archive: they would fill
    memory.

    Args:
        entries: The entries of a torch file.
        size: Bytes of the archive.
        path: The file, for messages.
        description: The archive, for messages.

    Raises:
        InputError: There are such entries.
    """
    for info in entries:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            problem = f"{info.filename} in {description} is compressed, which torch.save never does"
            raise damaged(path, problem, "write the file again with torch.save or safetensors")
    if (total := sum(info.file_size for info in entries)) > size:
        problem = f"the entries of {description} claim {total:,} bytes, but it has {size:,}"
        raise damaged(path, problem, "copy or download it again")


def unwrap_parameter(value: Any) -> Any:
    """Return the tensor inside a parameter; any other value unchanged."""
    for _ in range(4):
        if (
            not isinstance(value, PickledObject)
            or value.name not in REBUILD_PARAMETER
            or not value.args
        ):
            break
        value = value.args[0]
    return value


def are_sizes(values: Any) -> TypeGuard[Sequence[int]]:
    """Return whether a value of a pickle is a shape, or offsets or strides of one."""
    return (
        isinstance(values, tuple | list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    sizes = enumerate(zip(shape, strides, strict=True), start=1)
    return all(
        size == 1 or stride == math.prod(shape[position:]) for position, (size, stride) in sizes
    )


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor.

    Args:
        offsets: Index of its first entry in the whole tensor.
        sizes: Its shape.
        fill: Fills a buffer with the bytes of its entries (row-major) from a number on.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    fill: Callable[[memoryview, int], None]

    @property
    def ends(self) -> tuple[int, ...]:
        """Index behind its last entry in the whole tensor."""
        return tuple(map(operator.add, self.offsets, self.sizes))

    def overlaps(self, other: Box) -> bool:
        """Return whether two boxes, neither of them empty, have an entry in common."""
        edges = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in edges)


class Boxes:
    """The boxes of one tensor.

    Args:
        info: The tensor as presented.
        boxes: Its parts.
        path: The file or folder, for messages.
        shape: The shape that the boxes refer to; default that of the tensor.

    Raises:
        InputError: The boxes overlap, lie outside the tensor, do not cover it, or are too many to
            compare.
    """

    def __init__(
        self,
        info: TensorInfo,
        boxes: Iterable[Box],
        path: Path,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.info, self._shape = info, info.shape if shape is None else shape
        self._boxes = sorted(
            (box for box in boxes if math.prod(box.sizes)), key=lambda box: box.offsets
        )
        self._check_coverage(path)
        # The last dimension that is cut: entries of one index up to it are contiguous.
        self._cut = 0
        for d, size in enumerate(self._shape):
            if any(box.sizes[d] != size for box in self._boxes):
                self._cut = d

    def _check_coverage(self, path: Path) -> None:
        """Refuse boxes that overlap, lie outside the tensor, or do not cover it."""
        covered, numel, name = 0, math.prod(self._shape), self.info.name
        for box in self._boxes:
            if any(map(operator.gt, box.ends, self._shape)):
                place = f"a part of {name} at {list(box.offsets)} with shape {list(box.sizes)}"
                raise damaged(
                    path,
                    f"{place} lies outside its shape {list(self._shape)}",
                    "save the checkpoint again",
                )
            covered += math.prod(box.sizes)
        if covered != numel or self._has_overlap():
            problem = f"the parts of {name} hold {covered:,} entries of {numel:,}"
            problem += " and overlap" if covered == numel else ""
            raise damaged(
                path, problem, "a file is missing, or the folder holds files of two checkpoints"
            )

    def _has_overlap(self) -> bool:
        """Return whether two boxes, sorted by their first index, overlap, or there are too many
        pairs to compare.
        """
        pairs = 0
        for index, box in enumerate(self._boxes):
            for other in self._boxes[index + 1 :]:
                if box.sizes and other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                    break
                pairs += 1
                if pairs > MAX_PAIRS or box.overlaps(other):
                    return True
        return False

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of the whole tensor (row-major, stored dtype)."""
        import torch

        out = torch.empty(stop - start, dtype=getattr(torch, self.info.dtype))
        self._fill(out.view(torch.uint8).numpy(), start, stop)
        return out

    def read_bytes(self) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        import numpy as np

        content = np.empty(self.info.numel * WIDTH[self.info.dtype], np.uint8)
        self._fill(content, 0, self.info.numel)
        return content.tobytes()

    def _fill(self, out: NDArray[np.uint8], start: int, stop: int) -> None:
        """Fill an array with the bytes of the entries ``start:stop``."""
        import numpy as np

        item = WIDTH[self.info.dtype]
        inner = math.prod(self._shape[self._cut + 1 :])
        if self._cut == 0:  # cut along the first dimension only: the boxes follow each other
            for box in self._boxes:
                begin = box.offsets[0] * inner if box.offsets else 0
                low, high = max(start, begin), min(stop, begin + math.prod(box.sizes))
                if low < high:
                    box.fill(out[(low - start) * item : (high - start) * item].data, low - begin)
            return
        # Rows of width: all indices up to the cut dimension, and the entries after them.
        width = self._shape[self._cut] * inner
        if start >= stop:
            return
        first, last = start // width, -(-stop // width)
        rows = np.empty((last - first, width * item), np.uint8)
        for box in self._boxes:
            left, box_width = box.offsets[self._cut] * inner, box.sizes[self._cut] * inner
            for row, index, count in _find_runs(box, self._shape, self._cut, first, last):
                part = np.empty(count * box_width * item, np.uint8)
                box.fill(part.data, index * box_width)
                columns = slice(left * item, (left + box_width) * item)
                rows[row - first : row - first + count, columns] = part.reshape(count, -1)
        out[:] = rows.reshape(-1)[(start - first * width) * item : (stop - first * width) * item]


def _find_runs(
    box: Box, shape: tuple[int, ...], cut: int, first: int, last: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the rows of a box among the rows ``first:last`` of the tensor, as runs of neighbours.

    A row is an index of the dimensions before ``cut``.

    Yields:
        Of each run: its first row in the tensor, its first row in the box, and the number of rows.
    """
    import numpy as np

    rows = np.arange(first, last)
    offsets, sizes = np.array(box.offsets[:cut])[:, None], np.array(box.sizes[:cut])[:, None]
    index = np.stack(np.unravel_index(rows, shape[:cut])) - offsets
    inside = ((index >= 0) & (index < sizes)).all(0)
    rows, in_box = rows[inside], np.ravel_multi_index(tuple(index[:, inside]), box.sizes[:cut])
    begins = np.flatnonzero(np.diff(rows, prepend=-2) * np.diff(in_box, prepend=-2) != 1)
    for begin, end in zip(begins, [*begins[1:], len(rows)], strict=False):
        yield int(rows[begin]), int(in_box[begin]), int(end - begin)


class PartsFolder(TensorFile):
    """A folder whose files hold parts of tensors, presented as one file of whole tensors.

    Args:
        folder: The folder.
        tensors: The parts of every tensor, by its name.
        notes: Remarks on how it was opened.

    Raises:
        InputError: A name is not valid Unicode.
    """

    label = ""
    # Folder inside it that holds config.json.
    config_folder = ""

    def __init__(self, folder: Path, tensors: Mapping[str, Boxes], notes: Sequence[str]) -> None:
        self.path, self.notes, self._boxes = folder, tuple(notes), tensors
        self.tensors = {name: replace(boxes.info, name=name) for name, boxes in tensors.items()}
        check_unicode(self.tensors, folder)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        return self._boxes[name].read(start, stop)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        return self._boxes[name].read_bytes()
