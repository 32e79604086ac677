"""ΔW = W_tuned − W_base and its norms, in one pass over row blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from lora_diag.linalg.devices import move
from lora_diag.linalg.rounding import LAYOUT, Spacing, rounding_bound, rounding_variance


@dataclass(slots=True)
class Difference:
    """What one pass over a pair of matrices gives.

    Args:
        matrix: ΔW, ``(m, n)``, float32; float64 if either side is stored as float64. None if it was not asked for.
        fro: ‖ΔW‖_F, accumulated in float64; exact to the rounding of the entries of ``matrix``.
        base_fro: ‖W_base‖_F, likewise.
        unchanged: Share of the entries that are bit-identical; across dtypes, that have the same value.
        rounding_fro: Bound on the norm of the rounding error of ΔW, from the spacing of the stored values.
        rounding_variance: Mean variance of an entry of that error, if it behaves like noise.
        mantissa: Mantissa bits that the stored values of base and tuned really use.
        non_finite: What and where the first entry is for which ΔW is not a finite number; None if all are.
    """

    matrix: Tensor | None
    fro: float
    base_fro: float
    unchanged: float
    rounding_fro: float
    rounding_variance: float
    mantissa: tuple[int, int]
    non_finite: str | None = None


def difference(
    blocks: Iterable[tuple[Tensor, Tensor]],
    shape: tuple[int, int],
    device: torch.device,
    keep: bool = True,
    steps: Iterable[tuple[Tensor | None, Tensor | None]] | None = None,
) -> Difference:
    """Subtract two matrices block by block.

    torch's own float32 ``norm()`` on the CPU loses up to 3e-3 at 4096×11008, hence float64 accumulation throughout.

    Args:
        blocks: ``(base, tuned)`` row blocks from the first row to the last, ``(rows, n)`` each, floating point.
        shape: ``(m, n)``.
        device: Where to compute and to leave ΔW.
        keep: False to measure the norms alone, without holding ΔW.
        steps: The spacing of quantized storage formats, for base and tuned, block by block; None if there are none.

    Returns:
        ΔW and its norms. After a non-finite entry nothing more is read and the norms are NaN.
    """
    matrix: Tensor | None = None
    fro = base_fro = 0.0
    base_spacing, tuned_spacing = Spacing(), Spacing()
    same = row = 0
    spacings = repeat((None, None)) if steps is None else steps
    for (stored_base, stored_tuned), (base_step, tuned_step) in zip(blocks, spacings, strict=False):
        base, tuned = move(stored_base, device), move(stored_tuned, device)
        wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
        block = tuned.to(wide) - base.to(wide)
        norm, base_norm = _norm(block), _norm(base)
        if not math.isfinite(norm + base_norm):
            why = _why_not_finite(base, tuned, block, row)
            return Difference(None, math.nan, math.nan, math.nan, math.nan, math.nan, (0, 0), why)
        fro, base_fro = math.hypot(fro, norm), math.hypot(base_fro, base_norm)
        same += _unchanged(base, tuned)
        base_spacing.add(base, base_step)
        tuned_spacing.add(tuned, tuned_step)
        if keep:
            if matrix is None:
                matrix = torch.empty(shape, dtype=wide, device=device)
            matrix[row : row + len(block)] = block
        row += len(block)
    entries = max(1, math.prod(shape))
    return Difference(
        matrix=matrix,
        fro=fro,
        base_fro=base_fro,
        unchanged=same / entries,
        rounding_fro=rounding_bound(base_spacing, tuned_spacing),
        rounding_variance=rounding_variance(base_spacing, tuned_spacing, entries),
        mantissa=(base_spacing.mantissa, tuned_spacing.mantissa),
    )


def norm(blocks: Iterable[Tensor]) -> float:
    """Return the Frobenius norm of a matrix that comes in blocks, accumulated in float64."""
    return math.hypot(*(_norm(block) for block in blocks))


def _norm(block: Tensor) -> float:
    plain = float(torch.linalg.vector_norm(block, dtype=torch.float64))
    if block.dtype != torch.float64 or 1e-140 < plain < 1e140:
        return plain
    largest = float(block.abs().max())  # squares of float64 numbers may underflow or overflow
    return plain if largest in {0.0, math.inf} or math.isnan(largest) else largest * _norm(block / largest)


def _unchanged(base: Tensor, tuned: Tensor) -> int:
    """Count entries with the same bits; across dtypes, with the same value."""
    if base.dtype != tuned.dtype:
        return int((base.to(torch.float64) == tuned.to(torch.float64)).sum())
    bits = LAYOUT[base.dtype][0]
    return int((base.view(bits) == tuned.view(bits)).sum())


def first_non_finite(words: str, values: Tensor, first_row: int = 0) -> str | None:
    """Return the value and the place of the first entry that is not finite; None if all are.

    Args:
        words: How the sentence begins.
        values: ``(rows, n)``.
        first_row: Row number of the first row.

    Example:
        >>> first_non_finite("B holds", torch.tensor([[0.0, 1.0], [2.0, math.inf]]))
        'B holds inf at [1, 1]'
    """
    if math.isfinite(float(torch.linalg.vector_norm(values, dtype=torch.float64))):
        return None  # a fifth of the time that looking at every entry takes, a tenth of that of a whole adapter
    bad = ~torch.isfinite(values)
    if not bad.any():
        return None
    row, column = divmod(int(bad.reshape(-1).to(torch.uint8).argmax()), values.shape[1])
    return f"{words} {float(values[row, column])} at [{first_row + row}, {column}]"


def _why_not_finite(base: Tensor, tuned: Tensor, block: Tensor, row: int) -> str:
    return (
        first_non_finite("BASE holds", base, row)
        or first_non_finite("TUNED holds", tuned, row)
        or first_non_finite("the difference overflows to", block, row)
        or f"the norm of rows {row}-{row + len(block) - 1} overflows float64"
    )
