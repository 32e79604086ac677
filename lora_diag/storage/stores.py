"""Stores answer the requests for an address: buckets through fsspec (s3fs, gcsfs), and web servers
by range requests.

A store returns only verified data. Every range is checked against the request and against the
version of the file whose header was read; any difference is an error. A folder of a bucket is
listed once. Redirects of web servers are not followed. Retries and chunks belong to ``addresses``,
the Hub to ``hub``.
"""

from __future__ import annotations

import asyncio
import os
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import quote, urljoin

from lora_diag.errors import InputError, damaged, require
from lora_diag.storage.addresses import (
    LEAST_BYTES,
    TransientError,
    call_with_retries,
    hide_secrets,
)

# Variables of the environment with credentials and settings; a notebook may change them.
SETTINGS = ("AWS_", "GOOGLE_", "GCSFS_", "FSSPEC_")
# File systems by scheme, process and these variables.
_FILE_SYSTEMS: dict[Any, Any] = {}

# HTTP status codes that a retry may solve.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
CHANGED = "the file has changed since its header was read; run again when it no longer changes"

# Names of botocore's errors for broken connections and answers; botocore is importable only with
# s3fs.
BROKEN = frozenset(
    {"ConnectionError", "HTTPClientError", "ResponseStreamingError", "IncompleteReadError"}
)

# Bytes of the first request for a file: the header of a small one, or all of a configuration.
HEAD_BYTES = 2**16
# Largest file accepted from a server without range requests: adapters and configurations, but not
# models.
MAX_WHOLE_BYTES = 2**23

DOWNLOAD = "download the file and give the local path"
TOO_MANY = f"the server sent more bytes than requested; {DOWNLOAD}"

# Timeouts in seconds: for connecting, and in which LEAST_BYTES or the rest of an answer must
# arrive. The first includes the headers of the answer, so a file's header in the first 64 KiB has
# this time as a whole. The limit is 1 KiB/s.
CONNECT_SECONDS = 20
READ_SECONDS = 60

# A web address with one of these extensions is a file, any other a folder.
FILES = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|json|jsonl|distcp|metadata)$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Properties of a file in a store.

    Args:
        size: Size in bytes.
        version: Identifier that changes with the content: an ETag, a generation, a hash, a commit,
            or else a date; empty if unknown.
        head: The first bytes, if they were part of the response.
        ranged: Whether ranges can be requested; otherwise ``head`` is the whole file.
    """

    size: int
    version: str
    head: bytes = b""
    ranged: bool = True


class Store:
    """Base class of stores: files are queried once, and a copy for another process opens its own
    connections.
    """

    note = ""

    def __init__(self) -> None:
        self._known: dict[str, FileInfo | None] = {}
        self._fs: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop connections and cached first bytes that can be read again; keep the recorded
        versions.
        """
        known = {
            address: replace(file_info, head=b"")
            if file_info is not None and file_info.ranged
            else file_info
            for address, file_info in self._known.items()
        }
        return self.__dict__ | {"_fs": None, "_known": known}

    def file_info(self, address: str) -> FileInfo | None:
        """Return the properties of a file; None if it does not exist."""
        if address not in self._known:
            self._known[address] = self._find(address)
        return self._known[address]

    def is_file(self, address: str) -> bool:
        """Return whether a file exists; raises like ``file_info``."""
        return self.file_info(address) is not None

    def join(self, address: str, name: str) -> str:
        """Return the address of a file in a folder."""
        return f"{address}/{name}"

    def is_folder(self, address: str) -> bool:
        """Return whether the address is a folder."""
        raise NotImplementedError

    def children(self, address: str) -> Iterable[str]:
        """Return the addresses of a folder's content, as far as the store can list it."""
        raise NotImplementedError

    def read_range(self, address: str, start: int, buffer: memoryview, file_info: FileInfo) -> None:
        """Fill a buffer with the bytes from ``start`` on, without retries.

        Raises:
            TransientError: The request failed, and a retry may succeed.
            InputError: The request failed permanently, or the answer is not what was requested.
        """
        raise NotImplementedError

    def _find(self, address: str) -> FileInfo | None:
        """Request the properties of a file; return None if it does not exist."""
        raise NotImplementedError


def filesystem(scheme: str, **options: Any) -> Any:
    """Return the fsspec file system shared by all stores of a scheme, since creating an S3 client
    takes a second.

    Other processes and other settings in the environment get their own.

    Args:
        scheme: A scheme of fsspec.
        options: Options of a new file system; an existing one is returned as it is.
    """
    settings = frozenset(item for item in os.environ.items() if item[0].startswith(SETTINGS))
    key = (scheme, os.getpid(), settings)
    if key not in _FILE_SYSTEMS:
        packages = {"s3": ["s3fs"], "gs": ["gcsfs"]}.get(scheme, [])
        with require(f"the scheme {scheme}://", "remote", *packages, kind=InputError):
            import fsspec

            _FILE_SYSTEMS[key] = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    return _FILE_SYSTEMS[key]


def get_first_line(error: BaseException) -> str:
    """Return the first line of a library's error, at most 300 characters, without the secret parts
    of addresses.

    Without a text, it is the name of the error's type.
    """
    lines = str(error).splitlines()
    return hide_secrets(lines[0])[:300] if lines else type(error).__name__


class BucketStore(Store):
    """Files in buckets, through the file systems of fsspec.

    Args:
        scheme: ``s3`` or ``gs``.
    """

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self._scheme = scheme
        self._listed: dict[str, dict[str, Any]] = {}

    def is_folder(self, address: str) -> bool:
        """Return whether there is any file under an address."""
        return bool(self._list_entries(address))

    def children(self, address: str) -> Iterable[str]:
        """Return the addresses of a folder's content."""
        return list(self._list_entries(address))

    def read_range(self, address: str, start: int, buffer: memoryview, file_info: FileInfo) -> None:
        """Fill a buffer with the bytes from ``start`` on, and check the version of the file.

        S3 checks it on the server; other stores are queried afterwards.

        Raises:
            TransientError: The request failed, and a retry may succeed.
            InputError: The request failed permanently, or the file has changed.
        """
        stop = start + len(buffer)
        self._open()
        if self._scheme == "s3":
            from fsspec.asyn import sync

            content = self._call(
                address, sync, self._fs.loop, self._get_s3, address, start, stop, file_info
            )
        else:
            content = self._call(
                address, self._fs.cat_file, _make_key(address), start=start, end=stop
            )
            current = self._call(address, self._fs.info, _make_key(address))
            if content is None or current is None or _make_file_info(current) != file_info:
                raise InputError(f"{address}: {CHANGED}")
        if len(content) > len(buffer):
            raise InputError(f"{address}: {TOO_MANY}")
        buffer[: len(content)] = content
        if len(content) < len(buffer):
            raise TransientError("the answer was cut short", len(content))

    def _find(self, address: str) -> FileInfo | None:
        listed = self._listed.get(address.rpartition("/")[0])
        if listed is not None:
            entry = listed.get(address)
        else:  # not listed: the folder of a single requested file may be very large
            self._open()
            entry = call_with_retries(
                address, lambda: self._call(address, self._fs.info, _make_key(address))
            )
        return _make_file_info(entry) if entry is not None and entry.get("type") == "file" else None

    def _list_entries(self, folder: str) -> dict[str, Any]:
        """Return the entries of a folder by address, requested once."""
        if folder not in self._listed:
            self._open()
            request = partial(
                self._call, folder, self._fs.ls, _make_key(folder), detail=True, refresh=True
            )
            entries = call_with_retries(folder, request) or ()
            by_address = {
                f"{self._scheme}://{entry['name'].strip('/')}": entry for entry in entries
            }
            self._listed[folder] = {
                name: entry for name, entry in by_address.items() if name.startswith(f"{folder}/")
            }
        return self._listed[folder]

    def _open(self) -> None:
        if self._fs is None:
            # Retries are done and counted in ``addresses``.
            options = (
                {"config_kwargs": {"retries": {"max_attempts": 0}}} if self._scheme == "s3" else {}
            )
            self._fs = filesystem(self._scheme, use_listings_cache=False, **options)
            if self._scheme == "s3":
                self._fs.retries = 1

    def _call(self, address: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a method of the file system and translate its errors; return None if the file does
        not exist.
        """
        try:
            return function(*args, **options)
        except FileNotFoundError:
            return None
        except (InputError, TransientError):
            raise
        except Exception as error:  # from fsspec, aiohttp and two cloud libraries
            kind, problem, fix = type(error).__name__.lower(), "cannot be read", ""
            if isinstance(error, PermissionError):
                problem, fix = "access is denied", "; reading needs s3:GetObject and s3:ListBucket"
            elif "credentials" in kind or "token" in kind:
                problem, fix = "no credentials", "; for a public bucket set FSSPEC_S3_ANON=true"
            elif isinstance(error, OSError) or any(
                base.__name__ in BROKEN for base in type(error).__mro__
            ):
                raise TransientError(get_first_line(error)) from error
            fix = fix if self._scheme == "s3" else ""
            raise InputError(f"{address}: {problem}: {get_first_line(error)}{fix}") from error

    async def _get_s3(self, address: str, start: int, stop: int, file_info: FileInfo) -> bytes:
        """Return a range of a file in S3, which refuses it if the version has changed."""
        from botocore.exceptions import ClientError  # type: ignore[import-untyped]

        await self._fs.set_session()
        bucket, key, _ = self._fs.split_path(_make_key(address))
        client = await self._fs.get_s3(bucket)
        condition = {"IfMatch": file_info.version} if file_info.version else {}
        try:
            response = await client.get_object(
                Bucket=bucket,
                Key=key,
                Range=f"bytes={start}-{stop - 1}",
                **condition,
                **self._fs.req_kw,
            )
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in {404, 412, 416}:
                raise InputError(f"{address}: {CHANGED} (the store answers {status})") from error
            if status in {401, 403}:
                raise PermissionError(str(error)) from error
            if status in TRANSIENT:
                raise TransientError(f"the store answers {status}") from error
            raise
        async with response["Body"] as body:
            sent, wanted = (
                response.get("ContentRange", "no range"),
                f"bytes {start}-{stop - 1}/{file_info.size}",
            )
            if response.get("ContentLength") != stop - start or sent != wanted:
                raise damaged(address, f"the store sent {sent!r} instead of {wanted!r}", DOWNLOAD)
            if file_info.version and response.get("ETag", file_info.version) != file_info.version:
                raise InputError(f"{address}: {CHANGED}")
            return bytes(await body.read())


def _make_key(address: str) -> str:
    """Return the bucket and path of an address, as fsspec expects them."""
    return address.partition("://")[2]


def _make_file_info(entry: Any) -> FileInfo:
    """Return size and version from an entry of an fsspec listing."""
    version_keys = ("ETag", "generation", "etag", "md5Hash", "LastModified", "updated")
    return FileInfo(
        int(entry["size"]), next((str(entry[key]) for key in version_keys if entry.get(key)), "")
    )


class HttpStore(Store):
    """Files of a web server.

    Redirects are not followed: they could lead to another host than the user named.

    Args:
        root: The printable address.
        credentials: Name and password in the address; None without them.
        query: The query of the address; sent with every request.
    """

    redirects = 0

    def __init__(
        self, root: str, credentials: tuple[str, str] | None = None, query: str = ""
    ) -> None:
        super().__init__()
        self._credentials, self._query = credentials, query
        # A signature is valid for one file, so no other file of the folder is requested.
        self._only_file = root if query and FILES.search(root) else None

    def url(self, address: str) -> str:
        """Return the URL of an address; existing escapes are kept."""
        return quote(address, safe="/:%~!$&'()*+,;=@[]") + (
            f"?{self._query}" if self._query else ""
        )

    def headers(self) -> dict[str, str]:
        """Return the authorization header, if the address has a user."""
        if self._credentials is None:
            return {}
        return {
            "Authorization": f"Basic {b64encode(':'.join(self._credentials).encode()).decode()}"
        }

    def version(self, headers: Any) -> str:
        """Return the version of the file given in the headers of an answer; empty if
        there is none.
        """
        return str(headers.get("ETag") or headers.get("Last-Modified") or "")

    def join(self, address: str, name: str) -> str:
        """Return the address of a file in a folder, with special characters of the name escaped."""
        return f"{address}/{quote(name, safe='')}"

    def is_folder(self, address: str) -> bool:
        """Return whether an address has none of the extensions of files that are read."""
        return not FILES.search(address)

    def children(self, address: str) -> Iterable[str]:
        """Return nothing: a web server does not list folders."""
        return ()

    def read_range(self, address: str, start: int, buffer: memoryview, file_info: FileInfo) -> None:
        """Fill a buffer with the bytes from ``start`` on, by one range request."""
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
            raise InputError(f"{args[0]}: cannot be read: {get_first_line(error)}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise TransientError(get_first_line(error)) from error

    def _open(self) -> None:
        if self._fs is None:
            self._fs = filesystem("http", get_client=_make_client)

    async def check_redirect(self, address: str, url: Any) -> None:
        """Accept a redirect to this URL; a subclass may raise an ``InputError``."""

    @asynccontextmanager
    async def _get(self, address: str, start: int, stop: int) -> AsyncIterator[Any]:
        """Request a range and yield the answer, after at most ``redirects`` redirects.

        Credentials stay with the first host.
        """
        import yarl

        session = await self._fs.set_session()
        url = yarl.URL(self.url(address), encoded=True)
        headers = {
            **self.headers(),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        for redirects_left in range(self.redirects, -1, -1):
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                location = (
                    response.headers.get("Location") if 300 <= response.status < 400 else None
                )
                if location is None or not redirects_left:
                    yield response
                    return
                target = url.join(yarl.URL(location, encoded=True))
            await self.check_redirect(address, target)
            if target.origin() != url.origin():
                headers = {
                    name: value
                    for name, value in headers.items()
                    if name.lower() != "authorization"
                }
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
                raise InputError(
                    f"{address}: the server sent bytes up to {stop:,} instead of {HEAD_BYTES:,}"
                )
            content = await _read_body(address, response, stop, count)
            return FileInfo(size, self.version(response.headers), content)

    async def _read_whole(
        self, address: str, response: Any, count: Callable[[int], int]
    ) -> FileInfo:
        """Return the properties and content of a small file, from a server that ignores ranges."""
        size = response.content_length
        if size is None or size > MAX_WHOLE_BYTES:
            whole = f"the whole file ({size:,} bytes)" if size else "the whole file"
            problem = f"the server ignores range requests and would send {whole} for every tensor"
            raise damaged(address, problem, DOWNLOAD)
        self._check_encoding(address, response)
        content = await _read_body(address, response, size, count)
        return FileInfo(size, self.version(response.headers), content, ranged=False)

    async def _read(
        self, address: str, start: int, buffer: memoryview, file_info: FileInfo
    ) -> None:
        """Fill a buffer by one range request, after checking range, size and version in
        the answer.
        """
        import aiohttp

        stop, done = start + len(buffer), 0
        async with _limit_time() as count, self._get(address, start, stop) as response:
            self._check_status(address, response)
            if response.status == 200:
                raise InputError(
                    f"{address}: the server sent the whole file instead of a range; download the "
                    "file"
                )
            content_range = _parse_content_range(address, response.headers)
            if (
                content_range[2] != file_info.size
                or self.version(response.headers) != file_info.version
            ):
                raise InputError(f"{address}: {CHANGED}")
            if (sent := content_range[:2]) != (start, stop):
                problem = (
                    f"the server sent bytes {sent[0]:,} to {sent[1]:,} instead of {start:,} "
                    f"to {stop:,}"
                )
                raise damaged(address, problem, DOWNLOAD)
            try:
                async for piece in response.content.iter_chunked(2**18):
                    if len(piece) > len(buffer) - done:
                        raise InputError(f"{address}: {TOO_MANY}")
                    buffer[done : done + len(piece)] = piece
                    done += count(len(piece))
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise TransientError(get_first_line(error), done) from error
        if done < len(buffer):
            raise TransientError("the answer was cut short", done)

    def _check_status(self, address: str, response: Any) -> None:
        """Raise the error that a status stands for; accept 200 and 206 if the content is not
        encoded.
        """
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
            raise damaged(
                address,
                f"the server sends the file encoded as {encoding}, which has no ranges",
                DOWNLOAD,
            )

    def _suggest_access(self) -> str:
        if self._query or self._credentials:
            return (
                "the credentials in the address are refused; a signature may be expired, or "
                "valid for another file"
            )
        return (
            "the file is not public or does not exist; for a private bucket give s3://, gs:// "
            "or a presigned URL"
        )


@asynccontextmanager
async def _limit_time() -> AsyncIterator[Callable[[int], int]]:
    """Limit the time of a request: within ``READ_SECONDS`` ``LEAST_BYTES`` must arrive, again and
    again until its end.

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
        raise TransientError(
            f"less than {LEAST_BYTES:,} bytes arrived in {READ_SECONDS:g} s"
        ) from error


async def _read_body(address: str, response: Any, size: int, count: Callable[[int], int]) -> bytes:
    """Return the content of an answer, which must have exactly ``size`` bytes; stop if there are
    more.
    """
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
    """Return a session that does not decompress content, and uses the proxies of the
    environment.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
    )
    return aiohttp.ClientSession(timeout=timeout, auto_decompress=False, trust_env=True, **options)


def _parse_content_range(address: str, headers: Any) -> tuple[int, int, int]:
    """Parse a ``Content-Range`` header: first byte, one past the last byte, and the size of the
    whole file.
    """
    text = str(headers.get("Content-Range", ""))
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", text)
    if not match:
        raise damaged(address, f"invalid Content-Range header {text[:60]!r}", DOWNLOAD)
    return int(match[1]), int(match[2]) + 1, int(match[3])
