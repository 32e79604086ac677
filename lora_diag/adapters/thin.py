"""Two stored factors and a scale, read with NumPy, for updates ΔW = s·B·A that depend on nothing
else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diag.adapters.patterns import Scale, compute_scale
from lora_diag.adapters.updates import flatten_shape
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    from lora_diag.storage.file_bytes import Numbers


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """Two stored factors and a scale: a ``ThinFactors``.

    Reading raises ``InputError`` if a file cannot be read.

    Args:
        checkpoint: The adapter's tensors.
        b: Name of B ``(out, r, 1, …)``.
        a: Name of A ``(r, in, …)``.
        scale: s.
        turned: Whether both are stored transposed.
    """

    checkpoint: Checkpoint
    b: str
    a: str
    scale: Scale
    turned: bool = False

    def read_b(self) -> Numbers:
        """Return B ``(out, r)``."""
        factor: Numbers = self._read([self.b])[0]
        return factor

    def read_a(self) -> Numbers:
        """Return A ``(r, in·kh·kw)``."""
        factor: Numbers = self._read([self.a])[0]
        return factor

    def read_scale(self) -> float:
        """Return s."""
        return compute_scale(self.checkpoint, self.scale)

    @property
    def kind(self) -> Hashable:
        """Equal for factors that can be read as one stack: of the same files, orientation, shapes
        and dtypes.
        """
        stored = [(self.checkpoint.file_of(key), self.checkpoint[key]) for key in (self.b, self.a)]
        return self.turned, *((file, info.shape, info.dtype) for file, info in stored)

    def read_each_b(self, stack: Sequence[StoredFactors]) -> Numbers:
        """Return each B of several factors of this kind, ``(k, out, r)``."""
        return self._read([factors.b for factors in stack])

    def read_each_a(self, stack: Sequence[StoredFactors]) -> Numbers:
        """Return each A of several factors of this kind, ``(k, r, in·kh·kw)``."""
        return self._read([factors.a for factors in stack])

    def _read(self, keys: Sequence[str]) -> Numbers:
        """Return several factors of one shape, as matrices, in one array."""
        stack = self.checkpoint.read_arrays(keys)
        stack = stack.reshape(len(keys), *flatten_shape(stack.shape[1:]))
        return stack.transpose(0, 2, 1) if self.turned else stack


def find_thin_factors(
    checkpoint: Checkpoint, b: str, a: str, scale: Scale, turned: bool = False
) -> StoredFactors | None:
    """Return two stored factors; None if their file or format needs torch.

    For the arguments see ``StoredFactors``.
    """
    keys = [b, a, scale.alpha] if scale.alpha else [b, a]
    return (
        StoredFactors(checkpoint, b, a, scale, turned)
        if all(map(checkpoint.decodes, keys))
        else None
    )
