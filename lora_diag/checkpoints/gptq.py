"""GPTQ and AWQ: integers packed into words, with the weight stored transposed.

    W[i, j] = scales[g, i] · (q[j, i] − z[g, i])

GPTQ packs q along the inputs j, ``qweight (in · bits / 32, out)``, the lowest bits first; ``g_idx[j]`` is the group g
of an input (act-order), without it ``⌊j / group⌋``. ``qzeros`` are packed along the outputs. Files of format ``gptq``
store z − 1, modulo 2^bits; those of ``gptq_v2`` store z. A stored 2^bits − 1 is read as z = 0; the kernels of auto-gptq
and gptqmodel decode it differently, so a note names the tensors with it.

AWQ (``gemm``) has 4 bits, packs q along the outputs, ``qweight (in, out / 8)``, in the order 0, 2, 4, 6, 1, 3, 5, 7,
and stores z.

Reference: Frantar et al. 2022 and auto-gptq 0.7.1 ``QuantLinear``; Lin et al. 2023 and AutoAWQ 0.2.9 ``packing_utils``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.compressed import INTEGERS, read_checked_groups
from lora_diag.checkpoints.packing import RowWeight, read_columns, require, unpack
from lora_diag.checkpoints.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

CODES = ".qweight"
WORDS = frozenset({"int32"})
# Bits per code whose codes fill words.
BITS = (2, 4, 8)
# Place of each output in a word of AWQ.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_FIX = "give the unquantized checkpoint, or analyse the adapter alone"
# Format of a file -> offset to add to its zero points.
FORMATS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a GPTQ or AWQ weight.

    Args:
        source: The checkpoint as stored.
        module: The weight's name without ``.weight``.
        shape: ``(out, in)``.
        bits: Bits per code.
        groups: Scales per output.
        group: Inputs that share a scale, where ``ordered`` is False.
        ordered: Whether ``g_idx`` gives the group of every input.
        added: Offset of stored zero points, modulo 2^bits.
        awq: Whether it is AWQ.
    """

    source: Checkpoint
    module: str
    shape: tuple[int, int]
    bits: int
    groups: int
    group: int
    ordered: bool
    added: int
    awq: bool


def values(layout: Layout, first: int, last: int) -> torch.Tensor:
    """Return the rows ``first:last`` (outputs) of the weight, float32."""
    import torch

    group = _read_groups(layout)
    scales = _read_scales(layout, first, last)[group]
    zeros = ((_unpack_along_outputs(layout, "qzeros", layout.groups, first, last) + layout.added) % (1 << layout.bits))[
        group
    ]
    if layout.awq:
        codes = _unpack_along_outputs(layout, "qweight", layout.shape[1], first, last)
    else:
        rows = layout.source[f"{layout.module}{CODES}"].shape[0]
        words = read_columns(layout.source, f"{layout.module}{CODES}", (0, rows), (first, last))
        shifts = torch.arange(0, 32, layout.bits, dtype=torch.int32)[:, None]
        codes = ((words[:, None] >> shifts) & ((1 << layout.bits) - 1)).view(layout.shape[1], last - first)
    return scales.mul_(codes.sub_(zeros)).T


def steps(layout: Layout, first: int, last: int) -> torch.Tensor:
    """Return the distance between neighbouring values in the rows ``first:last`` of the weight."""
    return _read_scales(layout, first, last).abs()[_read_groups(layout)].T


def _read_scales(layout: Layout, first: int, last: int) -> torch.Tensor:
    return read_columns(layout.source, f"{layout.module}.scales", (0, layout.groups), (first, last)).float()


def _read_groups(layout: Layout) -> torch.Tensor:
    """Return the group of every input."""
    import torch

    if not layout.ordered:
        return torch.arange(layout.shape[1]) // layout.group
    return read_checked_groups(layout.source, f"{layout.module}.g_idx", layout.groups)


def _unpack_along_outputs(layout: Layout, part: str, rows: int, first: int, last: int) -> torch.Tensor:
    """Return the codes of the outputs ``first:last`` of a tensor that is packed along them, ``(rows, outputs)``."""
    per_word = 32 // layout.bits
    low, high = first // per_word, -(-last // per_word)
    words = read_columns(layout.source, f"{layout.module}.{part}", (0, rows), (low, high))
    codes = unpack(words, layout.bits, (high - low) * per_word)
    if layout.awq:
        codes = codes.view(rows, -1, 8)[:, :, list(ORDER)].reshape(rows, -1)
    return codes[:, first - low * per_word : last - low * per_word]


def find(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the weights of GPTQ and AWQ.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.

    Raises:
        InputError: A tensor of a weight is missing or has the wrong shape, or the layout is another one.
    """
    for name in source:
        if name.endswith(CODES):
            yield _describe_weight(source, name.removesuffix(CODES), config)


def _describe_weight(source: Checkpoint, module: str, config: Mapping[str, Any]) -> RowWeight:
    codes, scales, zeros, order = (f"{module}{part}" for part in (CODES, ".scales", ".qzeros", ".g_idx"))
    weight = f"{module}.weight"
    if len(source[codes].shape) != 2 or source[codes].dtype != "int32":
        raise InputError(f"{source.file_of(codes)}: {codes} is not an int32 matrix, as in GPTQ and AWQ; {_FIX}")
    if scales not in source or len(source[scales].shape) != 2:
        raise InputError(f"{source.file_of(codes)}: {codes} of GPTQ or AWQ has no matrix {scales} of scales; {_FIX}")
    groups, out = source[scales].shape
    awq = source[codes].shape[1] * 8 == out
    method = str(config.get("quant_method", "")).lower()
    if method not in {"awq" if awq else "gptq", ""} or (not awq and source[codes].shape[1] != out):
        raise InputError(
            f"{source.file_of(codes)}: {codes} {list(source[codes].shape)} with scales {[groups, out]} is not laid "
            f"out as {method or 'GPTQ or AWQ'} does; {_FIX}"
        )
    if zeros not in source or len(source[zeros].shape) != 2 or out == 0:
        raise InputError(
            f"{source.file_of(codes)}: {codes} of GPTQ or AWQ has no matrix {zeros} of zero points; {_FIX}"
        )
    bits = 4 if awq else source[zeros].shape[1] * 32 // out
    if bits not in BITS:
        raise InputError(f"{source.file_of(codes)}: {codes} has {bits} bits a code; 2, 4 and 8 are read; {_FIX}")
    _check_bits(source, codes, bits, config)
    columns = source[codes].shape[0] * (1 if awq else 32 // bits)
    require(source, scales, (groups, out), FLOAT_DTYPES, weight)
    require(source, zeros, (groups, -(-out * bits // 32)), WORDS, weight)
    ordered = order in source
    if ordered:
        require(source, order, (columns,), INTEGERS, weight)
    elif config.get("desc_act") is True and groups > 1 and not awq:
        raise InputError(
            f"{source.path}: {order} is missing, but desc_act of quantization_config says that the inputs are "
            f"reordered; {_FIX}"
        )
    group = _find_group_size(source, scales, columns, groups, ordered, config)
    layout = Layout(
        source, module, (out, columns), bits, groups, group, ordered, _find_zero_point_offset(source, awq, config), awq
    )
    info = TensorInfo(weight, (out, columns), "float32", stored=f"{'awq' if awq else 'gptq'}-int{bits}")
    parts = (scales, zeros, *((order,) if ordered else ()))
    return RowWeight(info, codes, parts, partial(values, layout), partial(steps, layout))


def _check_bits(source: Checkpoint, codes: str, bits: int, config: Mapping[str, Any]) -> None:
    """Refuse a configuration with another number of bits. ``dynamic`` of gptqmodel has settings of single modules."""
    dynamic = config.get("dynamic")
    of_single_modules = [settings for settings in dynamic.values() if isinstance(settings, dict)] if dynamic else []
    declared = [settings["bits"] for settings in (config, *of_single_modules) if "bits" in settings]
    if declared and not any(type(value) is int and value == bits for value in declared):
        raise InputError(
            f"{source.file_of(codes)}: {codes} has {bits} bits a code, but bits in quantization_config is "
            f"{declared[0]!r}; correct it, or save the model again"
        )


def _find_group_size(
    source: Checkpoint, scales: str, columns: int, groups: int, ordered: bool, config: Mapping[str, Any]
) -> int:
    """Return the number of inputs in a group, after checking it against the number of groups."""
    configured = config.get("group_size")
    size = configured if type(configured) is int and configured > 0 else -(-columns // max(1, groups))
    if groups < 1 or (not ordered and -(-columns // size) != groups):
        raise InputError(
            f"{source.file_of(scales)}: {scales} has {groups} groups for {columns} inputs in groups of {size}; "
            "save the model again"
        )
    return size


def _find_zero_point_offset(source: Checkpoint, awq: bool, config: Mapping[str, Any]) -> int:
    """Return the offset to add to stored zero points; refuse unsupported formats and GPTQ without a configuration."""
    if awq:
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise InputError(f"{source.path}: is AWQ of version {version!r}; only gemm is read; {_FIX}")
        return 0
    kind = str(config.get("checkpoint_format", "gptq")).lower()
    if not config:
        raise InputError(
            f"{source.path}: is GPTQ without quantization_config, which states how zero points are "
            "stored; copy the config.json or quantize_config.json of the model into the same folder"
        )
    if kind not in FORMATS:
        raise InputError(f"{source.path}: is GPTQ in the format {kind!r}; gptq and gptq_v2 are read; {_FIX}")
    return FORMATS[kind]


def find_ambiguous_zeros(source: Checkpoint, weights: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note if zero points of 0 occur in a file of format ``gptq``, which libraries read differently.

    Args:
        source: The checkpoint as stored.
        weights: The quantized weights that were found, by name.
        config: Its ``quantization_config``; with ``sym`` all zero points are in the middle.
    """
    if config.get("sym") is True or str(config.get("checkpoint_format", "gptq")).lower() != "gptq":
        return ()
    for name, weight in weights.items():
        if (stored := str(weight.info.stored)).startswith("gptq-int"):
            bits = int(stored.removeprefix("gptq-int"))
            bytes_with_full_code = [
                byte
                for byte in range(256)
                if any(byte >> shift & (2**bits - 1) == 2**bits - 1 for shift in range(0, 8, bits))
            ]
            zeros = f"{name.removesuffix('.weight')}.qzeros"
            if re.search(
                b"[" + b"".join(re.escape(bytes([byte])) for byte in bytes_with_full_code) + b"]",
                source.read_bytes(zeros),
            ):
                return (
                    f"{zeros} holds zero points of 0, of which auto-gptq and gptqmodel make other numbers; read as 0",
                )
    return ()
