"""Thin factors B and A → singular values of B·A, with NumPy alone, and sketches of it.

What ``linalg`` does with torch, for the one input that needs neither torch nor a GPU: importing
torch takes ten times as long as measuring an adapter. Sketches are of many adapters, and torch adds
up their rows in 0.4 times the time of SciPy's sparse products.

With B = Q_b R_b and Aᵀ = Q_a R_a, B·A = Q_b (R_b R_aᵀ) Q_aᵀ, so the singular values are those of
the r×r core R_b R_aᵀ. A factor that is well conditioned needs no Q: R is the Cholesky factor of
BᵀB, and the error of every σ_i is *relative*. Any other is reduced by Householder QR.

All products and decompositions are of blocks that OpenBLAS, which NumPy's wheels contain, computes
on one thread, so that the bytes of the result do not depend on the number of threads. Before NumPy
2.3, OpenBLAS starts threads for inverses from rank 30 or 40 on, and before 2.0 for Cholesky factors
of rank 64.

A sketch is a short vector; inner products of sketches estimate those of matrices, so that thousands
are compared without reading any again. Each entry X_ij is added, with a random sign s(i)t(j), to
one of d buckets, (h(i) + k(j)) mod d. Then E⟨sketch X, sketch Y⟩ = ⟨X, Y⟩. Of a product B·A the
sketch is the sum over columns of circular convolutions of those of B's column and A's row, by FFT:
a factor is read once, with one addition an entry (TensorSketch: Pham and Pagh 2013, "Fast and
scalable polynomial kernels via explicit feature maps"). What is stored in at most 32 bits is added
and transformed in float32, whose rounding is far below the error of the method. The cosine of two
sketches has an error of about (1 − c²)/√d, where c is that of the matrices; at rank one up to 2.5
times that (tests/thin/test_sketch.py). A sketch of several layers is the sum of theirs, each with
its own random signs, so that products of different layers are zero on average.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diag.scratch import scratch

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32] | NDArray[np.float64]
    Array = NDArray[np.float64]
    Transforms = NDArray[np.complexfloating[Any, Any]]

# Largest rank: beyond, a block of r columns is no longer small.
MAX_RANK = 64

# OpenBLAS starts threads for products of m·n·k ≥ 2^18 (interface/gemm.c), and for m·n > 2^13
# entries of a matrix times a vector (interface/ger.c, gemv.c), of which Householder QR consists.
MAX_PRODUCT, MAX_QR_ENTRIES = 2**18, 2**13

# Rows of a product, and entries that are converted to float64 at once: half a MiB.
MAX_BLOCK_ROWS, CACHE_ENTRIES = 512, 2**16

# Least eigenvalue of XᵀX with columns scaled to norm 1, from which it is factored by Cholesky. Its
# bound is then below that of QR. Trained adapters: 0.05 and more (tests/thin/test_values.py);
# Gaussian factors 0.9.
MIN_EIGENVALUE = 1 / 32

# Largest bound on an error of C(r) for which energies are taken from Gram matrices alone; trained
# adapters: below 1e-9.
MAX_GRAM_ERROR = 1e-8

# Rows at multiples of this distance in bytes share a few lines of the cache: copying their columns
# takes twice as long for 16 rows, and six times as long for 64. With this many entries between
# them, they do not.
CACHE_STRIDE, CACHE_GAP = 4096, 16

# ‖x_i‖² within which squares and products of two factors are far from the ends of float64's range.
MIN_SQUARE, MAX_SQUARE = 1e-100, 1e100

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class ThinValues:
    """Singular values of a stack of k matrices B·A.

    Args:
        s: All min(m, n, r) that can be nonzero of each, descending, ``(k, min(m, n, r))``; of
            ``thin_energies`` r each.
        energy_error: Bounds on |Ĉ(i) − C(i)| for every i, ``(k,)``.
        fro: ‖B·A‖_F, ``(k,)``; not finite where the product overflows.
        mix: W with B·W the left singular vectors, ``(k, r, s.shape[1])``, where σ > 0; None if not
            requested. Accurate for values that are not far below σ_1.
    """

    s: Array
    energy_error: Array
    fro: Array
    mix: Array | None = None


@dataclass(frozen=True, slots=True)
class Triangles:
    """R of X = QR of each X of a stack, scaled.

    Args:
        r: R/scale, ``(k, min(m, r), r)``.
        scale: The scales, ``(k,)``.
        relative: R is that of (I + E)X with ‖E‖_2 ≤ relative.
        backward: Then R is that of X + E with ‖E‖_F ≤ backward·‖X‖_F.
    """

    r: Array
    scale: Array
    relative: Array
    backward: Array


@dataclass(frozen=True, slots=True)
class Grams:
    """XᵀX of each X of a stack.

    Args:
        products: XᵀX, ``(k, r, r)``.
        terms: Numbers of terms t: entry (i, j) has an error of at most t·ε·‖x_i‖‖x_j‖, ``(k,)``.
    """

    products: Array
    terms: NDArray[np.int64]


def thin_values(
    left: Triangles, right: Triangles, factor: float | Array = 1.0, vectors: bool = False
) -> ThinValues:
    """Compute the singular values of every s·B·A of a stack.

    Args:
        left: Triangles of B, ``(m, r)``, r ≤ ``MAX_RANK``.
        right: Triangles of Aᵀ, ``(n, r)``.
        factor: s, one or ``(k,)``.
        vectors: Whether to compute ``mix``. B·A·v = σu, and A applied to right singular vectors Q_a
            V is R_aᵀV.

    Returns:
        The values; infinite where they overflow. With relative errors η_b, η_a and backward errors
            β_b, β_a of the
        two triangles, every computed value is that of a matrix with σ_i(1 ± η), η = η_b + η_a, and
            an error of at most
        δ = (β_b + β_a + κ)·‖B‖_F‖A‖_F, where κ = (r² + r)·ε covers the product R_b R_aᵀ and its
            decomposition. Hence
        Σ|σ̂_i² − σ_i²| ≤ (2η + η²)Σσ_i² + 2δ√(pΣσ_i²) + pδ² for p values, by Cauchy–Schwarz.
    """
    rank = left.r.shape[2]
    core = left.r @ right.r.transpose(0, 2, 1)
    vh = None
    if vectors:
        _, s, vh = np.linalg.svd(core, full_matrices=False)
    else:
        s = np.asarray(np.linalg.svd(core, compute_uv=False), np.float64)
    energy, count = _sum_squares(s), s.shape[1]
    divisor = np.where(energy > 0, energy, 1.0)
    eta = left.relative + right.relative
    delta = (left.backward + right.backward + (rank**2 + rank) * EPS) * np.sqrt(
        _sum_squares(left.r) * _sum_squares(right.r)
    )
    error = 2 * eta + eta**2 + (2 * delta * np.sqrt(count * energy) + count * delta**2) / divisor
    mix = None
    if vh is not None:
        sizes = np.where(s > 0, s, 1.0) * left.scale[:, None]
        mix = (right.r.transpose(0, 2, 1) @ vh.transpose(0, 2, 1)) / sizes[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        scale = left.scale * right.scale * np.abs(factor)
        bound = np.where(energy > 0, np.minimum(error, 1.0), 0.0)
        return ThinValues(s * scale[:, None], bound, np.sqrt(energy) * scale, mix)


def thin_energies(left: Grams, right: Grams, factor: Array) -> ThinValues:
    """Compute the energies of every s·B·A of a stack, faster than ``thin_values``: small σ_i are
    not accurate.

    With columns b_i scaled to norm 1 and the rows of A in turn, AAᵀ = LLᵀ, and σ_i² are the
    eigenvalues of LᵀBᵀBL. An error E of BᵀB moves them by at most ‖E‖_2‖L‖_F² together, one of LLᵀ
    by ‖E‖_2‖B‖_F², one of the r×r matrix by √r·‖E‖_F; these are t_b·ε·‖B‖_F², (t_a + r +
    1)·ε·‖A‖_F² (Higham 2002, theorem 10.3), and that of two products and the decomposition, (r² +
    2r)·ε·‖B‖_F²‖A‖_F².

    Args:
        left: BᵀB of each B.
        right: AAᵀ of each A.
        factor: s, ``(k,)``.

    Returns:
        The values, with ``mix``; ``energy_error`` is 1 where a ‖b_i‖ or ‖a_i‖ is near the ends of
            the range, a
        decomposition does not exist, or the bound on the error of the energy is half of it or more.
    """
    rank = left.products.shape[1]
    squares = [side.products.diagonal(axis1=1, axis2=2) for side in (left, right)]
    usable = _in_range(squares[0]) & _in_range(squares[1])
    b, a = (np.where(usable[:, None, None], side.products, np.eye(rank)) for side in (left, right))
    norms = np.sqrt(np.where(usable[:, None], squares[0], 1.0))
    outer = norms[:, :, None] * norms[:, None, :]
    lower, exists = _factor_cholesky(a * outer)
    energies, vectors = np.linalg.eigh(lower.transpose(0, 2, 1) @ (b / outer) @ lower)
    energies, vectors = np.maximum(energies[:, ::-1], 0.0), vectors[:, :, ::-1]
    total, s = energies.sum(axis=1), np.sqrt(energies)
    terms = left.terms + right.terms + rank + 1 + (rank**2 + 2 * rank) * math.sqrt(rank)
    mix = lower @ vectors / np.where(s > 0, s, 1.0)[:, None] / norms[:, :, None]
    scale = np.abs(factor)
    with np.errstate(over="ignore", invalid="ignore"):
        bound = rank * (squares[0] * squares[1]).sum(axis=1) * EPS * terms  # of Σ|σ̂_i² − σ_i²|
        is_bounded = usable & exists & (total > 2 * bound)
        error = np.where(is_bounded, 2 * bound / np.where(total > 0, total, 1.0), 1.0)
        return ThinValues(s * scale[:, None], error, np.sqrt(total) * scale, mix)


def _sum_squares(x: Array) -> Array:
    """Return the sum of squares of each of a stack."""
    return np.asarray(np.square(x).reshape(len(x), -1).sum(axis=1), np.float64)


def compute_triangle(x: Numbers) -> Triangles | None:
    """Return R of one X ``(m, r)``, as a stack of one; None if an entry is not finite."""
    grams = compute_grams(x[None])
    squares = grams.products[0].diagonal()
    if not np.isfinite(squares).all() and not np.isfinite(x).all():
        return None
    if not _in_range(squares):
        return _reduce_by_reflections(x, _choose_scale(x))
    triangle, conditioned = reduce_grams(grams)
    return triangle if conditioned.all() else _reduce_by_reflections(x)


def _in_range(squares: Array) -> NDArray[np.bool_]:
    """Return whether all ‖x_i‖² are far from the ends of the range, for each of a stack."""
    return np.asarray((squares >= MIN_SQUARE).all(axis=-1) & (squares <= MAX_SQUARE).all(axis=-1))


def compute_grams(stack: Numbers) -> Grams:
    """Return XᵀX of each X of a stack ``(k, m, r)``, summed over blocks of rows.

    A few blocks at a time are converted to float64, so that they are in the cache when they are
    multiplied.
    """
    count, rows, rank = stack.shape
    block = _choose_block_rows(rows, rank)
    if count > 1 and rows % block:
        grams = [compute_grams(x[None]) for x in stack]
        return Grams(
            np.concatenate([gram.products for gram in grams]),
            np.concatenate([gram.terms for gram in grams]),
        )
    x, per_matrix = stack.reshape(-1, rank), -(-rows // block)
    step = block * max(1, CACHE_ENTRIES // (block * rank))
    products_of_blocks = np.empty((count * per_matrix, rank, rank))
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(x), step):
            part = _to_float64(x[first : first + step])
            blocks, index = len(part) // block, first // block
            _multiply(
                part[: blocks * block].reshape(blocks, block, rank),
                products_of_blocks[index : index + blocks],
            )
            if len(part) > blocks * block:
                _multiply(
                    part[None, blocks * block :],
                    products_of_blocks[index + blocks : index + blocks + 1],
                )
        products = products_of_blocks.reshape(count, per_matrix, rank, rank).sum(axis=1)
    return Grams(products, np.full(count, min(rows, block) + per_matrix))


@cache
def _choose_block_rows(rows: int, rank: int) -> int:
    """Return the number of rows of a block: a divisor of all if there is one that is not small."""
    largest = max(1, min(rows, MAX_BLOCK_ROWS, (MAX_PRODUCT - 1) // (rank * (rank - rank // 2))))
    return next((block for block in range(largest, largest // 2, -1) if rows % block == 0), largest)


def _to_float64(part: Numbers) -> Array:
    """Return rows of a factor in float64, in their order in memory; those converted are valid until
    the next call.
    """
    if part.dtype == np.float64:
        return part.astype(np.float64, copy=False)
    memory = scratch("float64", part.size, np.float64)
    converted = (
        memory.reshape(part.shape)
        if part.flags.c_contiguous
        else memory.reshape(part.shape[::-1]).T
    )
    np.copyto(converted, part)
    return converted


def _multiply(stack: Array, out: Array) -> None:
    """Write XᵀX of each X of a stack to ``out``, as two halves.

    For the whole, NumPy would call syrk, which first copies X into an arrangement for larger
    matrices: 0.9 ns an entry of 16 columns instead of 0.5.
    """
    transposed, half = stack.transpose(0, 2, 1), stack.shape[2] // 2
    np.matmul(transposed[:, :half], stack, out=out[:, :half])
    np.matmul(transposed[:, half:], stack, out=out[:, half:])


def reduce_grams(grams: Grams) -> tuple[Triangles, NDArray[np.bool_]]:
    """Return R from each XᵀX of a stack by Cholesky, and which X are well conditioned: the others
    have no valid R.

    XᵀX is scaled to a unit diagonal, H, which changes no rounding error relative to ‖x_i‖‖x_j‖.
    Each entry has an error of at most (t + r + 2)·ε, from the product and from Cholesky (Higham
    2002, theorem 10.3), so RᵀR = Xᵀ(I + F)X on the range of X with ‖F‖_2 ≤ r(t + r + 2)·ε/λ_min(H),
    and R = Uᵀ(I + F)^½X. λ_min(H) = 1/‖L⁻¹‖_2² ≥ 1/(‖L⁻¹‖_1‖L⁻¹‖_∞), which is near it where the
    columns are nearly orthogonal, as those of most adapters, and ≥ 1/‖L⁻¹‖_F².
    """
    products, terms = grams.products, grams.terms
    count, rank = products.shape[:2]
    squares = products.diagonal(axis1=1, axis2=2)
    usable = _in_range(squares)
    norms = np.sqrt(np.where(usable[:, None], squares, 1.0))
    unit = np.where(usable[:, None, None], products, np.eye(rank)) / (
        norms[:, :, None] * norms[:, None, :]
    )
    lower, exists = _factor_cholesky(unit)
    inverse = np.abs(np.linalg.inv(lower))
    smallest = 1 / np.minimum(
        inverse.sum(axis=1).max(axis=1) * inverse.sum(axis=2).max(axis=1), _sum_squares(inverse)
    )
    result = Triangles(
        lower.transpose(0, 2, 1) * norms[:, None, :],
        np.ones(count),
        rank * (terms + rank + 2) * EPS / smallest,
        np.zeros(count),
    )
    return result, usable & exists & (smallest >= MIN_EIGENVALUE)


def _factor_cholesky(stack: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return Cholesky factors, and which of them exist; I for a matrix that is not positive
    definite.
    """
    try:
        return np.asarray(np.linalg.cholesky(stack), np.float64), np.ones(len(stack), bool)
    except np.linalg.LinAlgError:
        if len(stack) == 1:
            return np.eye(stack.shape[1])[None], np.zeros(1, bool)
        parts = [_factor_cholesky(matrix[None]) for matrix in stack]
        factors, exist = zip(*parts, strict=True)
        return np.concatenate(factors), np.concatenate(exist)


def _choose_scale(x: Numbers) -> float:
    """Return a power of two near the largest entry, by which division is exact; 1 for zeros."""
    largest = float(np.abs(x).max())
    return 2.0 ** max(math.frexp(largest)[1] - 1, -1000) if largest else 1.0


def _reduce_by_reflections(x: Numbers, scale: float = 1.0) -> Triangles:
    """Return R of X/scale by Householder QR of blocks of rows, and of their triangles, until one is
    left.

    Each QR of p rows has a backward error of p·r·ε (Higham 2002, theorem 19.4), and they add up
    along the path from a row to the last triangle. Reference: Demmel, Grigori, Hoemmen, Langou
    2012, "Communication-optimal parallel and sequential QR and LU factorizations" (TSQR).
    """
    rank = x.shape[1]
    block = max(2 * rank, MAX_QR_ENTRIES // rank)
    remaining, path = x.astype(np.float64, copy=False), 0
    if scale != 1.0:
        remaining = remaining / scale
    while len(remaining) > block:
        count = -(-len(remaining) // block)
        rows = -(-len(remaining) // count)
        if count * rows > len(remaining):
            remaining = np.concatenate([remaining, np.zeros((count * rows - len(remaining), rank))])
        remaining = _triangularize(remaining.reshape(count, rows, rank)).reshape(-1, rank)
        path += rows
    path += len(remaining)
    return Triangles(
        _triangularize(remaining)[None],
        np.array([scale]),
        np.zeros(1),
        np.array([path * rank * EPS]),
    )


def _triangularize(stack: Array) -> Array:
    """Return R of each matrix of a stack."""
    triangle: Any = np.linalg.qr(stack, mode="r")  # NumPy 2.4 declares another type
    return np.asarray(triangle, np.float64)


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
        return np.asarray(sketch_products(left[None], right[None], [name])[0])
    rows = fold(matrix, ROWS)
    both = fold(rows.T, COLUMNS)  # (buckets of columns, buckets of rows)
    buckets = np.arange(LENGTH)
    return np.asarray(
        both[(buckets[:, None] - buckets) % LENGTH, buckets].sum(axis=1) * _draw_signs(name)
    )


def to_row_major(x: Numbers) -> Numbers:
    """Return X in rows, for which products and sums take less time.

    Args:
        x: X, any shape.

    Returns:
        X itself if it is in rows, else a copy in memory of this thread, valid until the next call.
    """
    if x.flags.c_contiguous:
        return x
    if x.strides[-1] % CACHE_STRIDE == 0:
        *stack, rows, columns = x.shape
        shape = (*stack, columns, rows + CACHE_GAP)
        apart: Numbers = (
            scratch("apart", math.prod(shape), x.dtype).reshape(shape)[..., :rows].swapaxes(-1, -2)
        )
        np.copyto(apart, x)
        x = apart
    copied: Numbers = scratch("turned", x.size, x.dtype).reshape(x.shape)
    np.copyto(copied, x)
    return copied


def fold(x: Numbers, by: str) -> Numbers:
    """Return the rows of X added up in the buckets of a hash, in the precision of X if they fit it.

    Args:
        x: X ``(m, k)``, or a stack of several.
        by: ``ROWS`` or ``COLUMNS``, the hash of rows or columns of ΔW; ``BOTH`` for the first above
            the second.

    Returns:
        ``(…, LENGTH, k)``, of both hashes ``(…, 2·LENGTH, k)``.
    """
    import torch

    x = to_row_major(x)
    *stack, rows, columns = x.shape
    order, starts, signs = _make_buckets(rows, by, x.dtype, math.prod(stack))
    table = torch.from_numpy(x.reshape(-1, columns))
    # what torch.nn.functional.embedding_bag calls after 10 us of checks; mode 0 is the sum
    sums = torch.embedding_bag(table, order, starts, False, 0, False, signs)[0]
    folded: Numbers = sums.numpy().reshape(*stack, -1, columns)
    if x.dtype != np.float64 and not np.isfinite(folded).all():  # sums beyond the range of float32
        return fold(x.astype(np.float64), by)
    return folded


def transform(folded: Numbers) -> Transforms:
    """Return the Fourier transforms ``(…, LENGTH/2 + 1, k)`` of folded columns ``(…, LENGTH, k)``,
    in their precision.

    Those of B·W are those of B, times W. SciPy transforms several columns at once, in float32 five
    times as fast as NumPy in float64.
    """
    from scipy.fft import rfft

    transforms: Transforms = rfft(folded, axis=-2)
    return transforms


def sketch_products(left: Transforms, right: Transforms, names: Sequence[str]) -> Array:
    """Return the sketches ``(k, LENGTH)`` of a stack of B·A.

    Args:
        left: The transforms of the folded columns of each B, ``(k, LENGTH/2 + 1, r)``.
        right: Those of each Aᵀ.
        names: Names of the layers.
    """
    from scipy.fft import irfft

    sketches = irfft(np.einsum("kdr,kdr->kd", left, right), LENGTH)
    return np.asarray(sketches * np.stack([_draw_signs(name) for name in names]), np.float64)


def mix_columns(transforms: Transforms, mix: Array) -> Transforms:
    """Return the transforms of the columns of each B·W of a stack from those of B, on
    one thread.
    """
    block, converted = (
        max(1, (MAX_PRODUCT - 1) // (mix.shape[1] * mix.shape[2])),
        mix.astype(transforms.dtype),
    )
    products: Transforms = np.empty_like(transforms, shape=(*transforms.shape[:2], mix.shape[2]))
    for first in range(0, transforms.shape[1], block):
        np.matmul(
            transforms[:, first : first + block], converted, out=products[:, first : first + block]
        )
    return products


@lru_cache(maxsize=64)
def _make_buckets(
    dimension: int, by: str, dtype: np.dtype[Any], count: int = 1
) -> Sequence[torch.Tensor]:
    """Return the rows of ``count`` matrices by bucket, the position of each bucket's first row, and
    the rows' signs.
    """
    import torch

    hashed = [_hash_bytes(f"{which}:{dimension}", 2 * dimension) for which in by]
    buckets = np.concatenate(
        [LENGTH * i + values[:dimension].astype(np.intp) for i, values in enumerate(hashed)]
    )
    signs = np.concatenate([1.0 - 2.0 * (values[dimension:] & 1) for values in hashed])
    order = np.argsort(buckets, kind="stable")
    starts = np.searchsorted(buckets[order], np.arange(LENGTH * len(by)))
    matrix = np.arange(count)[:, None]
    rows, firsts = matrix * dimension + order % dimension, matrix * len(order) + starts
    arrays = (
        rows.ravel().astype(np.int32),
        firsts.ravel().astype(np.int32),
        np.tile(signs[order], count).astype(dtype),
    )
    return tuple(map(torch.from_numpy, arrays))


@lru_cache(maxsize=4096)
def _draw_signs(name: str) -> Array:
    """Return the random signs of a layer, ``(LENGTH,)``, each 1 or −1."""
    return np.asarray(1.0 - 2.0 * (_hash_bytes(name, LENGTH) & 1), np.float64)


def _hash_bytes(seed: str, count: int) -> NDArray[np.uint8]:
    """Return bytes that are equal in every run and with every version of NumPy."""
    return np.frombuffer(
        hashlib.shake_256(seed.encode("utf-8", "surrogateescape")).digest(count), np.uint8
    )
