"""Sums, distances, inner products and angles of matrices and subspaces, dense or factored, and
their TIES merge.

Two matrices are compared block by block (``compare_blocks``), and the fractions of a matrix in
given subspaces (``measure_shares``) follow from products with thin matrices only. With orthonormal
U (m × r) and V (n × r), the projection of G on the tangent space of the rank-r matrices at U·Σ·Vᵀ
is P(G) = UUᵀG + GVVᵀ − UUᵀGVVᵀ (Koch and Lubich 2007, *Dynamical low-rank approximation*, SIAM J.
Matrix Anal. Appl. 29, lemma 4.1; Vandereycken 2013, *Low-rank matrix completion by Riemannian
optimization*, SIAM J. Optim. 23, §2.1). Its three parts UUᵀG(I − VVᵀ), (I − UUᵀ)GVVᵀ and UUᵀGVVᵀ
are orthogonal to each other, so

    ‖P(G)‖² = ‖UᵀG‖² + ‖GV‖² − ‖UᵀGV‖²,

and no matrix of the size of G is formed. No digits are lost in the difference: ‖UᵀGV‖ is at most
the smaller of the other two. The first r columns of larger U and V give every smaller rank at once.

A sum of products B·A is one product of stacked factors. TIES: keep the largest entries of each
update, elect a sign for every entry, average the entries that agree with it.

Reference: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv
2306.01708, in the form of PEFT 0.21's ``merge_utils.ties``: the sign is that of the unweighted sum
of the trimmed updates, positive for zero; agreeing entries are multiplied by their weights and
averaged over their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_diag.linalg.devices import move
from lora_diag.linalg.difference import first_non_finite, norm
from lora_diag.linalg.exact import decompose_factored


class Products(NamedTuple):
    """Numbers from one pass over D and X: ‖D − X‖_F, ‖X‖_F and ⟨D, X⟩ = tr(DᵀX), accumulated in
    float64.
    """

    gap: float
    other: float
    inner: float


def compare_blocks(blocks: Iterable[tuple[Tensor, Tensor]]) -> Products:
    """Return ‖D − X‖_F, ‖X‖_F and ⟨D, X⟩ of two matrices given in blocks.

    Args:
        blocks: Row blocks of D and of X, of the same shape, float64.

    Example:
        >>> d, x = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
        >>> compare_blocks([(d, x)])
        Products(gap=1.4142135623730951, other=2.0, inner=2.0)
    """
    gap = other_norm = inner = 0.0
    for d, x in blocks:
        inner += float(torch.dot(d.reshape(-1), x.reshape(-1)))
        gap, other_norm = math.hypot(gap, norm([d - x])), math.hypot(other_norm, norm([x]))
    return Products(gap, other_norm, inner)


def principal_cosines(u: Tensor, v: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two spaces, descending.

    Args:
        u: ``(m, k)``, orthonormal columns.
        v: ``(m, j)``, likewise.

    Returns:
        ``(min(k, j),)`` float64 on the CPU: the singular values of UᵀV.

    Reference: Björck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces", theorem 1.

    Example:
        >>> principal_cosines(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]).tolist()
        [1.0, 0.0]
    """
    cosines: Tensor = torch.linalg.svdvals(u.to(torch.float64).T @ v.to(torch.float64))
    return cosines.clamp(max=1.0).cpu()


def factor_moments(moments: Tensor) -> tuple[Tensor, float]:
    """Return L with L·Lᵀ = C, and the distance of C from positive semidefinite.

    ‖D·L‖_F² = tr(D·C·Dᵀ), and D·L has the singular values of D·C^½: L is C^½ times an orthogonal
    matrix.

    Args:
        moments: C, ``(n, n)``, symmetric, finite.

    Returns:
        L ``(n, n)`` float64, from the eigenvalues that are positive; and |Σ of the negative ones| /
            Σ|λ|, 0 for C = 0.

    Example:
        >>> l, negative = factor_moments(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
        >>> (l @ l.T).tolist(), negative
        ([[4.0, 0.0], [0.0, 0.0]], 0.0)
    """
    eigenvalues, vectors = torch.linalg.eigh(moments.to(torch.float64))
    positive = eigenvalues.clamp(min=0)
    total = float(eigenvalues.abs().sum())
    return vectors * positive.sqrt(), float(
        (positive - eigenvalues).sum()
    ) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Shares:
    """Norms of the parts of G over ‖G‖_F; one value per requested rank.

    Args:
        fro: ‖G‖_F.
        both: ‖UᵀGV‖_F / ‖G‖_F.
        left: ‖UᵀG‖_F / ‖G‖_F.
        right: ‖GV‖_F / ‖G‖_F.
        tangent: ‖P(G)‖_F / ‖G‖_F.
    """

    fro: float
    both: tuple[float, ...]
    left: tuple[float, ...]
    right: tuple[float, ...]
    tangent: tuple[float, ...]


def orthonormalize(vectors: Tensor) -> Tensor:
    """Return float64 columns, orthonormal up to rounding, whose first k columns span the first k
    given ones.

    Args:
        vectors: ``(m, r)``, r ≤ m, linearly independent.
    """
    columns: Tensor = torch.linalg.qr(vectors.to(torch.float64))[0]
    return columns


def measure_shares(
    blocks: Iterable[Tensor], u: Tensor, v: Tensor, ranks: Sequence[int]
) -> Shares | str:
    """Measure the fractions of G in the subspaces of the first r columns of U and V.

    Args:
        blocks: The rows of G, ``(rows, n)`` each, any floating dtype, from the first row to the
            last.
        u: U, ``(m, R)`` float64, orthonormal columns.
        v: V, ``(n, R)`` likewise, on the same device.
        ranks: The r, 1 ≤ r ≤ R each.

    Returns:
        The fractions, with 0 ≤ both ≤ left, right ≤ tangent ≤ 1, all 0 if G is zero; or a sentence
            on an entry that is
        not finite or a norm that overflows.

    Example:
        >>> e = torch.eye(3, dtype=torch.float64)
        >>> found = measure_shares([torch.ones(3, 3)], e[:, :1], e[:, :1], [1])
        >>> [round(share[0] ** 2 * 9) for share in (found.both, found.left, found.tangent)]
        [1, 3, 5]
    """
    from_left = torch.zeros(u.shape[1], v.shape[0], dtype=torch.float64, device=u.device)
    squares = torch.zeros(v.shape[1], dtype=torch.float64, device=u.device)
    fro, row = 0.0, 0
    for stored in blocks:
        block = move(stored, u.device).to(torch.float64)
        size = norm([block])
        if not math.isfinite(size):
            return (
                first_non_finite("the gradient holds", block, row)
                or "the norm of the gradient overflows float64"
            )
        fro = math.hypot(fro, size)
        from_left.addmm_(u[row : row + len(block)].T, block)
        squares += (block @ v).square().sum(0)
        row += len(block)
    if fro == 0.0:
        zeros = (0.0,) * len(ranks)
        return Shares(0.0, zeros, zeros, zeros, zeros)
    both = (from_left @ v).square().cumsum(0).cumsum(1).diagonal().tolist()
    left, right = from_left.square().sum(1).cumsum(0).tolist(), squares.cumsum(0).tolist()
    by_rank = [_compute_shares(both[r - 1], left[r - 1], right[r - 1], fro) for r in ranks]
    return Shares(fro, *(tuple(part) for part in zip(*by_rank, strict=True)))


def _compute_shares(
    both: float, left: float, right: float, fro: float
) -> tuple[float, float, float, float]:
    """Return both, left, right and tangent from squares, with their order enforced against
    rounding.
    """
    inside, columns, rows = (min(1.0, math.sqrt(square) / fro) for square in (both, left, right))
    inside = min(inside, columns, rows)
    tangent = min(1.0, max(columns, rows, math.sqrt(max(0.0, left + right - both)) / fro))
    return inside, columns, rows, tangent


# A, or B and A of a product B·A.
Matrix = Tensor | tuple[Tensor, Tensor]

# Entries formed at a time, as elsewhere.
BLOCK_ENTRIES = 2**20


def stack_products(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return Σ w_k B_kA_k in factored form: [w_1B_1 w_2B_2 …] and [A_1; A_2; …], float64.

    Example:
        >>> pair = torch.ones(2, 1), torch.ones(1, 3)
        >>> b, a = stack_products([pair, pair], [1.0, 2.0])
        >>> b.tolist(), a.shape, (b @ a)[0, 0].item()
        ([[1.0, 2.0], [1.0, 2.0]], torch.Size([2, 3]), 3.0)
    """
    b = torch.cat(
        [weight * pair[0].to(torch.float64) for pair, weight in zip(pairs, weights, strict=True)],
        dim=1,
    )
    return b, torch.cat([pair[1].to(torch.float64) for pair in pairs], dim=0)


def sum_matrices(parts: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Return Σ w_k X_k: in factored form if all parts are, else dense, float64.

    Args:
        parts: The X_k, all ``(m, n)``; at least one.
        weights: The w_k.
    """
    pairs = [part for part in parts if isinstance(part, tuple)]
    if len(pairs) == len(parts):
        return stack_products(pairs, weights)
    m, n = shape_of(parts[0])
    summed = torch.zeros(m, n, dtype=torch.float64, device=device_of(parts[0]))
    for part, weight in zip(parts, weights, strict=True):
        row = 0
        for block in rows_of(part):
            summed[row : row + len(block)] += weight * block
            row += len(block)
    return summed


def rows_of(matrix: Matrix) -> Iterator[Tensor]:
    """Yield the rows in blocks, float64; a product is formed one block at a time."""
    m, n = shape_of(matrix)
    step = max(1, BLOCK_ENTRIES // max(1, n))
    for first in range(0, m, step):
        if isinstance(matrix, tuple):
            yield matrix[0][first : first + step].to(torch.float64) @ matrix[1].to(torch.float64)
        else:
            yield matrix[first : first + step].to(torch.float64)


def take_rows(matrix: Matrix, rows: Tensor) -> Tensor:
    """Return some rows of a matrix or a product, float64.

    Args:
        matrix: X, ``(m, n)``.
        rows: Their indices, int64.
    """
    rows = rows.to(device_of(matrix))
    if isinstance(matrix, tuple):
        return matrix[0][rows].to(torch.float64) @ matrix[1].to(torch.float64)
    return matrix[rows].to(torch.float64)


def shape_of(matrix: Matrix) -> tuple[int, int]:
    """Return ``(m, n)`` of a matrix or a product."""
    return (
        (len(matrix[0]), matrix[1].shape[1])
        if isinstance(matrix, tuple)
        else (matrix.shape[0], matrix.shape[1])
    )


def device_of(matrix: Matrix) -> torch.device:
    """Return the device of a matrix, or of B."""
    return matrix[0].device if isinstance(matrix, tuple) else matrix.device


def frobenius_inner(x: Matrix, y: Matrix) -> float:
    """Return ⟨X, Y⟩ = tr(XᵀY) in float64; for two products from thin matrices only: Σ
    (B_1ᵀB_2)∘(A_1A_2ᵀ).

    Example:
        >>> x = (torch.ones(2, 1), torch.ones(1, 3))
        >>> [frobenius_inner(x, y) for y in (x, torch.ones(2, 3))]
        [6.0, 6.0]
    """
    if isinstance(y, tuple) and not isinstance(x, tuple):
        x, y = y, x
    if isinstance(x, tuple) and isinstance(y, tuple):
        (b, a), (d, c) = ((pair[0].to(torch.float64), pair[1].to(torch.float64)) for pair in (x, y))
        return float(((b.T @ d) * (a @ c.T)).sum())
    return sum(
        float((left * right).sum()) for left, right in zip(rows_of(x), rows_of(y), strict=True)
    )


def frobenius_distance(x: Matrix, y: Matrix) -> float:
    """Return ‖X − Y‖_F; for two products by QR of their stacked factors, so that small distances
    lose no digits.

    Example:
        >>> x = (torch.ones(2, 1), torch.ones(1, 3))
        >>> [
        ...     round(frobenius_distance(x, y), 6)
        ...     for y in ((torch.ones(2, 1), torch.zeros(1, 3)), torch.ones(2, 3))
        ... ]
        [2.44949, 0.0]
    """
    if isinstance(x, tuple) and isinstance(y, tuple):
        return decompose_factored(*stack_products([x, y], [1.0, -1.0])).fro
    return norm(left - right for left, right in zip(rows_of(x), rows_of(y), strict=True))


@dataclass(slots=True)
class Conflicts:
    """Entries that several updates change, and the number with differing signs.

    Args:
        shared: Number of entries that at least two updates change.
        differing: Number of these with differing signs.
        by_chance: Expected number for random signs: Σ 1 − 2^(1−c), where c updates change an entry.
    """

    shared: int = 0
    differing: int = 0
    by_chance: float = 0.0

    def count(self, entries: Tensor) -> None:
        """Add the entries of a block, ``(K, rows, n)``."""
        positive, negative = (entries > 0).sum(0), (entries < 0).sum(0)
        changing = positive + negative
        self.shared += int((changing >= 2).sum())
        self.differing += int(((positive > 0) & (negative > 0)).sum())
        counts = torch.bincount(changing.flatten(), minlength=2).tolist()
        self.by_chance += sum(
            number * (1 - 2.0 ** (1 - c)) for c, number in enumerate(counts) if c >= 2
        )

    @property
    def share(self) -> float | None:
        """Fraction of the shared entries that differ in sign; None without shared entries."""
        return self.differing / self.shared if self.shared else None

    @property
    def random(self) -> float | None:
        """Expected fraction if signs were random; None without shared entries."""
        return self.by_chance / self.shared if self.shared else None


def magnitude_threshold(matrix: Matrix, density: float) -> float:
    """Return the smallest magnitude among the ⌊density·mn⌋ largest; infinite if there are none.

    Args:
        matrix: X, ``(m, n)``. Its magnitudes are kept in float32 during the call.
        density: Fraction of the entries to keep.

    Example:
        >>> magnitude_threshold(torch.tensor([[3.0, -1.0], [2.0, 0.5]]), 0.5)
        2.0
    """
    m, n = shape_of(matrix)
    keep = int(density * m * n)
    if keep == 0:
        return float("inf")
    magnitudes = torch.cat([block.abs().to(torch.float32).flatten() for block in rows_of(matrix)])
    return float(magnitudes.kthvalue(m * n - keep + 1).values)


def merge_entries(trimmed: Tensor, weights: Tensor) -> Tensor:
    """Return the TIES merge of a block: the entries of the elected sign, times their weights,
    averaged.

    Args:
        trimmed: ``(K, rows, n)``, with discarded entries set to zero.
        weights: ``(K,)``.

    Example:
        >>> merge_entries(torch.tensor([[[3.0, 1.0]], [[-1.0, 2.0]]]), torch.ones(2)).tolist()
        [[3.0, 1.5]]
    """
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agreeing = trimmed.sign() == elected
    averaged: Tensor = (trimmed * agreeing * weights.view(-1, 1, 1)).sum(0) / agreeing.sum(0).clamp(
        min=1
    )
    return averaged


def ties_blocks(
    parts: Sequence[Matrix],
    weights: Sequence[float],
    density: float,
    before: Conflicts | None = None,
    after: Conflicts | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield Σ w_kX_k and its TIES merge in row blocks, and count the entries with differing signs.

    All entries with the magnitude of the threshold are kept, whereas PEFT keeps some of them.

    Args:
        parts: The X_k, ``(m, n)``.
        weights: The w_k.
        density: Fraction of the entries of each X_k to keep; 1 keeps all.
        before: Gets the counts of all entries; None not to count them.
        after: Gets those of the kept entries, likewise.
    """
    limits = [magnitude_threshold(part, density) if density < 1 else 0.0 for part in parts]
    for blocks in zip(*map(rows_of, parts), strict=True):
        entries = torch.stack(blocks)
        scale = torch.tensor(weights, dtype=torch.float64, device=entries.device)
        limit = torch.tensor(limits, dtype=torch.float32, device=entries.device)
        trimmed = entries * (entries.abs().to(torch.float32) >= limit.view(-1, 1, 1))
        for conflicts, counted in ((before, entries), (after, trimmed)):
            if conflicts is not None:
                conflicts.count(counted)
        yield (entries * scale.view(-1, 1, 1)).sum(0), merge_entries(trimmed, scale)


def ties_factor(factors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return the TIES merge of one factor of several adapters; PEFT merges A and B separately.

    Args:
        factors: All of one shape.
        weights: One per factor.
        density: Fraction of the entries of each to keep.
    """
    return torch.cat([block for _, block in ties_blocks(factors, weights, density)])
