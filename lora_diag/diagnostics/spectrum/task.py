"""Input of a layer's spectrum: its update, its weighting, and the settings of the measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diag.layers.task import LayerSettings, LayerTask
from lora_diag.metrics import RANKS

if TYPE_CHECKING:
    from lora_diag.layers.metric import Weighting
    from lora_diag.linalg import Allowance


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        ranks: Ranks r of C(r) and the truncation errors.
        top: Number of largest singular values to keep; None for all.
        recover: Whether to estimate the update before rounding where the files do not resolve it.
    """

    ranks: tuple[int, ...] = RANKS
    top: int | None = None
    recover: bool = False

    @property
    def allowance(self) -> Allowance | None:
        """Return the method's settings and memory limit for a layer."""
        from lora_diag.linalg import Allowance  # deferred: imports torch

        return None if self.memory is None else Allowance(self.memory, self.method, self.top)


@dataclass(frozen=True, slots=True)
class Layer(LayerTask):
    """One layer's update and its weighting; None for the plain metric."""

    weighting: Weighting | None = None
