"""Input of every diagnostic: a layer's update and the settings of its measurement; and records of
skipped layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.deltas import Delta, Unpaired
from lora_diag.records import LeftOut
from lora_diag.records.run import Reason


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
        """The weight's name in BASE, or in the adapter when there is no BASE."""
        return self.delta.layer

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``, as it is stored."""
        return self.delta.shape


def left_out_vector(delta: Delta, device: str) -> LeftOut:
    """Return the record of a 1-D tensor, which has no rank: the norm of its change, or why it is
    not finite.
    """
    from lora_diag.layers.change import load_change  # deferred: imports torch
    from lora_diag.linalg.devices import resolve_device

    change = load_change(delta, resolve_device(device), keep=False)
    if change.non_finite is not None:
        return not_finite(delta, change.non_finite)
    detail = "1-D: its change has a norm but no rank"
    return leave_out(delta, "vector", detail, fro=change.fro, base_fro=change.base_fro)


def left_out_rows(unpaired: Unpaired, device: str) -> LeftOut:
    """Return the record of a tensor that could not be compared; of rows that only one side has,
    with their norm.

    If the rows are not finite, the record says so instead.
    """
    reason, detail, fro = unpaired.reason, unpaired.detail, None
    if unpaired.rows is not None:
        from lora_diag.linalg.devices import resolve_device
        from lora_diag.linalg.difference import first_non_finite, norm

        rows = unpaired.rows.read(0, unpaired.shape[0] * unpaired.shape[1]).view(unpaired.shape)
        rows = rows.to(resolve_device(device))
        if problem := first_non_finite("they hold", rows):
            reason, detail = "non_finite", f"{detail}; {problem}"
        else:
            fro = norm([rows])
    return LeftOut(
        layer=unpaired.layer,
        shape=unpaired.shape,
        reason=reason,
        detail=detail,
        fro=fro,
        tuned_shape=unpaired.tuned_shape,
    )


def leave_out(delta: Delta, reason: Reason, detail: str, **norms: float | None) -> LeftOut:
    """Return the record of a skipped layer; ``norms`` are ``fro`` and ``base_fro``, if they are
    known.
    """
    shape: tuple[int, ...] = delta.shape if delta.is_matrix else delta.shape[1:]
    return LeftOut(layer=delta.layer, shape=shape, reason=reason, detail=detail, **norms)


def not_finite(delta: Delta, problem: str) -> LeftOut:
    """Return the record of a layer that is not finite, or whose norm is out of range."""
    # A vector was read as one row.
    return leave_out(
        delta, "non_finite", problem if delta.is_matrix else problem.replace("[0, ", "[")
    )
