"""One layer's ΔW in any form: its norms, and the input of its singular values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_diag.deltas import (
    Delta,
    DenseDelta,
    FactoredDelta,
    Side,
    StoredDelta,
    footprint,
    row_blocks,
    row_spans,
)
from lora_diag.errors import MemoryLimitError
from lora_diag.layers.lineage import cosine_of_norms, judge_cosine
from lora_diag.linalg.devices import move, resolve_device, use_own_stream
from lora_diag.linalg.difference import Difference, difference, first_non_finite, norm
from lora_diag.linalg.exact import Factors, decompose_factored
from lora_diag.linalg.merge import Addend, Product, Whole
from lora_diag.linalg.methods import (
    Allowance,
    decompose,
    decompose_streamed,
    require_memory,
    whole_bytes,
)
from lora_diag.linalg.streamed import Streamed
from lora_diag.records.vocabulary import ON_CPU

T = TypeVar("T")

PRODUCT_OVERFLOW = "the product of its factors overflows float64"
SPACING_OVERFLOW = "the squares of the spacing of its numbers overflow float64"

# Range of norms of compared updates, so that squares of their quotients are finite in float64.
MIN_NORM, MAX_NORM = 1e-75, 1e75

# Parts of a block for steps in float64: results of 2^20 entries are new pages in every step, which
# took 12 ms instead of 2 for ‖ΔW − B·A‖ at 1536×576 on an AMD EPYC.
PARTS = 4

# Memory per entry of an update that is computed in full (LoHa, LoKr, ...): float64, with one factor
# or copy.
COMPUTED_ENTRY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Change:
    """ΔW on a device.

    Args:
        fro: ‖ΔW‖_F; None for factors, whose decomposition yields it. None or NaN if not finite.
        base_fro: ‖W_base‖_F; None if the base was not given. None or NaN if not finite.
        rounding: The pass over two stored sides, with the effect of their rounding; None for an
            update without them.
        matrix: ΔW ``(out, in)``; None if it is given by factors or in row blocks, or was not kept.
        factors: B and A, or None.
        non_finite: Why ΔW, W_base, a norm or the squares of the spacing are not finite, with the
            first such entry if it is known; None if all are.
        streamed: ΔW in row blocks, if it exceeds the memory limit; else None.
        limit: Memory limit of computations with it in bytes; None without limit.
        base_sigma: Certified lower bound of σ_1(W_base); None if it was not requested, or the base
            was not given.
        cosine_to_base: Cosine of W_base and W_tuned, as of ``layers.lineage``; None if both are not
            stored matrices.
    """

    fro: float | None
    base_fro: float | None
    rounding: Difference | None = None
    matrix: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    non_finite: str | None = None
    streamed: Streamed | None = None
    limit: int | None = None
    base_sigma: float | None = None
    cosine_to_base: float | None = None

    @property
    def row_blocks(self) -> int | None:
        """Number of row blocks in which ΔW is read repeatedly; None if it is in memory."""
        return None if self.streamed is None else len(list(row_spans(self.streamed.shape)))

    def is_unrelated(self, shape: tuple[int, int]) -> bool:
        """Return whether W_tuned, ``(out, in)``, is known to be unrelated to W_base."""
        return (
            self.cosine_to_base is not None
            and judge_cosine(self.cosine_to_base, math.prod(shape)) == "unrelated"
        )

    def blocks(self, shape: tuple[int, int], parts: int = 1) -> Iterator[Tensor]:
        """Yield ΔW in row blocks, float64; a product of factors is formed block by block.

        Args:
            shape: ``(out, in)``.
            parts: Number of blocks into which each of 2^20 entries is split.
        """
        if self.streamed is not None:
            yield from (
                part.to(torch.float64)
                for block in self.streamed.read()
                for part in torch.chunk(block, parts)
            )
            return
        for start, stop in row_spans(shape):
            step = math.ceil((stop - start) / parts)
            for first in range(start, stop, step):
                rows = slice(first, min(stop, first + step))
                if self.factors is not None:
                    b, a = self.factors
                    yield b[rows].to(torch.float64) @ a.to(torch.float64)
                else:
                    assert self.matrix is not None
                    yield self.matrix[rows].to(torch.float64)

    def decompose(
        self,
        method: str = "auto",
        top: int | None = None,
        vectors: bool = False,
        tol: float = 5e-4,
        seed: int = 0,
    ) -> Factors:
        """Compute singular values, in factored form if there are factors.

        Args:
            method: As in ``--svd``; not used for factors.
            top: Number of largest singular values; None for all.
            vectors: Whether to compute singular vectors, too.
            tol: Maximum error of an energy fraction; not used for factors.
            seed: Seed of random starting vectors.
        """
        if self.factors is not None:
            return decompose_factored(*self.factors, top=top, vectors=vectors)
        if self.streamed is not None:
            assert self.limit is not None
            assert self.fro is not None
            allowance = Allowance(self.limit, method, top, vectors)
            try:
                return decompose_streamed(self.streamed, allowance, self.fro, tol, seed)
            except MemoryLimitError as error:
                error.fro, error.base_fro = self.fro, self.base_fro
                raise
        assert self.matrix is not None
        return decompose(self.matrix, method, top, self.fro, vectors, tol, seed)


def load_change(
    delta: Delta,
    device: torch.device,
    keep: bool = True,
    allowance: Allowance | None = None,
    on_base: Callable[[Tensor], None] = lambda base: None,
) -> Change:
    """Read one layer's ΔW and measure its norms.

    Args:
        delta: The layer.
        device: Device of the computation.
        keep: False to drop a matrix once its norms are measured.
        allowance: The computation and its memory limit, which applies on the CPU and with ``keep``
            only; None without limit. If a stored ΔW does not fit, its norms are measured, and later
            computations read it again in row blocks.
        on_base: Called with the rows of W_base as they are read, from the first to the last.

    Returns:
        ΔW; without matrix, factors and row blocks if an entry is not finite.

    Raises:
        MemoryLimitError: ΔW is not stored, has to be computed in full, and does not fit.
    """
    allowance = (
        allowance if keep and device.type == "cpu" else None
    )  # the limit applies to memory of the host
    if isinstance(delta, StoredDelta):
        dtype = torch.float64 if "float64" in delta.dtypes else torch.float32
        fits = allowance is None or allowance.holds(delta.shape, dtype.itemsize)
        measured = difference(
            delta.blocks(), delta.shape, device, keep and fits, delta.steps(), on_base
        )
        if (
            measured.non_finite is not None and device.type != "cpu"
        ):  # read again to locate the entry
            measured = difference(
                delta.blocks(), delta.shape, torch.device("cpu"), keep and fits, delta.steps()
            )
        if measured.roundings and not measured.roundings.is_finite:
            measured.non_finite = SPACING_OVERFLOW
        matrix, measured.matrix = measured.matrix, None
        streamed = None
        if not fits and not measured.non_finite:
            streamed = Streamed(partial(_subtract_again, delta, dtype), delta.shape, dtype)
        limit = allowance.limit if allowance else None
        cosine = None
        if delta.is_matrix:
            cosine = cosine_of_norms(measured.base_fro, measured.tuned_fro, measured.fro)
        return Change(
            fro=measured.fro,
            base_fro=measured.base_fro,
            rounding=measured,
            matrix=matrix,
            non_finite=measured.non_finite,
            streamed=streamed,
            limit=limit,
            cosine_to_base=cosine,
        )
    if (
        isinstance(delta, DenseDelta)
        and allowance
        and not allowance.holds(delta.shape, COMPUTED_ENTRY_BYTES)
    ):
        shape = f"{delta.shape[0]}x{delta.shape[1]}"
        raise MemoryLimitError(
            shape, "$memory is too small for this update, which is computed in full", "give more"
        )
    base_fro = None
    if delta.base is not None:
        # Read on the CPU in the time of a copy to the device.
        base_fro = norm(_pass_on(row_blocks(delta.base, delta.shape), on_base))
        if not math.isfinite(base_fro):
            return Change(None, None, non_finite=_explain_non_finite_base(delta.base, delta.shape))
    if isinstance(delta, FactoredDelta):
        b, a = (move(factor, device) for factor in delta.load())
        problem = first_non_finite("lora_B holds", b) or first_non_finite("lora_A holds", a)
        return Change(None, base_fro, factors=None if problem else (b, a), non_finite=problem)
    matrix = move(delta.load(), device)
    problem = first_non_finite("the update holds", matrix)
    fro = None if problem else norm([matrix])
    return Change(fro, base_fro, None, matrix if keep and not problem else None, non_finite=problem)


def _pass_on(blocks: Iterable[Tensor], on_block: Callable[[Tensor], None]) -> Iterator[Tensor]:
    """Yield blocks, each passed on before."""
    for block in blocks:
        on_block(block)
        yield block


def load_addend(delta: Delta) -> Addend:
    """Return ΔW with its rows in float64; that of two stored sides is read on demand."""
    if isinstance(delta, FactoredDelta):
        b, a = delta.load()
        return Product(b.double(), a.double())
    if isinstance(delta, DenseDelta):
        matrix = delta.load()
        return Whole(delta.shape, lambda first, last: matrix[first:last])
    return Whole(delta.shape, partial(_subtract_rows, delta), exact=True)


def _subtract_rows(delta: StoredDelta, first: int, last: int) -> Tensor:
    """Return the rows ``first:last`` of ΔW, ``(rows, in)`` float64, read on demand."""
    span = first * delta.shape[1], last * delta.shape[1]
    return (delta.tuned.read(*span).double() - delta.base.read(*span).double()).view(
        -1, delta.shape[1]
    )


def bytes_of(delta: Delta, allowance: Allowance | None) -> int:
    """Estimate the bytes needed to measure a layer; at most the limit of an allowance, unless ΔW is
    factored.
    """
    if allowance is None or isinstance(delta, FactoredDelta):
        return footprint(delta)
    entry = COMPUTED_ENTRY_BYTES
    if isinstance(delta, StoredDelta):
        entry = 8 if "float64" in delta.dtypes else 4
    return min(allowance.limit, whole_bytes(delta.shape, allowance, entry))


def _subtract_again(delta: StoredDelta, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the row blocks of ΔW, ``(rows, in)`` in a dtype, read and subtracted again."""
    for base, tuned in delta.blocks():
        yield tuned.to(dtype) - base.to(dtype)


def join_blocks(blocks: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the matrix that consists of row blocks, on the device, in float32, or in float64 if it
    is stored so.
    """
    tensors = [move(block, device) for block in blocks]
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def load_with_base(
    delta: Delta, device: torch.device, memory: int | None, needed: int, use: str
) -> tuple[Change, Tensor] | str:
    """Load ΔW and the weight that it changes; return the problem if ΔW is not finite.

    Args:
        delta: The layer; BASE has its weight.
        device: The device.
        memory: Memory limit in bytes; None without limit.
        needed: Upper bound of the memory of the measurement in bytes.
        use: What takes that memory, with its verb, for messages.

    Raises:
        MemoryLimitError: The memory limit, which applies to the machine's memory, is too low.
    """
    if memory is not None and device.type == "cpu":
        require_memory(needed, memory, delta.shape, use, "$exclude it")
    change = load_change(delta, device)
    if change.non_finite is not None:
        return change.non_finite
    assert delta.base is not None
    return change, join_blocks(row_blocks(delta.base, delta.shape), device)


def form_tuned(delta: Delta, change: Change, before: Tensor, device: torch.device) -> Tensor:
    """Return W_tuned ``(out, in)``: as stored, or W_base (``before``) + ΔW in the dtype of
    ``before``.
    """
    if isinstance(delta, StoredDelta):
        return join_blocks(row_blocks(delta.tuned, delta.shape), device)
    after, row = before.clone(), 0
    for block in change.blocks(delta.shape):
        after[row : row + len(block)] += block.to(after.dtype)
        row += len(block)
    return after


def compute_on_device(compute: Callable[[torch.device], T], device: torch.device) -> tuple[T, str]:
    """Compute on a device, or on the CPU if the device is out of memory; return the result and a
    note for the record.
    """
    with _report_failed_allocations(), use_own_stream(device):
        try:
            return compute(device), ""
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # Only here the error, and with it the tensors of the calls that failed, are gone.
        torch.cuda.empty_cache()
        return compute(torch.device("cpu")), f"{ON_CPU}out of memory on {device}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU is out of memory, as noticed by torch or by CUDA's libraries."""
    messages = ("CUDA error: out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        message in str(error) for message in messages
    )


def why_not_comparable(fro: float) -> str | None:
    """Return why an update with this norm cannot be compared with another; None if it can."""
    if not math.isfinite(fro):
        return PRODUCT_OVERFLOW
    if fro == 0.0 or MIN_NORM <= fro <= MAX_NORM:
        return None
    return f"its norm is {fro:.2g}: float64 does not hold the squares of its quotients with others"


def measure_on_device(measure: Callable[[torch.device], T], device: str) -> T:
    """Return what is measured on a device; the method of a record names the CPU if the device was
    out of memory.

    Args:
        measure: Measures a layer; returns a record, or a tuple of records.
        device: As in ``--device``.
    """
    records, note = compute_on_device(measure, resolve_device(device))
    if not isinstance(records, tuple):
        return append_note(records, note)
    result: Any = tuple(append_note(record, note) for record in records)
    return result  # type: ignore[no-any-return]


def append_note(record: T, note: str) -> T:
    """Return a record with a note of ``compute_on_device`` appended to its method; one without a
    method as it is.
    """
    result: Any = record
    if note and hasattr(result, "method"):
        result = result.model_copy(update={"method": result.method + note})
    return result  # type: ignore[no-any-return]


@contextmanager
def _report_failed_allocations() -> Iterator[None]:
    """Raise ``MemoryLimitError`` in place of the errors of failed allocations."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            fix = "give $memory less than this machine has, or $workers 1"
            raise MemoryLimitError("out of memory", fix) from error
        raise


def _explain_non_finite_base(side: Side, shape: tuple[int, int]) -> str:
    """Return why W_base has no finite norm: the first entry that is not finite, or an overflow."""
    for (first, _), block in zip(row_spans(shape), row_blocks(side, shape), strict=True):
        if problem := first_non_finite("BASE holds", block, first):
            return problem
    return "the norm of BASE overflows float64"
