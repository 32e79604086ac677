"""What every diagnostic is given: a layer's update, and how to measure it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.deltas import Delta


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """How a layer is measured.

    Args:
        method: ``auto``, ``exact``, ``gram`` or ``krylov``.
        tol: Bound that ``auto`` and ``krylov`` have to reach on the error of every energy fraction.
        seed: Of random starting vectors.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        memory: Bytes that a layer may take; None for what it needs.
    """

    method: str = "auto"
    tol: float = 1e-4
    seed: int = 0
    device: str = "auto"
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class LayerTask:
    """One layer's update, to which diagnostics add what they compare or weigh it with.

    Args:
        delta: Its ΔW.
    """

    delta: Delta

    @property
    def layer(self) -> str:
        """The weight's name in BASE."""
        return self.delta.layer

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``, as it is stored."""
        return self.delta.shape
