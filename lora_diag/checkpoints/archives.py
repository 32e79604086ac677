"""Torch files (``torch.save``, zip format) read as data: the pickle by ``inert``, and ranges of tensors by position.

Used for what ``torch.load(weights_only=True)`` does not read, or only with the library that wrote it: pieces of
distributed tensors, which may be at any position of a larger file. Nothing in the file is run, and no storage is read
before its entries are requested.

Reference: ``torch.serialization``; a tensor is ``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, …)``,
and a storage the persistent id ``("storage", class, key, location, entries)`` of the archive's entry ``data/KEY``.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.file_bytes import FileBytes
from lora_diag.checkpoints.inert import Persistent, Record, describe, load
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

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
# Bytes per entry of the dtypes that are read.
WIDTH = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
# Functions that build a tensor from its storage.
REBUILD_TENSOR = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_tensor")
# Functions that build a parameter: their first argument is the tensor itself.
REBUILD_PARAMETER = ("_rebuild_parameter", "_rebuild_parameter_with_state")


# Dimensions of a tensor or of a device mesh at most, as in NumPy.
MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an archive.

    Args:
        file: The file.
        name: Its name, for messages.
        dtype: Torch's name of its dtype.
        shape: Its shape.
        position: Position of its first byte in the file.
    """

    file: FileBytes
    name: str
    dtype: str
    shape: tuple[int, ...]
    position: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` (row-major).

        Raises:
            InputError: The file cannot be read.
        """
        import torch

        out = torch.empty(stop - start, dtype=getattr(torch, self.dtype))
        content = memoryview(out.view(torch.uint8).numpy().data)
        self.file.fill(content, self.position + start * WIDTH[self.dtype], self.name)
        return out

    def read_bytes(self) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        content = bytearray(self.numel * WIDTH[self.dtype])
        self.file.fill(memoryview(content), self.position, self.name)
        return bytes(content)


class Archive:
    """A torch file, or a part of a larger file that is one.

    Args:
        file: The file.
        span: First byte of the archive and its number of bytes.
        description: Description of its content for messages.

    Attributes:
        value: Content of the pickle, as data.
        pickle_bytes: Bytes of the pickle.

    Raises:
        InputError: It is no torch file in zip format, is damaged, has compressed entries, or was saved on a big-endian
            machine.
    """

    def __init__(self, file: FileBytes, span: tuple[int, int], description: str) -> None:
        self.file, self.description = file, description
        self._offset = span[0]
        try:
            with zipfile.ZipFile(io.BufferedReader(_Window(file, span, description))) as archive:
                entries = archive.infolist()
                self._entries = {info.filename.partition("/")[2]: info for info in entries}
                self._check_entries(span[1])
                if self._entries.get("byteorder"):
                    order = archive.read(self._entries["byteorder"])
                    if order != b"little":
                        raise InputError(f"{file.path}: {description} was saved on a big-endian machine; save it again")
                content = archive.read(self._entries["data.pkl"])
        except KeyError as error:
            raise InputError(f"{file.path}: {description} holds no data.pkl; save it again with torch.save") from error
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise InputError(
                f"{file.path}: {description} is not a readable torch file: {reason}; copy or save it again"
            ) from error
        self.pickle_bytes = len(content)
        self.value = load(content, file.path, description)

    def _check_entries(self, size: int) -> None:
        """Refuse entries that are compressed, or together larger than the archive: they would fill memory."""
        for info in self._entries.values():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise InputError(
                    f"{self.file.path}: {info.filename} in {self.description} is compressed, which torch.save never "
                    "does; save it again"
                )
        if sum(info.file_size for info in self._entries.values()) > size:
            raise InputError(
                f"{self.file.path}: the entries of {self.description} are larger than the file; copy it again"
            )

    def tensor(self, value: Any, name: str) -> StoredTensor | None:
        """Return the location of a tensor; None if the value is no tensor.

        Args:
            value: A value of ``self.value``.
            name: Its name, for messages.

        Raises:
            InputError: The tensor has an invalid shape, an unsupported dtype or no storage, is not inside its storage,
                or is not in row-major order.
        """
        value = unwrap_parameter(value)
        if not isinstance(value, Record) or value.name not in REBUILD_TENSOR or not value.args or len(value.args) < 4:
            return None
        storage, offset, shape, strides = value.args[:4]
        named_dtype = value.args[6] if value.name == "_rebuild_tensor_v3" and len(value.args) > 6 else None
        if not (are_sizes(shape) and are_sizes(strides) and are_sizes((offset,)) and len(shape) == len(strides)):
            raise self._make_error(name, "has an invalid shape")
        dtype, begin, size = self._locate_storage(storage, name)
        if isinstance(named_dtype, Record):
            dtype = named_dtype.name
        if dtype not in WIDTH:
            raise self._make_error(name, f"has the unsupported dtype {dtype}")
        count, width = math.prod(shape), WIDTH[dtype]
        if count and not _is_row_major(shape, strides):
            raise self._make_error(name, f"is not stored in row-major order (strides {list(strides)})")
        if (offset + count) * width > size:
            raise self._make_error(name, f"needs {(offset + count) * width:,} bytes, but its storage has {size:,}")
        return StoredTensor(self.file, name, dtype, tuple(shape), begin + offset * width)

    def _locate_storage(self, storage: Any, name: str) -> tuple[str, int, int]:
        """Return the dtype of a storage, the position of its first byte in the file, and its number of bytes."""
        id_ = storage.id if isinstance(storage, Persistent) else None
        if not isinstance(id_, tuple) or len(id_) < 3 or id_[0] != "storage" or not isinstance(id_[1], Record):
            raise self._make_error(name, "has no storage in the file")
        info = self._entries.get(f"data/{id_[2]}") if isinstance(id_[2], str) else None
        if info is None:
            raise self._make_error(name, f"has its storage in data/{describe(id_[2])}, which is missing")
        # The entry's data follows its own header: 30 bytes, its name, and padding.
        header = bytearray(30)
        self.file.fill(memoryview(header), self._offset + info.header_offset, name)
        if header[:4] != b"PK\3\4":
            raise self._make_error(name, "has its storage at a wrong position")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return STORAGES.get(id_[1].name, id_[1].name), self._offset + info.header_offset + 30 + lengths, info.file_size

    def _make_error(self, name: str, problem: str) -> InputError:
        return InputError(f"{self.file.path}: {name} {problem}; save it again")


def unwrap_parameter(value: Any) -> Any:
    """Return the tensor inside a parameter; any other value unchanged."""
    for _ in range(4):
        if not isinstance(value, Record) or value.name not in REBUILD_PARAMETER or not value.args:
            break
        value = value.args[0]
    return value


def are_sizes(values: Any) -> bool:
    """Return whether a value of a pickle is a shape, or offsets or strides of one."""
    return (
        isinstance(values, tuple | list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class _Window(io.RawIOBase):
    """A part of a file as a separate stream."""

    def __init__(self, file: FileBytes, span: tuple[int, int], description: str) -> None:
        self._file, (self._offset, self._length), self._description = file, span, description
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if position < 0:
            raise ValueError(f"position {position} is before the start")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        if count:
            self._file.fill(memoryview(buffer)[:count], self._offset + self._position, self._description)
        self._position += count
        return count
