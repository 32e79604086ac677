"""Integers packed into words, with a scale and an offset per group of inputs: compressed-tensors,
GPTQ, AWQ, MLX.

    pack-quantized:  W[i, j] = (q[i, j] − z[i, g]) · scale[i, g]
    GPTQ, AWQ:       W[i, j] = scales[g, i] · (q[j, i] − z[g, i])
    MLX:             W[i, j] = scales[i, g] · q[i, j] + biases[i, g]

g is ``⌊j / group⌋``, or given by a tensor (act-order): ``weight_g_idx[j]``, of GPTQ ``g_idx[j]``.

compressed-tensors: the codes of a row are a stream of ``bits`` bits, with 2^(bits − 1) added, in
``weight_packed``; ``weight_shape`` gives the shape without padding. The zero points z are packed
like the codes, but along the rows; without them z = 0.

GPTQ stores the weight transposed and packs q along the inputs j, ``qweight (in · bits / 32, out)``,
the lowest bits first; ``qzeros`` are packed along the outputs. Files of format ``gptq`` store z −
1, modulo 2^bits; those of ``gptq_v2`` store z. A stored 2^bits − 1 is read as z = 0; the kernels of
auto-gptq and gptqmodel decode it differently, so a note names the first tensor with it. AWQ
(``gemm``) has 4 bits, packs q along the outputs, ``qweight (in, out / 8)``, in the order 0, 2, 4,
6, 1, 3, 5, 7, and stores z.

MLX: the codes of a row are a stream of bits in ``weight`` (uint32). Bits and group size are in
``config.json`` under ``quantization``, with exceptions under the names of modules.

Reference: ``compressed_tensors.compressors`` 0.20; Frantar et al. 2022 and auto-gptq 0.7.1
``QuantLinear``; Lin et al. 2023 and AutoAWQ 0.2.9 ``packing_utils``; ``mlx.core.quantize`` 0.32,
mode ``affine``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.errors import damaged
from lora_diag.storage import packing
from lora_diag.storage.packing import (
    INTEGERS,
    PACKED,
    RowWeight,
    check_part,
    damaged_tensor,
    read_columns,
    unpack,
)
from lora_diag.storage.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

WORDS = frozenset({"int32"})
UNSUPPORTED = "give the unquantized checkpoint, or analyse the adapter alone"

# Formats of compressed-tensors in ``quantization_config`` that are read here, in ``float4`` and in
# ``scaled``; of mixed precision, each group has its own.
COMPRESSED_FORMATS = frozenset({
    "mixed-precision", "dense", "pack-quantized", "int-quantized", "float-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
})  # fmt: skip

CODES = ".qweight"
# Bits per code whose codes fill words.
GPTQ_BITS = (2, 4, 8)
# Place of each output in a word of AWQ.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# Format of a GPTQ file, the default first, or version of AWQ -> offset to add to its zero points.
GPTQ_FORMATS, AWQ_VERSIONS = {"gptq": 1, "gptq_v2": 0}, {"gemm": 0}

MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_GROUPS = (16, 32, 64, 128)
# Mantissa bits of the dtypes of scales; numbers are rounded to within 2^-(bits + 1).
MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}


@dataclass(frozen=True, slots=True)
class IntegerLayout:
    """Layout of a weight of packed integers.

    Args:
        source: The checkpoint as stored.
        module: The weight's name without ``.weight``.
        columns: Columns of the weight, its inputs.
        bits: Bits per code.
        group: Columns that share a scale, where there is no ``order``.
        groups: Scales per row.
        order: Name of the tensor with the group of every column; empty without one.
        has_zeros: Whether there are zero points, in compressed-tensors.
        added: Offset of stored zero points modulo 2^bits, in GPTQ.
        is_awq: Whether it is AWQ.
    """

    source: Checkpoint
    module: str
    columns: int
    bits: int
    group: int
    groups: int
    order: str = ""
    has_zeros: bool = False
    added: int = 0
    is_awq: bool = False

    def read(self, part: str, first: int, last: int) -> torch.Tensor:
        """Return rows of a tensor of the weight; raises like ``read_rows``."""
        return packing.read_rows(self.source, f"{self.module}.{part}", first, last)

    def read_codes(self, part: str, first: int, last: int) -> torch.Tensor:
        """Return the codes of rows, each a stream of bits; raises like ``read_rows``."""
        return unpack(self.read(part, first, last), self.bits, self.columns)

    def read_groups(self) -> torch.Tensor:
        """Return the group of every column.

        Raises:
            InputError: A stored one does not exist, or the file cannot be read.
        """
        import torch

        if not self.order:
            return torch.arange(self.columns) // self.group
        indices = self.source.read(self.order).long()
        if len(wrong := indices[(indices < 0) | (indices >= self.groups)]):
            raise damaged_tensor(
                self.source, self.order, f"names group {wrong.min()}, but there are {self.groups}"
            )
        return indices


def compressed_values(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` of a weight of compressed-tensors, float32."""
    codes, group = layout.read_codes("weight_packed", first, last), layout.read_groups()
    codes -= (
        _read_compressed_zeros(layout, first, last)[:, group]
        if layout.has_zeros
        else 2 ** (layout.bits - 1)
    )
    return codes.float() * layout.read("weight_scale", first, last).float()[:, group]


def compressed_steps(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return the distance between neighbouring values in the rows ``first:last`` of a weight."""
    return layout.read("weight_scale", first, last).float().abs()[:, layout.read_groups()]


def _read_compressed_zeros(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return the zero points of rows, ``(rows, groups)``, with 2^(bits − 1) added like the codes.

    They are packed along the rows, so ``first`` may be in the middle of a word. Words are read from
    that one on, or from the start of the tensor if a code crosses the beginning of that word.
    """
    bits, low = layout.bits, first * layout.bits // 32
    begin, cut = divmod(low * 32, bits)
    if cut:
        low = begin = 0
    words = layout.read("weight_zero_point", low, -(-last * bits // 32)).T
    return unpack(words, bits, last - begin)[:, first - begin :].T


def gptq_values(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` (outputs) of a weight of GPTQ or AWQ, float32."""
    import torch

    group, largest = layout.read_groups(), (1 << layout.bits) - 1
    scales = _read_gptq_scales(layout, first, last)[group]
    zeros = (
        _unpack_along_outputs(layout, "qzeros", layout.groups, first, last) + layout.added
    ) & largest
    if layout.is_awq:
        codes = _unpack_along_outputs(layout, "qweight", layout.columns, first, last)
    else:
        name = f"{layout.module}{CODES}"
        words = read_columns(layout.source, name, (0, layout.source[name].shape[0]), (first, last))
        shifts = torch.arange(0, 32, layout.bits, dtype=torch.int32)[:, None]
        codes = ((words[:, None] >> shifts) & largest).view(layout.columns, last - first)
    return scales.mul_(codes.sub_(zeros[group])).T


def gptq_steps(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return the distance between neighbouring values in the rows ``first:last`` of a weight of
    GPTQ or AWQ.
    """
    return _read_gptq_scales(layout, first, last).abs()[layout.read_groups()].T


def _read_gptq_scales(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return the scales of the outputs ``first:last``, ``(groups, outputs)``, float32."""
    return read_columns(
        layout.source, f"{layout.module}.scales", (0, layout.groups), (first, last)
    ).float()


def _unpack_along_outputs(
    layout: IntegerLayout, part: str, rows: int, first: int, last: int
) -> torch.Tensor:
    """Return the codes of the outputs ``first:last`` of a tensor that is packed along them,
    ``(rows, outputs)``.
    """
    per_word = 32 // layout.bits
    low, high = first // per_word, -(-last // per_word)
    words = read_columns(layout.source, f"{layout.module}.{part}", (0, rows), (low, high))
    codes = unpack(words, layout.bits, (high - low) * per_word)
    if layout.is_awq:
        codes = codes.view(rows, -1, 8)[:, :, list(AWQ_ORDER)].reshape(rows, -1)
    return codes[:, first - low * per_word : last - low * per_word]


def mlx_values(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` of a weight of MLX, float32."""
    scales, biases = (_spread(layout, part, first, last) for part in ("scales", "biases"))
    return layout.read_codes("weight", first, last).float() * scales + biases


def mlx_steps(layout: IntegerLayout, first: int, last: int) -> torch.Tensor:
    """Return steps whose half bounds the error in the rows ``first:last`` of a weight of MLX.

    That is |s|, twice as much at the ends: MLX moves the scale so that the number of largest
    absolute value is stored exactly, which leaves others up to one step beyond the last code. Codes
    are chosen before scale and offset are rounded to their dtype, which changes ``s · q`` and the
    offset by up to half the spacing of that dtype.
    """
    codes = layout.read_codes("weight", first, last)
    scales, biases = (_spread(layout, part, first, last).abs() for part in ("scales", "biases"))
    ends = (codes == 0) | (codes == (1 << layout.bits) - 1)
    spacing = 2.0 ** -MANTISSA[layout.source[f"{layout.module}.scales"].dtype]
    return scales * (1 + ends.float()) + (scales * codes + biases) * spacing


def _spread(layout: IntegerLayout, part: str, first: int, last: int) -> torch.Tensor:
    """Return the scales or offsets of rows, repeated for every column."""
    return layout.read(part, first, last).float().repeat_interleave(layout.group, dim=1)


def find_compressed(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the weights of packed integers of compressed-tensors.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.

    Raises:
        InputError: A tensor of a weight is missing or has the wrong shape or dtype, the bits per
            code are ambiguous, or the configured format is unsupported.
    """
    if config.get("quant_method") == "compressed-tensors":
        for form in (settings.get("format") for settings in (config, *_list_config_groups(config))):
            if form is not None and form not in COMPRESSED_FORMATS:
                problem = f"has the unsupported compressed-tensors format {form!r} (config.json)"
                raise damaged(source.path, problem, UNSUPPORTED)
    for name in source:
        if name.endswith(PACKED) and source[name].dtype != "uint8":
            yield _describe_compressed(source, name.removesuffix(PACKED), config)


def find_gptq(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the weights of GPTQ and AWQ.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.
    """
    for name in source:
        if name.endswith(CODES):
            yield _describe_gptq(source, name.removesuffix(CODES), config)


def find_mlx(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the weights of MLX.

    Args:
        source: The checkpoint as stored.
        config: ``quantization`` of its configuration.
    """
    for name in source:
        module = name.removesuffix(".scales")
        weight = f"{module}.weight"
        if module != name and weight in source and source[weight].dtype == "uint32":
            yield _describe_mlx(source, module, config)


def _list_config_groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of weights of a configuration; each has settings for its weights and a
    format.
    """
    groups = config.get("config_groups")
    return (
        [group for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )


def _list_weight_schemes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of all quantized weights."""
    return [
        scheme
        for group in _list_config_groups(config)
        if isinstance(scheme := group.get("weights"), dict)
    ]


def refuse_contradicting_zeros(
    source: Checkpoint, weights: Iterable[TensorInfo], config: Mapping[str, Any]
) -> None:
    """Refuse weights of integers whose zero points contradict the configuration of
    compressed-tensors.

    Without ``weight_zero_point``, the codes of an asymmetric weight would be read around the
    middle.

    Args:
        source: The checkpoint as stored.
        weights: The quantized weights that were found.
        config: Its ``quantization_config``.

    Raises:
        InputError: Zero points are missing from an asymmetric weight, or present with a symmetric
            one.
    """
    schemes = [
        scheme for scheme in _list_weight_schemes(config) if scheme.get("type", "int") == "int"
    ]
    for info in weights:
        bits = str(info.stored).removeprefix("packed-").removeprefix("int")
        symmetric = {
            scheme.get("symmetric") for scheme in schemes if str(scheme.get("num_bits")) == bits
        }
        zeros = f"{info.name}_zero_point"
        if symmetric == {zeros in source}:
            problem, kind = (
                ("stored", "symmetric") if zeros in source else ("missing", "asymmetric")
            )
            claim = f"config.json says that weights of {bits} bits are {kind}"
            raise damaged(
                source.path,
                f"{zeros} is {problem}, but {claim}",
                "save it again, or correct config.json",
            )


def _describe_compressed(source: Checkpoint, module: str, config: Mapping[str, Any]) -> RowWeight:
    """Return a weight of compressed-tensors, after checking its tensors and the configuration."""
    name, weight = f"{module}{PACKED}", f"{module}.weight"
    scale, zero, shape = (f"{module}.weight_{part}" for part in ("scale", "zero_point", "shape"))
    check_part(source, shape, (2,), INTEGERS, weight)
    out, columns = memoryview(source.read_bytes(shape)).cast(
        "i" if source[shape].dtype == "int32" else "q"
    )
    if not (0 < out < 2**31 and 0 < columns < 2**31):
        raise damaged_tensor(source, shape, f"gives the shape [{out}, {columns}]")
    if source[name].dtype != "int32" or len(source[name].shape) != 2:
        raise damaged_tensor(source, name, "is not an int32 matrix")
    bits = _infer_bits(source, name, columns, config)
    check_part(source, name, (out, -(-columns * bits // 32)), WORDS, weight)
    groups = source[scale].shape[-1] if scale in source and source[scale].shape else 0
    check_part(source, scale, (out, groups), FLOAT_DTYPES, weight)
    order = _find_order(source, module, "weight_g_idx", columns)
    if groups < 1 or (not order and columns % groups):
        raise damaged_tensor(
            source, scale, f"has {groups} groups, which do not divide {columns} columns equally"
        )
    if zero in source:
        check_part(source, zero, (-(-out * bits // 32), groups), WORDS, weight)
    layout = IntegerLayout(
        source, module, columns, bits, columns // groups, groups, order, zero in source
    )
    optional = (part for part in (zero, order) if part in source)
    parts = (scale, shape, *optional, *packing.list_activations(source, module))
    info = TensorInfo(weight, (out, columns), "float32", stored=f"packed-int{bits}")
    return RowWeight(
        info, name, parts, partial(compressed_values, layout), partial(compressed_steps, layout)
    )


def _infer_bits(source: Checkpoint, name: str, columns: int, config: Mapping[str, Any]) -> int:
    """Return the bits of a code: the only number, among the configured ones if any, that fits the
    packed columns.
    """
    declared = [scheme.get("num_bits") for scheme in _list_weight_schemes(config)]
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == source[name].shape[1]]
    chosen = [bits for bits in fitting if bits in declared] if declared else fitting
    if len(chosen) != 1:
        found = "no number of bits" if not chosen else f"{' or '.join(map(str, chosen))} bits"
        problem = f"{list(source[name].shape)} holds {columns} codes a row in {found}"
        raise damaged_tensor(source, name, problem, "set num_bits in config.json")
    return chosen[0]


def _describe_gptq(source: Checkpoint, module: str, config: Mapping[str, Any]) -> RowWeight:
    """Return a weight of GPTQ or AWQ, after checking its tensors and the configuration."""
    codes, scales, zeros = (f"{module}{part}" for part in (CODES, ".scales", ".qzeros"))
    weight, shape = f"{module}.weight", source[codes].shape
    for name in (codes, scales, zeros):
        if (
            name not in source
            or len(source[name].shape) != 2
            or (name == codes and source[name].dtype != "int32")
        ):
            problem = (
                f"is of no known form of GPTQ or AWQ: {name} is missing or no matrix, or the codes "
                "are not int32"
            )
            raise damaged_tensor(source, codes, problem, UNSUPPORTED)
    groups, out = source[scales].shape
    is_awq = shape[1] * 8 == out
    method = str(config.get("quant_method", "")).lower()
    if (
        method not in {"awq" if is_awq else "gptq", ""}
        or (not is_awq and shape[1] != out)
        or out == 0
    ):
        problem = (
            f"{list(shape)} with scales {[groups, out]} is not laid out as "
            f"{method or 'GPTQ or AWQ'} does"
        )
        raise damaged_tensor(source, codes, problem, UNSUPPORTED)
    bits = 4 if is_awq else source[zeros].shape[1] * 32 // out
    _check_gptq_bits(source, codes, bits, config)
    columns = shape[0] * (1 if is_awq else 32 // bits)
    check_part(source, scales, (groups, out), FLOAT_DTYPES, weight)
    check_part(source, zeros, (groups, -(-out * bits // 32)), WORDS, weight)
    order = _find_order(source, module, "g_idx", columns)
    if not order and config.get("desc_act") is True and groups > 1 and not is_awq:
        problem = (
            f"{module}.g_idx is missing, but desc_act of quantization_config says that the "
            "inputs are reordered"
        )
        raise damaged(source.path, problem, UNSUPPORTED)
    configured = config.get("group_size")
    group = (
        configured if type(configured) is int and configured > 0 else -(-columns // max(1, groups))
    )
    if groups < 1 or (not order and -(-columns // group) != groups):
        raise damaged_tensor(
            source, scales, f"has {groups} groups for {columns} inputs in groups of {group}"
        )
    added = _find_zero_point_offset(source, is_awq, config)
    parts = (scales, zeros, order) if order else (scales, zeros)
    layout = IntegerLayout(
        source, module, columns, bits, group, groups, order, added=added, is_awq=is_awq
    )
    info = TensorInfo(
        weight, (out, columns), "float32", stored=f"{'awq' if is_awq else 'gptq'}-int{bits}"
    )
    return RowWeight(info, codes, parts, partial(gptq_values, layout), partial(gptq_steps, layout))


def _find_order(source: Checkpoint, module: str, part: str, columns: int) -> str:
    """Return the name of the tensor with the group of every column, after checking it; empty if
    there is none.
    """
    name = f"{module}.{part}"
    if name not in source:
        return ""
    check_part(source, name, (columns,), INTEGERS, f"{module}.weight")
    return name


def _check_gptq_bits(source: Checkpoint, codes: str, bits: int, config: Mapping[str, Any]) -> None:
    """Refuse unsupported bits, an invalid ``dynamic``, and a configuration with bits, but not these
    for any module.
    """
    if bits not in GPTQ_BITS:
        raise damaged_tensor(
            source, codes, f"has {bits} bits a code; 2, 4 and 8 are read", UNSUPPORTED
        )
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        problem = f"dynamic in quantization_config is a {type(dynamic).__name__}, not an object"
        raise damaged(source.path, problem, "correct it, or save the model again")
    of_modules = [settings for settings in dynamic.values() if isinstance(settings, dict)]
    declared = [settings["bits"] for settings in (config, *of_modules) if "bits" in settings]
    if declared and not any(type(value) is int and value == bits for value in declared):
        problem = f"has {bits} bits a code, but bits in quantization_config is {declared[0]!r}"
        raise damaged_tensor(source, codes, problem, "correct it, or save the model again")


def _find_zero_point_offset(source: Checkpoint, is_awq: bool, config: Mapping[str, Any]) -> int:
    """Return the offset to add to stored zero points; refuse unsupported formats and GPTQ without a
    configuration.
    """
    if not is_awq and not config:
        problem = "is GPTQ without quantization_config, which states how zero points are stored"
        raise damaged(
            source.path,
            problem,
            "copy the model's config.json or quantize_config.json into its folder",
        )
    method, key, offsets = (
        ("AWQ", "version", AWQ_VERSIONS) if is_awq else ("GPTQ", "checkpoint_format", GPTQ_FORMATS)
    )
    kind = str(config.get(key, next(iter(offsets)))).lower()
    if kind not in offsets:
        raise damaged(
            source.path,
            f"is {method} with {key} {kind!r}; supported: {', '.join(offsets)}",
            UNSUPPORTED,
        )
    return offsets[kind]


def describe_ambiguous_zeros(
    source: Checkpoint, weights: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a note if zero points of 0 occur in a file of format ``gptq``, which libraries read
    differently.

    Args:
        source: The checkpoint as stored.
        weights: The quantized weights that were found, by name.
        config: Its ``quantization_config``; with ``sym`` all zero points are in the middle.
    """
    if config.get("sym") is True or str(config.get("checkpoint_format", "gptq")).lower() != "gptq":
        return ()
    for name, weight in weights.items():
        if not (stored := str(weight.info.stored)).startswith("gptq-int"):
            continue
        bits = int(stored.removeprefix("gptq-int"))
        masks = [(1 << bits) - 1 << shift for shift in range(0, 8, bits)]
        with_largest_code = {
            byte for byte in range(256) if any(byte & mask == mask for mask in masks)
        }
        zeros = f"{name.removesuffix('.weight')}.qzeros"
        if not with_largest_code.isdisjoint(source.read_bytes(zeros)):
            return (
                f"{zeros} holds zero points of 0, of which auto-gptq and gptqmodel make other "
                "numbers; read as 0",
            )
    return ()


def _describe_mlx(source: Checkpoint, module: str, config: Mapping[str, Any]) -> RowWeight:
    """Return a weight of MLX, after checking its tensors and the configuration."""
    weight, scales, biases = (f"{module}.{part}" for part in ("weight", "scales", "biases"))
    module_config = config.get(module)
    settings = {**config, **module_config} if isinstance(module_config, dict) else config
    mode = settings.get("mode", "affine")
    bits = settings.get("bits")
    group = settings.get("group_size")
    if (
        mode != "affine"
        or bits not in MLX_BITS
        or group not in MLX_GROUPS
        or isinstance(bits, bool)
    ):
        problem = (
            f"is quantized by MLX with mode {mode!r}, bits {bits!r} and group_size {group!r} "
            "(config.json)"
        )
        raise damaged_tensor(source, weight, problem, "mode affine with 2 to 6 or 8 bits is read")
    shape = source[weight].shape
    columns = shape[-1] * 32 // bits if shape else 0
    if (
        len(shape) not in {2, 3}
        or columns * bits != shape[-1] * 32
        or columns % group
        or not columns
    ):
        problem = f"{list(shape)} is not a whole number of groups of {group} codes of {bits} bits"
        raise damaged_tensor(source, weight, problem)
    for name in (scales, biases):
        check_part(source, name, (*shape[:-1], columns // group), FLOAT_DTYPES, weight)
    layout = IntegerLayout(source, module, columns, bits, group, columns // group)
    info = TensorInfo(weight, (*shape[:-1], columns), "float32", stored=f"mlx-int{bits}")
    return RowWeight(
        info, weight, (scales, biases), partial(mlx_values, layout), partial(mlx_steps, layout)
    )
