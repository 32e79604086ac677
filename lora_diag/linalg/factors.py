"""The common result of all methods, its numerical rank, and the signs and the scale that all methods use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The largest singular values of a matrix A, with bounds on their errors.

    Args:
        s: Singular values, descending, float64, on the CPU.
        complete: True if all min(m, n) are included, or all that can be nonzero.
        method: Method, such as ``gram`` or ``exact:gesdd``.
        energy_error: Bound on |Ĉ(r) − C(r)| for every r ≤ len(s), where Ĉ(r) = Σ_{i≤r}σ̂_i² / ‖A‖_F².
        fro: ‖A‖_F.
        u: Left singular vectors ``(m, len(s))`` float64 on the device of A, or None if not requested. In every column
            the entry of largest absolute value is positive.
        vh: Right singular vectors ``(len(s), n)``, likewise, with signs consistent with ``u``.
    """

    s: Tensor
    complete: bool
    method: str
    energy_error: float
    fro: float
    u: Tensor | None = None
    vh: Tensor | None = None


# Singular values below this fraction of the largest are rounding, and their vectors are arbitrary: for factors,
# decomposed in float64, and for a dense ΔW, whose entries are float32 and whose Gram matrix loses half the digits.
ZERO_FACTORED, ZERO_DENSE = 1e-10, 1e-7


def rounding_threshold(factors: Factors) -> float:
    """Return the size below which singular values are rounding of the method, or of the entries of A.

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
    """Make singular vectors reproducible: the largest entry of every left vector is positive.

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


# log₂‖A‖_F beyond which A is scaled first: within it AᵀA stays far from the ends of float32's range.
MAX_UNSCALED_LOG2 = 30


def scale_of(fro: float, dtype: torch.dtype) -> float:
    """Return the divisor of A: methods form products of two and four A's, which could overflow or underflow.

    It is a power of two that the dtype can represent, so that division is exact.

    Args:
        fro: ‖A‖_F.
        dtype: Dtype of its entries.

    Example:
        >>> scale_of(8.0, torch.float32), scale_of(2.0**40, torch.float32), scale_of(1e40, torch.float32) == 2.0**127
        (1.0, 1099511627776.0, True)
    """
    if not fro or abs(math.log2(fro)) <= MAX_UNSCALED_LOG2:
        return 1.0
    max_exponent = math.frexp(torch.finfo(dtype).max)[1] - 1
    return float(2.0 ** max(1 - max_exponent, min(max_exponent, round(math.log2(fro)))))
