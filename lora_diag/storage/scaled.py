"""8-bit weights with a scale per tensor, row or block: FP8 checkpoints, and int8 weights of
compressed-tensors.

    W[i, j] = code[i, j] · scale[⌊i / b_out⌋, ⌊j / b_in⌋]

``scale`` is stored with the weight as ``…_scale_inv`` (DeepSeek, Qwen and transformers'
fine-grained FP8) or ``…_scale`` (fbgemm, compressed-tensors, modelopt). Both are multipliers,
despite the name ``_inv``. Blocks at the right and lower edge are cropped. A scale per tensor is one
block; a scale per row is a block of 1 × in. MXFP8 of compressed-tensors stores exponents e of
scales ``2^(e − 127)`` in 8-bit integers. In a stack of experts ``(E, out, in)``, each expert has
its own grid of scales, or all share one number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_diag.errors import damaged
from lora_diag.storage.packing import damaged_tensor, e8m0
from lora_diag.storage.tensors import FLOAT8, FLOAT_DTYPES, Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

SCALES = ("_scale_inv", "_scale")
# Scales of activations, which do not affect the weight; named after the weight's module.
ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "activation_scale_inv")
# Quantization methods in which every 8-bit float has a scale.
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Layout of the scales of a weight.

    Args:
        rows: Rows of scales per matrix.
        columns: Columns of scales.
        block: Rows and columns of the weight that share a scale.
        per_matrix: Whether each matrix of a stack has its own scales.
    """

    rows: int
    columns: int
    block: tuple[int, int]
    per_matrix: bool = True


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A weight stored as 8-bit codes and scales.

    Reading raises ``InputError`` if a file cannot be read.

    Args:
        source: The checkpoint as stored.
        info: The weight as presented.
        scale: Name of the tensor of scales.
        grid: Layout of the scales.
        parts: Names of the tensors that belong to the weight and are not presented.
        divisor: Divisor of every product; 127 for bitsandbytes, which stores the largest absolute
            value of a row.
    """

    source: Checkpoint
    info: TensorInfo
    scale: str
    grid: ScaleGrid
    parts: tuple[str, ...]
    divisor: float = 1.0

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of W, float32."""
        codes = self.source.read(self.info.name, start, stop)
        return self._apply_scales(codes.float(), start, stop)

    def read_steps(self, start: int, stop: int) -> torch.Tensor:
        """Return the distance to the next storable number at the entries
        ``start:stop``, float32.
        """
        import torch

        codes = self.source.read(self.info.name, start, stop).float()
        if self.info.stored in FLOAT8:
            mantissa, bias, _ = FLOAT8[self.info.stored]
            smallest = 1 - bias  # exponent of the smallest normal number
            # code = f · 2^e with f in [1/2, 1), so ⌊log2|code|⌋ = e − 1; the step of subnormal
            # numbers is constant.
            exponent = torch.where(codes == 0, smallest, torch.frexp(codes).exponent - 1).clamp(
                min=smallest
            )
            steps = torch.ldexp(torch.ones_like(codes), exponent - mantissa)
        else:
            steps = torch.ones_like(codes)
        return self._apply_scales(steps, start, stop)

    def read_scales(self, start: int, stop: int) -> torch.Tensor:
        """Return the scales that multiply the codes of the entries ``start:stop``, float32."""
        import torch

        return self._apply_scales(torch.ones(stop - start), start, stop)

    def _apply_scales(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Multiply the entries ``start:stop`` by their scales and divide by the divisor, in place;
        return them.
        """
        if start >= stop:
            return values
        columns = _find_matrix_shape(self.info.shape)[1]
        first, last = start // columns, -(-stop // columns)
        scales = self._read_scale_rows(first, last).repeat_interleave(self.grid.block[1], dim=1)[
            :, :columns
        ]
        values *= scales.reshape(-1)[start - first * columns :][: stop - start]
        return values if self.divisor == 1 else values.div_(self.divisor)

    def _read_scale_rows(self, first: int, last: int) -> torch.Tensor:
        """Return the scales of the rows ``first:last`` of all matrices stacked
        vertically, float32.
        """
        import torch

        grid, height = self.grid, _find_matrix_shape(self.info.shape)[0]
        row = torch.arange(first, last)
        indices = row % height // grid.block[0]
        if grid.per_matrix:
            indices += row // height * grid.rows
        lowest, highest = int(indices.min()), int(indices.max())
        scales = self.source.read(self.scale, lowest * grid.columns, (highest + 1) * grid.columns)
        if scales.dtype == torch.uint8:  # exponents of MXFP8
            scales = e8m0(scales)
        return scales.float().view(-1, grid.columns)[indices - lowest]


def find(source: Checkpoint, config: Mapping[str, Any]) -> Iterator[ScaledWeight]:
    """Yield the 8-bit weights that have scales.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.

    Raises:
        InputError: A float8 weight has no scales, where others have some or the configuration
            implies them; scales have an unsupported dtype or the wrong shape; a weight has zero
            points; or ``weight_block_size`` is invalid.
    """
    configured_block = _read_configured_block(source, config)
    bare, found_scaled = [], False
    for name in source:
        info = source[name]
        if (
            name.endswith(SCALES)
            or info.numel == 0
            or not (info.dtype in FLOAT8 or info.dtype == "int8")
        ):
            continue
        scale = next((name + suffix for suffix in SCALES if name + suffix in source), None)
        if scale is None:
            bare += [name] if info.dtype in FLOAT8 else []
            continue
        found_scaled = True
        if name + "_zero_point" in source:
            raise damaged_tensor(
                source, name, "has unsupported zero points", "give the unquantized checkpoint"
            )
        module = name.rpartition(".")[0]
        unused = (f"{module}.{activation}" for activation in ACTIVATIONS)
        yield ScaledWeight(
            source,
            TensorInfo(name, info.shape, "float32", stored=info.dtype),
            scale,
            grid_of(source, name, scale, configured_block),
            parts=(scale, *(part for part in unused if part in source)),
        )
    if bare and (found_scaled or config.get("quant_method") in METHODS):
        wanted = " or ".join(bare[0] + suffix for suffix in SCALES)
        raise damaged_tensor(
            source, bare[0], f"is stored as {source[bare[0]].dtype} without scales ({wanted})"
        )


def grid_of(
    source: Checkpoint, name: str, scale: str, configured_block: tuple[int, int] | None = None
) -> ScaleGrid:
    """Return the layout of the scales of a weight.

    Args:
        source: The checkpoint as stored.
        name: Name of the weight.
        scale: Name of its scales.
        configured_block: Rows and columns of a block in the configuration; None to infer them from
            the shapes.

    Raises:
        InputError: The scales are neither floats nor exponents of MXFP8, or their shape does not
            match the weight's.
    """
    weight, scales = source[name], source[scale]
    exponents = {"float8_e8m0fnu"}
    if weight.dtype in FLOAT8:
        exponents.add("uint8")
    if scales.dtype not in FLOAT_DTYPES | exponents:
        raise damaged_tensor(
            source, scale, f"is stored as {scales.dtype}, but scales must be floats"
        )
    rows, columns = _find_matrix_shape(weight.shape)
    if scales.numel == 1:
        return ScaleGrid(1, 1, (rows, columns), per_matrix=False)
    # Missing trailing dimensions have one scale for all entries: (out) is (out, 1).
    shape = scales.shape + (1,) * (len(weight.shape) - len(scales.shape))
    *stack, down, across = shape if len(shape) > 1 else (*shape, 1)
    if stack == list(weight.shape[:-2]) and down in {1, rows} and across == 1:
        return ScaleGrid(down, 1, (rows // down, columns))
    block = configured_block or (_infer_block_size(rows, down), _infer_block_size(columns, across))
    if (
        stack != list(weight.shape[:-2])
        or min(block) < 1
        or (down, across) != (-(-rows // block[0]), -(-columns // block[1]))
    ):
        expected = ""
        if configured_block:
            expected = f" in blocks of {configured_block[0]} × {configured_block[1]}"
        problem = (
            f"has shape {list(scales.shape)}, which does not match {name} "
            f"{list(weight.shape)}{expected}"
        )
        raise damaged_tensor(source, scale, problem)
    return ScaleGrid(down, across, block)


def _infer_block_size(size: int, count: int) -> int:
    """Infer the block size if ``count`` blocks, the last perhaps cropped, cover ``size``; 0 if no
    size is plausible.

    The possible sizes are in [size / count, size / (count − 1)), which contains at most one power
    of two. Formats use powers of two, mostly 128; without one, only an exact quotient is accepted.
    """
    if count == 1:
        return size
    smallest = -(-size // max(1, count))
    power = 1 << (smallest - 1).bit_length()
    if -(-size // power) == count:
        return power
    return smallest if smallest * count == size else 0


def _find_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of one matrix of a stack; a vector is a column, so it can have a
    scale per entry.

    >>> _find_matrix_shape((8, 32, 64)), _find_matrix_shape((32,))
    ((32, 64), (32, 1))
    """
    return (*shape, 1, 1)[:2] if len(shape) < 2 else shape[-2:]  # type: ignore[return-value]


def _read_configured_block(source: Checkpoint, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return ``weight_block_size`` of the configuration after checking it; None if
    there is none.
    """
    value = config.get("weight_block_size")
    if value is None:
        return None
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and size > 0 for size in value)
    ):
        problem = f"weight_block_size in config.json is {value!r}, not two positive integers"
        raise damaged(source.path, problem, "correct it")
    return value[0], value[1]
