"""Present quantized weights as ordinary float tensors.

A format is one module of this package and one line in ``FORMATS``. Each finds its weights by the names of the auxiliary
tensors stored with them. Auxiliary tensors are hidden; the weight appears under its own name, in its logical shape and
as float32. Weights are dequantized on reading, and only in the requested range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lora_diag.checkpoints import bitsandbytes, compressed, gptq, mlx, mxfp4, scaled
from lora_diag.checkpoints.names import refuse_unfound
from lora_diag.checkpoints.packing import RowWeight
from lora_diag.checkpoints.tensors import Checkpoint, TensorFile, TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch


class QuantizedWeight(Protocol):
    """One readable quantized weight."""

    @property
    def info(self) -> TensorInfo:
        """The weight as presented."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that belong to it and are not presented."""
        ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop``, float32."""
        ...

    def read_steps(self, start: int, stop: int) -> torch.Tensor:
        """Return steps whose half bounds the error of the entries ``start:stop``, float32."""
        ...


Find = Callable[[Checkpoint, Mapping[str, Any]], Iterable[QuantizedWeight]]

# Each finds the weights of one format in a checkpoint as stored, given its ``quantization_config``.
FORMATS: tuple[Find, ...] = (
    bitsandbytes.find_four_bit,
    bitsandbytes.find_eight_bit,
    scaled.find,
    compressed.find,
    gptq.find,
    mlx.find,
    mxfp4.find,
)


class Dequantized:
    """A file whose quantized weights are read as floats.

    Args:
        file: The file.
        weights: The quantized weights of the checkpoint, by the name of the tensor in whose place they appear.
        hidden: Names of the auxiliary tensors, which are not presented.
    """

    def __init__(self, file: TensorFile, weights: Mapping[str, QuantizedWeight], hidden: frozenset[str]) -> None:
        self._file = file
        in_file = [(name, weights[name]) for name in file.tensors if name in weights]
        self._weights = {weight.info.name: weight for _, weight in in_file}
        self.path = file.path
        self.notes = file.notes
        self.metadata = file.metadata
        self.tensors: Mapping[str, TensorInfo] = {
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
        """Return the bytes of a small tensor."""
        return self._file.read_bytes(name)

    def read_steps(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return steps whose half bounds the error of the entries ``start:stop``; None if not quantized."""
        weight = self._weights.get(name)
        return weight.read_steps(start, stop) if weight else None

    def read_scales(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return the scales that multiply the codes of the entries ``start:stop``; None without such codes."""
        weight = self._weights.get(name)
        return weight.read_scales(start, stop) if isinstance(weight, scaled.ScaledWeight) else None


def dequantize(source: Checkpoint, config: Mapping[str, Any]) -> tuple[tuple[TensorFile, ...], tuple[str, ...]]:
    """Present the quantized weights of a checkpoint as floats.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``; empty without one.

    Returns:
        The files, and notes: the number of weights of each format, and zero points that libraries read differently.

    Raises:
        InputError: A tensor of a quantized weight is missing, has the wrong size or contradicts the configuration.
    """
    weights = {weight.info.name: weight for find in FORMATS for weight in find(source, config)}
    refuse_unfound(source, config, {weight.info.stored for weight in weights.values()})
    compressed.refuse_other_zeros(source, (weight.info for weight in weights.values()), config)
    if not weights:
        return source.files, ()
    hidden = frozenset(part for weight in weights.values() for part in weight.parts)
    by_place = {(weight.place if isinstance(weight, RowWeight) else name): weight for name, weight in weights.items()}
    for place, weight in by_place.items():
        name = weight.info.name
        if place != name and name in source:
            raise InputError(f"{source.file_of(place)}: {name} is stored twice, once as {place}; save the model again")
    counts = Counter(weight.info.stored for weight in weights.values())
    formats = ", ".join(f"{count} as {stored}" for stored, count in sorted(counts.items(), key=str))
    note = f"quantized weights are dequantized while they are read: {formats}"
    notes = (note, *gptq.find_ambiguous_zeros(source, weights, config))
    return tuple(Dequantized(file, by_place, hidden) for file in source.files), notes
