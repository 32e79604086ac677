"""One weight and its treatment by each consumer → records with the relative error of the applied ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_diag.adapters.contents import Item
from lora_diag.adapters.updates import Site
from lora_diag.deltas import Delta, FactoredDelta
from lora_diag.diagnostics.portability.record import AS_INTENDED, NONLINEAR_PARTS, Portability, Status
from lora_diag.diagnostics.portability.rules import Outcome
from lora_diag.layers.change import PRODUCT_OVERFLOW, load_change
from lora_diag.layers.left_out import not_finite
from lora_diag.layers.metric import fro_of
from lora_diag.linalg import resolve_device
from lora_diag.linalg.stacked import gap
from lora_diag.records import LeftOut

if TYPE_CHECKING:
    from lora_diag.linalg.stacked import Matrix

# Scales that differ by less than this are equal, computed in another order: α/√r and √(α²/r).
SAME = 1e-9

# Consumer and version.
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Judged:
    """A weight that an adapter changes.

    Args:
        item: Its contents in the file.
        outcomes: Its treatment by each consumer, or the reason for refusing the adapter.
        intended: The intended s.
        delta: Its ΔW; None if that needs a BASE and none is given.
    """

    item: Item
    outcomes: Mapping[Name, Outcome | str]
    intended: float | None
    delta: Delta | None = None

    @property
    def layer(self) -> str:
        """The weight's name."""
        return self.item.layer

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``; ``(1, n)`` for a vector."""
        if self.delta is not None:
            return self.delta.shape
        shape = self.item.shape or (0,)
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


@dataclass(frozen=True, slots=True)
class PortabilitySettings:
    """Settings of the measurement of a weight.

    Args:
        memory: Memory limit of a layer in bytes; None without limit.
    """

    memory: int | None = None


def judge(task: Judged, settings: PortabilitySettings) -> tuple[Portability | LeftOut, ...]:
    """Return the record of every consumer.

    Where only the scale differs, ε = ‖s'BA − sBA‖/‖sBA‖ = |s'/s − 1|, independent of B and A; ‖sBA‖ comes from QR of
    the factors (``decompose_factored``). For DoRA and for initialisations that changed the base, ΔW is formed.
    """
    fro: float | None = None
    update: Matrix | None = None
    plain = task.item.part not in NONLINEAR_PARTS
    if task.delta is not None:
        delta = replace(task.delta, base=None) if isinstance(task.delta, FactoredDelta) else task.delta
        change = load_change(delta, resolve_device("cpu"), keep=not plain)
        if change.non_finite is not None:
            return (not_finite(task.delta, change),)
        fro = fro_of(change)
        if not math.isfinite(fro):
            return (not_finite(task.delta, replace(change, non_finite=PRODUCT_OVERFLOW)),)
        update = change.matrix if change.factors is None else change.factors
    return tuple(
        _record(task, name, outcome, fro, None if plain else update) for name, outcome in task.outcomes.items()
    )


def _record(task: Judged, name: Name, outcome: Outcome | str, fro: float | None, update: Matrix | None) -> Portability:
    status, epsilon, scale, why = _judge(task, outcome, fro, update)
    if isinstance(outcome, Outcome) and outcome.unjudged and status in AS_INTENDED:
        status, epsilon, why = "unknown", None, outcome.unjudged
    return Portability(
        layer=task.layer,
        consumer=name[0],
        version=name[1],
        status=status,
        part=task.item.part,
        rank=task.item.rank,
        scale=scale,
        intended=task.intended,
        epsilon=epsilon,
        fro=fro,
        why=why,
    )


def _judge(
    task: Judged, outcome: Outcome | str, fro: float | None, update: Matrix | None
) -> tuple[Status, float | None, float | None, str]:
    """Return status, ε, s' and the reason."""
    if isinstance(outcome, str):
        return "refused", None, None, outcome
    error = 0.0 if fro != 0.0 else None
    if outcome.does == "full":
        return "full", error, None, ""
    if outcome.does == "dropped":
        return "dropped", 1.0 if fro != 0.0 else None, None, outcome.why
    stored, intended = task.item.scale, task.intended
    as_intended = outcome.scale is not None and intended is not None and _is_same(outcome.scale, intended)
    if task.item.part in NONLINEAR_PARTS and outcome.does == "applied":
        return "wrong", _measure_distance(task, outcome, fro, update), outcome.scale, _explain_plain(task, outcome)
    if as_intended or outcome.scale is None or intended is None or (fro == 0.0 and stored != 0):
        return "exact", error, outcome.scale, ""
    deviation = abs(outcome.scale / intended - 1) if intended else None
    return "wrong", deviation, outcome.scale, outcome.why


def _is_same(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=SAME)


def _explain_plain(task: Judged, outcome: Outcome) -> str:
    plain = "the magnitudes of DoRA" if task.item.part == "dora" else "what the initialisation took from the base"
    return f"B·A alone is added, without {plain}" + (f"; {outcome.why}" if outcome.why else "")


def _measure_distance(task: Judged, outcome: Outcome, fro: float | None, update: Matrix | None) -> float | None:
    """Return ‖s'BA − ΔW‖_F / ‖ΔW‖_F, with ΔW formed; None if that needs a BASE and none is given."""
    item, delta = task.item, task.delta
    if delta is None or not fro or update is None or item.load is None or outcome.scale is None or not item.scale:
        return None
    loaded = item.load(Site(delta.shape))
    assert isinstance(loaded, tuple)
    b, a = loaded
    if (len(b), a.shape[1]) != delta.shape:
        b, a = a.T, b.T
    return gap((b * (outcome.scale / item.scale), a), update) / fro


def size(task: Judged, settings: PortabilitySettings) -> int:
    """Return the approximate memory of a weight in bytes: its factors, or ΔW in float64 if it must be formed."""
    if task.item.part in NONLINEAR_PARTS and task.delta is not None:
        return 8 * 4 * math.prod(task.shape)
    return 8 * 3 * (task.item.rank or 64) * sum(task.shape)
