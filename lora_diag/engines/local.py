"""The engine on one machine: several layers at once, each on its share of the cores."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

Task = TypeVar("Task")
Record = TypeVar("Record")

# What all layers at hand may take together, besides three float32 copies of the largest: with the program itself
# (0.35 GiB, nearly all of it torch) that stays under 1 GiB and four copies.
FLOOR_BYTES = 640 * 2**20


@dataclass(frozen=True, slots=True)
class Layout:
    """How layers share a machine.

    A matrix runs on as many cores as its share of the memory budget: many small ones side by side on one core each,
    which an eigenvalue solver uses best (docs/benchmarks.md), a large one alone on all of them. The share depends on
    the matrix and the machine alone, so that the same matrix gives the same bytes whatever runs beside it.

    Args:
        cores: Cores in all.
        budget: Bytes that all layers at hand may take together.
        workers: Layers at once, if the user says so; else None.
    """

    cores: int
    budget: int
    workers: int | None = None

    def threads(self, footprint: int) -> int:
        """Return the number of cores for a layer that takes ``footprint`` bytes.

        >>> Layout(8, 800).threads(50), Layout(8, 800).threads(250), Layout(8, 800).threads(5000)
        (1, 3, 8)
        """
        if self.workers is not None:
            return max(1, self.cores // self.workers)
        return min(self.cores, max(1, math.ceil(self.cores * footprint / self.budget)))


def layout_for(largest: int, workers: int | None = None, device: str = "cpu") -> Layout:
    """Return how this machine is shared.

    Args:
        largest: Entries of the largest matrix.
        workers: Layers at once, or None to choose.
        device: Where matrices are computed. On a GPU two layers are at hand: one is read while one is computed.
    """
    cores = torch.get_num_threads()
    return Layout(cores, FLOOR_BYTES + 3 * 4 * largest, workers or (2 if device == "cuda" else None))


def run_local(
    measure: Callable[[Task], Record], tasks: Iterable[Task], layout: Layout, footprint: Callable[[Task], int]
) -> Iterator[Record]:
    """Yield the record of every task, in the order of the tasks.

    Args:
        measure: A diagnostic with its settings bound.
        tasks: What to measure, one layer each.
        layout: How the machine is shared.
        footprint: Bytes that a task takes while it runs.

    Raises:
        LoradiagError: What the diagnostic raised, for the first task that did; later ones are abandoned.
    """
    most = layout.workers or layout.cores
    pending: deque[Future[Record]] = deque()
    running: dict[Future[Record], int] = {}
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(max_workers=most, thread_name_prefix="layer")
    try:
        for task in tasks:
            threads = layout.threads(footprint(task))
            while running and (len(running) >= most or sum(running.values()) + threads > max(layout.cores, most)):
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[done]
                while pending and pending[0].done():
                    yield pending.popleft().result()
            future = pool.submit(_on_threads, threads, measure, task)
            pending.append(future)
            running[future] = threads
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _on_threads(threads: int, measure: Callable[[Task], Record], task: Task) -> Record:
    torch.set_num_threads(threads)  # of this Python thread alone
    return measure(task)
