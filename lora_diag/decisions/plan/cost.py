"""Run time of ``spectrum``, and the required read rate of storage, from shapes and measured speed.

All times are core-seconds: a matrix that takes t seconds on p cores costs p·t, and a machine has as many core-seconds
per second as cores. Idle cores during the last matrices are not included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_diag.decisions.plan.measure import Matrix
from lora_diag.decisions.plan.record import PlanCost, PlanRates

# Numbers of machines in the table.
MACHINES = (1, 8, 64)


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured speed, and interpolation between the measured sizes.

    Args:
        rates: As in the record.
    """

    rates: PlanRates

    def core_seconds(self, shape: tuple[int, int], top: int | None) -> float:
        """Return the core-seconds of one matrix.

        Args:
            shape: ``(out, in)``.
            top: K, the number of requested values with krylov; None for all.
        """
        small, large = sorted(shape)
        read = self.rates.entry * small * large
        if top is not None and self.rates.few and small >= self.rates.few_from:
            return read + between(self.rates.few, small, beyond=0) * small * large
        return read + self.rates.product * small**2 * large + between(self.rates.eigen, small, beyond=3)


def between(costs: Mapping[int, float], order: int, beyond: int) -> float:
    """Interpolate a cost between measured orders by a power law; outside use ``order ** beyond``.

    >>> [round(between({1000: 0.1, 2000: 0.4}, n, beyond=3), 4) for n in (500, 1000, 1414, 2000, 4000)]
    [0.0125, 0.1, 0.1999, 0.4, 3.2]
    """
    below = max((n for n in costs if n <= order), default=None)
    above = min((n for n in costs if n >= order), default=None)
    if below is None or above is None:
        nearest = below or above or 1
        return costs[nearest] * math.pow(order / nearest, beyond)
    if below == above:
        return costs[below]
    exponent = math.log(costs[above] / costs[below]) / math.log(above / below)
    return costs[below] * math.pow(order / below, exponent)


def cost_of(matrices: Sequence[Matrix], size: int | None, speed: Speed, top: int | None) -> PlanCost:
    """Return the cost of a run of ``spectrum`` over all matrices.

    Args:
        matrices: Matrices of the model.
        size: Bytes of one side as stored; None if unknown.
        speed: Speed of the machine.
        top: K; None for all values.
    """
    core_seconds = [speed.core_seconds(matrix.shape, top) for matrix in matrices]
    total = math.fsum(matrix.count * each for matrix, each in zip(matrices, core_seconds, strict=True))
    seconds = total / speed.rates.cores
    longest = max(core_seconds) / speed.rates.cores
    return PlanCost(
        top=top,
        core_seconds=total,
        longest=longest,
        seconds={count: max(seconds / count, longest) for count in MACHINES},
        bytes=None if size is None else 2 * size,
    )
