"""What quantized formats have in common: codes of a few bits, 4-bit floats, and weights that are
decoded row by row.

Functions from codes to values are pure, so that a format can be tested against its formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diag.errors import InputError, damaged
from lora_diag.storage.tensors import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

# Values of the 4-bit floats of MXFP4 and NVFP4 (2 exponent bits, 1 mantissa bit), by code.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Bytes read at a time where a range of columns is cut out of stored rows.
SLAB_BYTES = 2**22

# Ending of the codes of compressed-tensors.
PACKED = ".weight_packed"
# Scales and zero points of activations, which do not affect the weight.
ACTIVATIONS = (
    "input_scale",
    "output_scale",
    "input_global_scale",
    "input_zero_point",
    "output_zero_point",
)

INTEGERS = frozenset({"int32", "int64"})


@dataclass(frozen=True, slots=True)
class RowWeight:
    """A quantized weight whose rows are decoded as a whole.

    Reading raises ``InputError`` if a file cannot be read.

    Args:
        info: The weight as presented.
        place: Name of the tensor in whose place it appears: that of its codes.
        parts: Names of the other tensors that belong to it and are not presented.
        values: Returns the rows ``first:last`` of the weight as a matrix
            ``(∏ shape[:-1], shape[-1])``, float32. A ``functools.partial`` of a module's function,
            so that the weight can be sent to another process.
        steps: Likewise the steps, whose half bounds the error of each entry.
    """

    info: TensorInfo
    place: str
    parts: tuple[str, ...]
    values: Callable[[int, int], torch.Tensor]
    steps: Callable[[int, int], torch.Tensor]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of W, float32."""
        return self._read_range(self.values, start, stop)

    def read_steps(self, start: int, stop: int) -> torch.Tensor:
        """Return steps whose half bounds the error of the entries ``start:stop``, float32."""
        return self._read_range(self.steps, start, stop)

    def _read_range(
        self, decode_rows: Callable[[int, int], torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        if start >= stop:
            return torch.empty(0)
        width = self.info.shape[-1]
        first, last = start // width, -(-stop // width)
        return (
            decode_rows(first, last)
            .reshape(-1)[start - first * width : stop - first * width]
            .contiguous()
        )


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the codes of rows that hold a stream of codes, the lowest bits of the first byte
    first.

    Args:
        packed: ``(rows, n)``, 8- or 32-bit integers, little-endian.
        bits: Bits per code, 1 to 8.
        count: Codes per row.

    Returns:
        ``(rows, count)``, int32.

    >>> import torch
    >>> unpack(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.int32)
    """
    import torch

    data = (
        packed.clone(memory_format=torch.contiguous_format)
        .view(torch.uint8)
        .view(packed.shape[0], -1)
    )
    if bits in {1, 2, 4, 8}:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes = ((data[:, :, None] >> shifts) & ((1 << bits) - 1)).view(len(data), -1)
        return codes[:, :count].int()
    bit = (data[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    stream = bit.view(len(data), -1)[:, : count * bits].reshape(len(data), count, bits).int()
    return (stream << torch.arange(bits)).sum(dim=2, dtype=torch.int32)


def gaps(table: torch.Tensor) -> torch.Tensor:
    """Return the distance from each value of a table to its farther neighbour; 1-D like the table.

    >>> import torch
    >>> gaps(torch.tensor([0.0, 1.0, 5.0, 2.0, -0.0]))
    tensor([1., 1., 3., 3., 1.])
    """
    import torch

    distance = table[None, :] - table[:, None]
    above, below = (
        torch.where(signed > 0, signed, math.inf).amin(dim=1) for signed in (distance, -distance)
    )
    return torch.maximum(above.where(above.isfinite(), 0.0), below.where(below.isfinite(), 0.0))


def e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Return the powers of two of 8-bit exponents, ``2^(e − 127)``, float32; 255 is not
    a number.
    """
    import torch

    values = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    return torch.where(exponents == 255, math.nan, values)


def read_rows(
    source: Checkpoint, name: str, first: int, last: int, width: int | None = None
) -> torch.Tensor:
    """Return the rows ``first:last`` of a stored matrix; ``width`` is by default its last
    dimension.
    """
    columns = source[name].shape[-1] if width is None else width
    return source.read(name, first * columns, last * columns).view(last - first, columns)


def read_columns(
    source: Checkpoint, name: str, rows: tuple[int, int], columns: tuple[int, int]
) -> torch.Tensor:
    """Return a range of columns of some rows of a stored matrix; a few megabytes of whole rows are
    read at a time.

    Args:
        source: The checkpoint as stored.
        name: The matrix; of more dimensions, all but the last are its rows.
        rows: First row and one past the last.
        columns: First column and one past the last.
    """
    import torch

    step = max(1, SLAB_BYTES // (4 * max(1, source[name].shape[-1])))
    parts = [
        read_rows(source, name, first, min(rows[1], first + step))[
            :, columns[0] : columns[1]
        ].clone()
        for first in range(rows[0], rows[1], step)
    ]
    return torch.cat(parts)


def damaged_tensor(
    source: Checkpoint, name: str, problem: str, fix: str = "save it again"
) -> InputError:
    """Return the error of a tensor that contradicts the others, or the configuration."""
    return damaged(source.file_of(name), f"{name} {problem}", fix)


def check_part(
    source: Checkpoint, name: str, shape: tuple[int, ...], dtypes: frozenset[str], whole: str
) -> None:
    """Check a tensor that belongs to a quantized weight.

    Args:
        source: The checkpoint as stored.
        name: The tensor.
        shape: Its required shape.
        dtypes: Its possible dtypes.
        whole: The weight, for messages.

    Raises:
        InputError: It is missing, or has another shape or dtype.
    """
    if name not in source:
        raise damaged(source.path, f"{name} is missing, which {whole} needs")
    info = source[name]
    if info.shape != shape or info.dtype not in dtypes:
        needed = f"{' or '.join(sorted(dtypes))} {list(shape)}"
        raise damaged_tensor(
            source, name, f"is {info.dtype} {list(info.shape)}, but {whole} needs {needed}"
        )


def list_activations(source: Checkpoint, module: str) -> list[str]:
    """Return the names of the stored scales and zero points of a module's activations."""
    return [name for part in ACTIVATIONS if (name := f"{module}.{part}") in source]
