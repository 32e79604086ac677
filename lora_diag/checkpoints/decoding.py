"""Decode stored numbers with NumPy, exactly: every format of at most 32 bits is a subset of float32."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lora_diag.checkpoints.tensors import FLOAT8

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32] | NDArray[np.float64]

# Formats that NumPy has: torch's name -> NumPy's.
_NUMPY_DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}


def is_native(dtype: str) -> bool:
    """Return whether the bytes are the numbers themselves, so that ``decode`` copies nothing."""
    return dtype in {"float64", "float32"}


def decode(content: NDArray[np.uint8], dtype: str) -> Numbers:
    """Return the numbers encoded by little-endian bytes, in float32, or in float64 if they are stored so.

    Args:
        content: The bytes; the result shares their memory if ``is_native``.
        dtype: One of ``tensors.DECODED``.

    Example:
        >>> decode(np.array([0x80, 0x3F, 0x20, 0xC1], np.uint8), "bfloat16").tolist()
        [1.0, -10.0]
    """
    if dtype in FLOAT8:
        return _make_table(dtype)[content.astype(np.intp)]
    if dtype == "bfloat16":  # the upper half of a float32
        upper_halves = content.view("<u2")
        bits = np.empty(len(upper_halves), np.uint32)
        np.left_shift(upper_halves, 16, out=bits, dtype=np.uint32)
        return bits.view(np.float32)
    if is_native(dtype):
        return content.view(_NUMPY_DTYPES[dtype])
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return content.view(_NUMPY_DTYPES[dtype]).astype(np.float32)


@cache
def _make_table(dtype: str) -> NDArray[np.float32]:
    """Return the numbers of all 256 codes of an 8-bit format."""
    mantissa_bits, bias, kind = FLOAT8[dtype]
    codes = np.arange(256)
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (codes & 0x7F) >> mantissa_bits
    magnitude = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if kind == "ieee":
        top = exponent == 0x7F >> mantissa_bits
        magnitude = np.where(top, np.where(fraction == 0, np.inf, np.nan), magnitude)
    elif kind == "fn":
        magnitude[[0x7F, 0xFF]] = np.nan
    else:
        magnitude[0x80] = np.nan
    return np.where(codes < 0x80, magnitude, -magnitude).astype(np.float32)
