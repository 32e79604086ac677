"""Run time of ``spectrum`` on machines like this one, from shapes and a measurement of its speed in
some seconds.

Times of matrices are core-seconds: a matrix that takes t seconds on p cores costs p·t, and a
machine has as many core-seconds per second as cores. Idle cores during the last matrices are not
included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from lora_diag.decisions.plan.architectures import Matrix
from lora_diag.decisions.plan.record import PlanCost, PlanRates
from lora_diag.linalg.krylov import smallest_order
from lora_diag.linalg.methods import time_full, time_leading, time_pass
from lora_diag.running.engines import MachineLayout, layout_for, run_local

# Numbers of machines in the table.
MACHINES = (1, 8, 64)


def estimate_core_seconds(rates: PlanRates, shape: tuple[int, int], top: int | None) -> float:
    """Return the core-seconds of one matrix.

    Args:
        rates: Speed of the machine.
        shape: ``(out, in)``.
        top: K, the number of requested values with krylov; None for all.
    """
    small, large = sorted(shape)
    read = rates.entry * small * large
    if top is not None and rates.few and small >= rates.few_from:
        return read + interpolate_cost(rates.few, small, beyond=0) * small * large
    return read + rates.product * small**2 * large + interpolate_cost(rates.eigen, small, beyond=3)


def interpolate_cost(costs: Mapping[int, float], order: int, beyond: int) -> float:
    """Return a cost interpolated between measured orders by a power law; beyond them, ∝
    ``order ** beyond``.

    >>> [
    ...     round(interpolate_cost({1000: 0.1, 2000: 0.4}, n, beyond=3), 4)
    ...     for n in (500, 1000, 1414, 2000, 4000)
    ... ]
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


def estimate_cost(
    matrices: Sequence[Matrix], size: int | None, rates: PlanRates, top: int | None
) -> PlanCost:
    """Return the cost of a run of ``spectrum`` over all matrices.

    Args:
        matrices: Matrices of the model.
        size: Bytes of one side as stored; None if unknown.
        rates: Speed of the machine.
        top: K; None for all values.
    """
    core_seconds = [estimate_core_seconds(rates, matrix.shape, top) for matrix in matrices]
    total = math.fsum(
        matrix.count * seconds for matrix, seconds in zip(matrices, core_seconds, strict=True)
    )
    seconds, longest = total / rates.cores, max(core_seconds) / rates.cores
    return PlanCost(
        top=top,
        core_seconds=total,
        longest=longest,
        seconds={count: max(seconds / count, longest) for count in MACHINES},
        bytes=None if size is None else 2 * size,
    )


T = TypeVar("T")

# Orders at which the eigenvalue solver is timed, up to the largest of the model; extrapolated
# beyond.
ORDERS = (256, 1024, 2048, 4096)

# Up to this order a kernel is timed at least three times.
QUICK = 2048

# Order of the matrix on which the pass over both sides is timed.
PASS_ORDER = 2048


def estimate_costs(
    matrices: Sequence[Matrix], size: int | None, top: int
) -> tuple[PlanRates, tuple[PlanCost, ...]]:
    """Return the speed of this machine, and the cost of a model's spectra on it.

    The first cost is that of all values; the second, where krylov is used, that of the K largest.

    Args:
        matrices: Matrices of the model.
        size: Bytes of one side as stored; None if unknown.
        top: K of the second estimate.
    """
    rates = _time_kernels(matrices, top)
    return rates, tuple(
        estimate_cost(matrices, size, rates, k) for k in ((None, top) if rates.few else (None,))
    )


def _time_kernels(matrices: Sequence[Matrix], top: int) -> PlanRates:
    """Return the speed of every kernel, timed as in a run: with the cores of its size, and with the
    others busy.
    """
    layout = layout_for(max(matrix.entries // matrix.count for matrix in matrices))
    largest = max(min(matrix.shape) for matrix in matrices)
    orders = [order for order in ORDERS if order <= largest] or [ORDERS[0]]
    eigen, product = dict[int, float](), 0.0
    for order in orders:
        threads, times = _time_side_by_side(partial(time_full, order), order, layout)
        eigen[order] = threads * _median_time([values for _, values in times])
        product = threads * _median_time([products for products, _ in times]) / order**3
    few_from, few = smallest_order(top), {}
    for order in (order for order in orders if order >= few_from):
        threads, seconds = _time_side_by_side(partial(time_leading, order, top), order, layout)
        few[order] = threads * _median_time(seconds) / order**2
    threads, seconds = _time_side_by_side(partial(time_pass, PASS_ORDER), PASS_ORDER, layout)
    entry = threads * _median_time(seconds) / PASS_ORDER**2
    return PlanRates(
        cores=layout.cores, entry=entry, product=product, eigen=eigen, few=few, few_from=few_from
    )


def _time_side_by_side(
    work: Callable[[], T], order: int, layout: MachineLayout
) -> tuple[int, list[T]]:
    """Return the cores per run of ``work``, and results of as many runs as fit side by side, at
    least 3 if quick.
    """
    footprint = 20 * order**2
    threads = layout.threads(footprint)
    copies = range(max(1 if order > QUICK else 3, layout.cores // threads))
    return threads, list(run_local(lambda _: work(), copies, layout, lambda _: footprint))


def _median_time(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]
