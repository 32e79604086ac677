"""Write a GGUF file tensor by tensor, to a temporary file that is then renamed.

Only one tensor is in memory at a time, and the same tensors always give the same bytes.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diag.checkpoints.gguf import ALIGNMENT, MAGIC, STRING, TYPES
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.checkpoints.writing import content
from lora_diag.files import replacing

if TYPE_CHECKING:
    import torch

# torch's dtype name -> code of the type.
CODES = {kind.dtype: code for code, kind in TYPES.items() if kind.dtype is not None}

# Types of fields: a string, a number as float32, a whole number as uint32.
_FIELDS = {float: (6, "<f"), int: (4, "<I")}


def write_gguf(
    path: Path,
    fields: Mapping[str, str | int | float],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Write a GGUF file.

    Args:
        path: The file, in a folder that loradiag creates.
        fields: The header's fields, ``general.architecture`` among them.
        tensors: Shape and dtype of every tensor by its name, in the order of the file.
        read: Returns a tensor by its name; called once per tensor, in the order of the file.

    Raises:
        InputError: The file cannot be written.
    """
    with replacing(path) as file:
        header = _make_header(fields, tensors)
        file.write(header + bytes(-len(header) % ALIGNMENT))
        for name, info in tensors.items():
            data = content(name, info, read(name))
            file.write(data)
            file.write(bytes(-len(data) % ALIGNMENT))


def _make_header(fields: Mapping[str, str | int | float], tensors: Mapping[str, TensorInfo]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        if isinstance(value, str):
            parts += [_encode_text(key), struct.pack("<I", STRING), _encode_text(value)]
        else:
            kind, form = _FIELDS[type(value)]
            parts += [_encode_text(key), struct.pack("<I", kind), struct.pack(form, value)]
    begin = 0
    for name, info in tensors.items():
        code = CODES[info.dtype]
        dimensions = info.shape[::-1]
        parts += [_encode_text(name), struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, code, begin)]
        size = info.numel * TYPES[code].size
        begin += size + -size % ALIGNMENT
    return b"".join(parts)


def _encode_text(value: str) -> bytes:
    content = value.encode()
    return struct.pack("<Q", len(content)) + content
