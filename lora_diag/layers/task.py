"""Input of every diagnostic: a layer's update, and the settings of the measurement."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.deltas import Delta


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """Settings of the measurement of a layer.

    Args:
        method: ``auto``, ``exact``, ``gram`` or ``krylov``.
        tol: Bound on the error of every energy fraction for ``auto`` and ``krylov``.
        seed: Seed of random starting vectors.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        memory: Memory limit of a layer in bytes; None without limit.
    """

    method: str = "auto"
    tol: float = 5e-4
    seed: int = 0
    device: str = "auto"
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class LayerTask:
    """One layer's update; diagnostics add the other inputs of the comparison.

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
