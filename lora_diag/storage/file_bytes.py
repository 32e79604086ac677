"""Read ranges of bytes of one file, local or remote, and tensors in them; count the bytes of local
files.

Numbers are decoded with NumPy exactly: every floating-point format of at most 32 bits is a subset
of float32.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.errors import InputError
from lora_diag.files import open_descriptor
from lora_diag.storage.remote import RemotePath
from lora_diag.storage.tensors import FLOAT8, WIDTH

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32] | NDArray[np.float64]

# Formats that NumPy has: torch's name -> NumPy's.
_NUMPY_DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}


class Reading:
    """Bytes that this process has read from local files, counted where they arrive.

    Not counted: headers of safetensors and GGUF, JSON, pickled indices, files that torch loads or
    maps, and what workers in other processes or on other machines read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_file: dict[str, int] = {}  # paths as text, which is hashed once

    def add(self, path: str, count: int) -> None:
        """Count bytes of a file."""
        with self._lock:
            self._by_file[path] = self._by_file.get(path, 0) + count

    def clear(self) -> None:
        """Forget what was read."""
        with self._lock:
            self._by_file.clear()

    def total(self) -> tuple[int, int, int]:
        """Return the bytes read, the number of files, and the total size of those that
        still exist.
        """
        with self._lock:
            bytes_by_file = dict(self._by_file)
        return (
            sum(bytes_by_file.values()),
            len(bytes_by_file),
            sum(Path(path).stat().st_size for path in bytes_by_file if Path(path).exists()),
        )


READING = Reading()


class FileBytes:
    """The bytes of a file, read by ``pread`` or by requests: no page stays resident, and a short
    file gives a message.

    Args:
        path: The file; opened at the first read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = str(path)
        self._descriptor: int | None = None

    def fill(self, buffer: memoryview, offset: int, name: str) -> None:
        """Fill a buffer with the bytes from ``offset`` on.

        Args:
            buffer: The memory to fill.
            offset: First byte of the file.
            name: The tensor, for messages.

        Raises:
            InputError: The file ends before the buffer is full, or cannot be read.
        """
        if isinstance(self.path, RemotePath):
            self.path.read_into(buffer, offset)
            return
        done = 0
        try:
            if self._descriptor is None:
                self._descriptor = open_descriptor(self.path)
            while done < len(buffer):  # one pread returns at most 2 GiB
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise InputError(
                        f"{self.path}: the file ends inside {name}; copy or download it again"
                    )
                done += count
                READING.add(self._name, count)
        except OSError as error:
            raise InputError(f"{self.path}: cannot read {name}: {error.strerror}") from error

    @cached_property
    def size(self) -> int:
        """Number of bytes of the file.

        Raises:
            OSError: The file cannot be found.
            InputError: A remote file cannot be found.
        """
        return self.path.stat().st_size

    def make_notes(self) -> tuple[str, ...]:
        """Return a note if changes of a remote file are not detected, since its server reports no
        version.
        """
        if not isinstance(self.path, RemotePath) or self.path.file_info().version:
            return ()
        return (
            f"the server reports no version of {self.path.name}: changes during the run are not "
            "detected",
        )

    def read_bytes(self, count: int, offset: int, name: str) -> bytes:
        """Return ``count`` bytes from ``offset`` on; ``name`` is the tensor, for messages."""
        content = bytearray(count)
        self.fill(memoryview(content), offset, name)
        return bytes(content)

    def read_entries(self, count: int, dtype: torch.dtype, offset: int, name: str) -> torch.Tensor:
        """Return ``count`` entries from byte ``offset`` on; messages have the tensor's ``name``."""
        import torch  # imported here, so that headers can be read without torch

        out = torch.empty(count, dtype=dtype)
        self.fill(memoryview(out.view(torch.uint8).numpy().data), offset, name)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open descriptor: a copy in another process opens its own."""
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in row-major order at a position in a file.

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

    def fill(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with the bytes of the entries from ``start`` on."""
        self.file.fill(buffer, self.position + start * WIDTH[self.dtype], self.name)

    def read_bytes(self) -> bytes:
        """Return the bytes of a small tensor."""
        return self.file.read_bytes(self.numel * WIDTH[self.dtype], self.position, self.name)

    def cut(self, start: int, count: int) -> StoredTensor:
        """Return ``count`` entries from ``start`` on as a vector."""
        return StoredTensor(
            self.file, self.name, self.dtype, (count,), self.position + start * WIDTH[self.dtype]
        )


def is_native(dtype: str) -> bool:
    """Return whether the bytes are the numbers themselves, so that ``decode`` copies nothing."""
    return dtype in {"float64", "float32"}


def decode(content: NDArray[np.uint8], dtype: str) -> Numbers:
    """Return the numbers encoded by little-endian bytes, in float32, or in float64 if they are
    stored so.

    Args:
        content: The bytes; the result shares their memory if ``is_native``.
        dtype: One of ``tensors.DECODED``.

    Example:
        >>> import numpy as np
        >>> decode(np.array([0x80, 0x3F, 0x20, 0xC1], np.uint8), "bfloat16").tolist()
        [1.0, -10.0]
    """
    import numpy as np  # imported here, so that headers are read without NumPy

    if dtype in FLOAT8:
        return _make_table(dtype)[content.astype(np.intp)]
    if dtype == "bfloat16":  # the upper half of a float32
        bits = content.view("<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if is_native(dtype):
        return content.view(_NUMPY_DTYPES[dtype])
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return content.view(_NUMPY_DTYPES[dtype]).astype(np.float32)


@cache
def _make_table(dtype: str) -> NDArray[np.float32]:
    """Return the numbers of all 256 codes of an 8-bit format."""
    import numpy as np

    mantissa_bits, bias, kind = FLOAT8[dtype]
    codes = np.arange(256)
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (codes & 0x7F) >> mantissa_bits
    magnitude = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias)
    )
    if kind == "ieee":
        top = exponent == 0x7F >> mantissa_bits
        magnitude = np.where(top, np.where(fraction == 0, np.inf, np.nan), magnitude)
    elif kind == "fn":
        magnitude[[0x7F, 0xFF]] = np.nan
    else:
        magnitude[0x80] = np.nan
    return np.where(codes < 0x80, magnitude, -magnitude).astype(np.float32)
