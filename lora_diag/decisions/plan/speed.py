"""Run time of ``spectrum`` on this machine, from a measurement of its speed in some seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from lora_diag.decisions.plan.cost import Speed, cost_of
from lora_diag.decisions.plan.measure import Matrix
from lora_diag.decisions.plan.record import PlanCost, PlanRates
from lora_diag.linalg.krylov import first_order
from lora_diag.linalg.speed import time_full, time_leading, time_pass
from lora_diag.running.engines import Layout, layout_for, run_local

T = TypeVar("T")

# Orders at which the eigenvalue solver is timed, up to the largest of the model; extrapolated beyond.
ORDERS = (256, 1024, 2048, 4096)

# Up to this order a kernel is timed at least three times.
QUICK = 2048

# Order of the matrix on which the pass over both sides is timed.
PASS_ORDER = 2048


def costs(matrices: Sequence[Matrix], size: int | None, top: int) -> tuple[PlanRates, tuple[PlanCost, ...]]:
    """Return the speed of this machine, and the cost of a model's spectra on it: all values, and the largest.

    Args:
        matrices: Those of the model.
        size: Stored bytes of one side; None if unknown.
        top: K of the second estimate.
    """
    speed = Speed(_time_rates(matrices, top))
    requested = (None, top) if speed.rates.few else (None,)
    return speed.rates, tuple(cost_of(matrices, size, speed, largest) for largest in requested)


def _time_rates(matrices: Sequence[Matrix], top: int) -> PlanRates:
    """Time every kernel as in a run: with the cores of its size, and with the other cores busy."""
    layout = layout_for(max(matrix.entries // matrix.count for matrix in matrices))
    largest = max(min(matrix.shape) for matrix in matrices)
    orders = [order for order in ORDERS if order <= largest] or [ORDERS[0]]
    eigen, product = dict[int, float](), 0.0
    for order in orders:
        threads, times = _time_side_by_side(partial(time_full, order), order, layout)
        eigen[order] = threads * _median_time([values for _, values in times])
        product = threads * _median_time([products for products, _ in times]) / order**3
    few_from = first_order(top)
    few = {}
    for order in (order for order in orders if order >= few_from):
        threads, seconds = _time_side_by_side(partial(time_leading, order, top), order, layout)
        few[order] = threads * _median_time(seconds) / order**2
    threads, seconds = _time_side_by_side(partial(time_pass, PASS_ORDER), PASS_ORDER, layout)
    entry = threads * _median_time(seconds) / PASS_ORDER**2
    return PlanRates(cores=layout.cores, entry=entry, product=product, eigen=eigen, few=few, few_from=few_from)


def _time_side_by_side(work: Callable[[], T], order: int, layout: Layout) -> tuple[int, list[T]]:
    """Return the number of cores per matrix, and the times of as many concurrent runs as fit."""
    footprint = 4 * order**2 + 16 * order**2
    threads = layout.threads(footprint)
    copies = range(max(1 if order > QUICK else 3, layout.cores // threads))
    return threads, list(run_local(lambda _: work(), copies, layout, lambda _: footprint))


def _median_time(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]
