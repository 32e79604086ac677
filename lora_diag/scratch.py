"""Reusable memory for temporary numbers: the system would clear new memory for every tensor."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

# Memory up to this size is kept for the next tensor.
KEPT_BYTES = 2**23

_local = threading.local()


def scratch(name: str, size: int, dtype: DTypeLike = np.uint8) -> NDArray[Any]:
    """Return memory of this thread, valid until the thread calls with the same name again.

    Args:
        name: Its purpose; the same name gives the same memory if that suffices and is at most
            ``KEPT_BYTES``.
        size: Number of entries.
        dtype: Their type.

    Returns:
        ``(size,)``, with arbitrary values.
    """
    size_bytes = size * np.dtype(dtype).itemsize
    buffer: NDArray[np.uint8] | None = getattr(_local, name, None)
    if buffer is None or len(buffer) < size_bytes:
        buffer = np.empty(size_bytes, np.uint8)
        if size_bytes <= KEPT_BYTES:
            setattr(_local, name, buffer)
    return buffer[:size_bytes].view(dtype)
