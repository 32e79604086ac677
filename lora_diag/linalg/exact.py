"""Singular values by full decompositions in float64: of a matrix, of its Gram matrix, and of thin
factors.

``Factors`` is the result of every method, those of ``krylov`` included.

``decompose_exact`` runs LAPACK (cuSOLVER on a GPU) on the matrix itself and is the reference.
``decompose_factored`` takes B·A from its factors, by QR of B and of Aᵀ and the SVD of the r×r core;
B·A is never formed.

``decompose_gram`` takes all singular values from the eigenvalues of the smaller Gram matrix, AᵀA or
AAᵀ. A product and a symmetric eigenvalue problem cost a fraction of a bidiagonalization. The
disadvantage is that σ² has an absolute error, so that a σ far below ‖A‖_F·√ε is noise. With a
float32 product that would be all values below 1e-3 of the largest, without a useful rigorous bound
on energy fractions (γ_k√r = 0.015 at k = r = 4096); in float64 it is 1e-8, and the bound is 1e-9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_diag.errors import InputError
from lora_diag.linalg import openblas
from lora_diag.linalg.devices import move, move_if_small, zeros
from lora_diag.linalg.difference import norm
from lora_diag.linalg.streamed import (
    ROWS,
    Matrix,
    Streamed,
    gram_of_rows,
    merge_small_blocks,
    rows_at_once,
    times_wide,
)


@dataclass(frozen=True, slots=True)
class Factors:
    """The largest singular values of a matrix A, with bounds on their errors.

    Args:
        s: Singular values, descending, float64, on the CPU.
        complete: True if all min(m, n) are included, or all that can be nonzero.
        method: Method, such as ``gram`` or ``exact:gesdd``.
        energy_error: Bound on |Ĉ(r) − C(r)| for every r ≤ len(s), where Ĉ(r) = Σ_{i≤r}σ̂_i² /
            ‖A‖_F².
        fro: ‖A‖_F.
        u: Left singular vectors ``(m, len(s))`` float64 on the device of A, or None if not
            requested. In every column the entry of largest absolute value is positive; in that of
            the core if ``method`` is ``factored``.
        vh: Right singular vectors ``(len(s), n)``, likewise, with signs consistent with ``u``.
        rest: Values after those of ``s``, descending; None where they were not computed with them.
    """

    s: Tensor
    complete: bool
    method: str
    energy_error: float
    fro: float
    u: Tensor | None = None
    vh: Tensor | None = None
    rest: Tensor | None = None

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """``u`` and ``vh`` of a decomposition with vectors."""
        assert self.u is not None
        assert self.vh is not None
        return self.u, self.vh


# Singular values below this fraction of the largest are rounding, and their vectors are arbitrary:
# for factors, decomposed in float64, and for a dense ΔW, whose entries are float32 and whose Gram
# matrix loses half the digits.
ZERO_FACTORED, ZERO_DENSE = 1e-10, 1e-7


def rounding_threshold(factors: Factors) -> float:
    """Return the size below which singular values are rounding of the method, or of the entries of
    A.

    Args:
        factors: Result of a decomposition.

    Example:
        >>> rounding_threshold(Factors(torch.tensor([2.0, 1.0, 1e-9]), True, "gram", 0.0, 5**0.5))
        2e-07
    """
    zero = ZERO_FACTORED if factors.method == "factored" else ZERO_DENSE
    return zero * float(factors.s[0]) if len(factors.s) else 0.0


def numerical_rank(factors: Factors) -> int:
    """Return the number of singular values above rounding.

    Args:
        factors: Result of a decomposition.

    Example:
        >>> numerical_rank(Factors(torch.tensor([2.0, 1.0, 1e-9]), True, "gram", 0.0, 5**0.5))
        2
    """
    return int((factors.s > rounding_threshold(factors)).sum())


def fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular vectors with reproducible signs: the largest entry by size of every left one
    is positive.

    Args:
        u: ``(m, k)``.
        vh: ``(k, n)``.

    Returns:
        Both, with the signs of some pairs flipped together.

    Example:
        >>> fix_signs(torch.tensor([[-2.0], [1.0]]), torch.tensor([[3.0]]))[0].tolist()
        [[2.0], [-1.0]]
    """
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, vh * signs.T


# log₂‖A‖_F beyond which A is scaled first: within it AᵀA stays far from the ends of float32's
# range.
MAX_UNSCALED_LOG2 = 30


def scale_of(fro: float, dtype: torch.dtype) -> float:
    """Return the divisor of A: methods form products of two and four A's, which could overflow or
    underflow.

    It is a power of two that the dtype can represent, so that division is exact.

    Args:
        fro: ‖A‖_F.
        dtype: Dtype of its entries.

    Example:
        >>> (
        ...     scale_of(8.0, torch.float32),
        ...     scale_of(2.0**40, torch.float32),
        ...     scale_of(1e40, torch.float32) == 2.0**127,
        ... )
        (1.0, 1099511627776.0, True)
    """
    if not fro or abs(math.log2(fro)) <= MAX_UNSCALED_LOG2:
        return 1.0
    max_exponent = math.frexp(torch.finfo(dtype).max)[1] - 1
    return float(2.0 ** max(1 - max_exponent, min(max_exponent, round(math.log2(fro)))))


# The drivers, fastest first. Divide and conquer (gesdd) and cuSOLVER's Jacobi (gesvdj) have failed
# to converge in practice; the QR iteration (gesvd) has not.
CPU_DRIVERS = ("gesdd", "gesvd")
CUDA_DRIVERS = ("gesvdj", "gesvd")


class Svd(NamedTuple):
    """A thin singular value decomposition and the driver that computed it."""

    s: Tensor
    u: Tensor | None
    vh: Tensor | None
    driver: str


def decompose_exact(
    matrix: Tensor, fro: float, top: int | None = None, vectors: bool = False
) -> Factors:
    """Compute the singular values of a matrix by a full decomposition.

    Args:
        matrix: A, ``(m, n)``, finite.
        fro: ‖A‖_F.
        top: Number of largest values to keep; None for all.
        vectors: Whether to compute singular vectors.

    Returns:
        The values. The solver returns the exact values of A + E with ‖E‖_2 ≤ p·ε·‖A‖_2 (Anderson et
            al., LAPACK Users'
        Guide, 3rd ed., §4.9.1), so by Weyl |σ̂_i − σ_i| ≤ δ = p·ε·σ_1, and by Cauchy–Schwarz
            |Σ_{i≤r}(σ̂_i² − σ_i²)| ≤
        2δ√r‖A‖_F + rδ². p is "a modestly growing function" of the dimensions; max(m, n) is used,
            far above observed
        values.
    """
    decomposed = svd(matrix.to(torch.float64), vectors)
    kept = decomposed.s[:top]
    delta = max(matrix.shape) * torch.finfo(torch.float64).eps * float(decomposed.s[0])
    error = (2 * delta * math.sqrt(len(kept)) * fro + len(kept) * delta**2) / fro**2 if fro else 0.0
    return Factors(
        s=kept,
        complete=len(kept) == min(matrix.shape),
        method=f"exact:{decomposed.driver}",
        energy_error=error,
        fro=fro,
        u=None if decomposed.u is None else decomposed.u[:, :top],
        vh=None if decomposed.vh is None else decomposed.vh[:top],
        rest=decomposed.s[len(kept) :],
    )


def svd(matrix: Tensor, vectors: bool) -> Svd:
    """Decompose a float64 matrix with the first driver that converges.

    Args:
        matrix: ``(m, n)``, float64, finite.
        vectors: Whether to compute singular vectors.

    Returns:
        Values on the CPU, vectors of fixed signs on the device of the matrix (None if not
            requested), and the driver's
        name.

    Raises:
        InputError: No driver converged.
    """
    device = matrix.device
    matrix = move_if_small(matrix)
    drivers = CUDA_DRIVERS if matrix.is_cuda else CPU_DRIVERS
    for driver in drivers:
        try:
            u, s, vh = _run_driver(matrix, driver, vectors)
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError):  # type: ignore[attr-defined]
            continue
        if u is None or vh is None:
            return Svd(s.cpu(), None, None, driver)
        u, vh = fix_signs(u, vh)
        return Svd(s.cpu(), move(u, device), move(vh, device), driver)
    raise InputError(
        f"the singular value decomposition of a {tuple(matrix.shape)} matrix did not converge"
    )


def _run_driver(
    matrix: Tensor, driver: str, vectors: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Run one driver: torch offers only gesdd on the CPU, so gesvd is run by SciPy."""
    if driver == "gesvd" and not matrix.is_cuda:
        import scipy.linalg  # 0.1 s, and rarely needed

        parts = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
        u, s, vh = (torch.from_numpy(part) for part in parts)
        return (u, s, vh) if vectors else (None, s, None)
    cuda_driver = driver if matrix.is_cuda else None
    if not vectors:
        return None, torch.linalg.svdvals(matrix, driver=cuda_driver), None
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver=cuda_driver)
    return u, s, vh


def decompose_factored(
    b: Tensor, a: Tensor, top: int | None = None, vectors: bool = False
) -> Factors:
    """Compute the singular values of B·A.

    With B = Q_b R_b and Aᵀ = Q_a R_a, B·A = Q_b (R_b R_aᵀ) Q_aᵀ, so the singular values are those
    of the core R_b R_aᵀ.

    Args:
        b: B, ``(m, r)``, finite.
        a: A, ``(r, n)``, finite.
        top: Number of largest values to keep; None for all min(m, n, r).
        vectors: Whether to compute singular vectors.

    Returns:
        The values that can be nonzero. Every step is backward stable in float64: the computed
            values are those of (B +
        δB)(A + δA) with ‖δB‖_F ≤ p·ε·‖B‖_F and likewise for A (Higham 2002, theorem 19.4), so each
            has an error of at
        most δ = 2p·ε·‖B‖_F‖A‖_F, with p = (m + n)·r.
    """
    b, a = b.to(torch.float64), a.to(torch.float64)
    scales = (
        norm([b]) or 1.0,
        norm([a]) or 1.0,
    )  # the product of the factors' norms may underflow or overflow
    b, a = b / scales[0], a / scales[1]
    mode = "reduced" if vectors else "r"  # forming Q takes twice as long as R
    q_b, r_b = torch.linalg.qr(b, mode=mode)
    q_a, r_a = torch.linalg.qr(a.T, mode=mode)
    core = svd(r_b @ r_a.T, vectors)
    s = core.s
    energy = float((s**2).sum())
    bound = 2 * (b.shape[0] + a.shape[1]) * b.shape[1] * torch.finfo(torch.float64).eps
    kept = s[:top]
    error = (
        (2 * bound * math.sqrt(len(kept) * energy) + len(kept) * bound**2) / energy
        if energy
        else 0.0
    )
    return Factors(
        s=kept * scales[0] * scales[1],
        complete=len(kept) == len(s),
        method="factored",
        energy_error=min(1.0, error),
        fro=math.sqrt(energy) * scales[0] * scales[1],
        u=None if core.u is None else (q_b @ core.u)[:, :top],
        vh=None if core.vh is None else (core.vh @ q_a.T)[:top],
    )


# Column panels of which only the lower triangle is multiplied (16 panels leave 17/32 of the work of
# a full product). At 11008×4096: 1.83 s, against 2.04 s with 1024 rows and 8 panels; at 2048² no
# difference. Narrower panels than the least are slow: on an AMD EPYC 1.2 ms at 576×192 with panels
# of 12 columns, 0.7 ms with 72.
PANELS, LEAST_PANEL = 16, 72

# From this order on eigenvalues are computed in place, by SciPy's LAPACK. torch's copies the matrix
# first; there, five float32 copies and the program itself no longer fit into four copies and 1 GiB.
# Below, torch's is the faster one (8192²: 16 s and 1.5 GiB against 28 s and 1.1 GiB).
IN_PLACE_FROM = 12288

# Up to this fraction of the eigenvectors is computed without the others: 64 of 4096 in 2.9 s
# instead of 8.4 s, 64 of 2048 in 0.24 s instead of 0.67 s; at a quarter of them nothing is gained.
# In small matrices one thread does it, from this order on all cores do, but only where the matrix
# has them: the threads wait for each other at every column, so that with concurrent work it was up
# to ten times slower than torch's.
SUBSET_FROM, SUBSET_SHARE = 2048, 1 / 8
ALL_CORES = torch.get_num_threads()


def decompose_gram(
    matrix: Matrix,
    fro: float,
    top: int | None = None,
    vectors: bool = False,
    cached_blocks: int = 1,
    in_place: bool = False,
) -> Factors:
    """Compute the singular values of a matrix from its smaller Gram matrix.

    Args:
        matrix: A, ``(m, n)``, finite.
        fro: ‖A‖_F.
        top: Number of largest values to keep; None for all.
        vectors: Whether to compute singular vectors.
        cached_blocks: Number of row blocks in memory, if A is streamed and has fewer rows than
            columns.
        in_place: Whether to compute eigenvalues without a second copy of the Gram matrix, which is
            slower; without vectors, on the CPU. Always from the order ``IN_PLACE_FROM`` on.

    Returns:
        The values. Rounding of the product: |Ĝ − G| ≤ γ_k|A|ᵀ|A| entrywise with γ_k = kε/(1 − kε)
            and k terms per sum
        (Higham 2002, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §3.5), so ‖Ĝ − G‖_F
            ≤ γ_k‖A‖_F². The
        eigensolver adds p·ε·‖Ĝ‖_2 to each eigenvalue (LAPACK Users' Guide, §4.7.1, with p = n, the
            order of G). The sum
        of the r largest eigenvalues changes by at most the sum of the r largest singular values of
            the perturbation
        (Fan 1949), which is at most √r‖·‖_F: |Σ_{i≤r}(σ̂_i² − σ_i²)| ≤ √r γ_k‖A‖_F² + r·n·ε·σ_1².
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    k, n = tall.shape
    gram = move_if_small(_compute_gram(tall, cached_blocks))
    u = vh = eigenvectors = None
    if vectors:
        eigenvalues, eigenvectors = _compute_eigenvectors(gram, top)
    else:
        eigenvalues = _compute_eigenvalues(gram, in_place)
    squares = eigenvalues.clamp(min=0).flip(0).cpu()
    kept = squares[:top].sqrt()
    if eigenvectors is not None:
        v = move(eigenvectors.flip(1), tall.device)
        u = _orthonormalize(times_wide(tall, v), kept)
        u, vh = fix_signs(v, u.T) if is_wide else fix_signs(u, v.T)
    error = _bound_energy_error(k, n, squares, len(kept), fro)
    rest = squares[len(kept) :].sqrt() if len(squares) == n else None
    return Factors(kept, len(kept) == n, "gram", error, fro, u, vh, rest)


# (Av_i)ᵀ(Av_j) = v_iᵀ(Ĝ − E)v_j, with Ĝ the computed Gram matrix and E its rounding and the
# solver's, some ε·σ_1². As σ̂_i² differs from ‖Av_i‖² by that, 1.7e-9 of it for σ_i = ACCURATE·σ_1,
# a column is divided by its own norm. Inner products of the columns are ε·σ_1²/(σ_iσ_j) times 26 at
# most (flat, stepped and logarithmic spectra, 600² to 4000×600, OpenBLAS kernels for SSE3, AVX2 and
# AVX-512): 1.5e-10 at most from ACCURATE·σ_1 on. From RESOLVED·σ_1 on, rounding of A·V is small
# enough for a column to be orthogonalized against others.
ACCURATE, RESOLVED = 1e-3, 1e-6


def _orthonormalize(product: Tensor, s: Tensor) -> Tensor:
    """Return orthonormal columns that span those of A·V, which are orthogonal but for rounding.

    Large ones are divided by their norms, a few small ones orthogonalized against them, twice, and
    by QR. Where a σ_i is near 0, QR of all makes its column orthogonal to the others.

    Args:
        product: A·V, ``(k, p)``.
        s: The σ_i, descending, on the CPU.
    """
    accurate = int((s >= ACCURATE * s[0]).sum())
    if not s[0] or s[-1] < RESOLVED * s[0] or 2 * accurate < len(s):
        accurate = 0
    large, rest = product[:, :accurate], product[:, accurate:]
    u: Tensor = large / torch.linalg.vector_norm(large, dim=0)
    if accurate == len(s):
        return u
    for _ in range(2 if accurate else 0):
        rest = rest - u @ (u.T @ rest)
    q, r = torch.linalg.qr(rest)
    return torch.cat([u, q * torch.where(r.diagonal() < 0, -1.0, 1.0)], dim=1)


def decompose_stack(matrices: Iterable[Tensor], top: int | None = None) -> Factors:
    """Compute the singular values of S = [A_1; A_2; …] with one A in memory at a time.

    SᵀS = ΣA_tᵀA_t, so they are the roots of the eigenvalues of that sum.

    Args:
        matrices: The A_t, ``(k_t, n)`` each, finite; at least one.
        top: Number of largest values to keep; None for all.

    Returns:
        The values, at most min(Σk_t, n). Their bound is that of ``decompose_gram`` for a matrix of
            Σk_t rows.

    Raises:
        ValueError: There is no matrix.

    Example:
        >>> decompose_stack([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])]).s.tolist()
        [4.0, 3.0]
    """
    gram: Tensor | None = None
    fro, rows, scale = 0.0, 0, 0.0
    for matrix in matrices:
        size = norm([matrix])
        larger = (
            max(scale, scale_of(size, matrix.dtype)) if size else scale
        )  # larger values must not overflow
        if gram is not None and larger > scale > 0:
            gram *= (scale / larger) ** 2
        scale = larger
        gram = gram_matrix(matrix / scale if scale not in {0.0, 1.0} else matrix, gram)
        fro, rows = math.hypot(fro, size), rows + len(matrix)
    if gram is None:
        raise ValueError("a stack of at least one matrix is needed")
    scale = scale or 1.0
    squares = _compute_eigenvalues(move_if_small(gram), in_place=False).clamp_(min=0).flip(0).cpu()
    possible = min(len(gram), rows)
    kept = squares[:possible][:top].sqrt()
    error = _bound_energy_error(rows, len(gram), squares, len(kept), fro / scale)
    return Factors(kept * scale, len(kept) == possible, "gram", error, fro)


def _bound_energy_error(terms: int, order: int, squares: Tensor, kept: int, fro: float) -> float:
    """Return the bound of ``decompose_gram`` for the ``kept`` largest σ² of a Gram matrix, with
    ``terms`` per sum.
    """
    if not fro:
        return 0.0
    epsilon = torch.finfo(torch.float64).eps
    gamma = terms * epsilon / (1 - terms * epsilon)
    return math.sqrt(kept) * gamma + kept * order * epsilon * float(squares[0]) / fro**2


def _compute_gram(tall: Matrix, cached_blocks: int) -> Tensor:
    """Return the lower triangle of AᵀA, for A or its transpose in memory or in row blocks."""
    if not isinstance(tall, Streamed):
        return gram_matrix(tall)
    if tall.transposed:
        return gram_of_rows(tall.T, cached_blocks)
    gram = zeros((tall.shape[1], tall.shape[1]), torch.float64, tall.device)
    for block in merge_small_blocks(tall.read(), ROWS):
        gram_matrix(block, gram)
    return gram


def gram_matrix(matrix: Tensor, gram: Tensor | None = None) -> Tensor:
    """Return the lower triangle of AᵀA.

    Args:
        matrix: A, ``(k, n)``, any floating dtype.
        gram: Result of an earlier call, to which AᵀA is added in place; None for zeros.

    Returns:
        ``(n, n)`` float64; entries above the diagonal panels are zero.
    """
    n = matrix.shape[1]
    width = max(LEAST_PANEL, math.ceil(n / PANELS))
    if gram is None:
        gram = zeros((n, n), torch.float64, matrix.device)
    for rows in torch.split(matrix, rows_at_once(matrix)):
        block = rows.to(torch.float64)
        for first in range(0, n, width):
            last = min(n, first + width)
            gram[first:last, :last].addmm_(block[:, first:last].T, block[:, :last])
    return gram


def _compute_eigenvalues(gram: Tensor, in_place: bool) -> Tensor:
    """Return the eigenvalues of a symmetric matrix given by its lower triangle, which may be
    overwritten.
    """
    if openblas.suits(gram):
        return openblas.eigenvalues(gram)
    if gram.is_cuda or not (in_place or len(gram) >= IN_PLACE_FROM):
        values: Tensor = torch.linalg.eigvalsh(gram, UPLO="L")
        return values
    import scipy.linalg  # 0.1 s, and rarely needed

    # The lower triangle by rows is the upper one by columns, the order in which LAPACK works
    # without a copy.
    eigenvalues = scipy.linalg.eigh(
        gram.numpy().T,
        lower=False,
        eigvals_only=True,
        overwrite_a=True,
        check_finite=False,
        driver="evd",
    )
    return torch.from_numpy(eigenvalues)


def _compute_eigenvectors(gram: Tensor, top: int | None) -> tuple[Tensor, Tensor]:
    """Return the ``top`` largest eigenvalues, or all, ascending; and the vectors of the ``top``
    largest (None: all).
    """
    n, has_all_cores = len(gram), not gram.is_cuda and torch.get_num_threads() == ALL_CORES
    suits = openblas.suits(gram) or (openblas.FOUND and has_all_cores and n >= SUBSET_FROM)
    if (
        top
        and top <= SUBSET_SHARE * n
        and suits
        and (largest := openblas.largest_eigenpairs(gram, top))
    ):
        return largest
    values, vectors = torch.linalg.eigh(gram, UPLO="L")
    return values, vectors if top is None else vectors[:, -top:]
