"""compressed-tensors: integers packed into words, and 4-bit floats with a scale per 16 or 32 entries.

    pack-quantized:  W[i, j] = (q[i, j] − z[i, g]) · scale[i, g]
    NVFP4:           W[i, j] = fp4[i, j] · scale[i, ⌊j / 16⌋] / global_scale
    MXFP4:           W[i, j] = fp4[i, j] · 2^(scale[i, ⌊j / 32⌋] − 127)

The codes q of a row are a stream of ``bits`` bits, with 2^(bits − 1) added, in ``weight_packed``; ``weight_shape``
gives the shape without padding. g is ``⌊j / group⌋``, or ``weight_g_idx[j]``. The zero points z are packed like the
codes, but along the rows; without them z = 0. A byte has two 4-bit floats, the first in the low half.

ModelOpt's NVFP4 has the codes in ``weight``, and multiplies with ``weight_scale_2`` instead of dividing.

Reference: ``compressed_tensors.compressors`` 0.20; Open Compute Project, Microscaling Formats 1.0, section 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lora_diag.checkpoints.packing import (
    RowWeight,
    fp4_steps,
    fp4_values,
    mxfp4_steps,
    read_rows,
    require,
    unpack,
)
from lora_diag.checkpoints.scaled import e8m0
from lora_diag.checkpoints.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

PACKED = ".weight_packed"
SECOND_SCALE = ".weight_scale_2"
NVFP4_GROUP, MXFP4_GROUP = 16, 32
# Formats of ``quantization_config`` that are read here and in ``scaled``; of mixed precision, each group has its own.
FORMATS = frozenset(
    {
        "mixed-precision",
        "dense",
        "pack-quantized",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp8-quantized",
    }
)
INTEGERS = frozenset({"int32", "int64"})

Kind = Literal["nvfp4", "mxfp4"]


@dataclass(frozen=True, slots=True)
class Packed:
    """Layout of a weight of packed integers.

    Args:
        source: The checkpoint as stored.
        module: The weight's name without ``.weight``.
        shape: ``(out, in)``.
        bits: Bits per code.
        groups: Scales per row.
        group: Columns that share a scale, where ``ordered`` is False.
        ordered: Whether ``weight_g_idx`` gives the group of every column.
        has_zeros: Whether there are zero points.
    """

    source: Checkpoint
    module: str
    shape: tuple[int, int]
    bits: int
    groups: int
    group: int
    ordered: bool
    has_zeros: bool


def packed_values(layout: Packed, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` of a weight of packed integers, float32."""
    source, module, bits = layout.source, layout.module, layout.bits
    codes = unpack(read_rows(source, f"{module}{PACKED}", first, last), bits, layout.shape[1])
    group = _read_groups(layout)
    if layout.has_zeros:
        zeros = _read_zeros(layout, first, last)
        codes -= zeros[:, group]
    else:
        codes -= 2 ** (bits - 1)
    return codes.float() * _read_scales(layout, first, last)[:, group]


def packed_steps(layout: Packed, first: int, last: int) -> torch.Tensor:
    """Return the distance between neighbouring values in the rows ``first:last`` of a weight of packed integers."""
    return _read_scales(layout, first, last).abs()[:, _read_groups(layout)]


def _read_scales(layout: Packed, first: int, last: int) -> torch.Tensor:
    return read_rows(layout.source, f"{layout.module}.weight_scale", first, last).float()


def _read_zeros(layout: Packed, first: int, last: int) -> torch.Tensor:
    """Return the zero points of rows, ``(rows, groups)``, with 2^(bits − 1) added like the codes.

    They are a stream along the rows, so one that begins at any row begins in the middle of a word.
    """
    name, bits = f"{layout.module}.weight_zero_point", layout.bits
    low, high = first * bits // 32, -(-last * bits // 32)
    words = read_rows(layout.source, name, low, high).T
    if low * 32 % bits == 0:
        begin = low * 32 // bits
        return unpack(words, bits, last - begin)[:, first - begin :].T
    words = read_rows(layout.source, name, 0, high).T  # codes that cross words: from the start
    return unpack(words, bits, last)[:, first:].T


def _read_groups(layout: Packed) -> torch.Tensor:
    """Return the group of every column."""
    import torch

    if not layout.ordered:
        return torch.arange(layout.shape[1]) // layout.group
    name = f"{layout.module}.weight_g_idx"
    return read_checked_groups(layout.source, name, layout.groups)


def read_checked_groups(source: Checkpoint, name: str, groups: int) -> torch.Tensor:
    """Return the stored group of every column.

    Raises:
        InputError: One does not exist.
    """
    indices = source.read(name).long()
    lowest, highest = (int(indices.min()), int(indices.max())) if len(indices) else (0, 0)
    if lowest < 0 or highest >= groups:
        raise InputError(
            f"{source.file_of(name)}: {name} names group {lowest if lowest < 0 else highest}, but there are {groups}; "
            "save the model again"
        )
    return indices


@dataclass(frozen=True, slots=True)
class Float4:
    """Layout of a weight of 4-bit floats.

    Args:
        source: The checkpoint as stored.
        codes: Name of the codes, ``(…, out, in / 2)``.
        scale: Name of the scales, ``(…, out, in / group)``.
        columns: in.
        kind: The format.
        divisor: Name of a number by which all is divided; empty without one.
        factor: Name of a number by which all is multiplied; empty without one.
    """

    source: Checkpoint
    codes: str
    scale: str
    columns: int
    kind: Kind
    divisor: str = ""
    factor: str = ""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return NVFP4_GROUP if self.kind == "nvfp4" else MXFP4_GROUP


def float4_values(layout: Float4, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` of a weight of 4-bit floats, float32; matrices of a stack follow each other."""
    return fp4_values(_read_float4_codes(layout, first, last)) * _read_float4_scales(layout, first, last)


def float4_steps(layout: Float4, first: int, last: int) -> torch.Tensor:
    """Return steps whose half bounds the error in the rows ``first:last`` of a weight of 4-bit floats."""
    steps = mxfp4_steps if layout.kind == "mxfp4" else fp4_steps
    return steps(_read_float4_codes(layout, first, last)) * _read_float4_scales(layout, first, last).abs()


def _read_float4_codes(layout: Float4, first: int, last: int) -> torch.Tensor:
    return unpack(read_rows(layout.source, layout.codes, first, last), 4, layout.columns)


def _read_float4_scales(layout: Float4, first: int, last: int) -> torch.Tensor:
    """Return the scale of every entry of rows, ``(last − first, columns)``, float32."""
    import torch

    stored = read_rows(layout.source, layout.scale, first, last)
    scales = e8m0(stored.view(torch.uint8)) if layout.kind == "mxfp4" else stored.float()
    if layout.divisor:
        scales = scales / layout.source.read(layout.divisor).float()
    if layout.factor:
        scales = scales * layout.source.read(layout.factor).float()
    return scales.repeat_interleave(layout.group, dim=1)


def find(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the weights of packed integers and of 4-bit floats.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.

    Raises:
        InputError: A tensor of a weight is missing or has the wrong shape, or the configured format is unknown.
    """
    _refuse_format(source, config)
    for name in source:
        if name.endswith(PACKED):
            module = name.removesuffix(PACKED)
            if source[name].dtype == "uint8":
                yield _describe_float4(source, module)
            else:
                yield _describe_packed(source, module, config)
        elif name.endswith(SECOND_SCALE):
            yield _describe_modelopt(source, name.removesuffix(SECOND_SCALE))


def _refuse_format(source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse compressed-tensors in a format that is not read: its codes may be laid out in another way."""
    if config.get("quant_method") != "compressed-tensors":
        return
    for form in (settings.get("format") for settings in (config, *_list_config_groups(config))):
        if form is not None and form not in FORMATS:
            raise InputError(
                f"{source.path}: is stored in the format {form!r} of compressed-tensors (config.json), which is not "
                "supported; give the unquantized checkpoint, or analyse the adapter alone"
            )


def _list_config_groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of weights of a configuration; each has settings for its weights and a format."""
    groups = config.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _list_weight_schemes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of all quantized weights."""
    return [scheme for group in _list_config_groups(config) if isinstance(scheme := group.get("weights"), dict)]


def refuse_other_zeros(source: Checkpoint, weights: Iterable[TensorInfo], config: Mapping[str, Any]) -> None:
    """Refuse weights of integers whose zero points contradict the configuration.

    Without ``weight_zero_point``, the codes of an asymmetric weight would be read around the middle.

    Args:
        source: The checkpoint as stored.
        weights: The quantized weights that were found.
        config: Its ``quantization_config``.

    Raises:
        InputError: Zero points are missing from an asymmetric weight, or present with a symmetric one.
    """
    for info in weights:
        bits = str(info.stored).removeprefix("packed-").removeprefix("int")
        schemes = [scheme for scheme in _list_weight_schemes(config) if scheme.get("type", "int") == "int"]
        symmetric = {scheme.get("symmetric") for scheme in schemes if str(scheme.get("num_bits")) == bits}
        zeros = f"{info.name}_zero_point"
        if symmetric == {zeros in source}:
            problem, kind = ("stored", "symmetric") if zeros in source else ("missing", "asymmetric")
            raise InputError(
                f"{source.path}: {zeros} is {problem}, but config.json says that weights of {bits} bits are {kind}; "
                "save the model again, or correct config.json"
            )


def _describe_packed(source: Checkpoint, module: str, config: Mapping[str, Any]) -> RowWeight:
    name, weight = f"{module}{PACKED}", f"{module}.weight"
    out, columns = _read_shape(source, module)
    if source[name].dtype != "int32" or len(source[name].shape) != 2:
        raise InputError(f"{source.file_of(name)}: {name} is not an int32 matrix; save the model again")
    bits = _infer_bits(source, name, columns, config)
    word_dtypes = frozenset({"int32"})
    require(source, name, (out, -(-columns * bits // 32)), word_dtypes, weight)
    scale, zero, order = (f"{module}.weight_{part}" for part in ("scale", "zero_point", "g_idx"))
    groups = source[scale].shape[-1] if scale in source and source[scale].shape else 0
    require(source, scale, (out, groups), FLOAT_DTYPES, weight)
    ordered = order in source
    if ordered:
        require(source, order, (columns,), INTEGERS, weight)
    if groups < 1 or (not ordered and columns % groups):
        raise InputError(
            f"{source.file_of(scale)}: {scale} has {groups} groups for {columns} columns, which do not divide into "
            "equal groups; save the model again"
        )
    if zero in source:
        require(source, zero, (-(-out * bits // 32), groups), word_dtypes, weight)
    layout = Packed(source, module, (out, columns), bits, groups, columns // groups, ordered, zero in source)
    parts = [scale, f"{module}.weight_shape", *(part for part in (zero, order) if part in source)]
    info = TensorInfo(weight, (out, columns), "float32", stored=f"packed-int{bits}")
    parts += _list_unused(source, module)
    return RowWeight(info, name, tuple(parts), partial(packed_values, layout), partial(packed_steps, layout))


def _list_unused(source: Checkpoint, module: str) -> tuple[str, ...]:
    """Return the names of the stored scales and zero points of activations, which do not affect the weight."""
    names = ("input_scale", "output_scale", "input_global_scale", "input_zero_point", "output_zero_point")
    return tuple(f"{module}.{name}" for name in names if f"{module}.{name}" in source)


def _read_shape(source: Checkpoint, module: str) -> tuple[int, int]:
    name = f"{module}.weight_shape"
    require(source, name, (2,), INTEGERS, f"{module}.weight")
    width = 8 if source[name].dtype == "int64" else 4
    content = source.read_bytes(name)
    out, columns = (int.from_bytes(content[start : start + width], "little", signed=True) for start in (0, width))
    if not (0 < out < 2**31 and 0 < columns < 2**31):
        raise InputError(f"{source.file_of(name)}: {name} gives the shape [{out}, {columns}]; save the model again")
    return out, columns


def _infer_bits(source: Checkpoint, name: str, columns: int, config: Mapping[str, Any]) -> int:
    """Return the bits of a code: the only number, among the configured ones if any, that fits the packed columns."""
    declared = [scheme.get("num_bits") for scheme in _list_weight_schemes(config)]
    width = source[name].shape[1]
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == width]
    chosen = [bits for bits in fitting if bits in declared] if declared else fitting
    if len(chosen) != 1:
        problem = "no number of bits" if not chosen else f"{' or '.join(map(str, chosen))} bits"
        raise InputError(
            f"{source.file_of(name)}: {name} {list(source[name].shape)} holds {columns} codes a row in {problem}; "
            "set num_bits in config.json"
        )
    return chosen[0]


def _describe_float4(source: Checkpoint, module: str) -> RowWeight:
    codes, scale = f"{module}{PACKED}", f"{module}.weight_scale"
    global_scale = f"{module}.weight_global_scale"
    kind: Kind = "nvfp4" if global_scale in source else "mxfp4"
    extra = (global_scale,) if global_scale in source else ()
    layout = _make_layout(source, module, codes, scale, kind, divisor=global_scale if extra else "")
    return _make_float4_weight(source, module, layout, (scale, *extra))


def _describe_modelopt(source: Checkpoint, module: str) -> RowWeight:
    codes, scale, factor = f"{module}.weight", f"{module}.weight_scale", f"{module}{SECOND_SCALE}"
    layout = _make_layout(source, module, codes, scale, "nvfp4", factor=factor)
    return _make_float4_weight(source, module, layout, (scale, factor))


def _make_layout(
    source: Checkpoint, module: str, codes: str, scale: str, kind: Kind, divisor: str = "", factor: str = ""
) -> Float4:
    """Return the layout of a weight of 4-bit floats, after checking its tensors."""
    weight = f"{module}.weight"
    shape = source[codes].shape if codes in source else ()
    if len(shape) not in {2, 3} or source[codes].dtype != "uint8" or math.prod(shape) == 0:
        raise InputError(
            f"{source.path}: {codes} is missing or not a uint8 matrix, which {weight} needs; save the model again"
        )
    layout = Float4(source, codes, scale, 2 * shape[-1], kind, divisor, factor)
    if layout.columns % layout.group:
        raise InputError(
            f"{source.file_of(codes)}: {codes} {list(shape)} is not a whole number of groups of {layout.group}; save "
            "the model again"
        )
    dtypes = {"float8_e4m3fn"} if kind == "nvfp4" else {"uint8", "float8_e8m0fnu"}
    require(source, scale, (*shape[:-1], layout.columns // layout.group), frozenset(dtypes), weight)
    for name in filter(None, (divisor, factor)):
        if source[name].numel != 1 or source[name].dtype not in FLOAT_DTYPES:
            raise InputError(f"{source.file_of(name)}: {name} is not a single float; save the model again")
    return layout


def _make_float4_weight(source: Checkpoint, module: str, layout: Float4, parts: tuple[str, ...]) -> RowWeight:
    shape = (*source[layout.codes].shape[:-1], layout.columns)
    info = TensorInfo(f"{module}.weight", shape, "float32", stored=layout.kind)
    parts = (*parts, *_list_unused(source, module))
    return RowWeight(info, layout.codes, parts, partial(float4_values, layout), partial(float4_steps, layout))
