"""Methods of merging ΔW_1 … ΔW_K of one layer into M, each named by its paper, in float64.

Updates with factors are merged in the core of their common spaces, where the method commutes with
rotations: with the orthonormal bases Q_b of all B_k and Q_a of all A_kᵀ, ΔW_k = Q_bC_kQ_aᵀ and M =
Q_b·merge(C_1, …, C_K)·Q_aᵀ. No matrix of the size of ΔW is formed. Those that compare single
entries of ΔW (TIES, DARE) form it.

Zero updates are left out by the caller. Singular values below ``ZERO`` of the largest are zero: a
space that no update has gets no direction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.linalg.distance import (
    Matrix,
    merge_entries,
    rows_of,
    shape_of,
    stack_products,
    sum_matrices,
    ties_blocks,
)
from lora_diag.linalg.exact import svd

# Singular values up to this fraction of the largest are rounding of float64.
ZERO = 1e-12

# Singular values of stacked orthonormal bases up to this fraction of the largest are rounding of
# equal directions. The updates are float32 or shorter, so equal directions of different updates
# agree to about 1e-7.
EQUAL = 1e-6


@dataclass(frozen=True, slots=True)
class Request:
    """What a method needs besides the updates.

    Args:
        weights: w_k, one per update.
        density: Fraction of entries to keep.
        seed: Seed of random masks: one per layer and run.
        names: Names of the updates, which distinguish their masks.
        count: K, the number of updates of the merge, including those that are zero here.
    """

    weights: Sequence[float]
    density: float
    seed: str
    names: Sequence[str]
    count: int


Merger = Callable[[Sequence[Matrix], Request], Matrix]


@dataclass(frozen=True, slots=True)
class CommonFrame:
    """Updates in the bases of their common spaces.

    Args:
        left: Q_b ``(m, p)``; None for the identity.
        right: Q_aᵀ ``(q, n)``; None for the identity.
        cores: C_k, each ``(p, q)``.
    """

    left: Tensor | None
    right: Tensor | None
    cores: tuple[Tensor, ...]

    def expand(self, core: Tensor) -> Matrix:
        """Return Q_b·core·Q_aᵀ."""
        if self.left is None or self.right is None:
            return core
        return self.left @ core, self.right


def reduce_to_cores(parts: Sequence[Matrix]) -> CommonFrame:
    """Return updates in the singular bases of their stacked factors; dense ones, if any is, in the
    identity.

    Reference: Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging in Core
    Space", arXiv 2509.17786: U of [B_1 … B_K] and Vᵀ of [A_1; …; A_K], without the directions that
    no update has.
    """
    pairs = [part for part in parts if isinstance(part, tuple)]
    if len(pairs) < len(parts):
        return CommonFrame(None, None, tuple(torch.cat(list(rows_of(part))) for part in parts))
    b, a = stack_products(pairs, [1.0] * len(pairs))
    left, right = _find_basis(b), _find_basis(a.T).T
    return CommonFrame(
        left, right, tuple((left.T @ b.double()) @ (a.double() @ right.T) for b, a in pairs)
    )


def _find_basis(columns: Tensor) -> Tensor:
    """Return the left singular vectors of nonzero singular values, ``(m, p)``."""
    u, s, _ = _decompose(columns)
    return u[:, : _count_nonzero(s)]


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ and Vᵀ."""
    found = svd(matrix, True)
    assert found.u is not None
    assert found.vh is not None
    return found.u, found.s.to(found.u.device), found.vh


def _count_nonzero(s: Tensor) -> int:
    """Return the number of singular values above rounding."""
    return int((s > ZERO * s[:1]).sum())


def has_equal(s: Tensor, rank: int) -> bool:
    """Return whether σ_rank and the next one are equal up to ``EQUAL``, so that rounding chooses
    between them.
    """
    return 0 < rank < len(s) and float(s[rank]) >= (1 - EQUAL) * float(s[rank - 1])


def order_equal(
    u: Tensor, s: Tensor, vh: Tensor, rank: int, total: Matrix
) -> tuple[Tensor, Tensor]:
    """Return U and Vᵀ in which those of the values equal to σ_rank come first that have most of S =
    Σ w_kΔW_k.

    The vectors U_g and V_g of equal singular values are determined up to one rotation Q of both,
    which a decomposition leaves to rounding. The first j columns of U_gQ and V_gQ have the largest
    Σ_i ⟨u_iv_iᵀ, S⟩ if Q are the eigenvectors of the symmetric part of C = U_gᵀSV_g, the largest
    eigenvalue first (Fan 1949). Those of Iso-C are the singular vectors of S. Where these
    eigenvalues are equal, too, the choice is arbitrary.

    Args:
        u: ``(m, r)``.
        s: ``(r,)``, descending.
        vh: ``(r, n)``.
        rank: Number of directions that will be kept.
        total: S, ``(m, n)``.
    """
    if not has_equal(s, rank):
        return u, vh
    group = ((s - s[rank - 1]).abs() <= EQUAL * s[rank - 1]).nonzero().flatten().to(u.device)
    core = project(u[:, group], total, vh[group])
    rotation = torch.linalg.eigh(core + core.T)[1].flip(1)
    u, vh = u.clone(), vh.clone()
    u[:, group] = u[:, group] @ rotation
    vh[group] = rotation.T @ vh[group]
    return u, vh


def project(u: Tensor, matrix: Matrix, vh: Tensor) -> Tensor:
    """Return UᵀXV for U ``(m, p)`` and Vᵀ ``(q, n)``."""
    if isinstance(matrix, tuple):
        return (u.T @ matrix[0].double()) @ (matrix[1].double() @ vh.T)
    return u.T @ matrix.double() @ vh.T


def add(parts: Sequence[Matrix], request: Request) -> Matrix:
    """M = Σ w_kΔW_k: factors side by side (PEFT's ``cat``), or the sum.

    Reference: Ilharco et al. 2023, "Editing Models with Task Arithmetic", arXiv 2212.04089;
    Wortsman et al. 2022, "Model soups", for the mean.
    """
    return sum_matrices(parts, request.weights)


def ties(parts: Sequence[Matrix], request: Request) -> Matrix:
    """Trim, elect signs, average the entries that agree, layer by layer: see
    ``linalg.distance``.
    """
    return torch.cat([merged for _, merged in ties_blocks(parts, request.weights, request.density)])


def make_generator(seed: str) -> torch.Generator:
    """Return a random number generator of the CPU, seeded by a text."""
    digest = hashlib.sha256(seed.encode("utf-8", "surrogateescape")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _drop(parts: Sequence[Matrix], request: Request) -> list[Tensor]:
    """Return updates of which each entry is kept with probability d and then divided by d.

    Reference: Yu et al. 2024, "Language Models are Super Mario", arXiv 2311.03099, with p = 1 − d.
    """
    dropped = []
    for name, part in zip(request.names, parts, strict=True):
        generator, blocks = make_generator(f"{request.seed}:{name}"), []
        for block in rows_of(part):
            kept = (
                torch.rand(block.shape, generator=generator, dtype=torch.float64) < request.density
            )
            blocks.append(block * kept.to(block.device) / request.density)
        dropped.append(torch.cat(blocks))
    return dropped


def dare(parts: Sequence[Matrix], request: Request) -> Matrix:
    """M = Σ w_k·drop(ΔW_k), whose expectation is Σ w_kΔW_k."""
    return sum_matrices(_drop(parts, request), request.weights)


def dare_ties(parts: Sequence[Matrix], request: Request) -> Matrix:
    """Elect signs of dropped and rescaled updates, and average the entries that agree (PEFT's
    ``dare_ties_svd``).
    """
    dropped = torch.stack(_drop(parts, request))
    return merge_entries(
        dropped, torch.tensor(request.weights, dtype=torch.float64, device=dropped.device)
    )


def tsv(parts: Sequence[Matrix], request: Request) -> Matrix:
    """M = U⊥·diag(w_kΣ_k)·V⊥ᵀ: the largest ⌊min(m, n)/K⌋ directions of each update, orthogonalized
    together.

    U = [U_1 … U_K] = PDQᵀ is replaced with its polar factor U⊥ = PQᵀ, the nearest matrix with
    orthonormal columns, and V likewise. Directions that several updates share up to ``EQUAL`` count
    once in P and Q, so that equal updates give their mean. K counts all updates of the merge, also
    those that are zero in this layer. An update of lower rank keeps its own directions; the
    authors' code fills up with arbitrary ones, of singular value 0.

    Reference: Gargiulo et al. 2025, "Task Singular Vectors", arXiv 2412.00081.
    """
    frame = reduce_to_cores(parts)
    at_most = min(shape_of(parts[0])) // request.count
    total = sum_matrices(frame.cores, request.weights)
    left, right, values = [], [], []
    for core, weight in zip(frame.cores, request.weights, strict=True):
        u, s, vh = _decompose(core)
        rank = min(_count_nonzero(s), max(1, at_most))
        u, vh = order_equal(u, s, vh, rank, total)
        left.append(u[:, :rank])
        right.append(vh[:rank])
        values.append(weight * s[:rank])
    return frame.expand(
        _orthogonalize(torch.cat(left, 1))
        * torch.cat(values)
        @ _orthogonalize(torch.cat(right).T).T
    )


def _orthogonalize(columns: Tensor) -> Tensor:
    """Return the polar factor PQᵀ of X = PDQᵀ on the range of X."""
    p, d, qh = _decompose(columns)
    rank = int((d > EQUAL * d[:1]).sum())
    return p[:, :rank] @ qh[:rank]


def iso_c(parts: Sequence[Matrix], request: Request) -> Matrix:
    """M = σ̄UVᵀ, from the sum UΣVᵀ = Σ w_kΔW_k with σ̄ the mean of its r nonzero singular values.

    Reference: Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging", arXiv
    2502.04959. A sum of adapters has r < min(m, n) directions; there it is the method in Core Space
    (Panariello et al. 2025), as the other directions of the authors' code on ΔW are arbitrary.
    """
    frame = reduce_to_cores(parts)
    weighted = [weight * core for weight, core in zip(request.weights, frame.cores, strict=True)]
    u, s, vh = _decompose(torch.stack(weighted).sum(0))
    largest = max(float(torch.linalg.vector_norm(core)) for core in weighted)
    rank = int((s > ZERO * largest).sum())  # of a sum that cancels, none
    return frame.expand(s[:rank].sum() / max(1, rank) * u[:, :rank] @ vh[:rank])


def knots_ties(parts: Sequence[Matrix], request: Request) -> Matrix:
    """M = U·TIES(ΣV_1ᵀ, …, ΣV_Kᵀ), with [ΔW_1 … ΔW_K] = UΣ[V_1ᵀ … V_Kᵀ].

    With factors, [C_1 … C_K] has the same U and Σ up to Q_b, and V_kᵀ = V_k'ᵀQ_aᵀ.

    Reference: Stoica et al. 2025, "Model merging with SVD to tie the Knots", arXiv 2410.19735.
    """
    frame = reduce_to_cores(parts)
    u, s, vh = _decompose(torch.cat(frame.cores, 1))
    rank = _count_nonzero(s)
    aligned = [
        part if frame.right is None else part @ frame.right
        for part in (s[:, None] * vh)[:rank].chunk(len(parts), 1)
    ]
    merged = ties(aligned, request)
    assert isinstance(merged, Tensor)
    return u[:, :rank] @ merged if frame.left is None else (frame.left @ u[:, :rank], merged)


def core_ties(parts: Sequence[Matrix], request: Request) -> Matrix:
    """M = Q_b·TIES(C_1, …, C_K)·Q_aᵀ: see ``reduce_to_cores``."""
    frame = reduce_to_cores(parts)
    merged = ties(frame.cores, request)
    assert isinstance(merged, Tensor)
    return frame.expand(merged)
