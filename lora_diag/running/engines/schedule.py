"""What is measured next on machines that share nothing, and how the records come back in order.

Knows costs, batches and who is waiting for what. It knows no cluster: how a batch is sent and fetched is handed in, so
that everything here can be tested without one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from lora_diag.errors import LoradiagError

# Multiplications of one batch, see ``cost``. One core does 7 to 9·10⁹ of them a second (spectra of bf16 pairs of 384²
# and 1024²), a task of Ray costs the program that sends it 0.4 ms: a batch of 2^32 takes half a second.
BATCH = 2**32
# What any layer costs besides: spectra of 64² take 0.5 ms each.
LEAST = 2**22
# Batches that may be begun before those in front of them are written, for every one that can run at once. More keeps
# cores busy behind a large matrix; fewer are measured again when the program that writes the file is killed.
REACH = 4


class Sized(Protocol):
    """What is measured of one layer; a small descriptor."""

    @property
    def layer(self) -> str:
        """The layer's name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        ...


S = TypeVar("S", bound=Sized)
Outcome = TypeVar("Outcome")
Ticket = TypeVar("Ticket")


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive tasks that are sent together.

    Args:
        start: The first of them.
        stop: One past the last.
        threads: Cores that each of them gets.
        cost: Multiplications, all together.
    """

    start: int
    stop: int
    threads: int
    cost: int = field(compare=False, default=0)

    def __len__(self) -> int:
        return self.stop - self.start

    def singly(self) -> list[Batch]:
        """Return its tasks as batches of their own."""
        return [Batch(at, at + 1, self.threads, self.cost // len(self)) for at in range(self.start, self.stop)]


def cost(shape: tuple[int, ...], footprint: int) -> int:
    """Return about how many multiplications a layer takes: m·n·min(m, n), as a decomposition does.

    Args:
        shape: ``(m, n)``.
        footprint: Bytes it takes while it runs. Fewer than it has entries mean thin factors, 64 columns or so of them.

    >>> cost((4096, 4096), 20 * 4096**2) == 4096**3 + LEAST
    True
    >>> cost((4096, 4096), 8 * 64 * 8192) < 4096**3 / 100
    True
    """
    entries = math.prod(shape)
    return LEAST + (entries * min(shape) if footprint >= entries else 64 * footprint)


def batches(
    tasks: Sequence[S], footprint: Callable[[S], int], threads: Callable[[int], int], slots: int
) -> list[Batch]:
    """Return the tasks in batches, in their order: large ones alone, small neighbours together.

    Args:
        tasks: One for each layer.
        footprint: Bytes that a task takes while it runs.
        threads: Cores for so many bytes.
        slots: Batches that can run at once. There are four times as many, if there are tasks enough: all end together.
    """
    sizes = [footprint(task) for task in tasks]
    costs = [cost(task.shape, size) for task, size in zip(tasks, sizes, strict=True)]
    most = min(BATCH, sum(costs) // (4 * max(1, slots)))
    found: list[Batch] = []
    for at, own in enumerate(costs):
        wanted = threads(sizes[at])
        last = found[-1] if found else None
        if last is not None and last.threads == wanted and last.cost + own <= most:
            found[-1] = Batch(last.start, at + 1, wanted, last.cost + own)
        else:
            found.append(Batch(at, at + 1, wanted, own))
    return found


class Waiting:
    """The batches not yet begun: largest first, but none far in front of what is written.

    The reach bounds what is kept in memory until its turn in the file comes, and what a crash loses.

    Args:
        plan: All batches, in the order of the file.
        reach: How many behind the first unwritten one may be begun.
    """

    def __init__(self, plan: Sequence[Batch], reach: int) -> None:
        self._plan, self._reach = plan, reach
        self._seen = 0
        self._heap: list[tuple[int, int]] = []

    def pop(self, written: int, may: Callable[[Batch], bool]) -> Batch | None:
        """Return the next batch; None if there is none within reach, or it may not be begun yet.

        Args:
            written: Batches that are finished, and everything before them.
            may: Whether there is room for a batch.
        """
        while self._seen < min(len(self._plan), written + self._reach):
            heapq.heappush(self._heap, (-self._plan[self._seen].cost, self._seen))
            self._seen += 1
        if not self._heap or not may(self._plan[self._heap[0][1]]):
            return None
        return self._plan[heapq.heappop(self._heap)[1]]


@dataclass(frozen=True, slots=True)
class Room:
    """How much may be under way: twice what can run, so that a core that is done finds its next batch waiting for it.

    Args:
        cores: Cores of all machines.
        most: Batches at once, if the user says so, or if something else than cores is short; else None.
    """

    cores: int
    most: int | None = None

    def has(self, batch: Batch, under_way: Sequence[Batch]) -> bool:
        """Say whether a batch may be sent.

        >>> Room(2).has(Batch(0, 1, 2), [Batch(1, 2, 1)] * 2), Room(2).has(Batch(0, 1, 2), [Batch(1, 2, 1)] * 3)
        (True, False)
        """
        if not under_way:
            return True
        if self.most is not None and len(under_way) >= self.most:
            return False
        return sum(other.threads for other in under_way) + batch.threads <= 2 * self.cores


def in_order(
    plan: Sequence[Batch],
    reach: int,
    room: Callable[[], Room],
    send: Callable[[Batch], Ticket],
    fetch: Callable[[Sequence[Ticket]], Iterator[tuple[Ticket, Sequence[Outcome | LoradiagError] | None]]],
    lost: Callable[[Batch], LoradiagError],
) -> Iterator[Outcome]:
    """Send batches and yield the outcome of every task, in the order of the tasks.

    Args:
        plan: All batches, in order.
        reach: See ``Waiting``.
        room: How much may be under way now.
        send: Begins a batch.
        fetch: Waits a while for what is under way; yields what is done. None instead of outcomes means that every
            machine that tried it died. Outcomes may end early, with an error.
        lost: The error for a single task of which that is so.

    Raises:
        LoradiagError: The first one in the order of the tasks; the outcomes before it are yielded first.
    """
    waiting = Waiting(plan, reach)
    under_way: dict[Ticket, Batch] = {}
    again: list[Batch] = []
    found: dict[int, Outcome | LoradiagError] = {}
    end = plan[-1].stop if plan else 0  # nothing from here on is worth being sent
    written = 0
    while written < len(plan):
        while True:
            now = room()
            running = list(under_way.values())
            if again:
                batch = again.pop() if now.has(again[-1], running) else None
            else:
                batch = waiting.pop(written, lambda one: now.has(one, running))  # noqa: B023  (called at once)
            if batch is None:
                break
            if batch.start < end:
                under_way[send(batch)] = batch
        for ticket, outcomes in fetch(list(under_way)):
            batch = under_way.pop(ticket)
            if outcomes is None and len(batch) > 1:
                again += reversed(batch.singly())  # one of them is deadly, and the others are not to die with it
                continue
            for at, outcome in enumerate([lost(batch)] if outcomes is None else outcomes, batch.start):
                found[at] = outcome
                if isinstance(outcome, LoradiagError):
                    end = min(end, at)
        while written < len(plan) and _is_whole(plan[written], end, found):
            for at in range(plan[written].start, plan[written].stop):
                outcome = found.pop(at)
                if isinstance(outcome, LoradiagError):
                    raise outcome
                yield outcome
            written += 1


def _is_whole(batch: Batch, end: int, found: Container[int]) -> bool:
    """Say whether the outcomes of a batch are there, up to the first error of all."""
    return all(at in found for at in range(batch.start, min(batch.stop, end + 1)))
