"""The safetensors format: an 8-byte length, a JSON header, then the bytes of every tensor.

The header is parsed here and not by the library, for three reasons. Ranges are read with ``pread``
into separate memory, so pages of a 100 GB checkpoint never count as resident, and a file that
shrinks gives an error instead of a SIGBUS. Duplicate names, which the library accepts, are refused.
Opening imports no torch.

A file is written tensor by tensor, to a temporary file that is then renamed: only one tensor is in
memory at a time, and the same tensors always give the same bytes.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.errors import InputError, damaged
from lora_diag.files import Kind, open_regular, replacing
from lora_diag.storage.documents import loads
from lora_diag.storage.file_bytes import FileBytes, StoredTensor
from lora_diag.storage.tensors import DECODED, WIDTH, TensorFile, TensorInfo

if TYPE_CHECKING:
    import torch

    from lora_diag.storage.file_bytes import Numbers


# The library's own limit, which prevents huge allocations for a hostile length.
MAX_HEADER_BYTES = 100_000_000

# Bits per entry of the dtypes that take less than a byte.
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

# dtype in the file -> torch's name, or its own if torch has none.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    **{code: code for code in PACKED_BITS},
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

# Alignment of the data in bytes, for readers that map the file.
ALIGNMENT = 8


class SafetensorsFile(TensorFile):
    """One ``*.safetensors`` file, opened by its header.

    Args:
        path: The file.

    Raises:
        InputError: The file cannot be read, or its header is invalid or does not describe its bytes
            exactly.
    """

    label = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        header, data_start, data_bytes = _read_header(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise damaged(
                path, "__metadata__ in the safetensors header must map strings to strings"
            )
        self.metadata = metadata
        self.tensors, spans = _parse_tensors(header, data_bytes, path)
        self._start = {name: data_start + begin for name, (begin, _) in spans.items()}
        self._bytes = {name: end - begin for name, (begin, end) in spans.items()}
        self._content = FileBytes(path)
        self.notes = self._content.make_notes()

    def __getstate__(self) -> dict[str, Any]:
        """Make a copy open the file separately, and close it when the copy is deleted."""
        return {**self.__dict__, "_content": copy.copy(self._content)}

    @staticmethod
    def matches(path: Path) -> bool:
        """Return whether this format claims the file."""
        return path.suffix == ".safetensors"

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype).

        Raises:
            InputError: They cannot be read, or need a newer version of torch.
        """
        import torch

        dtype = getattr(torch, self.tensors[name].dtype, None)
        if dtype is None:
            problem = (
                f"{name} is stored as {self.tensors[name].dtype}, which needs a newer "
                "version of torch"
            )
            raise InputError(f"{self.path}: {problem}")
        return self._content.read_entries(
            stop - start, dtype, self._start[name] + start * dtype.itemsize, name
        )

    def locate(self, name: str) -> StoredTensor:
        """Return the place of a tensor in the file."""
        info = self.tensors[name]
        return StoredTensor(self._content, name, info.dtype, info.shape, self._start[name])

    def decodes(self, name: str) -> bool:
        """Return whether ``read_arrays`` can read a tensor."""
        return self.tensors[name].dtype in DECODED

    def read_arrays(self, names: Sequence[str]) -> Numbers:
        """Return whole tensors of one shape and dtype as a stack, float32 or float64, without
        torch.
        """
        import numpy as np  # imported here: headers are read without NumPy

        from lora_diag.scratch import scratch
        from lora_diag.storage.file_bytes import decode, is_native

        info, size = self.tensors[names[0]], self._bytes[names[0]]
        total = size * len(names)
        content = np.empty(total, np.uint8) if is_native(info.dtype) else scratch("stored", total)
        for index, name in enumerate(names):
            self._content.fill(
                content[index * size : (index + 1) * size].data, self._start[name], name
            )
        return decode(content, info.dtype).reshape(len(names), *info.shape)

    def read_range(self, name: str, start: int, stop: int) -> Numbers:
        """Return the entries ``start:stop`` of a tensor; without torch where
        ``decodes`` is true.
        """
        if not self.decodes(name):
            return super().read_range(name, start, stop)
        import numpy as np  # imported here: headers are read without NumPy

        from lora_diag.storage.file_bytes import decode

        stored = self.locate(name)
        content = np.empty((stop - start) * WIDTH[stored.dtype], np.uint8)
        stored.fill(content.data, start)
        return decode(content, stored.dtype)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        return self.read_start(name, self._bytes[name])

    def read_start(self, name: str, limit: int) -> bytes:
        """Return the first ``limit`` bytes of a tensor, without torch."""
        return self._content.read_bytes(min(limit, self._bytes[name]), self._start[name], name)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the JSON header, the offset of the data and the number of data bytes."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                claim = f"its header claims {length:,}" if size >= 8 else "needs at least 8"
                problem = f"not a complete safetensors file: it has {size:,} bytes and {claim}"
                raise damaged(path, problem, "copy or download it again")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: the safetensors header is invalid: {error}; copy or download it again"
        ) from error
    if not isinstance(header, dict):
        problem = f"the safetensors header is a {type(header).__name__}, not an object"
        raise damaged(path, problem, "copy or download it again")
    return header, 8 + length, size - 8 - length


def _parse_tensors(
    header: dict[str, Any], data_bytes: int, path: Path
) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Return description and span of every tensor, after checking that the spans cover the data
    exactly once.
    """
    tensors: dict[str, TensorInfo] = {}
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        tensors[name], spans[name] = _parse_tensor(name, entry, path)
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise damaged(
                path, f"{name} starts at byte {begin:,}, but the tensor before it ends at {end:,}"
            )
        end = stop
    if end != data_bytes:
        problem = f"the header describes {end:,} bytes of tensors, the file holds {data_bytes:,}"
        raise damaged(
            path, problem, "it was cut short or is still being written: copy or download it again"
        )
    return tensors, spans


def _parse_tensor(name: str, entry: Any, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    """Return description and span of a tensor, after checking its entry in the header."""

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(
            path, f"the header entry of {name} has no dtype, shape or data_offsets"
        ) from error
    if not isinstance(code, str) or code not in DTYPES:
        raise InputError(
            f"{path}: {name} has the unknown dtype {code!r}; update loradiag, or save it in another"
        )
    if not isinstance(shape, list) or not all(map(is_size, [*shape, begin, end])) or begin > end:
        raise InputError(
            f"{path}: the header entry of {name} has an invalid shape or offset; save the file "
            "again"
        )
    dtype = DTYPES[code]
    bits = PACKED_BITS.get(dtype) or 8 * WIDTH[dtype]
    if math.prod(shape) * bits != (end - begin) * 8:
        raise damaged(
            path,
            f"{name} is {code} {shape}, which does not match its size of {end - begin:,} bytes",
        )
    return TensorInfo(name, tuple(shape), dtype), (begin, end)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    kind: Kind | None = None,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file.

    Args:
        path: The file; an existing one is replaced once the new one is complete.
        tensors: Shape and dtype of every tensor by its name. Tensors are ordered by decreasing
            width of the dtype, then by name.
        read: Returns a tensor by its name; called once per tensor, in the order of the file.
        metadata: Metadata of the file, such as ``{"format": "pt"}``.
        kind: The kind of file, which determines what it may replace; None for a file in a folder
            that loradiag creates.
        overwrite: Replace any existing file.
    """
    order = sorted(tensors, key=lambda name: (-WIDTH[tensors[name].dtype], name))
    with replacing(path, kind, overwrite) as file:
        file.write(_make_header([(name, tensors[name]) for name in order], metadata))
        for name in order:
            file.write(encode_tensor(name, tensors[name], read(name)))


def _make_header(tensors: list[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    """Return the header: length and JSON, padded with spaces to the alignment of the data."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, info in tensors:
        end = begin + info.numel * WIDTH[info.dtype]
        entries[name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def encode_tensor(name: str, info: TensorInfo, tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order.

    Raises:
        ValueError: The tensor does not have the declared shape and dtype.
    """
    import torch

    if tuple(tensor.shape) != info.shape or tensor.dtype != getattr(torch, info.dtype):
        raise ValueError(
            f"{name}: {tuple(tensor.shape)} {tensor.dtype} does not match the declared {info}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
