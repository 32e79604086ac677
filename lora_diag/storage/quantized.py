"""Present quantized weights as ordinary float tensors.

A family of formats is one module of this package, with its functions in ``FORMATS``. Each finds its
weights by the names of the auxiliary tensors stored with them. Auxiliary tensors are hidden; the
weight appears under its own name, in its logical shape and as float32. Weights are dequantized on
reading, and only in the requested range.

Unsupported formats are recognized by tensor names, dtypes or the configuration, and refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_diag.errors import damaged
from lora_diag.storage import bitsandbytes, float4, integers, scaled
from lora_diag.storage.packing import RowWeight, damaged_tensor
from lora_diag.storage.tensors import FLOAT_DTYPES, Checkpoint, TensorFile

if TYPE_CHECKING:
    import torch


QuantizedWeight = RowWeight | bitsandbytes.FourBitWeight | scaled.ScaledWeight
Find = Callable[[Checkpoint, Mapping[str, Any]], Iterable[QuantizedWeight]]

# Each finds the weights of one or more formats in a checkpoint as stored, given its
# ``quantization_config``.
FORMATS: tuple[Find, ...] = (
    bitsandbytes.find_four_bit,
    bitsandbytes.find_eight_bit,
    scaled.find,
    float4.find,
    integers.find_compressed,
    integers.find_gptq,
    integers.find_mlx,
)

# Endings of tensor names that a single method uses, the most specific first.
PACKED = {
    ".bitmask": "compressed-tensors (sparse)",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    "._data": "quanto",
}
# Endings that also occur on float tensors of ordinary models; they count only on tensors of other
# dtypes.
AMBIGUOUS = frozenset({"._data", ".bitmask"})

# Methods of ``quantization_config`` in which every quantized weight is packed into tensors of other
# names.
PACKING_METHODS = ("gptq", "awq", "mxfp4")

# Methods that are dequantized, as far as the tensors allow it.
READ_METHODS = (
    "bitsandbytes",
    "fp8",
    "fbgemm_fp8",
    "compressed-tensors",
    "modelopt",
    *PACKING_METHODS,
)

METHOD_KEY = "quant_method in config.json"
FLOATS_ADVICE = "if these weights are plain floats, remove quantization_config from config.json"
NOT_FLOATS_ADVICE = (
    "the weights are not stored as floats; give the unquantized checkpoint, or "
    "analyse the adapter alone"
)


class Dequantized(TensorFile):
    """A file whose quantized weights are read as floats.

    Args:
        file: The file.
        weights: The quantized weights of the checkpoint, by the name of the tensor in whose place
            they appear.
        hidden: Names of the auxiliary tensors, which are not presented.
    """

    def __init__(
        self, file: TensorFile, weights: Mapping[str, QuantizedWeight], hidden: frozenset[str]
    ) -> None:
        self._file = file
        in_file = [(name, weights[name]) for name in file.tensors if name in weights]
        self._weights = {weight.info.name: weight for _, weight in in_file}
        self.path, self.notes, self.metadata = file.path, file.notes, file.metadata
        self.tensors = {
            info.name: info
            for name, stored in file.tensors.items()
            if name in weights or name not in hidden
            for info in [weights[name].info if name in weights else stored]
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of a tensor; float32 if it is quantized."""
        weight = self._weights.get(name)
        return weight.read(start, stop) if weight else self._file.read(name, start, stop)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor that is not quantized."""
        return self._file.read_bytes(name)

    def read_steps(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return steps whose half bounds the error of the entries ``start:stop``; None if not
        quantized.
        """
        weight = self._weights.get(name)
        return weight.read_steps(start, stop) if weight else None

    def read_scales(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return the scales of the codes of the entries ``start:stop``, or None; see
        ``Checkpoint.read_scales``.
        """
        weight = self._weights.get(name)
        return weight.read_scales(start, stop) if isinstance(weight, scaled.ScaledWeight) else None


def dequantize(
    source: Checkpoint, config: Mapping[str, Any]
) -> tuple[tuple[TensorFile, ...], tuple[str, ...]]:
    """Present the quantized weights of a checkpoint as floats.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``; empty without one.

    Returns:
        The files, and a note on zero points that libraries read differently, if there are any.

    Raises:
        InputError: A tensor of a quantized weight is missing, has the wrong size or dtype or
            contradicts the configuration, a weight is stored twice, or a variant of a format is
            unsupported.
    """
    weights = {weight.info.name: weight for find in FORMATS for weight in find(source, config)}
    refuse_missing_packed(source, config, {weight.info.stored for weight in weights.values()})
    integers.refuse_contradicting_zeros(
        source, (weight.info for weight in weights.values()), config
    )
    if not weights:
        return source.files, ()
    hidden = frozenset(part for weight in weights.values() for part in weight.parts)
    by_place = {
        (weight.place if isinstance(weight, RowWeight) else name): weight
        for name, weight in weights.items()
    }
    for place, weight in by_place.items():
        name = weight.info.name
        if place != name and name in source:
            raise damaged_tensor(source, place, f"is {name}, which is stored twice")
    files = tuple(Dequantized(file, by_place, hidden) for file in source.files)
    return files, integers.describe_ambiguous_zeros(source, weights, config)


def count_quantized(presented: Checkpoint) -> tuple[str, ...]:
    """Return a note on how many weights are dequantized from which format, if there are any."""
    counts = Counter(presented[name].stored for name in presented if presented[name].stored)
    formats = ", ".join(f"{count} as {stored}" for stored, count in sorted(counts.items(), key=str))
    return (f"quantized weights are dequantized while they are read: {formats}",) if counts else ()


def find_quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``quantization_config`` under any of its names; empty if there is none."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if isinstance(value := config.get(key), dict):
            return value
    return {}


def refuse_packed(source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse unsupported quantization methods.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.

    Raises:
        InputError: A tensor's name or the configuration belongs to such a method.
    """
    method = config.get("quant_method")
    for suffix, label in PACKED.items():
        for name in source:
            if name.endswith(suffix) and (
                suffix not in AMBIGUOUS or source[name].dtype not in FLOAT_DTYPES
            ):
                label = str(method).upper() if method and str(method).upper() in label else label
                raise damaged(
                    source.file_of(name), f"is {label}-quantized ({name})", NOT_FLOATS_ADVICE
                )
    if method is not None and method not in READ_METHODS:
        problem = f"is quantized with {method!r} ({METHOD_KEY}), which is not supported"
        raise damaged(source.path, problem, f"{NOT_FLOATS_ADVICE}; {FLOATS_ADVICE}")


def refuse_missing_packed(
    source: Checkpoint, config: Mapping[str, Any], stored: Collection[str | None]
) -> None:
    """Refuse a checkpoint that is packed according to its configuration but has no packed tensor.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.
        stored: Storage formats of the quantized weights that were found.

    Raises:
        InputError: None is of the configured method.
    """
    method = config.get("quant_method")
    if method in PACKING_METHODS and not any(str(kind).startswith(method) for kind in stored):
        problem = f"is quantized with {method!r} ({METHOD_KEY}), but holds no such weight"
        raise damaged(source.path, problem, FLOATS_ADVICE)


def refuse_integer_weights(presented: Checkpoint) -> None:
    """Refuse integer, 4-bit and 6-bit ``.weight`` matrices of no known format, which would be
    silently skipped.

    Args:
        presented: The checkpoint after dequantization.

    Raises:
        InputError: There is such a matrix.
    """
    for name in presented:
        info = presented[name]
        if (
            name.endswith(".weight")
            and len(info.shape) > 1
            and info.dtype.startswith(("int", "uint", "F4", "F6"))
        ):
            problem = f"is stored as {info.dtype}, in no known quantized format"
            raise damaged_tensor(presented, name, problem, NOT_FLOATS_ADVICE)
