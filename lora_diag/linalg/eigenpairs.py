"""Eigenpairs at one end of a symmetric operator given by its products with vectors.

ARPACK's implicitly restarted Lanczos (Lehoucq, Sorensen and Yang 1998) by SciPy: memory is that of its basis,
independent of the number of products. A Ritz value is never beyond the true end of the spectrum, and is within ‖Hv −
λv‖ of an eigenvalue; missing an eigenvalue beyond it requires a random start orthogonal to its eigenvector. Among the
others, multiple or clustered eigenvalues may be skipped in favour of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from lora_diag.errors import InputError

# An operator this small is written out: one product a column is what Lanczos would take, too.
DENSE_UP_TO = 64

# Relative tolerance of ARPACK. Its bound is on the residual; the error of the eigenvalue is proportional to its square.
TOLERANCE = 1e-3

# Number of basis vectors, and maximum number of restarts.
BASIS_SIZE, MAX_RESTARTS = 20, 30


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """Eigenpairs at one end of a symmetric operator.

    Args:
        values: ``(k,)`` float64, the outermost first.
        vectors: ``(n, k)``, of norm 1.
        residual: ‖Hv − λv‖ of the outermost.
        products: Number of products, including that for the residual.
    """

    values: Tensor
    vectors: Tensor
    residual: float
    products: int


def basis_size(size: int, count: int) -> int:
    """Return the number of vectors of size ``size`` in the basis of Lanczos for ``count`` eigenvalues.

    >>> basis_size(10**6, 1), basis_size(10**6, 30), basis_size(100, 60)
    (20, 61, 100)
    """
    return min(size, max(2 * count + 1, BASIS_SIZE))


def eigenpairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    count: int,
    end: Literal["largest", "smallest"],
    seed: int,
    device: torch.device,
    largest: float = 0.0,
) -> Eigenpairs:
    """Return the largest or the smallest eigenvalues, by sign, with eigenvectors.

    Args:
        product: H·x for x ``(n,)`` float32 on the device.
        size: n.
        count: Number of eigenvalues; fewer if the operator has fewer.
        end: ``largest`` or ``smallest``.
        seed: Seed of the random start.
        device: Device of x.
        largest: The largest eigenvalue c, needed for the smallest, which are computed from cI − H. Tolerances are
            relative, and the many near-zero eigenvalues of a Gauss–Newton matrix would never meet one of their own
            size.

    Raises:
        InputError: Lanczos failed or did not converge, or a product is not finite.

    Reference:
        Lehoucq, Sorensen and Yang 1998, ARPACK Users' Guide.

    Example:
        >>> h = torch.diag(torch.arange(-3.0, 97.0))
        >>> found = eigenpairs(lambda x: h @ x, 100, 2, "largest", 0, torch.device("cpu"))
        >>> found.values.round(decimals=3).tolist()
        [96.0, 95.0]
    """
    calls = 0

    def times(x: Any) -> Any:
        nonlocal calls
        calls += 1
        y = product(torch.as_tensor(x, dtype=torch.float32).reshape(-1).to(device))
        if not bool(torch.isfinite(y).all()):
            raise InputError("a Hessian-vector product is not finite: the weights are broken, or the loss overflows")
        return y.cpu().numpy()

    if size <= max(DENSE_UP_TO, count + 1):
        values, vectors = _solve_dense(times, size, count, end)
    elif end == "largest":
        values, vectors = _run_lanczos(times, size, count, end, seed)
    else:
        values, vectors = _run_lanczos(lambda x: largest * x.reshape(-1) - times(x), size, count, end, seed)
        values = largest - values
    first = vectors[:, 0]
    residual = torch.from_numpy(times(first.numpy())).double() - values[0] * first.double()
    return Eigenpairs(values, vectors.to(device), float(residual.norm()), calls)


def _solve_dense(times: Callable[[Any], Any], size: int, count: int, end: str) -> tuple[Tensor, Tensor]:
    columns = torch.stack([torch.from_numpy(times(unit.numpy())) for unit in torch.eye(size)], 1).double()
    values, vectors = torch.linalg.eigh((columns + columns.T) / 2)
    if end == "largest":
        values, vectors = values.flip(0), vectors.flip(1)
    return values[:count], vectors[:, :count].float()


def _run_lanczos(times: Callable[[Any], Any], size: int, count: int, end: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator)
    operator = LinearOperator((size, size), matvec=times, dtype="float32")
    try:
        values, vectors = eigsh(
            operator,
            k=count,
            which="LA",
            v0=start.numpy(),
            ncv=basis_size(size, count),
            tol=TOLERANCE,
            maxiter=MAX_RESTARTS,
        )
    except ArpackNoConvergence as error:
        raise InputError(
            f"the {end} eigenvalues did not converge in {MAX_RESTARTS} restarts of Lanczos; give fewer --eigenvalues"
        ) from error
    except ArpackError as error:
        # of an operator that is zero, as of a layer that the loss does not depend on
        if times(start.numpy()).any():
            raise InputError(f"Lanczos failed: {error}") from error
        return torch.zeros(count, dtype=torch.float64), torch.linalg.qr(torch.randn(size, count, generator=generator))[
            0
        ]
    order = torch.argsort(torch.from_numpy(values), descending=True)
    return torch.from_numpy(values).double()[order], torch.from_numpy(vectors)[:, order]
