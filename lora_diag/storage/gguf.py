"""The GGUF container: a header with typed fields, a table of tensors, then their aligned data.

A file is opened by its header; a tensor is read by ranges, as whole blocks of its type, on request.
Every count, length and offset is checked against the bytes of the file before anything is allocated
or skipped by it. Large arrays, such as the tokens of a vocabulary, are not kept. Names are the
file's own: their meaning is left to the caller.

To decode another type, add an entry to ``CODECS``; its blocks are already in ``TYPES``.

A file is written tensor by tensor, to a temporary file that is then renamed: only one tensor is in
memory at a time, and the same tensors always give the same bytes.

A value of a quantized type is ``d · q − m`` with an integer code q, and d and m of the block or of
one of its groups; in IQ4 it is ``d · table[q]``, and in MXFP4 a 4-bit float times a power of two.
Steps and scales follow from q, d and m, which ``gguf.quants.dequantize`` does not return, so blocks
are unpacked here.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3; version 2 differs
in nothing read here. ``ggml-quants.c`` of llama.cpp; ``gguf.quants`` 0.19, with which the tests
compare every type.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_diag.errors import InputError, damaged
from lora_diag.files import open_regular, replacing
from lora_diag.storage.file_bytes import FileBytes
from lora_diag.storage.packing import FP4, e8m0, gaps
from lora_diag.storage.safetensors import encode_tensor
from lora_diag.storage.tensors import TensorFile, TensorInfo

if TYPE_CHECKING:
    import torch


MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32

# The header of a model with 256,000 tokens takes about 10 MB.
MAX_HEADER_BYTES = 200_000_000
# A longer array is skipped; the longest that is needed has a number per block of a model.
MAX_ARRAY = 4096
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

# Value of a field; None for an array that was skipped.
Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str] | None

# Code of a field's type -> struct format.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Type:
    """A type of tensors.

    Args:
        name: Its name in GGML.
        block: Entries per block.
        size: Bytes per block.
        dtype: torch's name if the bytes are the values; None if they are decoded (to float32).
    """

    name: str
    block: int
    size: int
    dtype: str | None = None


# Code of a tensor's type -> the type.
TYPES = {
    0: Type("F32", 1, 4, "float32"), 1: Type("F16", 1, 2, "float16"), 2: Type("Q4_0", 32, 18),
    3: Type("Q4_1", 32, 20), 6: Type("Q5_0", 32, 22), 7: Type("Q5_1", 32, 24),
    8: Type("Q8_0", 32, 34), 9: Type("Q8_1", 32, 40), 10: Type("Q2_K", 256, 84),
    11: Type("Q3_K", 256, 110), 12: Type("Q4_K", 256, 144), 13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210), 15: Type("Q8_K", 256, 292), 16: Type("IQ2_XXS", 256, 66),
    17: Type("IQ2_XS", 256, 74), 18: Type("IQ3_XXS", 256, 98), 19: Type("IQ1_S", 256, 50),
    20: Type("IQ4_NL", 32, 18), 21: Type("IQ3_S", 256, 110), 22: Type("IQ2_S", 256, 82),
    23: Type("IQ4_XS", 256, 136), 24: Type("I8", 1, 1, "int8"), 25: Type("I16", 1, 2, "int16"),
    26: Type("I32", 1, 4, "int32"), 27: Type("I64", 1, 8, "int64"),
    28: Type("F64", 1, 8, "float64"), 29: Type("IQ1_M", 256, 56),
    30: Type("BF16", 1, 2, "bfloat16"), 34: Type("TQ1_0", 256, 54), 35: Type("TQ2_0", 256, 66),
    39: Type("MXFP4", 32, 17), 40: Type("NVFP4", 64, 36), 41: Type("Q1_0", 128, 18),
}  # fmt: skip

# torch's dtype name -> code of the type.
CODES = {kind.dtype: code for code, kind in TYPES.items() if kind.dtype is not None}

# Type in Python -> code of the type of its field: float32, uint32 or text.
_FIELD_TYPES: dict[type, int] = {float: 6, int: 4, str: STRING}


# Type of a tensor, and its first byte in the file.
Span = tuple[Type, int]


class GgufFile(TensorFile):
    """One ``*.gguf`` file, opened by its header.

    Args:
        path: The file.

    Attributes:
        fields: Values of the header by their keys; None for a large array.
        metadata: Those that are strings.

    Raises:
        InputError: The file cannot be read, or its header is invalid or claims more bytes than it
            has.
    """

    label = "GGUF"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: Mapping[str, Value]
        self.fields, self.tensors, self._spans = _read_header(path)
        self.metadata = {k: v for k, v in self.fields.items() if isinstance(v, str)}
        self._content = FileBytes(path)
        self.notes = self._content.make_notes()

    @staticmethod
    def matches(path: Path) -> bool:
        """Return whether this format claims the file: by its name or its first bytes.

        Raises:
            InputError: The path is not a regular file, or a remote file cannot be read.
            OSError: The file cannot be opened.
        """
        if path.suffix == ".gguf":
            return True
        with open_regular(path) as file:
            return file.read(4) == MAGIC

    def type_of(self, name: str) -> Type:
        """Return the type in which a tensor is stored."""
        return self._spans[name][0]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major); float32 where blocks
        are decoded.
        """
        import torch

        kind, begin = self._spans[name]
        if kind.dtype is None:
            return self._decode_range(name, start, stop, self._find_codec(name).decode)
        return self._content.read_entries(
            stop - start, getattr(torch, kind.dtype), begin + start * kind.size, name
        )

    def read_bytes(self, name: str) -> bytes:
        """Return the stored bytes of a small tensor, without torch."""
        kind, begin = self._spans[name]
        return self._content.read_bytes(
            self.tensors[name].numel // kind.block * kind.size, begin, name
        )

    def read_steps(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return steps whose half bounds the error of the entries ``start:stop``; None if not
        quantized.
        """
        if self.type_of(name).dtype is not None:
            return None
        return self._decode_range(name, start, stop, self._find_codec(name).steps)

    def read_scales(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return the scales that multiply the codes of the entries ``start:stop``; None unless they
        are 8-bit codes.
        """
        if self.type_of(name).dtype is not None or not (codec := self._find_codec(name)).is_8_bit:
            return None
        return self._decode_range(name, start, stop, codec.scales)

    def _find_codec(self, name: str) -> Codec:
        kind = self.type_of(name)
        if kind.name not in CODECS:
            fix = f"give a file in one of F32, F16, BF16, {', '.join(CODECS)}"
            raise damaged(self.path, f"{name} is stored as {kind.name}, which is not decoded", fix)
        return CODECS[kind.name]

    def _decode_range(
        self, name: str, start: int, stop: int, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return the entries ``start:stop`` of a function of the blocks that hold them."""
        import torch

        kind, begin = self._spans[name]
        first, last = start // kind.block, -(-stop // kind.block)
        count, offset = max(0, last - first) * kind.size, first * kind.block
        blocks = self._content.read_entries(count, torch.uint8, begin + first * kind.size, name)
        return (
            function(blocks.view(-1, kind.size)).reshape(-1)[start - offset : stop - offset].clone()
        )


class _Cursor:
    """Reads a header from its beginning, never past the end of the file or the limit of
    a header.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.position = 0
        self.end = min(size, MAX_HEADER_BYTES)
        self.is_whole = size <= MAX_HEADER_BYTES

    def take(self, count: int, description: str) -> bytes:
        """Return the next bytes."""
        if count > self.end - self.position:
            limit = "the file ends"
            if not self.is_whole:
                limit = f"a header of more than {MAX_HEADER_BYTES:,} bytes ends"
            problem = f"{limit} inside {description}, which claims {count:,} bytes"
            raise damaged(self.path, problem, "copy or download it again")
        content = self.file.read(count)
        if len(content) != count:
            raise InputError(
                f"{self.path}: the file ends inside {description}; copy or download it again"
            )
        self.position += count
        return content

    def read_number(self, code: str, description: str) -> int:
        """Return the next whole number."""
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code), description))[0])

    def read_text(self, description: str) -> str:
        """Return the next string."""
        content = self.take(self.read_number("Q", description), description)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}: {description} is not UTF-8 text; convert the model again"
            ) from error


def _read_header(path: Path) -> tuple[dict[str, Value], dict[str, TensorInfo], dict[str, Span]]:
    """Return fields, tensors and their spans, after checking that the header describes the bytes of
    the file.
    """
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            cursor = _Cursor(file, path, size)
            if size < 24 or cursor.take(4, "the magic bytes") != MAGIC:
                raise InputError(
                    f"{path}: not a GGUF file: it does not begin with GGUF; copy or download it "
                    "again"
                )
            version = cursor.read_number("I", "the version")
            if version not in VERSIONS:
                swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
                problem = (
                    f"GGUF {'in big-endian order' if swapped else f'version {version}'} is "
                    "not supported"
                )
                raise damaged(path, problem, "convert the model again with a current llama.cpp")
            tensor_count, field_count = (
                cursor.read_number("Q", "the header"),
                cursor.read_number("Q", "the header"),
            )
            fields = _read_fields(cursor, field_count)
            rows = _read_rows(cursor, tensor_count)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise InputError(
            f"{path}: general.alignment is {alignment!r}, not a power of two; convert the model "
            "again"
        )
    return fields, *_locate_tensors(
        rows, path, cursor.position + -cursor.position % alignment, size, alignment
    )


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Value]:
    fields: dict[str, Value] = {}
    for position in range(
        count
    ):  # each takes at least 12 bytes of the file, so a false count raises an error
        key = cursor.read_text(f"the key of field {position}")
        if key in fields:
            raise InputError(
                f"{cursor.path}: the field {key!r} appears twice; convert the model again"
            )
        fields[key] = _read_value(cursor, cursor.read_number("I", key), key)
    return fields


def _read_value(cursor: _Cursor, kind: int, key: str) -> Value:
    if kind == STRING:
        return cursor.read_text(key)
    if kind == ARRAY:
        return _read_array(cursor, key)
    value: int | float | bool = _read_scalars(cursor, kind, 1, key)[0]
    return value


def _read_array(cursor: _Cursor, key: str) -> Value:
    kind, count = cursor.read_number("I", key), cursor.read_number("Q", key)
    if kind != STRING:
        values = _read_scalars(cursor, kind, count, key)
        return list(values) if len(values) == count else None
    if count <= MAX_ARRAY:
        return [cursor.read_text(key) for _ in range(count)]
    for _ in range(count):  # each takes at least 8 bytes of the file
        cursor.take(cursor.read_number("Q", key), key)
    return None


def _read_scalars(cursor: _Cursor, kind: int, count: int, key: str) -> tuple[Any, ...]:
    """Return numbers of one type; none if they are too many.

    Arrays of arrays are refused, as by llama.cpp.
    """
    if kind not in SCALARS:
        raise InputError(
            f"{cursor.path}: the field {key!r} has the unknown type {kind}; convert the model again"
        )
    content = cursor.take(count * struct.calcsize(SCALARS[kind]), key)
    return struct.unpack(f"<{count}{SCALARS[kind]}", content) if count <= MAX_ARRAY else ()


def _read_rows(cursor: _Cursor, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Return name, shape, code of the type and offset of every tensor."""
    rows: list[tuple[str, tuple[int, ...], int, int]] = []
    for position in range(count):  # each takes at least 24 bytes of the file
        name = cursor.read_text(f"the name of tensor {position}")
        dimensions = cursor.read_number("I", name)
        if dimensions > MAX_DIMENSIONS:
            raise InputError(
                f"{cursor.path}: {name} claims {dimensions:,} dimensions; at most 4 are allowed"
            )
        # The file's first dimension varies fastest.
        shape = tuple(cursor.read_number("Q", name) for _ in range(dimensions))[::-1]
        rows.append((name, shape, cursor.read_number("I", name), cursor.read_number("Q", name)))
    return rows


def _locate_tensors(
    rows: list[tuple[str, tuple[int, ...], int, int]],
    path: Path,
    start: int,
    size: int,
    alignment: int,
) -> tuple[dict[str, TensorInfo], dict[str, Span]]:
    """Return tensors, in the order of the rows, and their spans, after checking that these follow
    each other.

    Args:
        rows: Name, shape, code of the type and offset of every tensor.
        path: The file, for messages.
        start: First byte of the data.
        size: Bytes of the file.
        alignment: Alignment of the tensors in bytes.
    """
    tensors: dict[str, TensorInfo] = {}
    spans: dict[str, Span] = {}
    end = 0
    for name, shape, code, offset in sorted(rows, key=lambda row: row[3]):
        if name in tensors:
            raise InputError(f"{path}: the tensor {name!r} appears twice; convert the model again")
        if code not in TYPES:
            raise InputError(
                f"{path}: {name} has the unknown type {code}; it needs a newer version of loradiag"
            )
        kind = TYPES[code]
        if (shape[-1] if shape else 1) % kind.block:
            problem = (
                f"{name} is {kind.name} {list(shape)}, whose rows are not whole blocks of "
                f"{kind.block}"
            )
            raise damaged(path, problem, "convert the model again")
        begin, end = end + -end % alignment, offset + math.prod(shape) // kind.block * kind.size
        if offset != begin:
            problem = (
                f"{name} starts at byte {offset:,} of the data, but the tensor before it "
                f"ends at {begin:,}"
            )
            raise damaged(path, problem, "convert the model again")
        if start + end > size:
            problem = f"{name} ends at byte {start + end:,}, but the file holds {size:,}"
            raise damaged(
                path,
                problem,
                "it was cut short or is still being written: copy or download it again",
            )
        stored = None if kind.dtype is not None else kind.name.lower()
        tensors[name] = TensorInfo(name, shape, kind.dtype or "float32", stored)
        spans[name] = kind, start + offset
    return {name: tensors[name] for name, *_ in rows}, spans


def write_gguf(
    path: Path,
    fields: Mapping[str, str | int | float],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Write a GGUF file.

    Args:
        path: The file, in a folder that loradiag creates.
        fields: The header's fields, ``general.architecture`` among them; integers are written as
            uint32, floats as float32.
        tensors: Shape and dtype (one of ``CODES``) of every tensor by its name, in the order of the
            file.
        read: Returns a tensor by its name; called once per tensor, in the order of the file.
    """
    with replacing(path) as file:
        header = _make_header(fields, tensors)
        file.write(header + bytes(-len(header) % ALIGNMENT))
        for name, info in tensors.items():
            data = encode_tensor(name, info, read(name))
            file.write(data)
            file.write(bytes(-len(data) % ALIGNMENT))


def _make_header(
    fields: Mapping[str, str | int | float], tensors: Mapping[str, TensorInfo]
) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        kind = _FIELD_TYPES[type(value)]
        encoded = (
            _encode_text(value)
            if isinstance(value, str)
            else struct.pack(f"<{SCALARS[kind]}", value)
        )
        parts += [_encode_text(key), struct.pack("<I", kind), encoded]
    begin = 0
    for name, info in tensors.items():
        code, count = CODES[info.dtype], len(info.shape)
        parts += [
            _encode_text(name),
            struct.pack(f"<I{count}QIQ", count, *info.shape[::-1], code, begin),
        ]
        size = info.numel * TYPES[code].size
        begin += size + -size % ALIGNMENT
    return b"".join(parts)


def _encode_text(value: str) -> bytes:
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


# Codes ``(n, groups, width)``, and d and m of every group, ``(n, groups, 1)``; m is None where it
# is 0.
Unpacked = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None"]


@dataclass(frozen=True, slots=True)
class Codec:
    """The decoder of a type: blocks ``(n, size)`` of uint8 become numbers ``(n, block)`` of
    float32.

    Args:
        unpack: Returns codes, d and m of blocks.
        table: The value of each code; empty where that is the code itself.
        saturated: Codes as which a number one step beyond is stored, too.
        is_rounded: Whether d and m are rounded to float16 after the codes are chosen.
        is_8_bit: Whether codes have 8 bits.
    """

    unpack: Callable[[torch.Tensor], Unpacked]
    table: tuple[float, ...] = ()
    saturated: tuple[int, ...] = ()
    is_rounded: bool = False
    is_8_bit: bool = False

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return d · q − m of every code q, or d · table[q]."""
        import torch

        codes, d, m = self.unpack(blocks)
        values = d * (torch.tensor(self.table)[codes] if self.table else codes.float())
        return (values if m is None else values - m).flatten(1)

    def steps(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return steps whose half bounds the error: |d|, or its product with the gap in the table;
        more in some cases.

        Q3_K, Q4_0, Q5_0 and Q6_K map the number of largest absolute value to −2^(bits − 1), whose
        negative is not a code: it is stored one step lower. MXFP4 stores numbers up to 8 times its
        power of two as 6. Where codes are chosen before d and m are rounded to float16, that
        rounding adds up to 2⁻¹¹ of ``d · q`` and of m.
        """
        import torch

        codes, d, m = self.unpack(blocks)
        gap = gaps(torch.tensor(self.table))[codes] if self.table else torch.ones(codes.shape)
        steps = d.abs() * gap
        for code in self.saturated:
            steps = steps * (1 + (codes == code).float())
        if self.is_rounded:
            steps = steps + (d * codes.float()).abs() * 2**-10
            if m is not None:
                steps = steps + m.abs() * 2**-10
        return steps.flatten(1)

    def scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return |d|, by which codes are multiplied."""
        codes, d, _ = self.unpack(blocks)
        return d.abs().expand(codes.shape).flatten(1)


# Values of the 4-bit codes of IQ4.
IQ4 = (
    -127.0,
    -104.0,
    -83.0,
    -65.0,
    -49.0,
    -35.0,
    -22.0,
    -10.0,
    1.0,
    13.0,
    25.0,
    38.0,
    53.0,
    69.0,
    89.0,
    113.0,
)


def read_half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the float16 at a byte of every block, ``(n, 1)`` of float32."""
    import torch

    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _unpack_fields(data: torch.Tensor, bits: int, count: int, width: int) -> torch.Tensor:
    """Return the fields of ``bits`` bits of bytes ``(n, size)``,
    ``(n, size / width, count, width)``, int32.

    Of every ``width`` bytes, the lowest fields come first.
    """
    import torch

    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8)[:, None]
    return ((data.reshape(len(data), -1, 1, width) >> shifts) & ((1 << bits) - 1)).int()


def _unpack_plain(bits: int, zero: int | None, blocks: torch.Tensor) -> Unpacked:
    """Unpack Q4, Q5 or IQ4_NL: d, perhaps m, 4 bytes of fifth bits in Q5, 16 bytes of four low
    bits, low halves first.

    A code is q + ``zero``; None stands for q with an m (Q4_1, Q5_1: d · q + m).
    """
    codes = _unpack_fields(blocks[:, -16:], 4, 2, 16).reshape(-1, 1, 32)
    if bits == 5:
        codes = codes | _unpack_fields(blocks[:, -20:-16], 1, 8, 1).reshape(-1, 1, 32) << 4
    d = read_half(blocks, 0)[:, None]
    return (codes, d, -read_half(blocks, 2)[:, None]) if zero is None else (codes - zero, d, None)


def _unpack_q8_0(blocks: torch.Tensor) -> Unpacked:
    """Unpack Q8_0: d and 32 signed bytes."""
    import torch

    return blocks[:, 2:].contiguous().view(torch.int8)[:, None], read_half(blocks, 0)[:, None], None


def _unpack_q2_k(blocks: torch.Tensor) -> Unpacked:
    """Unpack Q2_K: 16 bytes with 4 bits of scale and 4 of minimum per group of 16, 64 of 2-bit
    codes, d and dmin.
    """
    scales, d, dmin = blocks[:, :16], read_half(blocks, 80), read_half(blocks, 82)
    codes = _unpack_fields(blocks[:, 16:80], 2, 4, 32).reshape(-1, 16, 16)
    return (
        codes,
        (d * (scales & 15).float())[:, :, None],
        (dmin * (scales >> 4).float())[:, :, None],
    )


def _unpack_q3_k(blocks: torch.Tensor) -> Unpacked:
    """Unpack Q3_K: 32 bytes of inverted third bits, 64 of low ones, 12 of 6-bit scales less 32 per
    group of 16, d.
    """
    low = _unpack_fields(blocks[:, 32:96], 2, 4, 32).reshape(-1, 16, 16)
    high = _unpack_fields(blocks[:, :32], 1, 8, 32).reshape(-1, 16, 16) ^ 1
    scales = _unpack_fields(blocks[:, 96:104], 4, 2, 8).reshape(-1, 16)
    scales |= _unpack_fields(blocks[:, 104:108], 2, 4, 4).reshape(-1, 16) << 4
    return low - (high << 2), (read_half(blocks, 108) * (scales - 32).float())[:, :, None], None


def _unpack_scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eight 6-bit scales and eight 6-bit minima of 12 bytes, ``(n, 8)`` each."""
    import torch

    d, m, shared = packed[:, :4].int(), packed[:, 4:8].int(), packed[:, 8:].int()
    scales = torch.cat([d & 63, (shared & 15) | ((d >> 2) & 48)], dim=1)
    return scales.float(), torch.cat([m & 63, (shared >> 4) | ((m >> 2) & 48)], dim=1).float()


def _unpack_q4_or_q5_k(bits: int, blocks: torch.Tensor) -> Unpacked:
    """Unpack Q4_K or Q5_K: d, dmin, 12 bytes of scales and minima of groups of 32, 32 of fifth
    bits, 128 of low.
    """
    scales, minima = _unpack_scales_and_minima(blocks[:, 4:16])
    codes = _unpack_fields(blocks[:, -128:], 4, 2, 32).reshape(-1, 8, 32)
    if bits == 5:
        codes = codes | _unpack_fields(blocks[:, 16:48], 1, 8, 32).reshape(-1, 8, 32) << 4
    return (
        codes,
        (read_half(blocks, 0) * scales)[:, :, None],
        (read_half(blocks, 2) * minima)[:, :, None],
    )


def _unpack_q6_k(blocks: torch.Tensor) -> Unpacked:
    """Unpack Q6_K: 128 bytes of four low bits, 64 of two high ones, 16 signed scales per group of
    16, d; q − 32.
    """
    import torch

    low = _unpack_fields(blocks[:, :128], 4, 2, 64).reshape(-1, 8, 32)
    high = _unpack_fields(blocks[:, 128:192], 2, 4, 32).reshape(-1, 8, 32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    codes = ((low | high << 4) - 32).reshape(-1, 16, 16)
    return codes, (read_half(blocks, 208) * scales)[:, :, None], None


def _unpack_iq4_xs(blocks: torch.Tensor) -> Unpacked:
    """Unpack IQ4_XS: d, 6-bit scales less 32 per group of 32 (2 bytes of high bits, 4 of low ones),
    codes as IQ4_NL.
    """
    high = _unpack_fields(blocks[:, 2:4], 2, 4, 1).reshape(-1, 8)
    low = _unpack_fields(blocks[:, 4:8], 4, 2, 1).reshape(-1, 8)
    codes = _unpack_fields(blocks[:, 8:], 4, 2, 16).reshape(-1, 8, 32)
    return codes, (read_half(blocks, 0) * ((low | high << 4) - 32).float())[:, :, None], None


def _unpack_mxfp4(blocks: torch.Tensor) -> Unpacked:
    """Unpack MXFP4: an exponent and 16 bytes of 4-bit floats, low halves first."""
    return (
        _unpack_fields(blocks[:, 1:], 4, 2, 16).reshape(-1, 1, 32),
        e8m0(blocks[:, :1])[:, None],
        None,
    )


# Name of a type -> its codec; a quantized type without one is listed, and refused when it is read.
CODECS = {
    "Q4_0": Codec(partial(_unpack_plain, 4, 8), saturated=(7,), is_rounded=True),
    "Q4_1": Codec(partial(_unpack_plain, 4, None), is_rounded=True),
    "Q5_0": Codec(partial(_unpack_plain, 5, 16), saturated=(15,), is_rounded=True),
    "Q5_1": Codec(partial(_unpack_plain, 5, None), is_rounded=True),
    "Q8_0": Codec(_unpack_q8_0, is_rounded=True, is_8_bit=True),
    "Q2_K": Codec(_unpack_q2_k),
    "Q3_K": Codec(_unpack_q3_k, saturated=(3,)),
    "Q4_K": Codec(partial(_unpack_q4_or_q5_k, 4)),
    "Q5_K": Codec(partial(_unpack_q4_or_q5_k, 5)),
    "Q6_K": Codec(_unpack_q6_k, saturated=(31,)),
    "IQ4_NL": Codec(partial(_unpack_plain, 4, 0), IQ4),
    "IQ4_XS": Codec(_unpack_iq4_xs, IQ4),
    "MXFP4": Codec(_unpack_mxfp4, FP4, saturated=(7, 15)),
}
