"""The engine on one machine: one layer after the other, every core on the layer at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Task = TypeVar("Task")
Record = TypeVar("Record")


def run_local(measure: Callable[[Task], Record], tasks: Iterable[Task]) -> Iterator[tuple[Task, Record]]:
    """Yield each task with its record, in the order of the tasks.

    Args:
        measure: A diagnostic with its settings bound.
        tasks: What to measure, one layer each.
    """
    for task in tasks:
        yield task, measure(task)
