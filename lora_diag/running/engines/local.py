"""The engine on one machine: several layers at once, each on its fraction of the cores."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TypeVar

from lora_diag.errors import Given, UsageError

Task = TypeVar("Task")
Record = TypeVar("Record")

# Memory of all concurrent layers, besides three float32 copies of the largest: with the program
# itself (0.35 GiB, nearly all of it torch) the total stays under 1 GiB and four copies.
FLOOR_BYTES = 640 * 2**20

# Memory of the program itself, nearly all of it torch: 256 MiB after import, 270 after LAPACK ran,
# and up to 40 more of freed blocks in the threads of layers (docs/guides/memory.md).
PROGRAM_BYTES = 352 * 2**20

# Smallest useful budget besides the program: two blocks and a matrix of 1024².
MIN_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class MachineLayout:
    """Allocation of a machine to layers.

    The number of cores of a matrix is proportional to its fraction of the memory budget: many small
    matrices run concurrently on one core each, the most efficient use of an eigenvalue solver
    (docs/benchmarks.md), and a large one alone on all cores. With ``workers``, each layer has an
    equal part of the cores, at least one. The number depends only on the matrix and the layout, so
    a matrix gives the same bytes whatever runs concurrently.

    Args:
        cores: Number of cores.
        budget: Memory of all concurrent layers in bytes.
        workers: Concurrent layers, if their number is fixed; else None.
        limited: Whether a layer must fit into the budget, and is else processed in row blocks.
        torch: Whether layers are computed with torch, whose threads are then set.
        apart: Whether every worker is a separate process.
    """

    cores: int
    budget: int
    workers: int | None = None
    limited: bool = False
    torch: bool = True
    apart: bool = False

    @property
    def limit(self) -> int | None:
        """Memory limit of one layer in bytes; None without limit.

        >>> (
        ...     MachineLayout(8, 800, limited=True).limit,
        ...     MachineLayout(8, 800, workers=2, limited=True).limit,
        ...     MachineLayout(8, 800).limit,
        ... )
        (800, 400, None)
        """
        return self.budget // (self.workers or 1) if self.limited else None

    def threads(self, footprint: int) -> int:
        """Return the number of cores for a layer that takes ``footprint`` bytes.

        >>> [MachineLayout(8, 800).threads(footprint) for footprint in (50, 250, 5000)]
        [1, 3, 8]
        """
        if self.workers is not None:
            return max(1, self.cores // self.workers)
        return min(self.cores, max(1, math.ceil(self.cores * footprint / self.budget)))


def layout_for(
    largest: int,
    workers: int | None = None,
    device: str = "cpu",
    memory: int | None = None,
    torch: bool = True,
) -> MachineLayout:
    """Return the allocation of this machine.

    Args:
        largest: Entries of the largest matrix.
        workers: Concurrent layers; None to choose.
        device: Device of the computation. By default, ``cuda`` has two concurrent layers: one is
            read while the other is computed.
        memory: Memory limit of the whole program in bytes; None for the need of the largest matrix.
        torch: Whether layers are computed with torch; without, it is not imported.

    Raises:
        UsageError: The memory limit is too small for the program itself and ``MIN_BYTES`` per
            worker.
    """
    cores = _count_torch_threads() if torch else _count_own_cores()
    workers = workers or (2 if device == "cuda" else None)
    if memory is None:
        return MachineLayout(cores, FLOOR_BYTES + 3 * 4 * largest, workers, torch=torch)
    budget = memory - PROGRAM_BYTES
    if budget < MIN_BYTES * (workers or 1):
        minimum = math.ceil((PROGRAM_BYTES + MIN_BYTES * (workers or 1)) / 1e6)
        program = f"the program itself takes {PROGRAM_BYTES / 1e6:.0f} MB"
        raise UsageError(
            Given("memory", f"{memory / 1e6:.0f}MB"), program, f"give {minimum}MB or more"
        )
    return MachineLayout(cores, budget, workers, limited=True, torch=torch)


def _count_own_cores() -> int:
    """Return the number of cores that this program may use: ``OMP_NUM_THREADS``, else the cores of
    the process.
    """
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdecimal() and int(stated) > 0:
        return int(stated)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count_torch_threads() -> int:
    """Return the number of threads that torch uses in this Python thread."""
    import torch

    return torch.get_num_threads()


def run_local(
    measure: Callable[[Task], Record],
    tasks: Iterable[Task],
    layout: MachineLayout,
    footprint: Callable[[Task], int],
) -> Iterator[Record]:
    """Yield the record of every task, in the order of the tasks.

    Args:
        measure: A diagnostic with its settings bound.
        tasks: The tasks, one per layer.
        layout: Allocation of the machine.
        footprint: Returns the memory of a running task in bytes.

    Raises:
        LoradiagError: The error of the first failing task; tasks that have not begun are abandoned.
    """
    max_threads = layout.workers or layout.cores
    if layout.apart:
        from lora_diag.running.engines.processes import Processes

        count = min(max_threads, len(tasks)) if isinstance(tasks, Sized) else max_threads
        with Processes(measure, count) as processes:
            yield from run_local(processes, tasks, replace(layout, apart=False), footprint)
        return
    if (
        max_threads == 1 and not layout.torch
    ):  # no call takes so long that Ctrl-C must not wait for it
        yield from map(measure, tasks)
        return
    pending: deque[Future[Record]] = deque()
    running: dict[Future[Record], int] = {}
    threads_before = _count_torch_threads() if layout.torch else 0
    pool = ThreadPoolExecutor(
        max_threads, thread_name_prefix="layer"
    )  # a name that cli/app.py recognizes
    patient = True
    try:
        for task in tasks:
            threads = layout.threads(footprint(task))
            while running and (
                len(running) >= max_threads
                or sum(running.values()) + threads > max(layout.cores, max_threads)
            ):
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[done]
                while pending and pending[0].done():
                    yield pending.popleft().result()
            future = pool.submit(_run_on_threads, threads if layout.torch else 0, measure, task)
            pending.append(future)
            running[future] = threads
        while pending:
            yield pending.popleft().result()
    except (KeyboardInterrupt, GeneratorExit):
        patient = False  # a large matrix may take minutes more, and its result is not needed
        raise
    finally:
        pool.shutdown(wait=patient, cancel_futures=True)
        _set_torch_threads(threads_before)


def _run_on_threads(threads: int, measure: Callable[[Task], Record], task: Task) -> Record:
    """Return the record of a task, measured with this number of threads of torch; 0 leaves their
    number.
    """
    _set_torch_threads(threads)
    return measure(task)


def _set_torch_threads(threads: int) -> None:
    """Set the threads of torch for this Python thread only; 0 leaves them."""
    if threads:
        import torch

        torch.set_num_threads(threads)
