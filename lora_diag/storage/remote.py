"""Paths of addresses, with the interface of ``pathlib.Path`` that the readers use.

This module is independent of any protocol (see ``stores``). The secret parts of an address, such as
a password or the signature of a presigned URL, stay in the store that makes the requests, so the
text of a path is safe to print and to record. Local paths import nothing.
"""

# Signatures of ``pathlib`` differ between versions of Python; here they have what the readers use.
# mypy: disable-error-code="override"

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from lora_diag.errors import InputError, damaged
from lora_diag.storage.addresses import ADDRESS, HIDDEN, SCHEME, WEB, Address, hide_secrets

if TYPE_CHECKING:
    from lora_diag.storage.stores import FileInfo, Store

    # functions that take a Path take a RemotePath, too, and mypy checks what they do with it
    _Path = Path
else:
    _Path = object

# Read-ahead while the header of a file is read.
BUFFER_BYTES = 2**16


@dataclass(frozen=True)
class RemotePath(_Path):
    """A file or folder at an address, with the part of ``pathlib.Path`` that the readers use.

    Args:
        address: The printable address, without a trailing slash.
        store: The store that makes the requests and caches the answers, also for its parents and
            the paths below it.
    """

    address: str
    store: Store = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.address

    def __fspath__(self) -> str:
        return self.address

    def __lt__(self, other: PurePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        return RemotePath(self.store.join(self.address, os.fspath(name)), self.store)

    @property
    def name(self) -> str:
        """The last part of the path; empty for a bucket or host."""
        last = self.address.partition("://")[2].partition("/")[2].rpartition("/")[2]
        return unquote(last) if self.address.startswith(WEB) else last

    @property
    def suffix(self) -> str:
        """The extension of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The parent folder; a bucket or host is its own parent."""
        return RemotePath(self.address.rpartition("/")[0], self.store) if self.name else self

    def as_posix(self) -> str:
        """Return the address."""
        return self.address

    def match(self, pattern: str) -> bool:
        """Return whether the name matches a pattern."""
        return fnmatchcase(self.name, pattern)

    def is_file(self) -> bool:
        """Return whether the path is an existing file."""
        return self.store.is_file(self.address)

    def is_dir(self) -> bool:
        """Return whether the path is a folder; on a web server, which has none, whether it can only
        mean a folder.
        """
        return self.store.is_folder(self.address)

    def exists(self) -> bool:
        """Return whether the path exists; True for every folder of a web server."""
        return self.is_dir() or self.is_file()

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the content of a folder; nothing if the server cannot list it."""
        yield from (
            RemotePath(address, self.store) for address in self.store.children(self.address)
        )

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the paths in the folder whose names match a pattern."""
        yield from (path for path in self.iterdir() if path.match(pattern))

    def file_info(self) -> FileInfo:
        """Return size and version of the file.

        Raises:
            InputError: The file does not exist, or the store cannot be reached, denies access or
                gives an invalid answer.
        """
        info = self.store.file_info(self.address)
        if info is None:
            raise InputError(f"{self}: no such file; check the address")
        return info

    def stat(self) -> Any:
        """Return the size, as ``st_size``; raises like ``file_info``."""
        return SimpleNamespace(st_size=self.file_info().size)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from ``offset`` on."""
        from lora_diag.storage.addresses import fill

        fill(self.store, self.address, buffer, offset, self.file_info())

    def read_bytes(self) -> bytes:
        """Return the whole content; raises like ``read_into``."""
        with self.open() as file:
            return file.read()

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Return the file, open for reading bytes; raises like ``file_info``, and its reads like
        ``read_into``.
        """
        assert mode == "rb"
        return io.BufferedReader(RangeStream(self.read_into, self.file_info().size), BUFFER_BYTES)

    @contextmanager
    def download_temporarily(self) -> Iterator[str]:
        """Download the whole file temporarily, for formats that cannot be read by ranges.

        Yields:
            Path of the local copy, which is removed afterwards.

        Raises:
            InputError: The disk for temporary files (``TMPDIR``) has too little space, or the file
                cannot be read.
        """
        import shutil
        import tempfile

        size, free = self.file_info().size, shutil.disk_usage(tempfile.gettempdir()).free
        if size > free:
            place = f"{tempfile.gettempdir()} ({free:,} free)"
            fix = (
                "set TMPDIR to a larger disk, or convert it to safetensors, which is read by ranges"
            )
            raise damaged(
                self,
                f"this format is read whole, but its {size:,} bytes do not fit into {place}",
                fix,
            )
        with tempfile.NamedTemporaryFile(prefix="loradiag-") as copy:
            with self.open() as file:
                shutil.copyfileobj(file, copy, 2**26)
            copy.flush()
            yield copy.name


class RangeStream(io.RawIOBase):
    """Bytes that are read by ranges, as a seekable stream.

    Args:
        read_into: Fills a buffer with the bytes from an offset on.
        size: Number of bytes.
    """

    def __init__(self, read_into: Callable[[memoryview, int], None], size: int) -> None:
        self._read_into, self._size, self._position = read_into, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, which may be beyond the end; return it.

        Raises:
            ValueError: The position is before the start.
        """
        position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        if position < 0:
            raise ValueError(f"position {position} is before the start")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the position on, as far as there are bytes; return their number."""
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            self._read_into(memoryview(buffer)[:count], self._position)
        self._position += count
        return count

    def readall(self) -> bytes:
        """Return the bytes from the position on, read at once; that of the base class reads 8 KiB
        at a time.
        """
        content = bytearray(max(0, self._size - self._position))
        self.readinto(content)
        return bytes(content)


def as_path(address: Path | str) -> Path:
    """Return a path: a ``RemotePath`` for an address, else a ``Path``.

    A ``RemotePath`` is returned unchanged, with the answers that its store has cached; a command
    therefore converts each of its arguments once.

    Raises:
        InputError: The address is invalid, or has an unsupported scheme or a part that its scheme
            does not accept; for ``hf://``, also if ``huggingface_hub`` is not installed or the
            repository cannot be reached.
    """
    if isinstance(address, RemotePath):
        return cast(Path, address)
    full = address.full if isinstance(address, Address) else str(address)
    match = ADDRESS.fullmatch(full)
    if match is None:
        if SCHEME.match(full) and not Path(address).exists():
            raise damaged(
                hide_secrets(address),
                "unsupported scheme",
                "give s3://, gs://, hf://, https:// or http://",
            )
        return Path(address)
    root = hide_secrets(full).rstrip("/")
    return cast(Path, RemotePath(root, _open_store(match[1].lower(), match[2].rstrip(), root)))


def _open_store(scheme: str, location: str, root: str) -> Store:
    """Return the store for an address.

    Args:
        scheme: ``s3``, ``gs``, ``hf``, ``https`` or ``http``.
        location: The part after ``://``, with secrets.
        root: The printable address.

    Raises:
        InputError: The address is invalid or has a part that its scheme does not accept; for
            ``hf://``, also if ``huggingface_hub`` is not installed or the repository cannot be
            reached.
    """
    try:
        parts = urlsplit(f"{scheme}://{location}")
        is_valid = parts.port != 0 and not root.endswith(HIDDEN)
    except ValueError:  # its message may have a part of the password
        is_valid = False
    if not is_valid:
        problem = "invalid host or port"
        raise damaged(
            root,
            problem,
            "in a password write : / ? # @ as %3A %2F %3F %23 %40, and so @ in a path",
        )
    if scheme in WEB:
        if not parts.hostname:
            raise InputError(f"{root}: the address has no host; give https://host/path")
        from lora_diag.storage.stores import HttpStore

        credentials = (
            (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        )
        return HttpStore(root, credentials, parts.query)
    if "@" in location.partition("/")[0] or "?" in location:
        problem = f"{scheme}:// accepts no password and no query"
        fix = (
            "provide credentials as for the tools of that cloud (environment, configuration files)"
        )
        raise damaged(root, problem, fix)
    if scheme == "hf":
        from lora_diag.storage.hub import open_hub

        return open_hub(location.rstrip("/"), root)
    from lora_diag.storage.stores import BucketStore

    return BucketStore(scheme)
