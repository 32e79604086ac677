"""Files of a web server, read by HTTP range requests.

Redirects are not followed, and every answer must state which bytes it sends.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urljoin

from lora_diag.checkpoints.addresses import LEAST_BYTES, TransientError, call_with_retries, hide_secrets
from lora_diag.checkpoints.stores import CHANGED, TRANSIENT, FileInfo, Store, filesystem, first_line_of
from lora_diag.errors import InputError

# Bytes of the first request for a file: the header of a small one, or all of a configuration.
HEAD_BYTES = 2**16
# Largest file accepted from a server without range requests: adapters and configurations, but not models.
MAX_WHOLE_BYTES = 2**23

TOO_MANY = "the server sent more bytes than requested; download the file and give the local path"

# Timeouts in seconds: for connecting, and in which LEAST_BYTES or the rest of an answer must arrive. The first includes
# the headers of the answer, so a file's header in the first 64 KiB has this time as a whole. The limit is 1 KiB/s.
CONNECT_SECONDS = 20
READ_SECONDS = 60

# A web address with one of these extensions is a file, any other a folder.
FILES = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|json|jsonl|distcp|metadata)$", re.IGNORECASE)


class HttpStore(Store):
    """Files of a web server.

    Redirects are not followed: they could lead to another host than the user named.

    Args:
        root: The printable address.
        credentials: Name and password in the address; None without them.
        query: The query of the address; sent with every request.
    """

    redirects = 0

    def __init__(self, root: str, credentials: tuple[str, str] | None = None, query: str = "") -> None:
        super().__init__()
        self._credentials, self._query = credentials, query
        # A signature is valid for one file, so no other file of the folder is requested.
        self._only_file = root if query and FILES.search(root) else None

    def url(self, address: str) -> str:
        """Return the URL of an address; existing escapes are kept."""
        return quote(address, safe="/:%~!$&'()*+,;=@[]") + (f"?{self._query}" if self._query else "")

    def headers(self) -> dict[str, str]:
        """Return the authorization header, if the address has a user."""
        if self._credentials is None:
            return {}
        return {"Authorization": f"Basic {b64encode(':'.join(self._credentials).encode()).decode()}"}

    def version(self, headers: Any) -> str:
        """Return the version of the file given in the headers of an answer; empty if there is none."""
        return str(headers.get("ETag") or headers.get("Last-Modified") or "")

    def join(self, address: str, name: str) -> str:
        """Return the address of a file in a folder, with special characters of the name escaped."""
        return f"{address}/{quote(name, safe='')}"

    def is_folder(self, address: str) -> bool:
        """Return whether an address has no file extension."""
        return not FILES.search(address)

    def children(self, address: str) -> Iterable[str]:
        """Return nothing: a web server does not list folders."""
        return ()

    def read_range(self, address: str, start: int, buffer: memoryview, file_info: FileInfo) -> None:
        """Fill a buffer by one range request."""
        self._run(self._read, address, start, buffer, file_info)

    def _find(self, address: str) -> FileInfo | None:
        if self.is_folder(address) or (self._only_file and address != self._only_file):
            return None
        return call_with_retries(address, lambda: self._run(self._request_head, address))

    def _run(self, coroutine: Callable[..., Any], *args: Any) -> Any:
        """Run a request to its end, and translate its errors."""
        self._open()
        import aiohttp
        from fsspec.asyn import sync

        try:
            return sync(self._fs.loop, coroutine, *args)
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL, ValueError) as error:
            raise InputError(f"{args[0]}: cannot be read: {first_line_of(error)}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise TransientError(first_line_of(error)) from error

    def _open(self) -> None:
        if self._fs is None:
            self._fs = filesystem("http", get_client=_make_client)

    async def check_redirect(self, address: str, url: Any) -> None:
        """Raise an ``InputError`` if a redirect to this URL is not to be followed."""

    @asynccontextmanager
    async def _get(self, address: str, start: int, stop: int) -> AsyncIterator[Any]:
        """Request a range and yield the answer, after at most ``redirects`` redirects.

        Credentials stay with the first host.
        """
        import yarl

        session = await self._fs.set_session()
        url = yarl.URL(self.url(address), encoded=True)
        headers = {**self.headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        for redirects_left in range(self.redirects, -1, -1):
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                location = response.headers.get("Location") if 300 <= response.status < 400 else None
                if location is None or not redirects_left:
                    yield response
                    return
                target = url.join(yarl.URL(location, encoded=True))
            await self.check_redirect(address, target)
            if target.origin() != url.origin():
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            url = target

    async def _request_head(self, address: str) -> FileInfo | None:
        """Request the first bytes of a file; return its properties, None if it does not exist.

        Presigned URLs refuse ``HEAD``, which would not prove range support.
        """
        async with _limit_time() as count, self._get(address, 0, HEAD_BYTES) as response:
            if response.status in {404, 410}:
                return None
            if response.status == 416:
                return FileInfo(0, self.version(response.headers))
            if response.status == 200:
                return await self._read_whole(address, response, count)
            self._check_status(address, response)
            _, stop, size = _parse_content_range(address, response.headers)
            if stop != min(size, HEAD_BYTES):
                raise InputError(f"{address}: the server sent bytes up to {stop:,} instead of {HEAD_BYTES:,}")
            content = await _read_body(address, response, stop, count)
            return FileInfo(size, self.version(response.headers), content)

    async def _read_whole(self, address: str, response: Any, count: Callable[[int], int]) -> FileInfo:
        """Return the properties and content of a small file, from a server that ignores ranges."""
        size = response.content_length
        if size is None or size > MAX_WHOLE_BYTES:
            raise InputError(
                f"{address}: the server ignores range requests and would send the whole file "
                + (f"({size:,} bytes) " if size else "")
                + "for every tensor; download it and give the local path"
            )
        self._check_encoding(address, response)
        content = await _read_body(address, response, size, count)
        return FileInfo(size, self.version(response.headers), content, ranged=False)

    async def _read(self, address: str, start: int, buffer: memoryview, file_info: FileInfo) -> None:
        """Fill a buffer by one range request, after checking range, size and version in the answer."""
        import aiohttp

        stop, done = start + len(buffer), 0
        async with _limit_time() as count, self._get(address, start, stop) as response:
            self._check_status(address, response)
            if response.status == 200:
                raise InputError(f"{address}: the server sent the whole file instead of a range; download the file")
            content_range = _parse_content_range(address, response.headers)
            if content_range[2] != file_info.size or self.version(response.headers) != file_info.version:
                raise InputError(f"{address}: {CHANGED}")
            if content_range[:2] != (start, stop):
                raise InputError(
                    f"{address}: the server sent bytes {content_range[0]:,} to {content_range[1]:,} "
                    f"instead of {start:,} to {stop:,}; download the file and give the local path"
                )
            try:
                async for piece in response.content.iter_chunked(2**18):
                    if len(piece) > len(buffer) - done:
                        raise InputError(f"{address}: {TOO_MANY}")
                    buffer[done : done + len(piece)] = piece
                    done += count(len(piece))
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise TransientError(first_line_of(error), done) from error
        if done < len(buffer):
            raise TransientError("the answer was cut short", done)

    def _check_status(self, address: str, response: Any) -> None:
        status = response.status
        if status in TRANSIENT:
            raise TransientError(f"the server answers {status}")
        if status in {401, 403}:
            raise InputError(f"{address}: the server answers {status}: {self._suggest_access()}")
        if 300 <= status < 400:
            target = hide_secrets(urljoin(address, response.headers.get("Location", "")))
            raise InputError(f"{address}: the server redirects to {target}; give that address")
        if status in {404, 410, 412, 416}:
            raise InputError(f"{address}: {CHANGED} (the server answers {status})")
        if status not in {200, 206}:
            raise InputError(f"{address}: the server answers {status}; check the address")
        self._check_encoding(address, response)

    def _check_encoding(self, address: str, response: Any) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise InputError(
                f"{address}: the server sends the file encoded as {encoding}, which has no ranges; download the file"
            )

    def _suggest_access(self) -> str:
        if self._query or self._credentials:
            return "the credentials in the address are refused; a signature may be expired, or valid for another file"
        return "the file is not public or does not exist; for a private bucket give s3://, gs:// or a presigned URL"


@asynccontextmanager
async def _limit_time() -> AsyncIterator[Callable[[int], int]]:
    """Limit the time of a request: within ``READ_SECONDS`` ``LEAST_BYTES`` must arrive, again and again until its end.

    Yields:
        A function to count received bytes, which it returns.

    Raises:
        TransientError: Less arrived.
    """
    pending = 0
    try:
        async with asyncio.timeout(READ_SECONDS) as limit:

            def count(received: int) -> int:
                nonlocal pending
                pending += received
                if pending >= LEAST_BYTES:
                    pending = 0
                    limit.reschedule(asyncio.get_running_loop().time() + READ_SECONDS)
                return received

            yield count
    except TimeoutError as error:
        raise TransientError(f"less than {LEAST_BYTES:,} bytes arrived in {READ_SECONDS:g} s") from error


async def _read_body(address: str, response: Any, size: int, count: Callable[[int], int]) -> bytes:
    """Return the content of an answer, which must have exactly ``size`` bytes; never read more."""
    content = bytearray()
    async for piece in response.content.iter_chunked(2**16):
        content += piece
        count(len(piece))
        if len(content) > size:
            raise InputError(f"{address}: {TOO_MANY}")
    if len(content) < size:
        raise TransientError("the answer was cut short")
    return bytes(content)


async def _make_client(**options: Any) -> Any:
    """Return a session that does not decompress content, and uses the proxies of the environment."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    return aiohttp.ClientSession(timeout=timeout, auto_decompress=False, trust_env=True, **options)


def _parse_content_range(address: str, headers: Any) -> tuple[int, int, int]:
    """Parse a ``Content-Range`` header: first byte, one past the last byte, and the size of the whole file."""
    text = str(headers.get("Content-Range", ""))
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", text)
    if not match:
        raise InputError(
            f"{address}: invalid Content-Range header {text[:60]!r}; download the file and give the local path"
        )
    return int(match[1]), int(match[2]) + 1, int(match[3])
