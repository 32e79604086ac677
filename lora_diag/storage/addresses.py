"""Addresses, their printable part, and reading their bytes: in parallel chunks, with retries, for
any protocol.

The printable part of an address has no password and no query. Number and timing of retries are
determined here; the stores tell transient failures from permanent ones.
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_diag.errors import damaged

if TYPE_CHECKING:
    from lora_diag.storage.stores import FileInfo, Store


# Also matches a single slash: ``Path`` collapses the two.
ADDRESS = re.compile(r"\s*(s3|gs|hf|https?):/{1,2}([^/].*)", re.IGNORECASE | re.DOTALL)
# An address of any scheme: the scheme, and the text after ``://``.
SCHEME = re.compile(r"\s*([A-Za-z][\w+.-]*)://(.*)", re.ASCII | re.DOTALL)
# An address inside a longer text.
IN_TEXT = re.compile(
    r"(?:([A-Za-z][\w+.-]*)://|(?<![\w+.-])(s3|gs|hf|https?):/(?!/))([^\s'\"<>]+)",
    re.ASCII | re.IGNORECASE,
)
WEB = ("http", "https")

# A host without user, as in ``host``, ``host:8000`` or ``[::1]:8000``.
HOST = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[^:\[\]]*)(:\d*)?", re.ASCII)

# Shown for an address whose host cannot be told from a password with unescaped signs; such an
# address is refused.
HIDDEN = "(hidden)"

T = TypeVar("T")
R = TypeVar("R")

# Object stores give about 50-100 MB/s per connection and answer after 10-50 ms; their guides
# recommend ranges of 8 to 16 MB on several connections. With 8 MiB, a dropped connection repeats
# little.
CHUNK_BYTES = 2**23
CONNECTIONS = 16

# Blocks of a matrix (4 MiB in float32) fetched in advance while one is computed, for each input of
# a layer.
READ_AHEAD = 4

# Consecutive attempts without progress before giving up, with waits of 0.25, 0.5, 1 and 2 s between
# them. Progress is LEAST_BYTES or half of what is left: a byte at a time would go on for ever.
TRIES = 5
LEAST_BYTES = 2**16
FIRST_WAIT = 0.25


class Address(str):
    """An address whose text has no secrets, so that no text made from it has them; ``as_path``
    reads ``full``.

    >>> address = Address("https://user:secret@host/model.safetensors")
    >>> f"{address}", address.full
    ('https://host/model.safetensors', 'https://user:secret@host/model.safetensors')
    """

    full: str

    def __new__(cls, full: str) -> Address:
        """Return the printable text of an address, which keeps the whole one."""
        address = super().__new__(cls, hide_secrets(full))
        address.full = full
        return address

    def __getnewargs__(self) -> tuple[str]:
        return (self.full,)


def hide_secrets(address: Path | str) -> str:
    """Return an address, or a text that contains addresses, without passwords and queries.

    >>> hide_secrets("https://user:secret@host/model.safetensors?X-Amz-Signature=0123")
    'https://host/model.safetensors'
    >>> hide_secrets("cannot reach https://host/x?sig=1: timeout")
    'cannot reach https://host/x timeout'
    >>> hide_secrets("http://user:with/slash@host/x")
    'http://(hidden)'
    """
    text = str(address)
    if match := ADDRESS.fullmatch(text) or SCHEME.fullmatch(text):
        return _drop_secrets(match[1].lower(), match[2].rstrip())
    if ":/" not in text:
        return text
    return IN_TEXT.sub(lambda match: _drop_secrets(match[1] or match[2], match[3]), text)


def _drop_secrets(scheme: str, remainder: str) -> str:
    """Return an address without its secrets, given the text after ``://``; a host that may hold one
    is hidden.
    """
    authority = re.split(r"[/?#]", remainder, maxsplit=1)[0]
    path_and_query = remainder[len(authority) :]
    path = re.split(r"[?#]" if scheme.lower() in WEB else r"\?", path_and_query, maxsplit=1)[0]
    _, at_sign, host = authority.rpartition("@")
    # A second @ may belong to a password, unless it is behind the ? of an address with a user.
    is_ambiguous = "@" in (path if at_sign else path_and_query) and ":" in authority
    if is_ambiguous or HOST.fullmatch(host.rstrip(".,:;)")) is None:
        return f"{scheme}://{HIDDEN}"
    return f"{scheme}://{host}{path}"


class TransientError(Exception):
    """A request failed in a way that a retry may solve.

    Args:
        why: The reason, without the address.
        done: Number of bytes received before the failure.
    """

    def __init__(self, why: str, done: int = 0) -> None:
        super().__init__(why)
        self.why, self.done = why, done


def fill(store: Store, address: str, buffer: memoryview, offset: int, file_info: FileInfo) -> None:
    """Fill a buffer with the bytes from ``offset`` on, in parallel chunks.

    Raises:
        InputError: The file is too short, or a range cannot be read.
    """
    stop = offset + len(buffer)
    if stop > file_info.size:
        problem = f"ends at byte {file_info.size:,}, before the end given in its header"
        raise damaged(address, problem, "upload the file again")
    if stop <= len(file_info.head):
        buffer[:] = file_info.head[offset:stop]
        return
    if len(buffer) <= CHUNK_BYTES:
        _fill_chunk(store, address, offset, buffer, file_info)
        return

    def fill_chunk(start: int) -> None:
        _fill_chunk(store, address, offset + start, buffer[start : start + CHUNK_BYTES], file_info)

    for _ in _pool("chunk").map(fill_chunk, range(0, len(buffer), CHUNK_BYTES)):
        pass  # an error ends the loop, and cancels the chunks that have not begun


def _fill_chunk(
    store: Store, address: str, offset: int, buffer: memoryview, file_info: FileInfo
) -> None:
    """Fill a buffer by one request, and after a failure by further ones that continue from the
    received bytes.
    """
    done = 0

    def attempt() -> None:
        nonlocal done
        try:
            store.read_range(address, offset + done, buffer[done:], file_info)
        except TransientError as error:
            done += error.done
            raise
        done = len(buffer)

    while done < len(buffer):
        enough = done + max(1, min(LEAST_BYTES, (len(buffer) - done) // 2))
        call_with_retries(address, attempt, lambda enough=enough: done >= enough)  # type: ignore[misc]


def call_with_retries(
    address: str, attempt: Callable[[], T], made_progress: Callable[[], bool] = lambda: False
) -> T | None:
    """Call a function until it succeeds or makes progress, at most ``TRIES`` times.

    Args:
        address: Address for the error message.
        attempt: The function to call.
        made_progress: Returns whether a failed attempt made progress; the caller then continues
            from there.

    Returns:
        The result of the function; None if an attempt failed but made progress.

    Raises:
        InputError: All attempts failed, none of them with progress.
    """
    for number in range(TRIES):
        try:
            return attempt()
        except TransientError as error:
            if made_progress():
                return None
            if number == TRIES - 1:
                problem = f"cannot be read: {error.why} ({TRIES} attempts)"
                raise damaged(address, problem, "check the connection and run again") from error
            time.sleep(FIRST_WAIT * 2**number * random.uniform(0.8, 1.2))
    raise AssertionError


def map_concurrently(
    function: Callable[[T], R], items: Iterable[T], ahead: int = CONNECTIONS
) -> Iterator[R]:
    """Yield the results of a function for each item, in order, while the next items are processed
    in threads.

    The function may read ranges, but must not call ``map_concurrently`` itself.

    Args:
        function: The function, which mostly waits for the network.
        items: Its arguments.
        ahead: Number of items processed in advance.
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
    """Return one of two thread pools: tasks in ``block`` may wait for tasks in ``chunk``, never the
    reverse.
    """
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix=f"remote-{name}")
