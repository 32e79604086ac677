"""The metric of updates: the Frobenius norm, or a norm defined by the layer's inputs (and
gradients).

With C = E[xxᵀ] the second moment of the inputs, ‖D·C^½‖_F² = E‖Dx‖² is the mean square change of
the layer's output due to the update. D·L with L·Lᵀ = C has the same norm and the same singular
values, so all results for D apply to D·L, including the Eckart–Young bound. With G = E[ggᵀ] of the
loss's gradient with respect to the output, ‖G^½·D·C^½‖_F² is the K-FAC estimate of E⟨∇ℓ, D⟩²
(Martens and Grosse 2015), the squared change of the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diag.deltas import Delta, Side, row_blocks
from lora_diag.errors import InputError, MemoryLimitError
from lora_diag.layers.change import PARTS, Change, why_not_comparable
from lora_diag.layers.resolution import Gains
from lora_diag.linalg.devices import move
from lora_diag.linalg.difference import first_non_finite, norm
from lora_diag.linalg.distance import compare_blocks, factor_moments, principal_cosines
from lora_diag.linalg.exact import Factors, decompose_factored
from lora_diag.metrics.energy import truncation_error
from lora_diag.metrics.subspaces import Distances, compute_distances
from lora_diag.records import Agreement

# Tolerance for symmetry and positive semidefiniteness of a second moment, due to float32 sums of
# many products.
MOMENT_ERROR = 1e-4

# When a second moment is inverted, eigenvalues below this fraction of the largest are float32
# rounding.
SMALLEST = 1e-7

# Unit roundoff of the dtypes a second moment may be stored in.
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True, slots=True)
class MomentLocation:
    """Location of a second moment of a layer: C = E[xxᵀ] of its input, or G = E[ggᵀ] of its output
    gradient.

    Args:
        side: The stored matrix.
        size: Its order.
        on_rows: Whether it belongs to the rows of the stored weight: C if that is ``(in, out)``,
            else G.
    """

    side: Side
    size: int
    on_rows: bool


@dataclass(frozen=True, slots=True)
class Weighting:
    """The weighting of a layer: C, and G if both sides are weighted.

    Args:
        inputs: C.
        gradients: G; None to weigh the input side alone.
    """

    inputs: MomentLocation
    gradients: MomentLocation | None = None


def weighting_bytes(weighting: Weighting | None, shape: tuple[int, int]) -> int:
    """Estimate the bytes of weighting a matrix: a root and its eigenvectors, ΔW and W_base in
    float64; 0 for None.
    """
    if weighting is None:
        return 0
    order = max(
        moments.size for moments in (weighting.inputs, weighting.gradients) if moments is not None
    )
    return 8 * order * (4 * order + 3 * max(shape))


@dataclass(frozen=True, slots=True)
class Root:
    """L with L·Lᵀ = C.

    Args:
        matrix: L, float64.
        on_rows: Whether it belongs to the rows of the stored weight.
        error: Bound on ‖L·Lᵀ − C‖_2, with the rounding of the stored C.
        fro: ‖L‖_F = √tr(C).
        spectral: ‖L‖_2 = √λ_1(C).
    """

    matrix: Tensor
    on_rows: bool
    error: float
    fro: float
    spectral: float

    @property
    def inverse(self) -> Tensor:
        """The transposed pseudo-inverse of L; eigenvalues of C up to ``SMALLEST`` of the largest
        count as zero.
        """
        eigenvalues = (self.matrix**2).sum(0)
        kept = eigenvalues > SMALLEST * self.spectral**2
        return torch.where(kept, self.matrix / torch.where(kept, eigenvalues, 1.0), 0.0)


@dataclass(frozen=True, slots=True)
class Weighted:
    """An update in the data metric: ΔW·L, or KᵀΔW·L with K·Kᵀ = G; transposed if stored as
    ``(in, out)``.

    Args:
        change: The product.
        error: Bound on the error of every energy fraction due to C, its root and the product.
        plain_fro: ‖ΔW‖_F.
        gains: Effect of the metric on rounding errors.
        roots: L, and K.
    """

    change: Change
    error: float
    plain_fro: float
    gains: Gains
    roots: tuple[Root, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """D in one metric: unchanged, or multiplied by a root of C.

    Args:
        change: D, or D·L.
        factors: Its largest singular values, with vectors if needed.
        shape: ``(out, in)``.
        root: L; None in the plain metric.
        on_rows: Whether L belongs to the rows.
    """

    change: Change
    factors: Factors
    shape: tuple[int, int]
    root: Tensor | None = None
    on_rows: bool = False

    def distances(self, other: Change | None, rank: int | None) -> tuple[Distances, float]:
        """Return the distances of X from D, and ‖X‖, in this metric; without distances if ‖X‖ is
        not comparable.

        Args:
            other: X in the plain metric; None for X = 0.
            rank: Rank of X, for the lower bound; None without one.
        """
        fro = gap = self.factors.fro
        norm = inner = 0.0
        if other is not None:
            if self.root is not None:
                other = times(other, self.root, self.on_rows)
            gap, norm, inner = compare_blocks(
                zip(*(each.blocks(self.shape, PARTS) for each in (self.change, other)), strict=True)
            )
        if why_not_comparable(norm):
            return Distances(), norm
        return compute_distances(fro, norm, gap, inner, self._lower_bound(rank)), norm

    def _lower_bound(self, rank: int | None) -> float | None:
        """Return √(1 − C(r)); None without a rank, for D = 0, or if too few values are known."""
        if rank is None or self.factors.fro == 0.0:
            return None
        error = truncation_error(
            self.factors.s.numpy(), self.factors.fro, rank, self.factors.complete
        )
        return None if error is None else error[0] / self.factors.fro


def weigh(change: Change, delta: Delta, weighting: Weighting, device: torch.device) -> Weighted:
    """Return an update in the data metric, with the norm of its base in it.

    The bound: the energies are eigenvalues of D·C·Dᵀ. With Ĉ = L·Lᵀ and ‖Ĉ − C‖_2 ≤ c the sum of
    the r largest moves by no more than ‖D(Ĉ − C)Dᵀ‖_* ≤ c‖D‖_F² (Fan 1949), with G by c‖KᵀD‖_F² +
    g‖D·L‖_F² + c·g‖D‖_F². Rounding of a product with n terms per sum is at most n·ε·‖D‖_F‖L‖_F. A
    fraction has such an error in both numerator and denominator.

    Args:
        change: ΔW, finite.
        delta: Its layer.
        weighting: C, and G.
        device: Where to compute.
    """
    roots = [
        read_root(moments, device)
        for moments in (weighting.inputs, weighting.gradients)
        if moments is not None
    ]

    def multiply_by_all(update: Change) -> Change:
        for factor in roots:
            update = times(update, factor.matrix, factor.on_rows)
        return update

    weighted = replace(multiply_by_all(change), base_fro=None)
    if delta.base is not None:
        base = move(torch.cat(list(row_blocks(delta.base, delta.shape))), device).to(torch.float64)
        weighted = replace(weighted, base_fro=multiply_by_all(Change(None, None, matrix=base)).fro)
    plain_fro, fro = fro_of(change), fro_of(weighted)
    moved = roots[0].error * plain_fro**2
    if len(roots) > 1:
        c, g = (factor.error for factor in roots)
        fro_inputs, fro_gradients = (
            fro_of(times(change, factor.matrix, factor.on_rows)) for factor in roots
        )
        moved = c * fro_gradients**2 + g * fro_inputs**2 + c * g * plain_fro**2
    roots_fro = math.prod(factor.fro for factor in roots)
    rounding = 2 * max(delta.shape) * torch.finfo(torch.float64).eps * plain_fro * roots_fro
    error = 2 * (moved / fro**2 + 2 * rounding / fro + (rounding / fro) ** 2) if fro else 0.0
    return Weighted(
        weighted,
        min(1.0, error),
        plain_fro,
        _measure_gains(change, delta.shape, roots),
        tuple(roots),
    )


def _measure_gains(change: Change, shape: tuple[int, int], roots: list[Root]) -> Gains:
    """Return the effect of the metric on rounding errors with variances that are products of row
    and column factors.
    """
    rounding = change.rounding.rounding if change.rounding else None
    gains, base, bound = [], 1.0, 1.0
    for on_rows, size in zip((True, False), shape, strict=True):
        variance = torch.ones(size, dtype=torch.float64)
        if rounding is not None:
            total = float(rounding.noise.rows.sum())
            sums = rounding.noise.rows if on_rows else rounding.noise.columns
            variance = (
                sums * (rounding.noise.unit / math.sqrt(total))
                if total
                else torch.zeros_like(variance)
            )
        factor = next((candidate for candidate in roots if candidate.on_rows == on_rows), None)
        if factor is None:
            gains.append((math.sqrt(float(variance.sum())), math.sqrt(float(variance.max()))))
            continue
        scaled = variance.sqrt()[:, None].to(factor.matrix.device) * factor.matrix
        gains.append((norm([scaled]), float(torch.linalg.matrix_norm(scaled, 2))))
        base *= factor.fro / math.sqrt(size)
        bound *= factor.spectral
    return Gains(gains[0], gains[1], base, bound)


def fro_of(change: Change) -> float:
    """Return ‖ΔW‖_F; of factors without forming their product."""
    if change.fro is not None:
        return change.fro
    assert change.factors is not None
    return decompose_factored(*change.factors).fro


def times(change: Change, root_matrix: Tensor, on_rows: bool) -> Change:
    """Return ΔW·L, or Lᵀ·ΔW if L belongs to the rows of the stored weight; in factored form if
    there are factors.

    Raises:
        MemoryLimitError: ΔW does not fit into memory as a whole.
    """
    if change.streamed is not None:
        shape = "x".join(map(str, change.streamed.shape))
        raise MemoryLimitError(
            shape, "the data metric needs the whole ΔW, which exceeds $memory", "give more"
        )
    if change.factors is not None:
        b, a = (factor.to(torch.float64) for factor in change.factors)
        return replace(change, factors=(root_matrix.T @ b, a) if on_rows else (b, a @ root_matrix))
    assert change.matrix is not None
    matrix = change.matrix.to(torch.float64)
    product = root_matrix.T @ matrix if on_rows else matrix @ root_matrix
    return replace(change, matrix=product, fro=norm([product]))


def read_root(moments: MomentLocation, device: torch.device) -> Root:
    """Read C (or G), check it, and return L with L·Lᵀ = C.

    Raises:
        InputError: C could not be read, or is not finite, not symmetric, or not positive
            semidefinite.
    """
    side = moments.side
    place = f"{side.checkpoint.file_of(side.name)}: {side.name}"
    c = move(side.read(0, moments.size**2).view(moments.size, moments.size), device).to(
        torch.float64
    )
    if problem := first_non_finite(f"{place}: holds", c):
        raise InputError(problem)
    fro = norm([c])
    if norm([c - c.T]) > MOMENT_ERROR * fro:
        raise InputError(f"{place}: not symmetric, so not a second moment E[xxᵀ]; record it again")
    root_matrix, negative = factor_moments((c + c.T) / 2)
    if negative > MOMENT_ERROR:
        raise InputError(
            f"{place}: has negative eigenvalues, so it is not a second moment E[xxᵀ]; record it "
            "again"
        )
    error = (
        norm([root_matrix @ root_matrix.T - c]) + _ROUNDOFF[side.checkpoint[side.name].dtype] * fro
    )
    spectral = float((root_matrix**2).sum(0).max().sqrt()) if moments.size else 0.0
    return Root(root_matrix, moments.on_rows, error, norm([root_matrix]), spectral)


def agreement(u: Tensor, v: Tensor) -> Agreement:
    """Return the record of the principal angles between two spaces, given by
    orthonormal columns.
    """
    cosines = principal_cosines(u, v)
    return Agreement(
        cosines=tuple(round(cosine, 6) for cosine in cosines.tolist()),
        overlap=min(1.0, float((cosines**2).mean())),
        random=max(u.shape[1], v.shape[1]) / len(u),
    )
