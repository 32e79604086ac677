"""Stores answer the requests for an address: the base class of all stores, and helpers.

A store returns only verified data. Every range is checked against the request (position, length and size of the whole
file) and against the version of the file whose header was read; any difference is an error. Retries and chunks belong
to ``addresses``; each protocol has its own module ``stores_*``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lora_diag.checkpoints.addresses import hide_secrets
from lora_diag.errors import InputError, install_command

# Variables of the environment with credentials and settings; a notebook may change them.
SETTINGS = ("AWS_", "GOOGLE_", "GCSFS_", "FSSPEC_")
# File systems by scheme, process and these variables.
_FILE_SYSTEMS: dict[Any, Any] = {}

# HTTP status codes that a retry may solve.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
CHANGED = "the file has changed since its header was read; run again when it no longer changes"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Properties of a file in a store.

    Args:
        size: Size in bytes.
        version: Identifier that changes with the content: an ETag, a generation, or else a date; empty if unknown.
        head: The first bytes, if they were part of the response.
        ranged: Whether ranges can be requested; otherwise ``head`` is the whole file.
    """

    size: int
    version: str
    head: bytes = b""
    ranged: bool = True


class Store:
    """Base class of stores: files are queried once, and a copy for another process opens its own connections."""

    note = ""

    def __init__(self) -> None:
        self._known: dict[str, FileInfo | None] = {}
        self._fs: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop connections and cached first bytes that can be read again; keep the recorded versions."""
        known = {
            address: replace(file_info, head=b"") if file_info is not None and file_info.ranged else file_info
            for address, file_info in self._known.items()
        }
        return self.__dict__ | {"_fs": None, "_known": known}

    def file_info(self, address: str) -> FileInfo | None:
        """Return the properties of a file; None if it does not exist."""
        if address not in self._known:
            self._known[address] = self._find(address)
        return self._known[address]

    def is_file(self, address: str) -> bool:
        """Return whether a file exists."""
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
        """Fill a buffer with the bytes from ``start`` on, by one request.

        Raises:
            TransientError: The request failed, and a retry may succeed.
            InputError: The request failed permanently, or the answer is not what was requested.
        """
        raise NotImplementedError

    def _find(self, address: str) -> FileInfo | None:
        """Request the properties of a file; return None if it does not exist."""
        raise NotImplementedError


def filesystem(scheme: str, **options: Any) -> Any:
    """Return the fsspec file system shared by all stores of a scheme, since creating an S3 client takes a second.

    Raises:
        InputError: The package is not installed; the message gives the command that installs it.
    """
    settings = frozenset(item for item in os.environ.items() if item[0].startswith(SETTINGS))
    key = (scheme, os.getpid(), settings)
    if key not in _FILE_SYSTEMS:
        package = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme)
        command = install_command("remote", *([package] if package else []))
        try:
            import fsspec

            _FILE_SYSTEMS[key] = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        except ImportError as error:
            raise InputError(f"{scheme}:// addresses need {package or 'fsspec'}: {command}") from error
    return _FILE_SYSTEMS[key]


def first_line_of(error: BaseException) -> str:
    """Return the first line of a library's error, at most 300 characters, without the secret parts of addresses."""
    lines = str(error).splitlines()
    return hide_secrets(lines[0])[:300] if lines else type(error).__name__
