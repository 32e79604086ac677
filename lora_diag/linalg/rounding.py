"""How coarsely a file stores its numbers: the spacing of floating-point values around each entry.

A value w stored with p mantissa bits stands for every number within half a spacing of it,
ulp(w) = 2^(⌊log₂|w|⌋ − p). So a stored W differs from the one that was trained by an E with |E_ij| ≤ ulp(W_ij)/2, and,
while the trained values lie anywhere between two stored ones, E_ij has the variance ulp²/12 of a uniform error
(Widrow and Kollár 2008, *Quantization Noise*, §4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# dtype -> (integer of the same width, mask of the exponent bits, stored mantissa bits)
LAYOUT = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 52),
    torch.float32: (torch.int32, 0x7F80_0000, 23),
    torch.float16: (torch.int16, 0x7C00, 10),
    torch.bfloat16: (torch.int16, 0x7F80, 7),
}


@dataclass(slots=True)
class Spacing:
    """Σ ulp² of one side of ΔW, block by block.

    Args:
        squares: Σ ulp(w)².
        mantissa: Mantissa bits that the stored values really use; 0 for a quantized format.
    """

    squares: float = 0.0
    mantissa: int = 0

    def add(self, block: Tensor, step: Tensor | None = None) -> None:
        """Count a block in.

        A bfloat16 model that was saved as float32 is still rounded to bfloat16, so values that a shorter dtype holds
        exactly are taken for what they are.

        Args:
            block: Stored values, or dequantized ones.
            step: The spacing of a quantized format at every entry, in place of that of the dtype.
        """
        if step is not None:
            self.squares += float(torch.linalg.vector_norm(step, dtype=torch.float64)) ** 2
            return
        short, rest = split_by_precision(block)
        for part in (short, rest):
            if part.numel():
                self.squares += ulp_squares(part)
        self.mantissa = max(self.mantissa, LAYOUT[(short if short.numel() > rest.numel() else rest).dtype][2])


# The shorter dtypes whose values may have been saved in a longer one, the shortest first.
SHORTER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float16: (torch.bfloat16,),
    torch.bfloat16: (),
}


def split_by_precision(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split entries into those of the shortest dtype that most of them fit exactly, and the rest as they are stored.

    A float32 number that was not rounded to bfloat16 fits it with probability 2⁻¹⁶, a float16 number bfloat16 with 1/8;
    so a majority that fits was rounded, and a few entries that do not (a hand edit) change nothing about the others.

    Example:
        >>> short, rest = split_by_precision(torch.tensor([1.0, 0.5, 0.1]))
        >>> short.dtype, rest.tolist() == [torch.tensor(0.1).item()]
        (torch.bfloat16, True)
    """
    flat = values.reshape(-1)
    # Only values that may be short pay for the whole comparison. The step is odd: by every 4096th entry, a block with
    # 4096 columns would be told by the first of them alone.
    sample = flat[:: len(flat) // 256 | 1]
    for dtype in SHORTER[values.dtype]:
        if _fits(sample, dtype).float().mean() > 0.5 and (fits := _fits(flat, dtype)).float().mean() > 0.5:
            return flat[fits].to(dtype), flat[~fits]
    return flat[:0], flat


def _fits(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).to(values.dtype) == values


def ulp_squares(values: Tensor) -> float:
    """Return Σ ulp(w)² over the entries of a block in the spacing of its dtype.

    Args:
        values: float64, float32, float16 or bfloat16; any shape.

    Example:
        >>> ulp_squares(torch.tensor([-3.0], dtype=torch.bfloat16)) == (2**-6) ** 2
        True
    """
    integer, mask, mantissa = LAYOUT[values.dtype]
    powers = (values.view(integer) & mask).view(values.dtype)  # 2^⌊log₂|w|⌋; 0 for zero and subnormal numbers
    powers.clamp_(min=torch.finfo(values.dtype).tiny)  # those are spaced like the smallest normal number
    return float(torch.linalg.vector_norm(powers, dtype=torch.float64)) ** 2 * 4.0**-mantissa


def rounding_bound(base: Spacing, tuned: Spacing) -> float:
    """Return B with ‖E‖_F ≤ B for the rounding error E of ΔW: √Σ(ulp/2)² of each side, added (Minkowski)."""
    return sum(math.sqrt(side.squares) / 2 for side in _rounded(base, tuned))


def rounding_variance(base: Spacing, tuned: Spacing, entries: int) -> float:
    """Return the mean variance of an entry of E if E behaves like noise: Σulp²/12, divided by the entries."""
    return sum(side.squares for side in _rounded(base, tuned)) / 12 / max(1, entries)


def _rounded(base: Spacing, tuned: Spacing) -> list[Spacing]:
    """Return the sides whose rounding is an error of ΔW.

    TUNED is what training arrived at, rounded: it always counts. BASE is where training started; if TUNED is stored
    more finely, the stored values of BASE were the starting point and are exact. Otherwise BASE counts too, since both
    may have been rounded from a finer run; and so does a quantized BASE, which stands for weights that it only
    approximates.
    """
    return [tuned] if tuned.mantissa > base.mantissa > 0 else [base, tuned]
