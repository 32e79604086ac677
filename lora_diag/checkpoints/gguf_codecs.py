"""Blocks of GGUF's quantized types → numbers, and steps whose half bounds their errors.

A value is ``d · q − m`` with an integer code q, and d and m of the block or of one of its groups; in IQ4 it is
``d · table[q]``, and in MXFP4 a 4-bit float times a power of two. ``blocks`` are ``(n, size)`` of uint8.

Reference: ``ggml-quants.c`` of llama.cpp; ``gguf.quants`` 0.19, with which the tests compare every type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.checkpoints.bitsandbytes import gaps
from lora_diag.checkpoints.packing import fp4_values, mxfp4_steps
from lora_diag.checkpoints.scaled import e8m0

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Codec:
    """How the blocks of a type become numbers.

    Args:
        decode: Blocks ``(n, size)`` of uint8 to values ``(n, block)`` of float32.
        steps: The same blocks to steps whose half bounds the error of each value, ``(n, block)`` of float32.
        scales: The same blocks to what each code is multiplied by; None for a type whose values have an offset.
    """

    decode: Callable[[torch.Tensor], torch.Tensor]
    steps: Callable[[torch.Tensor], torch.Tensor]
    scales: Callable[[torch.Tensor], torch.Tensor] | None = None


# Values of the 4-bit codes of IQ4.
IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)

# From blocks to codes ``(n, groups, width)``, and d and m of every group, ``(n, groups, 1)``; m is None where it is 0.
Unpack = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None"]]


def half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the float16 at a byte of every block, ``(n, 1)`` of float32."""
    import torch

    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _decode(unpack_blocks: Unpack, blocks: torch.Tensor) -> torch.Tensor:
    """Return d · q − m of every code, ``(n, block)``."""
    codes, d, m = unpack_blocks(blocks)
    values = d * codes.float()
    return (values if m is None else values - m).reshape(len(blocks), codes.shape[1] * codes.shape[2])


def _compute_steps(unpack_blocks: Unpack, largest: int | None, rounded: bool, blocks: torch.Tensor) -> torch.Tensor:
    """Return steps whose half bounds the error: |d|, and more in two cases.

    The types without m map the number of largest absolute value to −2^(bits − 1), whose negative is not a code: it is
    stored one step lower. Where codes are chosen before d and m are rounded to float16, that rounding adds up to 2⁻¹¹
    of ``d · q`` and of m.

    Args:
        unpack_blocks: Returns codes, d and m of blocks.
        largest: The largest code, as which a number one step above it is stored, too; None if there is none.
        rounded: Whether d and m are rounded after the codes are chosen.
        blocks: ``(n, size)``.
    """
    codes, d, m = unpack_blocks(blocks)
    steps = d.abs().expand(codes.shape)
    if largest is not None:
        steps = steps * (1 + (codes == largest).float())
    if rounded:
        steps = steps + (d * codes.float()).abs() * 2**-10
        steps = steps if m is None else steps + m.abs() * 2**-10
    return steps.reshape(len(blocks), codes.shape[1] * codes.shape[2])


def _compute_scales(unpack_blocks: Unpack, blocks: torch.Tensor) -> torch.Tensor:
    """Return |d|, by which codes are multiplied."""
    codes, d, _ = unpack_blocks(blocks)
    return d.abs().expand(codes.shape).reshape(len(blocks), codes.shape[1] * codes.shape[2])


def _unpack_fields(data: torch.Tensor, bits: int, count: int, width: int) -> torch.Tensor:
    """Return the fields of ``bits`` bits of bytes ``(n, size)``, ``(n, size / width, count, width)``, int32.

    Of every ``width`` bytes, the lowest fields come first.
    """
    import torch

    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8)[:, None]
    return ((data.reshape(len(data), -1, 1, width) >> shifts) & ((1 << bits) - 1)).int()


def _unpack_high_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the bits of four bytes of every block, ``(n, 32)``."""
    import torch

    return ((blocks[:, start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1, 32).int()


def _unpack_q4(blocks: torch.Tensor, has_offset: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Unpack Q4_0 (d, 16 bytes, q − 8) or Q4_1 (d, m, 16 bytes, d · q + m), low halves first."""
    codes = _unpack_fields(blocks[:, -16:], 4, 2, 16).reshape(-1, 1, 32)
    d = half(blocks, 0)[:, None]
    return (codes, d, -half(blocks, 2)[:, None]) if has_offset else (codes - 8, d, None)


def _unpack_q5(blocks: torch.Tensor, has_offset: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Unpack Q5_0 or Q5_1: as Q4_0 and Q4_1, with the fifth bits of all codes in four bytes before the low ones."""
    low = _unpack_fields(blocks[:, -16:], 4, 2, 16).reshape(-1, 32)
    codes = (low | _unpack_high_bits(blocks, 4 if has_offset else 2) << 4)[:, None]
    d = half(blocks, 0)[:, None]
    return (codes, d, -half(blocks, 2)[:, None]) if has_offset else (codes - 16, d, None)


def _unpack_q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Unpack Q8_0: d and 32 signed bytes."""
    import torch

    return blocks[:, 2:].contiguous().view(torch.int8)[:, None], half(blocks, 0)[:, None], None


def _unpack_q2_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unpack Q2_K: 16 bytes with 4 bits of scale and 4 of minimum per group of 16, 64 of 2-bit codes, d and dmin."""
    scales, d, dmin = blocks[:, :16], half(blocks, 80), half(blocks, 82)
    codes = _unpack_fields(blocks[:, 16:80], 2, 4, 32).reshape(-1, 16, 16)
    return codes, (d * (scales & 15).float())[:, :, None], (dmin * (scales >> 4).float())[:, :, None]


def _unpack_q3_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Unpack Q3_K: 32 bytes of inverted third bits, 64 of low ones, 12 of 6-bit scales less 32 per group of 16, d."""
    import torch

    low = _unpack_fields(blocks[:, 32:96], 2, 4, 32).reshape(-1, 16, 16)
    high = _unpack_fields(blocks[:, :32], 1, 8, 32).reshape(-1, 16, 16) ^ 1
    packed = blocks[:, 96:108]
    shifts = torch.tensor([0, 4], dtype=torch.uint8)[:, None]
    scales = ((packed[:, None, :8] >> shifts) & 15).reshape(-1, 16).int()
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    scales |= ((packed[:, None, 8:] >> shifts) & 3).reshape(-1, 16).int() << 4
    return low - (high << 2), (half(blocks, 108) * (scales - 32).float())[:, :, None], None


def _unpack_scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eight 6-bit scales and eight 6-bit minima of 12 bytes, ``(n, 8)`` each."""
    import torch

    d, m, shared = packed[:, :4].int(), packed[:, 4:8].int(), packed[:, 8:].int()
    scales = torch.cat([d & 63, (shared & 15) | ((d >> 2) & 48)], dim=1)
    return scales.float(), torch.cat([m & 63, (shared >> 4) | ((m >> 2) & 48)], dim=1).float()


def _unpack_q4_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unpack Q4_K: d, dmin, 12 bytes of scales and minima per group of 32, 128 bytes of 4-bit codes."""
    scales, minima = _unpack_scales_and_minima(blocks[:, 4:16])
    codes = _unpack_fields(blocks[:, 16:], 4, 2, 32).reshape(-1, 8, 32)
    return codes, (half(blocks, 0) * scales)[:, :, None], (half(blocks, 2) * minima)[:, :, None]


def _unpack_q5_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unpack Q5_K: as Q4_K, with 32 bytes of fifth bits before the low ones."""
    scales, minima = _unpack_scales_and_minima(blocks[:, 4:16])
    high = _unpack_fields(blocks[:, 16:48], 1, 8, 32).reshape(-1, 8, 32)
    codes = _unpack_fields(blocks[:, 48:], 4, 2, 32).reshape(-1, 8, 32) | high << 4
    return codes, (half(blocks, 0) * scales)[:, :, None], (half(blocks, 2) * minima)[:, :, None]


def _unpack_q6_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Unpack Q6_K: 128 bytes of four low bits, 64 of two high ones, 16 signed scales per group of 16, d; q − 32."""
    import torch

    low = _unpack_fields(blocks[:, :128], 4, 2, 64).reshape(-1, 8, 32)
    high = _unpack_fields(blocks[:, 128:192], 2, 4, 32).reshape(-1, 8, 32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    codes = ((low | high << 4) - 32).reshape(-1, 16, 16)
    return codes, (half(blocks, 208) * scales)[:, :, None], None


def _unpack_iq4_nl(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack IQ4_NL, d and 16 bytes of codes in a table, low halves first; return codes, and d of the block."""
    return _unpack_fields(blocks[:, 2:], 4, 2, 16).reshape(-1, 1, 32), half(blocks, 0)[:, None]


def _unpack_iq4_xs(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack IQ4_XS: as IQ4_NL, with 6-bit scales less 32 per 32: two high bits each in 2 bytes, four low ones in 4."""
    high = _unpack_fields(blocks[:, 2:4], 2, 4, 1).reshape(-1, 8)
    low = _unpack_fields(blocks[:, 4:8], 4, 2, 1).reshape(-1, 8)
    codes = _unpack_fields(blocks[:, 8:], 4, 2, 16).reshape(-1, 8, 32)
    return codes, (half(blocks, 0) * ((low | high << 4) - 32).float())[:, :, None]


def _look_up_codes(
    unpack_blocks: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    of_table: Callable[[torch.Tensor], torch.Tensor],
    blocks: torch.Tensor,
) -> torch.Tensor:
    """Return a function of the IQ4 table at every code, times d; times |d| for the gaps."""
    import torch

    codes, d = unpack_blocks(blocks)
    values = of_table(torch.tensor(IQ4))[codes]
    return (d.abs() if of_table is gaps else d).mul(values).reshape(len(blocks), codes.shape[1] * codes.shape[2])


def _make_table_codec(unpack_blocks: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Codec:
    return Codec(partial(_look_up_codes, unpack_blocks, _return_table), partial(_look_up_codes, unpack_blocks, gaps))


def _return_table(table: torch.Tensor) -> torch.Tensor:
    return table


def _decode_mxfp4(of_codes: Callable[[torch.Tensor], torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
    """Return values or steps of MXFP4, an exponent and 16 bytes of 4-bit floats, low halves first.

    ``of_codes`` gives those of the floats, without the exponent.
    """
    codes = _unpack_fields(blocks[:, 1:], 4, 2, 16).reshape(-1, 32)
    return of_codes(codes) * e8m0(blocks[:, :1])


def _make_codec(
    unpack_blocks: Unpack, largest: int | None = None, rounded: bool = False, with_scales: bool = False
) -> Codec:
    scales = partial(_compute_scales, unpack_blocks) if with_scales else None
    return Codec(partial(_decode, unpack_blocks), partial(_compute_steps, unpack_blocks, largest, rounded), scales)


# Name of a type -> its codec; a type without one is listed, and refused when it is read.
CODECS: dict[str, Codec] = {
    "Q4_0": _make_codec(partial(_unpack_q4, has_offset=False), largest=7, rounded=True),
    "Q4_1": _make_codec(partial(_unpack_q4, has_offset=True), rounded=True),
    "Q5_0": _make_codec(partial(_unpack_q5, has_offset=False), largest=15, rounded=True),
    "Q5_1": _make_codec(partial(_unpack_q5, has_offset=True), rounded=True),
    "Q8_0": _make_codec(_unpack_q8_0, rounded=True, with_scales=True),
    "Q2_K": _make_codec(_unpack_q2_k),
    "Q3_K": _make_codec(_unpack_q3_k, largest=3),
    "Q4_K": _make_codec(_unpack_q4_k),
    "Q5_K": _make_codec(_unpack_q5_k),
    "Q6_K": _make_codec(_unpack_q6_k, largest=31),
    "IQ4_NL": _make_table_codec(_unpack_iq4_nl),
    "IQ4_XS": _make_table_codec(_unpack_iq4_xs),
    "MXFP4": Codec(partial(_decode_mxfp4, fp4_values), partial(_decode_mxfp4, mxfp4_steps)),
}
