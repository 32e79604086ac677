"""4-bit floats with a scale per 16 or 32 entries: NVFP4 and MXFP4 of compressed-tensors, ModelOpt
and gpt-oss.

    NVFP4:    W[i, j] = fp4[i, j] · scale[i, ⌊j / 16⌋] / global_scale
    MXFP4:    W[i, j] = fp4[i, j] · 2^(scale[i, ⌊j / 32⌋] − 127)

A byte has two codes, the first in the low half. ModelOpt's NVFP4 has the codes in ``weight``, and
multiplies with ``weight_scale_2`` instead of dividing.

gpt-oss stacks experts: ``…_blocks`` ``(E, out, in / 32, 16)`` and ``…_scales``
``(E, out, in / 32)``. transformers presents, and saves, such a parameter without the suffix and
transposed, as ``(E, in, out)``; so does this module, so that both forms of a model have the same
names and shapes.

Reference: ``compressed_tensors.compressors`` 0.20;
``transformers.integrations.mxfp4.convert_moe_packed_tensors``; Open Compute Project, Microscaling
Formats 1.0, section 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.errors import damaged
from lora_diag.storage import packing
from lora_diag.storage.packing import PACKED, RowWeight, check_part, damaged_tensor, read_rows
from lora_diag.storage.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

SECOND_SCALE = ".weight_scale_2"
BLOCKS, SCALES = "_blocks", "_scales"
# Columns that share a scale, and possible dtypes of the scales.
GROUP = {"nvfp4": 16, "mxfp4": 32}
SCALE_DTYPES = {
    "nvfp4": frozenset({"float8_e4m3fn"}),
    "mxfp4": frozenset({"uint8", "float8_e8m0fnu"}),
}


@dataclass(frozen=True, slots=True)
class Float4Layout:
    """Layout of a weight of 4-bit floats.

    Args:
        source: The checkpoint as stored.
        kind: ``nvfp4`` or ``mxfp4``.
        codes: Name of the codes, ``(…, out, in / 2)``; of gpt-oss ``(E, out, in / 32, 16)``.
        scale: Name of the scales, ``(…, out, in / group)``.
        out: Rows of a matrix, its outputs.
        columns: Columns of a matrix, its inputs.
        divisor: Name of a number by which all is divided; empty without one.
        factor: Name of a number by which all is multiplied; empty without one.
    """

    source: Checkpoint
    kind: str
    codes: str
    scale: str
    out: int
    columns: int
    divisor: str = ""
    factor: str = ""


def decode_rows(layout: Float4Layout, is_steps: bool, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` of a weight, or steps whose half bounds the error; matrices
    follow each other.
    """
    return _decode(layout, is_steps, first, last, 0, layout.columns)


def decode_transposed(layout: Float4Layout, is_steps: bool, first: int, last: int) -> torch.Tensor:
    """Return values or steps of the inputs ``first:last``, counted over all experts,
    ``(last − first, out)``.
    """
    import torch

    inputs, step = layout.columns, max(1, packing.SLAB_BYTES // (layout.columns // 2))
    parts = []
    for expert in range(first // inputs, -(-last // inputs)):
        low, high = max(0, first - expert * inputs), min(inputs, last - expert * inputs)
        part = torch.empty(high - low, layout.out)
        for row in range(0, layout.out, step):
            end, top = min(layout.out, row + step), expert * layout.out
            part[:, row:end] = _decode(layout, is_steps, top + row, top + end, low, high).T
        parts.append(part)
    return torch.cat(parts)


def _decode(
    layout: Float4Layout, is_steps: bool, first: int, last: int, low: int, high: int
) -> torch.Tensor:
    """Return values or steps of the rows ``first:last`` and columns ``low:high``, float32.

    The step of a code is the distance to its farther neighbour. The power of two of MXFP4 is
    ``2^(⌊log2 max⌋ − 2)``, so the largest value is in [4, 8) and is stored as 6 at most: an error
    of up to 2 there, where it saturates.
    """
    import torch

    group = GROUP[layout.kind]
    begin, end = low // group, -(-high // group)
    packed = read_rows(layout.source, layout.codes, first, last, layout.columns // 2)
    codes = packing.unpack(
        packed[:, begin * group // 2 : end * group // 2], 4, (end - begin) * group
    )
    stored = read_rows(layout.source, layout.scale, first, last)[:, begin:end]
    scales = packing.e8m0(stored.view(torch.uint8)) if layout.kind == "mxfp4" else stored.float()
    if layout.divisor:
        scales = scales / layout.source.read(layout.divisor).float()
    if layout.factor:
        scales = scales * layout.source.read(layout.factor).float()
    table = torch.tensor(packing.FP4)
    if is_steps:
        table, scales = packing.gaps(table), scales.abs()
        table[[7, 15]] *= 2 if layout.kind == "mxfp4" else 1
    decoded = table[codes] * scales.repeat_interleave(group, dim=1)
    return decoded[:, low - begin * group : high - begin * group]


def find(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the weights of 4-bit floats.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``; unused.
    """
    for name in source:
        if name.endswith(PACKED) and source[name].dtype == "uint8":
            module = name.removesuffix(PACKED)
            divisor = (
                f"{module}.weight_global_scale" if f"{module}.weight_global_scale" in source else ""
            )
            yield _describe_weight(source, "nvfp4" if divisor else "mxfp4", module, name, divisor)
        elif name.endswith(SECOND_SCALE):
            module = name.removesuffix(SECOND_SCALE)
            yield _describe_weight(source, "nvfp4", module, f"{module}.weight", factor=name)
        elif name.endswith(BLOCKS) and source[name].dtype not in FLOAT_DTYPES:
            yield _describe_experts(source, name)


def _describe_weight(
    source: Checkpoint, kind: str, module: str, codes: str, divisor: str = "", factor: str = ""
) -> RowWeight:
    """Return a weight, after checking its tensors."""
    weight, scale, group = f"{module}.weight", f"{module}.weight_scale", GROUP[kind]
    shape = source[codes].shape if codes in source else ()
    if len(shape) not in {2, 3} or source[codes].dtype != "uint8" or math.prod(shape) == 0:
        raise damaged(
            source.path, f"{codes} is missing or not a uint8 matrix, which {weight} needs"
        )
    columns = 2 * shape[-1]
    if columns % group:
        raise damaged_tensor(
            source, codes, f"{list(shape)} is not a whole number of groups of {group}"
        )
    check_part(source, scale, (*shape[:-1], columns // group), SCALE_DTYPES[kind], weight)
    numbers = [name for name in (divisor, factor) if name]
    for name in numbers:
        if source[name].numel != 1 or source[name].dtype not in FLOAT_DTYPES:
            raise damaged_tensor(source, name, "is not a single float")
    layout = Float4Layout(source, kind, codes, scale, shape[-2], columns, divisor, factor)
    info = TensorInfo(weight, (*shape[:-1], columns), "float32", stored=kind)
    parts = (scale, *numbers, *packing.list_activations(source, module))
    return RowWeight(
        info, codes, parts, partial(decode_rows, layout, False), partial(decode_rows, layout, True)
    )


def _describe_experts(source: Checkpoint, blocks: str) -> RowWeight:
    """Return a stack of experts of gpt-oss, after checking its tensors."""
    name, shape = blocks.removesuffix(BLOCKS), source[blocks].shape
    if (
        len(shape) != 4
        or shape[-1] != GROUP["mxfp4"] // 2
        or source[blocks].dtype != "uint8"
        or 0 in shape
    ):
        expected = "not the uint8 [experts, out, in / 32, 16] of MXFP4"
        raise damaged_tensor(source, blocks, f"is {source[blocks].dtype} {list(shape)}, {expected}")
    check_part(source, f"{name}{SCALES}", shape[:-1], frozenset({"uint8"}), name)
    layout = Float4Layout(
        source, "mxfp4", blocks, f"{name}{SCALES}", shape[1], shape[2] * GROUP["mxfp4"]
    )
    info = TensorInfo(name, (shape[0], layout.columns, layout.out), "float32", stored="mxfp4")
    decode = partial(decode_transposed, layout)
    return RowWeight(info, blocks, (layout.scale,), partial(decode, False), partial(decode, True))
