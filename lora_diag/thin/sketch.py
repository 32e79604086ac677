"""Short vectors whose inner products estimate those of matrices, to compare thousands without reading any again.

Each entry X_ij is added, with a random sign s(i)t(j), to one of d buckets, (h(i) + k(j)) mod d. Then E⟨sketch X, sketch
Y⟩ = ⟨X, Y⟩. Of a product B·A the sketch is the sum over columns of circular convolutions of those of B's column and A's
row, by FFT: a factor is read once, with one addition an entry (TensorSketch: Pham and Pagh 2013, "Fast and scalable
polynomial kernels via explicit feature maps"). What is stored in at most 32 bits is added and transformed in float32,
whose rounding is far below the error of the method. The cosine of two sketches has an error of about (1 − c²)/√d,
where c is that of the matrices; at rank one up to 2.5 times that (tests/thin/test_sketch.py). A sketch of several
layers is the sum of theirs, each with its own random signs, so that products of different layers are zero on average.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diag.scratch import scratch
from lora_diag.thin.values import MAX_PRODUCT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32] | NDArray[np.float64]
    Array = NDArray[np.float64]
    Transforms = NDArray[np.complexfloating[Any, Any]]

# Length of a sketch, d: a bucket is one byte of a hash.
LENGTH = 256

# The two hashes.
ROWS, COLUMNS, BOTH = "0", "1", "01"


def sketch(matrix: Array | tuple[Array, Array], name: str) -> Array:
    """Return the sketch of X, ``(LENGTH,)``.

    Args:
        matrix: X, ``(m, n)``, dense or B and A.
        name: Name of the layer, which determines its signs.
    """
    if isinstance(matrix, tuple):
        b, a = matrix
        left, right = transform(fold(b, ROWS)), transform(fold(a.T, COLUMNS))
        return np.asarray(join(left[None], right[None], [name])[0])
    rows = fold(matrix, ROWS)
    both = fold(rows.T, COLUMNS)  # (buckets of columns, buckets of rows)
    buckets = np.arange(LENGTH)
    return np.asarray(both[(buckets[:, None] - buckets) % LENGTH, buckets].sum(axis=1) * _signs(name))


def row_major(x: Numbers) -> Numbers:
    """Return X in rows, in memory of this thread if it was not: products and sums of rows then take less time."""
    if x.flags.c_contiguous:
        return x
    copied: Numbers = scratch("turned", x.size, x.dtype).reshape(x.shape)
    np.copyto(copied, x)
    return copied


def fold(x: Numbers, by: str) -> Numbers:
    """Return the rows of X added up in the buckets of a hash, in the precision of X if they fit it.

    Args:
        x: X ``(m, k)``, or a stack of several.
        by: ``ROWS`` or ``COLUMNS``, the hash of rows or columns of ΔW; ``BOTH`` for the first above the second.

    Returns:
        ``(…, LENGTH, k)``, of both hashes ``(…, 2·LENGTH, k)``.
    """
    x = row_major(x)
    *stack, rows, columns = x.shape
    buckets = _buckets(rows, by, x.dtype, math.prod(stack))
    folded: Numbers = np.asarray(buckets @ x.reshape(-1, columns)).reshape(*stack, -1, columns)
    if x.dtype != np.float64 and not np.isfinite(folded).all():  # sums beyond the range of float32
        return fold(x.astype(np.float64), by)
    return folded


def transform(folded: Numbers) -> Transforms:
    """Return the Fourier transforms of folded columns, ``(…, LENGTH, k)``, in their precision.

    Those of B·W are those of B, times W. SciPy transforms several columns at once, in float32 five times as fast as
    NumPy in float64.
    """
    from scipy.fft import rfft

    transforms: Transforms = rfft(folded, axis=-2)
    return transforms


def join(left: Transforms, right: Transforms, names: Sequence[str]) -> Array:
    """Return the sketches ``(k, LENGTH)`` of a stack of B·A.

    Args:
        left: The transforms of the folded columns of each B, ``(k, LENGTH/2 + 1, r)``.
        right: Those of each Aᵀ.
        names: Names of the layers.
    """
    from scipy.fft import irfft

    sketches = irfft(np.einsum("kdr,kdr->kd", left, right), LENGTH)
    return np.asarray(sketches * np.stack([_signs(name) for name in names]), np.float64)


def mixed(transforms: Transforms, mix: Array) -> Transforms:
    """Return the transforms of the columns of each B·W of a stack from those of B, on one thread."""
    block, converted = max(1, (MAX_PRODUCT - 1) // (mix.shape[1] * mix.shape[2])), mix.astype(transforms.dtype)
    products: Transforms = np.empty_like(transforms, shape=(*transforms.shape[:2], mix.shape[2]))
    for first in range(0, transforms.shape[1], block):
        np.matmul(transforms[:, first : first + block], converted, out=products[:, first : first + block])
    return products


@lru_cache(maxsize=64)
def _buckets(dimension: int, by: str, dtype: np.dtype[Any], count: int = 1) -> Any:
    """Return hashes as a sparse matrix of a dtype with ``count`` equal blocks ``(LENGTH·len(by), dimension)``."""
    from scipy.sparse import block_diag, csr_array

    if count > 1:
        return block_diag([_buckets(dimension, by, dtype)] * count, format="csr")
    hashed = [_bytes(f"{which}:{dimension}", 2 * dimension) for which in by]
    buckets = np.concatenate([LENGTH * i + values[:dimension].astype(np.int32) for i, values in enumerate(hashed)])
    signs = np.concatenate([1.0 - 2.0 * (values[dimension:] & 1) for values in hashed])
    rows = np.tile(np.arange(dimension), len(by))
    return csr_array((signs.astype(dtype), (buckets, rows)), shape=(LENGTH * len(by), dimension))


@lru_cache(maxsize=4096)
def _signs(name: str) -> Array:
    return np.asarray(1.0 - 2.0 * (_bytes(name, LENGTH) & 1), np.float64)


def _bytes(seed: str, count: int) -> NDArray[np.uint8]:
    """Return bytes that are equal in every run and with every version of NumPy."""
    return np.frombuffer(hashlib.shake_256(seed.encode("utf-8", "surrogateescape")).digest(count), np.uint8)
