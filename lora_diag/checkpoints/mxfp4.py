"""MXFP4 as in gpt-oss: stacked experts of 4-bit floats, with a power of two per 32 inputs.

    W[e, o, i] = fp4[e, o, i] · 2^(scales[e, o, ⌊i / 32⌋] − 127)

``…_blocks`` ``(E, out, in / 32, 16)`` has two codes per byte, the first in the low half; ``…_scales`` is
``(E, out, in / 32)``. transformers presents, and saves, such a parameter without the suffix and transposed, as
``(E, in, out)``; so does this module, so that both forms of a model have the same names and shapes.

Reference: ``transformers.integrations.mxfp4.convert_moe_packed_tensors``; Open Compute Project, Microscaling Formats
1.0, section 5.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.packing import RowWeight, fp4_values, mxfp4_steps, require, unpack
from lora_diag.checkpoints.scaled import e8m0
from lora_diag.checkpoints.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
BYTES = frozenset({"uint8"})
# Bytes of codes read at a time.
SLAB_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a stack of experts.

    Args:
        source: The checkpoint as stored.
        name: The parameter.
        out: Outputs of an expert.
        inputs: Inputs.
    """

    source: Checkpoint
    name: str
    out: int
    inputs: int


def decode(layout: Layout, first: int, last: int, of_codes: Any) -> torch.Tensor:
    """Return values or steps of the inputs ``first:last``, counted over all experts, ``(last − first, out)``.

    Args:
        layout: The stack.
        first: First row.
        last: One past the last row.
        of_codes: Returns the value or the step of each code, without its scale.
    """
    import torch

    parts = []
    for expert in range(first // layout.inputs, -(-last // layout.inputs)):
        low, high = max(0, first - expert * layout.inputs), min(layout.inputs, last - expert * layout.inputs)
        parts.append(_decode_expert(layout, expert, low, high, of_codes))
    return torch.cat(parts)


def _decode_expert(layout: Layout, expert: int, first: int, last: int, of_codes: Any) -> torch.Tensor:
    """Return values or steps of the inputs ``first:last`` of one expert, ``(last − first, out)``."""
    import torch

    groups = layout.inputs // GROUP
    low, high = first // GROUP, -(-last // GROUP)
    out = torch.empty(last - first, layout.out)
    step = max(1, SLAB_BYTES // (groups * GROUP // 2))
    for row in range(0, layout.out, step):
        end = min(layout.out, row + step)
        span = (expert * layout.out + row) * groups, (expert * layout.out + end) * groups
        codes = layout.source.read(f"{layout.name}{BLOCKS}", span[0] * 16, span[1] * 16).view(end - row, groups, 16)
        scales = layout.source.read(f"{layout.name}{SCALES}", *span).view(end - row, groups)[:, low:high]
        values = of_codes(unpack(codes[:, low:high].reshape(end - row, -1), 4, (high - low) * GROUP))
        values *= e8m0(scales).repeat_interleave(GROUP, dim=1)
        out[:, row:end] = values[:, first - low * GROUP : last - low * GROUP].T
    return out


def find(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[RowWeight]:
    """Yield the stacks of experts.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``; unused.

    Raises:
        InputError: The scales of a stack are missing, or the shapes do not fit.
    """
    for blocks in source:
        if not blocks.endswith(BLOCKS) or source[blocks].dtype in FLOAT_DTYPES:
            continue
        name = blocks.removesuffix(BLOCKS)
        shape = source[blocks].shape
        if len(shape) != 4 or shape[-1] != GROUP // 2 or source[blocks].dtype != "uint8" or 0 in shape:
            raise InputError(
                f"{source.file_of(blocks)}: {blocks} is {source[blocks].dtype} {list(shape)}, not the uint8 "
                "[experts, out, in / 32, 16] of MXFP4; save the model again"
            )
        require(source, f"{name}{SCALES}", shape[:-1], BYTES, name)
        layout = Layout(source, name, shape[1], shape[2] * GROUP)
        yield RowWeight(
            TensorInfo(name, (shape[0], layout.inputs, layout.out), "float32", stored="mxfp4"),
            blocks,
            (f"{name}{SCALES}",),
            partial(decode, layout, of_codes=fp4_values),
            partial(decode, layout, of_codes=mxfp4_steps),
        )
