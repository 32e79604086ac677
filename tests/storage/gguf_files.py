"""GGUF files written by hand, from the specification of the container."""

import math
import struct

import numpy as np

# Name of a type -> its code, and the entries and bytes of a block.
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144), "MXFP4": (39, 32, 17),
}  # fmt: skip


def _text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _field(value):
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
    return (
        struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
    )


def write_gguf(path, fields, tensors):
    """Write a GGUF file.

    Args:
        path: The file.
        fields: Key -> text, whole number, float or list of whole numbers.
        tensors: Name -> array, stored as float32; or (type, shape, bytes).
    """
    rows, data = [], b""
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            value = ("F32", value.shape, value.astype("<f4").tobytes())
        kind, shape, content = value
        code, block, size = TYPES[kind]
        assert len(content) == math.prod(shape) // block * size
        data += bytes(-len(data) % 32)
        rows.append(
            _text(name)
            + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, len(data))
        )
        data += content
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(fields))
    head += b"".join(_text(key) + _field(value) for key, value in fields.items()) + b"".join(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def llama(heads=4, heads_kv=2, **fields):
    """Return the fields of a Llama model."""
    counts = {"llama.attention.head_count": heads, "llama.attention.head_count_kv": heads_kv}
    return {"general.architecture": "llama", **counts, **fields}
