"""Files of a web server, by HTTP range requests.

Redirects are not followed, and a server that lies about what it sends, or does not say, is not believed.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote, urljoin

from lora_diag.checkpoints.addresses import shown
from lora_diag.checkpoints.ranges import MayPassError, retried
from lora_diag.checkpoints.stores import CHANGED, PASSING, Facts, Store, filesystem, words_of
from lora_diag.errors import InputError

# What is read with the first request for a file: the header of a small one, or all of a configuration.
HEAD_BYTES = 2**16
# What a server that gives no ranges may send whole: adapters and configurations, not models.
MAX_WHOLE_BYTES = 2**23

TOO_MANY = "the server sent more bytes than it was asked for"

# Seconds until a connection that says nothing counts as broken.
CONNECT_SECONDS = 20
READ_SECONDS = 60

# By these endings a web address is meant as a file; any other is a folder.
FILES = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|json|jsonl)$", re.IGNORECASE)


class HttpStore(Store):
    """Files of a web server.

    Redirects are not followed: they would lead out of the place that was named.

    Args:
        root: The address that was named, as it may be shown.
        user: Name and password in it; None if there is none.
        query: What is behind its ``?``; sent with every request.
    """

    redirects = 0

    def __init__(self, root: str, user: tuple[str, str] | None = None, query: str = "") -> None:
        super().__init__()
        self._user, self._query = user, query
        # A signature is for one file: what lies beside it is not asked for.
        self._alone = root if query and FILES.search(root) else None

    def url(self, address: str) -> str:
        """Return what is requested; escapes that are there stay as they are."""
        return quote(address, safe="/:%~!$&'()*+,;=@[]") + (f"?{self._query}" if self._query else "")

    def headers(self) -> dict[str, str]:
        """Return what lets us in."""
        if self._user is None:
            return {}
        return {"Authorization": f"Basic {b64encode(':'.join(self._user).encode()).decode()}"}

    def version(self, headers: Any) -> str:
        """Return by what a response names the version of the file."""
        return str(headers.get("ETag") or headers.get("Last-Modified") or "")

    def join(self, address: str, name: str) -> str:
        """Return the address of a file in a folder: a name's ``?``, ``#`` and ``%`` mean nothing to the server."""
        return f"{address}/{quote(name, safe='')}"

    def is_folder(self, address: str) -> bool:
        """Say whether an address does not look like a file."""
        return not FILES.search(address)

    def children(self, address: str) -> Iterable[str]:
        """Return nothing: a web server does not list."""
        return ()

    def read_range(self, address: str, start: int, buffer: memoryview, facts: Facts) -> None:
        """Fill a buffer from the server's answer to one request for a range."""
        self._run(self._read, address, start, buffer, facts)

    def _find(self, address: str) -> Facts | None:
        if self.is_folder(address) or (self._alone and address != self._alone):
            return None
        return retried(address, lambda: self._run(self._ask, address))

    def _run(self, coroutine: Callable[..., Any], *words: Any) -> Any:
        self._open()
        import aiohttp
        from fsspec.asyn import sync

        try:
            return sync(self._fs.loop, coroutine, *words)
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:
            raise InputError(f"{words[0]}: cannot be read: {words_of(error)}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise MayPassError(words_of(error)) from error

    def _open(self) -> None:
        if self._fs is None:
            self._fs = filesystem("http", get_client=_client)

    def _get(self, session: Any, address: str, start: int, stop: int) -> Any:
        import yarl

        return session.get(
            yarl.URL(self.url(address), encoded=True),
            headers={**self.headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"},
            allow_redirects=self.redirects > 0,
            max_redirects=max(1, self.redirects),
        )

    async def _ask(self, address: str) -> Facts | None:
        """Ask for the first bytes of a file: a ``HEAD`` is refused by presigned addresses, and proves no ranges."""
        async with self._get(await self._fs.set_session(), address, 0, HEAD_BYTES) as response:
            if response.status in {404, 410}:
                return None
            if response.status == 416:
                return Facts(0, self.version(response.headers))
            if response.status == 200:
                return await self._all(address, response)
            self._check_status(address, response)
            _, stop, size = _content_range(address, response.headers)
            if stop != min(size, HEAD_BYTES):
                raise InputError(f"{address}: the server sent bytes up to {stop:,} when asked for {HEAD_BYTES:,}")
            return Facts(size, self.version(response.headers), await _body(address, response, stop))

    async def _all(self, address: str, response: Any) -> Facts:
        """Take a small file whole from a server that ignores ranges."""
        size = response.content_length
        if size is None or size > MAX_WHOLE_BYTES:
            raise InputError(
                f"{address}: the server ignores ranges: it would send the whole file "
                + (f"({size:,} bytes) " if size else "")
                + "for every tensor; download it and give the local file"
            )
        self._check_encoding(address, response)
        return Facts(size, self.version(response.headers), await _body(address, response, size), ranged=False)

    async def _read(self, address: str, start: int, buffer: memoryview, facts: Facts) -> None:
        import aiohttp

        stop, done = start + len(buffer), 0
        async with self._get(await self._fs.set_session(), address, start, stop) as response:
            self._check_status(address, response)
            if response.status == 200:
                raise InputError(f"{address}: the server sent the whole file where a range of it was asked for")
            found = _content_range(address, response.headers)
            if found[2] != facts.size or self.version(response.headers) != facts.version:
                raise InputError(f"{address}: {CHANGED}")
            if found[:2] != (start, stop):
                raise InputError(
                    f"{address}: the server sent bytes {found[0]:,} to {found[1]:,} "
                    f"when asked for {start:,} to {stop:,}"
                )
            try:
                async for piece in response.content.iter_chunked(2**18):
                    if len(piece) > len(buffer) - done:
                        raise InputError(f"{address}: {TOO_MANY}")
                    buffer[done : done + len(piece)] = piece
                    done += len(piece)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise MayPassError(words_of(error), done) from error
        if done < len(buffer):
            raise MayPassError("the answer was cut short", done)

    def _check_status(self, address: str, response: Any) -> None:
        status = response.status
        if status in PASSING:
            raise MayPassError(f"the server answers {status}")
        if status in {401, 403}:
            raise InputError(f"{address}: the server answers {status}: {self._way_in()}")
        if 300 <= status < 400:
            to = shown(urljoin(address, response.headers.get("Location", "")))
            raise InputError(f"{address}: the server redirects to {to}; redirects are not followed: give that address")
        if status in {404, 410, 412, 416}:
            raise InputError(f"{address}: {CHANGED} (the server answers {status})")
        if status not in {200, 206}:
            raise InputError(f"{address}: the server answers {status}")
        self._check_encoding(address, response)

    def _check_encoding(self, address: str, response: Any) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise InputError(f"{address}: the server sends it as {encoding}, which has no ranges; download it")

    def _way_in(self) -> str:
        if self._query or self._user:
            return "what the address carries does not let you in; a signature may have run out, or be for another file"
        return "it is not public, or not there; for a private bucket give s3:// or gs://, or an address signed for you"


async def _body(address: str, response: Any, size: int) -> bytes:
    """Return the content of an answer of so many bytes, and never take more."""
    content = bytearray()
    async for piece in response.content.iter_chunked(2**16):
        content += piece
        if len(content) > size:
            raise InputError(f"{address}: {TOO_MANY}")
    if len(content) < size:
        raise MayPassError("the answer was cut short")
    return bytes(content)


async def _client(**options: Any) -> Any:
    """Return a session that keeps bytes as they are sent, and goes through the proxies that the environment names."""
    import aiohttp

    waits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    return aiohttp.ClientSession(timeout=waits, auto_decompress=False, trust_env=True, **options)


def _content_range(address: str, headers: Any) -> tuple[int, int, int]:
    """Return first byte, the one behind the last, and the size of the whole that a server says it sends."""
    said = str(headers.get("Content-Range", ""))
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", said)
    if not found:
        raise InputError(f"{address}: the server does not say which bytes it sends (Content-Range: {said[:60]!r})")
    return int(found[1]), int(found[2]) + 1, int(found[3])
