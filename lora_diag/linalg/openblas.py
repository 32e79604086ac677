"""Eigenvalue solvers of the OpenBLAS in NumPy's wheels, for symmetric matrices on the CPU.

Up to ``ONE_THREAD_UP_TO`` they run on one thread: torch's setting of threads does not change that
of OpenBLAS, whose threads would make the bytes of a result depend on the number of cores, and
concurrent layers wait for each other. A few eigenvectors come from LAPACK's C interface, since
SciPy's wrapper holds the interpreter's lock meanwhile. Where NumPy is linked to another library,
torch's solvers take their place.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext, suppress
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_diag.linalg.devices import SharedSetting

# Largest order of matrices that one thread solves. On an AMD EPYC all eigenvalues of order 576 took
# 13 ms instead of 22 with torch (MKL), of 1024 68 instead of 116; the 8 largest with vectors 13
# instead of 42, and 63 instead of 263.
ONE_THREAD_UP_TO = 1024

WORDS = (
    "openblas_get_num_threads",
    "openblas_set_num_threads",
    "LAPACKE_dsyevr",
    "openblas_get_config",
)


def _find() -> tuple[Any, ...]:
    """Return the functions ``WORDS`` of OpenBLAS but the last, and the type of their integers;
    empty without OpenBLAS.

    Builds differ in the first and the last part of all names, and in the size of integers.
    """
    with suppress(ImportError, OSError):  # a later NumPy may have another module
        from numpy.linalg import _umath_linalg

        library = ctypes.CDLL(
            _umath_linalg.__file__
        )  # finds names in the libraries that it is linked to, too
        for first, last in product(("scipy_", ""), ("64_", "")):
            with suppress(AttributeError):
                *functions, configuration = (
                    getattr(library, f"{first}{word}{last}") for word in WORDS
                )
                configuration.restype = ctypes.c_char_p
                return (
                    *functions,
                    ctypes.c_int64 if b"USE64BITINT" in configuration() else ctypes.c_int32,
                )
    return ()


FOUND = _find()
_one_thread = SharedSetting(lambda: int(FOUND[0]()), lambda count: FOUND[1](count), 1)


def suits(gram: Tensor) -> bool:
    """Return whether one thread of OpenBLAS solves a matrix."""
    return bool(FOUND) and not gram.is_cuda and len(gram) <= ONE_THREAD_UP_TO


def eigenvalues(gram: Tensor) -> Tensor:
    """Return the eigenvalues of a matrix that ``suits``, given by its lower triangle; ascending."""
    with _one_thread:
        return torch.from_numpy(np.linalg.eigvalsh(gram.numpy(), UPLO="L"))


def largest_eigenpairs(gram: Tensor, top: int) -> tuple[Tensor, Tensor] | None:
    """Return the largest eigenvalues, ascending, and their vectors, by bisection and inverse
    iteration.

    Above ``ONE_THREAD_UP_TO`` on all threads of OpenBLAS, which must be ``FOUND``.

    Args:
        gram: Float64, on the CPU, given by its lower triangle.
        top: Number of values, from 1 to n.

    Returns:
        ``(top,)`` and ``(n, top)``; None if inverse iteration does not converge, or if bisection
            cannot separate the
        ``top``-th value from the next ones and returns fewer, as observed for 600 equal values.

    Raises:
        ValueError: ``top`` is out of range, on which LAPACK prints a message of its own.
    """
    if not 1 <= top <= len(gram):
        raise ValueError(f"top {top}: must be from 1 to {len(gram)}")
    dsyevr, integer = FOUND[2:]
    n, zero = integer(len(gram)), ctypes.c_double(0.0)
    matrix, values, vectors = gram.numpy().copy(), np.empty(len(gram)), np.empty((top, len(gram)))
    counts = np.zeros(1 + 2 * top, integer)  # of values, and workspace
    addresses = [
        ctypes.c_void_p(array.ctypes.data)
        for array in (matrix, counts, values, vectors, counts[1:])
    ]
    chosen = n, zero, zero, integer(len(gram) - top + 1), n, zero
    with _one_thread if len(gram) <= ONE_THREAD_UP_TO else nullcontext():
        # 102: by columns; the lower triangle by rows is the upper one (U) by columns
        failed = dsyevr(
            102,
            *map(ctypes.c_char, b"VIU"),
            n,
            addresses[0],
            *chosen,
            *addresses[1:4],
            n,
            addresses[4],
        )
    return (
        None
        if failed or counts[0] < top
        else (torch.from_numpy(values[:top]), torch.from_numpy(vectors).T)
    )
