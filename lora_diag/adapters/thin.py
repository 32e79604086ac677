"""Two stored factors and a scale, read with NumPy, for updates ΔW = s·B·A that depend on nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diag.adapters.scales import Scale, scale_of
from lora_diag.adapters.updates import flat
from lora_diag.checkpoints import Checkpoint

if TYPE_CHECKING:
    from lora_diag.checkpoints.decoding import Numbers


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """Two stored factors and a scale: a ``ThinFactors``.

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
        return self._read(self.b)

    def read_a(self) -> Numbers:
        """Return A ``(r, in·kh·kw)``."""
        return self._read(self.a)

    def read_scale(self) -> float:
        """Return s."""
        return scale_of(self.checkpoint, self.scale)

    def _read(self, key: str) -> Numbers:
        array = self.checkpoint.read_array(key)
        array = array.reshape(flat(array.shape))
        return array.T if self.turned else array


def thin_factors(checkpoint: Checkpoint, b: str, a: str, scale: Scale, turned: bool = False) -> StoredFactors | None:
    """Return two stored factors; None if their file or format needs torch. For the arguments see ``StoredFactors``."""
    keys = [b, a, scale.alpha] if scale.alpha else [b, a]
    return StoredFactors(checkpoint, b, a, scale, turned) if all(map(checkpoint.decodes, keys)) else None
