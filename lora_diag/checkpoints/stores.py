"""Who makes the requests for an address: what every store has in common.

A store hands out nothing that it cannot vouch for. Every range is held against what was asked for (its place, its
length, the size of the whole file) and against the version of the file that its header was read from; whatever differs
is an error, never data. Trying again and cutting into chunks is the business of ``ranges``; one protocol is one file
beside this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lora_diag.checkpoints.addresses import shown
from lora_diag.errors import InputError

# File systems by scheme, process and the variables by which clouds are told who asks, which a notebook may change.
SETTINGS = ("AWS_", "GOOGLE_", "GCSFS_", "FSSPEC_")
_FILE_SYSTEMS: dict[Any, Any] = {}

# Answers of a server that may be another one in a moment.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
CHANGED = "has changed since its header was read; run again once it stays as it is"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a store says of a file.

    Args:
        size: Bytes.
        version: What changes when the content does: an ETag, a generation, else a date; empty if it says nothing.
        head: Its first bytes, as far as they came with the answer.
        ranged: Whether ranges can be asked for; else ``head`` is all of it.
    """

    size: int
    version: str
    head: bytes = b""
    ranged: bool = True


class Store:
    """What is common: files are asked about once, and a copy for another process opens its own connections."""

    note = ""

    def __init__(self) -> None:
        self._known: dict[str, Facts | None] = {}
        self._fs: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave connections behind, and first bytes that can be read again; not the versions that were seen."""
        known = {
            address: replace(facts, head=b"") if facts is not None and facts.ranged else facts
            for address, facts in self._known.items()
        }
        return self.__dict__ | {"_fs": None, "_known": known}

    def facts(self, address: str) -> Facts | None:
        """Return what is known of a file; None if it is not there."""
        if address not in self._known:
            self._known[address] = self._find(address)
        return self._known[address]

    def is_file(self, address: str) -> bool:
        """Say whether a file is there."""
        return self.facts(address) is not None

    def join(self, address: str, name: str) -> str:
        """Return the address of a file in a folder."""
        return f"{address}/{name}"

    def is_folder(self, address: str) -> bool:
        """Say whether it is a folder."""
        raise NotImplementedError

    def children(self, address: str) -> Iterable[str]:
        """Return the addresses of what is in a folder, as far as the store can tell."""
        raise NotImplementedError

    def read_range(self, address: str, start: int, buffer: memoryview, facts: Facts) -> None:
        """Fill a buffer with the bytes from ``start`` on, by one request.

        Raises:
            MayPassError: It failed in a way that may pass.
            InputError: It failed for good, or something else came than was asked for.
        """
        raise NotImplementedError

    def _find(self, address: str) -> Facts | None:
        raise NotImplementedError


def filesystem(scheme: str, **options: Any) -> Any:
    """Return the file system of fsspec that all stores of a scheme share: a client for S3 takes a second to make.

    Raises:
        InputError: It is not installed; the message says how to install it.
    """
    settings = frozenset(item for item in os.environ.items() if item[0].startswith(SETTINGS))
    key = (scheme, os.getpid(), settings)
    if key not in _FILE_SYSTEMS:
        package = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme)
        needs = f"'loradiag[remote]'{f' {package}' if package else ''}"
        try:
            import fsspec

            _FILE_SYSTEMS[key] = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        except ImportError as error:
            raise InputError(f"{scheme}:// addresses need {package or 'fsspec'}: pip install {needs}") from error
    return _FILE_SYSTEMS[key]


def words_of(error: BaseException) -> str:
    """Return one line of an error of a library, without what an address in it must not show."""
    lines = str(error).splitlines()
    return shown(lines[0])[:300] if lines else type(error).__name__
