"""MLX: integers packed into words, with a scale and an offset per group of inputs.

    W[i, j] = scales[i, g] · q[i, j] + biases[i, g],  g = ⌊j / group⌋

The codes of a row are a stream of bits in ``weight`` (uint32), the lowest first. Bits and group size are in
``config.json`` under ``quantization``, with exceptions under the names of modules.

Reference: ``mlx.core.quantize`` 0.32, mode ``affine``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.packing import RowWeight, read_rows, require, unpack
from lora_diag.checkpoints.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128)
# Mantissa bits of the dtypes of scales; numbers are rounded to within 2^-(bits + 1).
MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a weight.

    Args:
        source: The checkpoint as stored.
        module: The weight's name without ``.weight``.
        rows: Rows, those of all matrices of a stack.
        columns: Columns.
        bits: Bits per code.
        group: Columns that share a scale.
    """

    source: Checkpoint
    module: str
    rows: int
    columns: int
    bits: int
    group: int


def values(layout: Layout, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` of the weight, float32."""
    codes = unpack(read_rows(layout.source, f"{layout.module}.weight", first, last), layout.bits, layout.columns)
    return codes.float() * _spread(layout, "scales", first, last) + _spread(layout, "biases", first, last)


def steps(layout: Layout, first: int, last: int) -> torch.Tensor:
    """Return steps whose half bounds the error in the rows ``first:last`` of the weight.

    That is |s|, twice as much at the ends: MLX moves the scale so that the number of largest absolute value is stored
    exactly, which leaves others up to one step beyond the last code. Codes are chosen before scale and offset are
    rounded to their dtype, which adds up to its half spacing of ``s · q`` and of the offset.
    """
    codes = unpack(read_rows(layout.source, f"{layout.module}.weight", first, last), layout.bits, layout.columns)
    scales = _spread(layout, "scales", first, last).abs()
    ends = (codes == 0) | (codes == (1 << layout.bits) - 1)
    spacing = 2.0 ** -MANTISSA[layout.source[f"{layout.module}.scales"].dtype]
    magnitudes = scales * codes + _spread(layout, "biases", first, last).abs()
    return scales * (1 + ends.float()) + magnitudes * spacing


def _spread(layout: Layout, part: str, first: int, last: int) -> torch.Tensor:
    """Return the scales or offsets of rows, repeated for every column."""
    stored = read_rows(layout.source, f"{layout.module}.{part}", first, last).float()
    return stored.repeat_interleave(layout.group, dim=1)


def find(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the quantized weights.

    Args:
        source: The checkpoint as stored.
        config: ``quantization`` of its configuration.

    Raises:
        InputError: A tensor of a weight is missing or has the wrong shape, or the mode is another one.
    """
    for name in source:
        module = name.removesuffix(".scales")
        weight = f"{module}.weight"
        if module != name and weight in source and source[weight].dtype == "uint32":
            yield _describe_weight(source, module, config)


def _describe_weight(source: Checkpoint, module: str, config: Mapping[str, Any]) -> RowWeight:
    weight, scales, biases = (f"{module}.{part}" for part in ("weight", "scales", "biases"))
    module_config = config.get(module)
    settings = {**config, **module_config} if isinstance(module_config, dict) else config
    mode, bits, group = settings.get("mode", "affine"), settings.get("bits"), settings.get("group_size")
    if mode != "affine" or bits not in BITS or group not in GROUPS or isinstance(bits, bool):
        raise InputError(
            f"{source.file_of(weight)}: {weight} is quantized by MLX with mode {mode!r}, bits {bits!r} and group_size "
            f"{group!r} (quantization in config.json); mode affine with 2 to 8 bits is read"
        )
    shape = source[weight].shape
    columns = shape[-1] * 32 // bits if shape else 0
    if len(shape) not in {2, 3} or columns * bits != shape[-1] * 32 or columns % group or not columns:
        raise InputError(
            f"{source.file_of(weight)}: {weight} {list(shape)} is not a whole number of groups of {group} codes of "
            f"{bits} bits; save the model again"
        )
    for name in (scales, biases):
        require(source, name, (*shape[:-1], columns // group), FLOAT_DTYPES, weight)
    rows = 1
    for size in shape[:-1]:
        rows *= size
    layout = Layout(source, module, rows, columns, bits, group)
    info = TensorInfo(weight, (*shape[:-1], columns), "float32", stored=f"mlx-int{bits}")
    return RowWeight(info, weight, (scales, biases), partial(values, layout), partial(steps, layout))
