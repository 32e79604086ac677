"""Write a safetensors file tensor by tensor, to a temporary file that is then renamed.

Only one tensor is in memory at a time, and the same tensors always give the same bytes.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diag.checkpoints.safetensors import DTYPES
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.files import Kind, replacing

if TYPE_CHECKING:
    import torch

# torch's dtype name -> code in the file and bytes per entry.
CODES = {name: (code, bits // 8) for code, (name, bits) in DTYPES.items() if bits >= 8}

# Alignment of the data in bytes, for readers that map the file.
ALIGNMENT = 8


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
        tensors: Shape and dtype of every tensor by its name. Tensors are ordered by decreasing width of the dtype, then
            by name, as the library does.
        read: Returns a tensor by its name; called once per tensor, in the order of the file.
        metadata: Metadata of the file, such as ``{"format": "pt"}``.
        kind: The kind of file, which determines what it may replace; None for a file in a folder that loradiag creates.
        overwrite: Replace any existing file.

    Raises:
        UsageError: See ``lora_diag.files.check_output``.
        InputError: The file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-CODES[tensors[name].dtype][1], name))
    with replacing(path, kind, overwrite) as file:
        file.write(_make_header([(name, tensors[name]) for name in order], metadata))
        for name in order:
            file.write(content(name, tensors[name], read(name)))


def _make_header(tensors: list[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    """Return the header: length and JSON, padded with spaces to the alignment of the data."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, info in tensors:
        code, width = CODES[info.dtype]
        end = begin + math.prod(info.shape) * width
        entries[name] = {"dtype": code, "shape": list(info.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def content(name: str, info: TensorInfo, tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    import torch

    if tuple(tensor.shape) != info.shape or tensor.dtype != getattr(torch, info.dtype):
        raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} does not match the declared {info}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
