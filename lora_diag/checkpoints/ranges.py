"""Ranges of bytes from a store: several connections at once, and again after a failure that may pass.

Knows how often and how long to try; knows no protocol.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from lora_diag.errors import InputError

if TYPE_CHECKING:
    from lora_diag.checkpoints.stores import Facts, Store

T = TypeVar("T")
R = TypeVar("R")

# Object stores give one connection some 50-100 MB/s and answer after 10-50 ms: their own guides advise ranges of 8 to
# 16 MB on several connections. 8 MiB lets a dropped connection repeat little.
CHUNK_BYTES = 2**23
CONNECTIONS = 16

# Blocks of a matrix (4 MiB in float32) that are fetched while one is computed, for each side of a layer.
READ_AHEAD = 4

# Failures in a row, without one byte between them, until it is given up; waits of 0.25, 0.5, 1 and 2 s lie between.
TRIES = 5
FIRST_WAIT = 0.25


class MayPassError(Exception):
    """A request failed in a way that may pass.

    Args:
        why: For people, without the address.
        done: Bytes that were received before.
    """

    def __init__(self, why: str, done: int = 0) -> None:
        super().__init__(why)
        self.why, self.done = why, done


def fill(store: Store, address: str, buffer: memoryview, offset: int, facts: Facts) -> None:
    """Fill a buffer with the bytes from ``offset`` on, in chunks side by side.

    Raises:
        InputError: The file ends before, or a range cannot be read.
    """
    stop = offset + len(buffer)
    if stop > facts.size:
        raise InputError(f"{address}: ends at byte {facts.size:,}, before what its header promises")
    if stop <= len(facts.head):
        buffer[:] = facts.head[offset:stop]
        return
    if len(buffer) <= CHUNK_BYTES:
        _fill_chunk(store, address, offset, buffer, facts)
        return
    starts = range(0, len(buffer), CHUNK_BYTES)
    parts = [
        _pool("chunk").submit(_fill_chunk, store, address, offset + at, buffer[at : at + CHUNK_BYTES], facts)
        for at in starts
    ]
    try:
        for part in parts:
            part.result()
    finally:
        for part in parts:
            part.cancel()


def _fill_chunk(store: Store, address: str, offset: int, buffer: memoryview, facts: Facts) -> None:
    """Fill a buffer by one request, and by others from where one broke off."""
    done = 0

    def attempt() -> None:
        nonlocal done
        try:
            store.read_range(address, offset + done, buffer[done:], facts)
        except MayPassError as error:
            done += error.done
            raise
        done = len(buffer)

    while done < len(buffer):
        before = done
        retried(address, attempt, lambda before=before: done > before)  # type: ignore[misc]


def retried(address: str, attempt: Callable[[], T], is_further: Callable[[], bool] = lambda: False) -> T | None:
    """Try until it succeeds, or has failed too often.

    Args:
        address: For the message.
        attempt: What to do.
        is_further: Whether a failed attempt has brought something; then the caller goes on from there.

    Returns:
        What the attempt returned; None if it was brought further and no more.

    Raises:
        InputError: It failed too often.
    """
    for number in range(TRIES):
        try:
            return attempt()
        except MayPassError as error:
            if is_further():
                return None
            if number == TRIES - 1:
                raise InputError(f"{address}: cannot be read: {error.why}; tried {TRIES} times") from error
            time.sleep(FIRST_WAIT * 2**number * random.uniform(0.8, 1.2))
    raise AssertionError


def side_by_side(function: Callable[[T], R], items: Iterable[T], ahead: int = CONNECTIONS) -> Iterator[R]:
    """Yield what a function gives for each item, in their order, while the next few are worked on.

    The function may read ranges, but may not call this in turn.

    Args:
        function: What to do, mostly waiting for the network.
        items: For which.
        ahead: How many, besides the one that is waited for.
    """
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(_pool("block").submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@cache
def _pool(name: str) -> ThreadPoolExecutor:
    """Return one of the two pools: whoever works in ``block`` may wait for ``chunk``, never the other way."""
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix=f"remote-{name}")
