"""Storage formats of merged weights, and their rounding.

x is a float32 matrix ``(out, in)``; groups are consecutive inputs of one output, the last group of a row may be
shorter. ``rne`` rounds to the nearest value of a type, ties to even. All scales of a zero maximum give zeros.

    bf16, fp16  rne(x); fp16 overflows to infinity from 65520 on
    fp8         e4m3: rne(x/s)·s, saturating at ±448; s = fl32(max|x| / 448) of an output, or of the matrix
    mxfp4       groups of 32: e2m1(x/s)·s, saturating at ±6; s = 2^(⌊log₂ max|x|⌋ − 2), 2^−127 ≤ s ≤ 2^127
    nvfp4       groups of 16: e2m1(x/(s·g))·s·g; g = fl32(max|x| of the matrix / 2688), s = e4m3(max|x| / (6g))
    int4        groups of 128: clamp(round(x/s), −7, 7)·s; s = fl32(max|x| / 7)

Reference: Open Compute Project, Microscaling Formats (MX) 1.0, sections 5.3 and 6.3 (mxfp4); NVIDIA, Pretraining Large
Language Models with NVFP4, 2025 (nvfp4, 2688 = 6 · 448). Round to nearest, without calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3, E2M1, INT4 = 448.0, 6.0, 7.0  # largest values
GROUPS = {"mxfp4": 32, "nvfp4": 16, "int4": 128}
SIXTEEN_BIT = ("bf16", "fp16")
# Largest exponent of e2m1, and the exponents that E8M0 has.
E2M1_EXPONENT, E8M0 = 2, 127


@dataclass(frozen=True, slots=True)
class Target:
    """A storage format.

    Args:
        name: ``bf16``, ``fp16``, ``fp8``, ``mxfp4``, ``nvfp4`` or ``int4``.
        group: Number of inputs that share a scale; 0 without groups.
        per_tensor: Whether fp8 has one scale for the whole matrix.
    """

    name: str
    group: int = 0
    per_tensor: bool = False

    @property
    def needs_peaks(self) -> bool:
        """Whether scales depend on more of the matrix than a group."""
        return self.name in {"fp8", "nvfp4"}


def quantize(x: Tensor, target: Target, peaks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a matrix, or whole groups of its inputs.

    Args:
        x: ``(out, in)``, float32.
        target: The format.
        peaks: max|x| of every output over all inputs of the matrix, ``(out, 1)``; of a format with one scale for all,
            the same number in every row. Not needed where scales follow from groups alone.

    Returns:
        Codes, and the numbers that they encode, float64; both ``(out, in)``.

    Example:
        >>> quantize(torch.tensor([[1.0, 0.3, -6.1]]), Target("mxfp4", 32))[1]
        tensor([[ 1.0000,  0.5000, -6.0000]], dtype=torch.float64)
    """
    if target.name in SIXTEEN_BIT:
        codes = x.to(torch.bfloat16 if target.name == "bf16" else torch.float16).double()
        return codes, codes
    if target.name == "fp8":
        assert peaks is not None
        scale = _replace_zeros(peaks / E4M3)
        codes = _round_e4m3(x / scale)
        return codes, codes * scale.double()
    padding = -x.shape[1] % target.group
    groups = torch.nn.functional.pad(x, (0, padding)).view(len(x), -1, target.group)
    top = groups.abs().amax(dim=2, keepdim=True)
    if target.name == "mxfp4":
        exponent = (torch.frexp(top).exponent - 1 - E2M1_EXPONENT).clamp(-E8M0, E8M0)
        scales = torch.ldexp(torch.ones_like(top, dtype=torch.float64), exponent)
        codes = _round_e2m1(groups.double() / scales)
    elif target.name == "nvfp4":
        assert peaks is not None
        global_scale = _replace_zeros(peaks / (E2M1 * E4M3))[:, :, None]
        scales = _round_e4m3(top / (E2M1 * global_scale)) * global_scale.double()
        codes = torch.where(scales == 0, 0.0, _round_e2m1(groups.double() / _replace_zeros(scales)))
    else:
        scales = _replace_zeros(top / INT4).double()
        codes = (groups.double() / scales).round().clamp(-INT4, INT4)
    return _cut(codes, x), _cut(codes * scales, x)


def _cut(groups: Tensor, x: Tensor) -> Tensor:
    return groups.reshape(len(x), -1)[:, : x.shape[1]]


def _replace_zeros(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _round_e4m3(x: Tensor) -> Tensor:
    """Round float32 numbers to e4m3, saturating, float64."""
    return x.clamp(-E4M3, E4M3).to(torch.float8_e4m3fn).double()


def _round_e2m1(x: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign, saturating: spacing 1/2 below 2, 1 below 4, 2 above."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((x / step).round() * step).clamp(-E2M1, E2M1)
