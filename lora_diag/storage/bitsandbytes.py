"""bitsandbytes: 4-bit weights (nf4, fp4, with and without double quantization) and 8-bit weights
(LLM.int8).

4-bit: two codes per byte, the first in the high half; a table of 16 values; one absolute maximum
per block of entries in row-major order, itself stored in 8 bits under double quantization:

    W[k] = table[code[k]] · absmax[⌊k / block⌋]
    absmax[b] = nested_table[nested_code[b]] · nested_absmax[⌊b / nested block⌋] + offset

8-bit: ``W[i, j] = code[i, j] · SCB[i] / 127``, where SCB[i] is the largest absolute value of row i.

Reference: Dettmers et al. 2023, QLoRA, section 3; Dettmers et al. 2022, LLM.int8(), section 3.1.
The tensor names are those written by ``QuantState.as_dict(packed=True)`` and ``Linear8bitLt``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_diag.errors import damaged
from lora_diag.storage.documents import loads
from lora_diag.storage.packing import damaged_tensor, gaps
from lora_diag.storage.scaled import ScaledWeight, grid_of
from lora_diag.storage.tensors import FLOAT_DTYPES, WIDTH, Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

STATE = ".quant_state.bitsandbytes__"
TYPES = frozenset({"nf4", "fp4"})
# The settings take about 200 bytes.
MAX_STATE_BYTES = 10_000
# bitsandbytes uses blocks of 32 to 4096 entries. Ranges are read in whole blocks, so their size
# bounds memory.
MAX_BLOCK = 2**16
# Dtypes that can hold codes (``bnb_4bit_quant_storage``; FSDP needs that of the other weights).
STORAGE = frozenset({"uint8", "int8", "float16", "bfloat16", "float32"})


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """A weight quantized to 4 bits.

    Reading raises ``InputError`` if a file cannot be read.

    Args:
        source: The checkpoint as stored.
        info: The weight as presented.
        block: Entries that share an absolute maximum.
        nested: Entries per block of absolute maxima that are quantized, and the offset added to
            each; None if they are floats.
        parts: Names of the tensors that belong to the weight and are not presented.
    """

    source: Checkpoint
    info: TensorInfo
    block: int
    nested: tuple[int, float] | None
    parts: tuple[str, ...]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of W, float32."""
        values = self._read_whole("quant_map")[self._read_codes(start, stop)]
        return values.mul_(
            spread(self._read_absmax(*self._find_blocks(start, stop)), self.block, start, stop)
        )

    def read_steps(self, start: int, stop: int) -> torch.Tensor:
        """Return steps whose half bounds the error of the entries ``start:stop``, float32.

        A code t chosen under the exact absolute maximum a has an error of at most a·gap/2, where
        gap is the distance from t to its farther neighbour in the table. If a itself is stored as â
        = a ± δ, the error of t·â is at most â·gap/2 + (|t| + gap/2)·δ.
        """
        codes, (first, last) = self._read_codes(start, stop), self._find_blocks(start, stop)
        table = self._read_whole("quant_map")
        gap = gaps(table)[codes]
        steps = gap * spread(self._read_absmax(first, last).abs(), self.block, start, stop)
        if self.nested:
            absmax_steps = gaps(self._read_whole("nested_quant_map"))[
                self._read_nested_codes(first, last)
            ]
            absmax_steps *= self._read_nested_absmax(first, last).abs()
            steps += (table[codes].abs() + gap / 2) * spread(absmax_steps, self.block, start, stop)
        return steps

    def _find_blocks(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first block of the entries ``start:stop``, and one past the last."""
        return start // self.block, -(-stop // self.block)

    def _read_codes(self, start: int, stop: int) -> torch.Tensor:
        """Return the 4-bit codes of the entries ``start:stop``, int32."""
        import torch

        name = self.info.name
        width = WIDTH[self.source[name].dtype]
        first, last = start // (2 * width), -(-stop // (2 * width))
        packed = self.source.read(name, first, last).view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
        return codes[start - first * 2 * width :][: stop - start].int()

    def _read_absmax(self, first: int, last: int) -> torch.Tensor:
        """Return the absolute maxima of the blocks ``first:last``."""
        if self.nested is None:
            return self.source.read(f"{self.info.name}.absmax", first, last).float()
        values = self._read_whole("nested_quant_map")[self._read_nested_codes(first, last)]
        return values.mul_(self._read_nested_absmax(first, last)).add_(self.nested[1])

    def _read_nested_codes(self, first: int, last: int) -> torch.Tensor:
        """Return the 8-bit codes of the absolute maxima of the blocks ``first:last``, int32."""
        return self.source.read(f"{self.info.name}.absmax", first, last).int()

    def _read_nested_absmax(self, first: int, last: int) -> torch.Tensor:
        """Return the multipliers of the nested values of the blocks ``first:last``."""
        assert self.nested is not None
        block = self.nested[0]
        values = self.source.read(
            f"{self.info.name}.nested_absmax", first // block, -(-last // block)
        )
        return spread(values.float(), block, first, last)

    def _read_whole(self, part: str) -> torch.Tensor:
        """Return a whole auxiliary tensor of the weight, float32."""
        return self.source.read(f"{self.info.name}.{part}").float()


def spread(values: torch.Tensor, block: int, start: int, stop: int) -> torch.Tensor:
    """Return the values of blocks, given from ``start // block`` on, repeated for the entries
    ``start:stop``.
    """
    return values.repeat_interleave(block)[start % block :][: stop - start]


def find_four_bit(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[FourBitWeight]:
    """Yield the 4-bit weights.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``; unused, since every weight has its own settings.

    Raises:
        InputError: The settings of a weight are missing or invalid, or one of its tensors is
            missing or has the wrong size or dtype.
    """
    kind_by_weight = {}
    for name in source:
        weight, separator, kind = name.rpartition(STATE)
        if separator:
            kind_by_weight[weight] = kind
    for name in source:
        weight = name.removesuffix(".absmax")
        if weight != name and weight not in kind_by_weight:
            raise damaged_tensor(source, name, f"has no settings ({weight}{STATE}nf4 is missing)")
    for name, kind in kind_by_weight.items():
        yield _describe_four_bit(source, name, kind)


def find_eight_bit(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[ScaledWeight]:
    """Yield the 8-bit weights.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``; unused.

    Raises:
        InputError: Scales are no floats or have no int8 matrix of their size, or a weight is not in
            row-major order.
    """
    for name in source:
        module = name.removesuffix(".SCB")
        if module == name:
            continue
        weight, layout = f"{module}.weight", f"{module}.weight_format"
        matrix = source[weight] if weight in source else source[name]
        if (
            matrix.dtype != "int8"
            or len(matrix.shape) != 2
            or source[name].shape != matrix.shape[:1]
        ):
            raise damaged_tensor(source, name, f"has no int8 matrix {weight} to scale")
        if layout in source and any(source.read_bytes(layout)):
            problem = f"is not 0: {weight} is not stored in row-major order"
            raise damaged_tensor(
                source, layout, problem, "save the model again with a current bitsandbytes"
            )
        info = TensorInfo(weight, source[weight].shape, "float32", stored="int8")
        parts = (name, layout) if layout in source else (name,)
        grid = grid_of(source, weight, name)
        yield ScaledWeight(source, info, name, grid, parts=parts, divisor=127.0)


def _describe_four_bit(source: Checkpoint, name: str, kind: str) -> FourBitWeight:
    """Return a 4-bit weight after checking its settings against the sizes of its stored tensors."""
    state_name = f"{name}{STATE}{kind}"
    state = _read_state(source, state_name)
    if kind not in TYPES or state.get("quant_type") != kind:
        problem = f"has the unsupported format {state.get('quant_type', kind)!r}"
        raise damaged_tensor(source, state_name, problem, "supported are nf4 and fp4")
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(
        type(size) is int and 0 < size < 2**63 for size in shape
    ):
        raise damaged_tensor(
            source, state_name, f"gives the shape {shape!r}, not a list of positive integers"
        )
    block, count = _read_block_size(source, state_name, state, "blocksize"), math.prod(shape)
    nested = None
    size_by_part = {"quant_map": 16, "absmax": -(-count // block)}
    if "nested_blocksize" in state or f"{name}.nested_absmax" in source:
        offset = state.get("nested_offset")
        if not isinstance(offset, int | float) or not abs(offset) <= sys.float_info.max:
            raise damaged_tensor(
                source, state_name, f"gives the nested_offset {offset!r}, not a finite number"
            )
        nested = _read_block_size(source, state_name, state, "nested_blocksize"), float(offset)
        size_by_part |= {
            "nested_quant_map": 256,
            "nested_absmax": -(-size_by_part["absmax"] // nested[0]),
        }
    for part, size in size_by_part.items():
        is_quantized = part == "absmax" and nested is not None
        _check_part(
            source, f"{name}.{part}", size, frozenset({"uint8"}) if is_quantized else FLOAT_DTYPES
        )
    width = WIDTH[source[name].dtype] if name in source and source[name].dtype in STORAGE else 1
    _check_part(source, name, -(-count // (2 * width)), STORAGE)
    parts = (state_name, *(f"{name}.{part}" for part in size_by_part))
    return FourBitWeight(
        source, TensorInfo(name, tuple(shape), "float32", stored=kind), block, nested, parts
    )


def _check_part(source: Checkpoint, name: str, size: int, dtypes: frozenset[str]) -> None:
    """Refuse a tensor of a 4-bit weight that is missing, or has another number of
    entries or dtype.
    """
    if name not in source:
        raise damaged(source.path, f"{name} is missing, which a 4-bit weight needs")
    info = source[name]
    if info.numel != size or info.dtype not in dtypes:
        needed = f"{size:,} of {' or '.join(sorted(dtypes))}"
        raise damaged_tensor(
            source, name, f"holds {info.numel:,} {info.dtype} entries instead of {needed}"
        )


def _read_state(source: Checkpoint, name: str) -> dict[str, Any]:
    """Return the settings of a weight, stored as JSON in a tensor."""
    try:
        if source[name].numel > MAX_STATE_BYTES:
            raise ValueError(f"it has {source[name].numel:,} entries")
        state = loads(source.read_bytes(name))
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (ValueError, RecursionError) as error:
        raise damaged_tensor(
            source, name, f"does not hold the settings of a 4-bit weight ({error})"
        ) from error
    return state


def _read_block_size(source: Checkpoint, name: str, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 0 < value <= MAX_BLOCK:
        raise damaged_tensor(
            source, name, f"gives the {key} {value!r}, not an integer in 1 to {MAX_BLOCK}"
        )
    return value
