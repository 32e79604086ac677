"""Choice of a method for a matrix, in memory or within a memory limit, and timing of the methods on
this machine.

The numbers of bytes are upper bounds on peak memory, derived from the code of each method and
compared with the resident memory of real runs (tests/linalg/test_limited.py). LAPACK's workspaces
are those of its documentation: 2n² for the eigenvectors of an n×n matrix (dsyevd), negligible for
eigenvalues alone.

Timing is that of the kernels alone, with synthetic matrices; the cost of a whole run is computed in
``decisions.plan.cost``.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diag.errors import Given, MemoryLimitError, UsageError
from lora_diag.linalg.difference import difference, norm
from lora_diag.linalg.distance import BLOCK_ENTRIES
from lora_diag.linalg.exact import (
    IN_PLACE_FROM,
    Factors,
    decompose_exact,
    decompose_gram,
    gram_matrix,
    scale_of,
)
from lora_diag.linalg.krylov import LARGEST_BASIS, decompose_krylov, first_basis, may_be_cheaper
from lora_diag.linalg.streamed import ROWS, Streamed

# Default bound on the error of an energy fraction: C(r) to three digits.
TOL = 5e-4

METHODS = ("exact", "gram", "krylov")

# Up to this many rows or columns LAPACK is as fast as the Gram matrix, and more accurate in the
# smallest values.
EXACT_UP_TO = 128


def decompose(
    matrix: Tensor,
    method: str = "auto",
    top: int | None = None,
    fro: float | None = None,
    vectors: bool = False,
    tol: float = TOL,
    seed: int = 0,
) -> Factors:
    """Compute the singular values of a matrix.

    Args:
        matrix: A, ``(m, n)`` with m, n ≥ 1, float32 or float64, finite.
        method: ``exact``; ``gram``; ``krylov``, which needs ``top`` and falls back to ``gram`` if
            the spectrum is too flat, its basis too large or a solver fails; or ``auto`` for the
            cheapest whose bound meets ``tol``.
        top: Number of largest values to keep; None for all.
        fro: ‖A‖_F in float64 accuracy if known; else computed.
        vectors: Whether to compute singular vectors.
        tol: Required bound on the error of every energy fraction; ignored by ``exact`` and
            ``gram``.
        seed: Seed of random starting vectors.

    Returns:
        The values, their method, and a bound on the error of every energy fraction.

    Raises:
        UsageError: The method is unknown, or ``top`` or ``tol`` is invalid.
        InputError: No driver of ``exact`` converged.
        ValueError: The matrix has no entries, or not two dimensions.

    Example:
        >>> import torch
        >>> factors = decompose(torch.diag(torch.tensor([3.0, 4.0])))
        >>> factors.s.tolist(), factors.complete
        ([4.0, 3.0], True)
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(
            f"a matrix with entries is needed, not a tensor of shape {tuple(matrix.shape)}"
        )
    check_request(method, top, tol)
    if fro is None:
        fro = norm([matrix])
    if (scale := scale_of(fro, matrix.dtype)) != 1.0:
        scaled = decompose(matrix / scale, method, top, fro / scale, vectors, tol, seed)
        return replace(
            scaled,
            s=scaled.s * scale,
            fro=fro,
            rest=None if scaled.rest is None else scaled.rest * scale,
        )
    smaller = min(matrix.shape)
    if method == "exact" or (method == "auto" and smaller <= EXACT_UP_TO):
        return decompose_exact(matrix, fro, top, vectors)
    if top is not None and tries_krylov(matrix.shape, method, top, vectors):
        factors = decompose_krylov(matrix, fro, top, vectors, tol, seed, budget=budget_of(method))
        if factors is not None:
            return factors
    return decompose_gram(matrix, fro, top, vectors)


def tries_krylov(
    shape: tuple[int, ...], method: str, top: int | None, vectors: bool = False
) -> bool:
    """Return whether ``krylov`` is tried before a full method.

    Args:
        shape: ``(m, n)``.
        method: As in ``decompose``.
        top: Number of largest values; None for all.
        vectors: Whether to compute singular vectors.
    """
    m, n = shape
    return top is not None and (
        method == "krylov" or (method == "auto" and may_be_cheaper((m, n), top, vectors))
    )


def budget_of(method: str) -> float | None:
    """Return the budget of ``krylov``: infinite if the method was requested explicitly, else None
    for its default.
    """
    return math.inf if method == "krylov" else None


def check_request(method: str, top: int | None, tol: float) -> None:
    """Refuse an invalid method, ``top`` or ``tol``.

    Args:
        method: As in ``decompose``.
        top: Number of largest values, at least 1; None for all, which ``krylov`` does not compute.
        tol: Bound on the error of every energy fraction, between 0 and 1, both excluded.

    Raises:
        UsageError: One of them is invalid.
    """
    if method not in {"auto", *METHODS}:
        raise UsageError(Given("svd", method), f"use auto, {', '.join(METHODS)}")
    if method == "krylov" and top is None:
        raise UsageError(
            Given("svd", "krylov"),
            "computes the largest values only",
            "give $top K, or use auto",
        )
    if top is not None and top < 1:
        raise UsageError(Given("top", top), "must be at least 1")
    if not 0 < tol < 1:
        raise UsageError(Given("tol", tol), "must lie between 0 and 1")


# Memory of reading and subtracting a block: 2^20 entries of both sides as stored and as float32,
# their difference, and the spacing of their values.
READING_BYTES = 48 * 2**20

# Bytes of a float32 and a float64 number.
F4, F8 = 4, 8


@dataclass(frozen=True, slots=True)
class Allowance:
    """A computation on a matrix, and the memory limit of reading and computing.

    Args:
        limit: The limit in bytes.
        method: ``auto``, ``exact``, ``gram`` or ``krylov``.
        top: Number of largest values; None for all.
        vectors: Whether to compute singular vectors.
    """

    limit: int
    method: str = "auto"
    top: int | None = None
    vectors: bool = False

    def holds(self, shape: tuple[int, int], entry: int = F4) -> bool:
        """Return whether the whole matrix fits, with the computation.

        Args:
            shape: ``(m, n)``.
            entry: Bytes of an entry in memory.
        """
        return whole_bytes(shape, self, entry) <= self.limit


def whole_bytes(shape: tuple[int, int], allowance: Allowance, entry: int = F4) -> int:
    """Return the memory of a matrix with its decomposition in bytes.

    Args:
        shape: ``(m, n)``.
        allowance: The computation; its limit is ignored.
        entry: Bytes of an entry in memory.

    Example:
        >>> round(whole_bytes((4096, 4096), Allowance(0)) / 2**20)
        384
    """
    small, large = sorted(shape)
    matrix = entry * small * large
    if allowance.method == "exact" or (allowance.method == "auto" and small <= EXACT_UP_TO):
        vectors = 4 * F8 * small * (small + large) if allowance.vectors else 0
        return READING_BYTES + matrix + 3 * F8 * small * large + vectors
    needed = gram_bytes(shape, allowance)  # krylov may fall back to it
    if allowance.top and tries_krylov(shape, allowance.method, allowance.top, allowance.vectors):
        needed = max(needed, krylov_bytes(shape, allowance.top, int(LARGEST_BASIS * small)))
    return READING_BYTES + matrix + needed


def gram_bytes(shape: tuple[int, int], allowance: Allowance, in_place: bool = False) -> int:
    """Return the memory of ``gram`` besides the matrix in bytes: G = AᵀA, its eigenvectors with
    workspace, and A·V.

    Args:
        shape: ``(m, n)``.
        allowance: The computation.
        in_place: Whether its eigenvalues overwrite G.
    """
    small, large = sorted(shape)
    square = F8 * small**2
    rows = 2 * ROWS * F8 * small
    if not allowance.vectors:
        return rows + square * (1 if in_place or small >= IN_PLACE_FROM else 2)
    top = small if allowance.top is None else min(allowance.top, small)
    return rows + max(4 * square, 2 * square + 4 * F8 * large * top) + F8 * small * top


def krylov_bytes(shape: tuple[int, int], top: int, basis: int) -> int:
    """Return the memory of ``krylov`` besides the matrix in bytes, with a basis of this many
    columns.

    Q, Y and Z in float32, one of them while it grows; Q, Z and what is formed of them in float64;
    or, once the values are taken, Q in float64, A·V, its QR factors and its left vectors.

    Args:
        shape: ``(m, n)``.
        top: K, the number of values.
        basis: Number of columns of the basis.
    """
    small, large = sorted(shape)
    basis_bytes = F4 * basis * (2 * small + large)
    growing = F4 * basis * large
    projected = F8 * basis * 4 * small + 4 * F8 * basis**2
    values = F8 * basis * small + 4 * F8 * large * top
    return basis_bytes + max(growing, projected, values)


def decompose_streamed(
    matrix: Streamed, allowance: Allowance, fro: float, tol: float = TOL, seed: int = 0
) -> Factors:
    """Compute the singular values of a matrix in row blocks.

    ``gram`` and ``krylov`` have the bounds that they have in memory; ``exact`` needs the whole
    matrix and is refused.

    Args:
        matrix: A, ``(m, n)``, finite.
        allowance: The computation and its memory limit.
        fro: ‖A‖_F.
        tol: Required bound on the error of every energy fraction.
        seed: Seed of random starting vectors.

    Returns:
        The values, their method, and their bound.

    Raises:
        MemoryLimitError: No suitable method fits, or the method is ``exact``.
        UsageError: The method is unknown, or ``top`` or ``tol`` is invalid.
    """
    check_request(allowance.method, allowance.top, tol)
    if (scale := scale_of(fro, matrix.dtype)) != 1.0:
        scaled = decompose_streamed(matrix / scale, allowance, fro / scale, tol, seed)
        return replace(scaled, s=scaled.s * scale, fro=fro)
    left = allowance.limit - READING_BYTES
    in_place = gram_bytes(matrix.shape, allowance) > left
    needed = gram_bytes(matrix.shape, allowance, in_place)
    tried = tries_krylov(matrix.shape, allowance.method, allowance.top, allowance.vectors)
    if allowance.top and (tried or (allowance.method == "auto" and needed > left)):
        largest = _find_largest_basis(matrix.shape, allowance.top, left)
        budget = math.inf if needed > left else budget_of(allowance.method)
        factors = decompose_krylov(
            matrix, fro, allowance.top, allowance.vectors, tol, seed, largest, budget
        )
        if factors is not None:
            return factors
    if allowance.method == "exact" or needed > left:
        raise _make_memory_error(matrix.shape, allowance)
    # The remaining memory holds rows of a wide matrix, so that it is read fewer times.
    block = F4 * max(matrix.shape[1], 2**20)
    return decompose_gram(
        matrix, fro, allowance.top, allowance.vectors, max(1, (left - needed) // block), in_place
    )


def require_memory(
    needed: int, limit: int, shape: tuple[int, int], description: str, alternative: str
) -> None:
    """Refuse a computation that needs the whole matrix and does not fit.

    Args:
        needed: Required memory in bytes.
        limit: Available memory in bytes.
        shape: ``(m, n)``.
        description: What takes the memory, with its verb: ``both weights take``.
        alternative: An alternative to more memory, in words.

    Raises:
        MemoryLimitError: The computation does not fit.

    Example:
        >>> require_memory(10**9, 10**9, (4096, 4096), "both weights take", "$exclude it")
    """
    if needed > limit:
        raise MemoryLimitError(
            f"{shape[0]}x{shape[1]}",
            f"$memory leaves {_format_size(limit)} for a layer, and {description} "
            f"{_format_size(needed)}",
            f"{_suggest_memory(needed, Allowance(limit))}, or {alternative}",
        )


def _find_largest_basis(shape: tuple[int, int], top: int, left: int) -> int:
    """Return the largest number of basis columns that fits, within 2%, at most ``LARGEST_BASIS``; 0
    if none fits.
    """
    basis = int(LARGEST_BASIS * min(shape))
    while basis > 0 and krylov_bytes(shape, top, basis) > left:
        basis -= max(1, basis // 50)
    return basis


def _make_memory_error(shape: tuple[int, int], allowance: Allowance) -> MemoryLimitError:
    """Return the error of a layer that fits no method: the required memory and a fix."""
    small, size = min(shape), f"{shape[0]}x{shape[1]}"
    problem = f"$memory leaves {_format_size(allowance.limit)} for a layer"
    if allowance.method == "exact":
        needed = whole_bytes(shape, allowance)
        return MemoryLimitError(
            size,
            f"{problem}, and exact takes {_format_size(needed)}",
            "$svd gram reads it in row blocks",
        )
    needed = READING_BYTES + gram_bytes(shape, allowance, in_place=True)
    top = allowance.top or min(64, small)
    krylov_needed = READING_BYTES + krylov_bytes(shape, top, first_basis(top, allowance.vectors))
    if allowance.top is None and krylov_needed < needed:
        what, other = (
            "all values take",
            f", or $top {top} ({_format_size(krylov_needed)} if they decay)",
        )
    elif krylov_needed <= allowance.limit:
        what, other = "its spectrum is too flat for krylov within that, so it takes", ""
    else:
        needed = min(krylov_needed, needed)
        what, other = "it takes at least", ", or fewer values with $top K"
    return MemoryLimitError(
        size,
        f"{problem}, and {what} {_format_size(needed)}",
        f"{_suggest_memory(needed, allowance)}{other}",
    )


def _suggest_memory(needed: int, allowance: Allowance) -> str:
    """Return the advice to give the missing memory: N times as much with ``--workers N``, as a
    layer gets one Nth.
    """
    missing = needed - allowance.limit
    # More by the unit of the rounding below, so that the advice is not too little.
    return (
        f"give {_format_size(missing + (10**6 if missing < 998 * 10**6 else 5 * 10**7))} more "
        "(times $workers)"
    )


def _format_size(count: int) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# σ_i ∝ i^-DECAY, as for the updates of the benchmark; the work of krylov depends on it.
DECAY = 0.7


def time_full(order: int) -> tuple[float, float]:
    """Measure the seconds of a Gram product ``(n, n)`` × ``(n, n)`` and of its eigenvalues.

    Args:
        order: n.
    """
    matrix = torch.randn(order, order, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    gram = gram_matrix(matrix)
    between = time.perf_counter()
    torch.linalg.eigvalsh(gram)
    return between - start, time.perf_counter() - between


def time_leading(order: int, top: int) -> float:
    """Measure the seconds for the ``top`` largest values of an ``(n, n)`` matrix with a decaying
    spectrum.

    Args:
        order: n.
        top: K.
    """
    matrix = make_decaying(order)
    start = time.perf_counter()
    decompose(matrix, top=top)
    return time.perf_counter() - start


def time_pass(order: int) -> float:
    """Measure the seconds of the pass over two bf16 matrices ``(n, n)``: copy, subtract, compute
    norms.

    Args:
        order: n.
    """
    update = make_decaying(order)
    base = torch.full((order, order), 0.02, dtype=torch.bfloat16)
    tuned = (base + update).to(torch.bfloat16)
    rows = max(1, BLOCK_ENTRIES // order)
    start = time.perf_counter()
    # copying a block simulates reading it from a cached file
    blocks = (
        (b.clone(), t.clone())
        for b, t in zip(torch.split(base, rows), torch.split(tuned, rows), strict=True)
    )
    difference(blocks, (order, order), torch.device("cpu"))
    return time.perf_counter() - start


def make_decaying(order: int) -> Tensor:
    """Return an ``(n, n)`` float32 matrix with singular values near i^-0.7."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(order, order, generator=generator) for _ in range(2))
    return (left * torch.arange(1, order + 1) ** -DECAY) @ right / order
