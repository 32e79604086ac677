"""Scheduling on machines without shared memory: the next batch to send, and the order of the
records.

Handles costs, batches and dependencies. Sending and fetching are arguments, so that scheduling can
be tested without a cluster.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from lora_diag.errors import LoradiagError

# Multiplications per batch, see ``cost``. One core does 7 to 9·10⁹ per second (spectra of bf16
# pairs of 384² and 1024²), and a Ray task costs the sending program 0.4 ms: a batch of 2^32 takes
# half a second.
BATCH = 2**32
# Fixed cost of a layer: spectra of 64² take 0.5 ms each.
LAYER_COST = 2**22
# Batches that may start before earlier ones are written, per concurrent batch. More keep cores busy
# during a large matrix; fewer lose less work if the writing program is killed. See ``Waiting`` for
# large ones.
REACH = 4


class Sized(Protocol):
    """One layer's task; a small descriptor."""

    @property
    def layer(self) -> str:
        """The layer's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""


S = TypeVar("S", bound=Sized)
Outcome = TypeVar("Outcome")
Ticket = TypeVar("Ticket")


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive tasks that are sent together.

    Args:
        start: Index of the first task.
        stop: One past the last.
        threads: Cores per task.
        cost: Multiplications of all tasks.
    """

    start: int
    stop: int
    threads: int
    cost: int = field(compare=False, default=0)

    def __len__(self) -> int:
        return self.stop - self.start

    def singly(self) -> list[Batch]:
        """Return the tasks as batches of one."""
        return [
            Batch(index, index + 1, self.threads, self.cost // len(self))
            for index in range(self.start, self.stop)
        ]


def cost(shape: tuple[int, ...], footprint: int) -> int:
    """Estimate the multiplications of a layer: m·n·min(m, n), as in a decomposition, plus
    ``LAYER_COST``.

    For thin factors, which are assumed to have 64 columns, 64·``footprint`` in place of m·n·min(m,
    n).

    Args:
        shape: ``(m, n)``.
        footprint: Memory of the running task in bytes. A value below the number of entries means
            thin factors.

    >>> cost((4096, 4096), 20 * 4096**2) == 4096**3 + LAYER_COST
    True
    >>> cost((4096, 4096), 8 * 64 * 8192) < 4096**3 / 100
    True
    """
    entries = math.prod(shape)
    return LAYER_COST + (entries * min(shape) if footprint >= entries else 64 * footprint)


def batches(
    tasks: Sequence[S], footprint: Callable[[S], int], threads: Callable[[int], int], slots: int
) -> list[Batch]:
    """Return the tasks divided into batches, in order: large tasks alone, small neighbours
    together.

    Args:
        tasks: One per layer.
        footprint: Returns the memory of a running task in bytes.
        threads: Returns the number of cores for this memory.
        slots: Concurrent batches. About four times as many or more are made, if there are enough
            tasks, so that all slots end at about the same time.
    """
    sizes = [footprint(task) for task in tasks]
    costs = [cost(task.shape, size) for task, size in zip(tasks, sizes, strict=True)]
    max_cost = min(BATCH, sum(costs) // (4 * max(1, slots)))
    planned: list[Batch] = []
    for index, layer_cost in enumerate(costs):
        cores = threads(sizes[index])
        last = planned[-1] if planned else None
        if last is not None and last.threads == cores and last.cost + layer_cost <= max_cost:
            planned[-1] = Batch(last.start, index + 1, cores, last.cost + layer_cost)
        else:
            planned.append(Batch(index, index + 1, cores, layer_cost))
    return planned


class Waiting:
    """Batches not yet started: largest first, within a limited distance of the first unwritten
    batch.

    The distance bounds the number of records in memory, and the work lost in a crash. A batch of c
    times the mean cost may start c times further away, or the others would wait for it: there are
    few of them.

    Args:
        plan: All batches, in the order of the file.
        reach: Number of batches, from the first unwritten one on, among which those of at most the
            mean cost may start.
    """

    def __init__(self, plan: Sequence[Batch], reach: int) -> None:
        self._plan = plan
        mean = sum(batch.cost for batch in plan) / max(1, len(plan)) or 1.0
        openings = [
            (index - math.ceil(reach * max(1.0, batch.cost / mean)), index)
            for index, batch in enumerate(plan)
        ]
        self._closed = deque(sorted(openings))
        self._heap: list[tuple[int, int]] = []

    def pop(self, written: int, has_room: Callable[[Batch], bool]) -> Batch | None:
        """Return the next batch; None if none is within reach or there is no room.

        Args:
            written: Number of leading batches that are finished.
            has_room: Returns whether there is room for a batch.
        """
        while self._closed and self._closed[0][0] < written:
            index = self._closed.popleft()[1]
            heapq.heappush(self._heap, (-self._plan[index].cost, index))
        if not self._heap or not has_room(self._plan[self._heap[0][1]]):
            return None
        return self._plan[heapq.heappop(self._heap)[1]]


@dataclass(frozen=True, slots=True)
class Capacity:
    """Capacity for submitted batches: for twice the cores, so that an idle core finds its next
    batch waiting.

    Args:
        cores: Cores of all machines.
        max_batches: Maximum number of submitted batches, if set by the user or by another resource
            than cores; else None.
    """

    cores: int
    max_batches: int | None = None

    def has_room(self, batch: Batch, batches: int, threads: int) -> bool:
        """Return whether a batch may be sent: always if none is submitted.

        Args:
            batch: The batch.
            batches: Number of submitted batches.
            threads: Cores of all submitted batches.

        >>> Capacity(2).has_room(Batch(0, 1, 2), 2, 2), Capacity(2).has_room(Batch(0, 1, 2), 3, 3)
        (True, False)
        """
        if not batches:
            return True
        if self.max_batches is not None and batches >= self.max_batches:
            return False
        return threads + batch.threads <= 2 * self.cores


def in_order(
    plan: Sequence[Batch],
    reach: int,
    capacity: Callable[[], Capacity],
    send: Callable[[Batch], Ticket],
    fetch: Callable[
        [Sequence[Ticket]], Iterator[tuple[Ticket, Sequence[Outcome | LoradiagError] | None]]
    ],
    lost_error: Callable[[Batch], LoradiagError],
) -> Iterator[Outcome]:
    """Send batches and yield the outcome of every task, in the order of the tasks.

    Args:
        plan: All batches, in order.
        reach: See ``Waiting``.
        capacity: Returns the current capacity.
        send: Submits a batch.
        fetch: Waits a limited time and yields finished batches with their outcomes. None instead of
            outcomes means that every worker that ran the batch died. Outcomes may end early, with
            an error.
        lost_error: Returns the error for a single task whose workers all died.

    Raises:
        LoradiagError: The first one in the order of the tasks; the outcomes before it are yielded
            first.
    """
    waiting = Waiting(plan, reach)
    under_way: dict[Ticket, Batch] = {}
    retry: list[Batch] = []
    arrived: dict[int, Outcome | LoradiagError] = {}
    end = plan[-1].stop if plan else 0  # batches after an error are not sent
    written = threads = 0
    while written < len(plan):
        while True:
            has_room = partial(capacity().has_room, batches=len(under_way), threads=threads)
            batch = None
            if not retry:
                batch = waiting.pop(written, has_room)
            elif has_room(retry[-1]):
                batch = retry.pop()
            if batch is None:
                break
            if batch.start < end:
                under_way[send(batch)] = batch
                threads += batch.threads
        for ticket, outcomes in fetch(list(under_way)):
            batch = under_way.pop(ticket)
            threads -= batch.threads
            if outcomes is None and len(batch) > 1:
                # One task kills its worker; run the others separately.
                retry += reversed(batch.singly())
                continue
            if outcomes is None:
                outcomes = [lost_error(batch)]
            for index, outcome in enumerate(outcomes, batch.start):
                arrived[index] = outcome
                if isinstance(outcome, LoradiagError):
                    end = min(end, index)
        while written < len(plan) and _is_whole(plan[written], end, arrived):
            for index in range(plan[written].start, plan[written].stop):
                outcome = arrived.pop(index)
                if isinstance(outcome, LoradiagError):
                    raise outcome
                yield outcome
            written += 1


def _is_whole(batch: Batch, end: int, outcomes: Container[int]) -> bool:
    """Return whether the outcomes of a batch are complete, up to the first error."""
    return all(index in outcomes for index in range(batch.start, min(batch.stop, end + 1)))
