"""A path of an address, which the readers can ask as they ask a ``Path``, and the store that answers for it.

Knows nothing of any protocol (``stores`` does). What an address carries besides the place, a password or the signature
of a presigned URL, stays in the store that makes the requests: the text of a path is safe to print and to record.
Nothing is imported for local paths.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from lora_diag.checkpoints.addresses import ADDRESS, SCHEME, WEB, shown
from lora_diag.errors import InputError

if TYPE_CHECKING:
    from lora_diag.checkpoints.stores import Facts, Store

# How much a file is read ahead while its header is looked at.
BUFFER_BYTES = 2**16


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder on object storage, with as much of ``pathlib.Path`` as the readers use.

    Args:
        address: As it may be shown, without a slash at its end.
        store: Who makes the requests, and remembers for all paths of one command what it was told.
    """

    address: str
    store: Store = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.address

    def __fspath__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.store.join(self.address, name), self.store)

    @property
    def name(self) -> str:
        """The last part; empty for a bucket or a host itself."""
        last = self.address.partition("://")[2].partition("/")[2].rpartition("/")[2]
        return unquote(last) if self.address.startswith(WEB) else last

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder around it; of a bucket or a host, itself."""
        return RemotePath(self.address.rpartition("/")[0], self.store) if self.name else self

    def as_posix(self) -> str:
        """Return the address."""
        return self.address

    def match(self, pattern: str) -> bool:
        """Say whether the name matches a pattern."""
        return fnmatchcase(self.name, pattern)

    def is_file(self) -> bool:
        """Say whether a file is there."""
        return self.store.is_file(self.address)

    def is_dir(self) -> bool:
        """Say whether it is a folder; of a web server, which has none, whether it can only be meant as one."""
        return self.store.is_folder(self.address)

    def exists(self) -> bool:
        """Say whether anything is there."""
        return self.is_dir() or self.is_file()

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in a folder; nothing where the server cannot tell."""
        yield from (RemotePath(address, self.store) for address in self.store.children(self.address))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what in the folder has a name that matches a pattern."""
        yield from (path for path in self.iterdir() if path.match(pattern))

    def facts(self) -> Facts:
        """Return size and version.

        Raises:
            InputError: Nothing is there.
        """
        found = self.store.facts(self.address)
        if found is None:
            raise InputError(f"{self}: no such file")
        return found

    def stat(self) -> Any:
        """Return the size, as ``st_size``."""
        return SimpleNamespace(st_size=self.facts().size)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from ``offset`` on.

        Raises:
            InputError: They cannot be read, the file has changed since it was opened, or the server answers something
                else than it was asked.
        """
        from lora_diag.checkpoints.ranges import fill

        fill(self.store, self.address, buffer, offset, self.facts())

    def read_bytes(self) -> bytes:
        """Return the whole content."""
        content = bytearray(self.facts().size)
        self.read_into(memoryview(content), 0)
        return bytes(content)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open it for reading bytes."""
        assert mode == "rb"
        return io.BufferedReader(_Raw(self), BUFFER_BYTES)

    @contextmanager
    def downloaded(self) -> Iterator[str]:
        """Give the whole file as a local one, for formats that cannot be read by ranges; it is removed afterwards.

        Raises:
            InputError: The disk for temporary files (``TMPDIR``) has no room for it, or it cannot be read.
        """
        import shutil
        import tempfile

        size, free = self.facts().size, shutil.disk_usage(tempfile.gettempdir()).free
        if size > free:
            raise InputError(
                f"{self}: this format is read whole, and its {size:,} bytes do not fit into {tempfile.gettempdir()} "
                f"({free:,} free); set TMPDIR to a larger disk, or convert it to safetensors, which is read by ranges"
            )
        with tempfile.NamedTemporaryFile(prefix="loradiag-") as copy:
            buffer = memoryview(bytearray(min(size, 2**26)))
            for start in range(0, size, 2**26):
                part = buffer[: min(2**26, size - start)]
                self.read_into(part, start)
                copy.write(part)
            copy.flush()
            yield copy.name


class _Raw(io.RawIOBase):
    """A remote file as a stream that can seek."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._at, self._size = path, 0, path.facts().size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            self._path.read_into(memoryview(buffer)[:count], self._at)
        self._at += count
        return count


def as_path(words: Path | str) -> Path:
    """Return a path: of an address a ``RemotePath``, which answers what the readers ask of a ``Path``.

    One that is given stays as it is, with what its store knows already: so a command makes paths of its words once.

    Raises:
        InputError: The address is not complete, or what reads it is not installed.
    """
    if isinstance(words, RemotePath):
        return cast(Path, words)
    found = ADDRESS.fullmatch(str(words))
    if found is None:
        if SCHEME.match(str(words)) and not Path(words).exists():
            raise InputError(f"{shown(words)}: only s3://, gs://, hf://, https:// and http:// addresses are read")
        return Path(words)
    root = shown(words).rstrip("/")
    return cast(Path, RemotePath(root, _open_store(found[1].lower(), found[2], root)))


def _open_store(scheme: str, rest: str, root: str) -> Store:
    """Return who makes the requests for an address.

    Args:
        scheme: ``s3``, ``gs``, ``hf``, ``https`` or ``http``.
        rest: What is behind ``://``, secrets included.
        root: The address as it may be shown.

    Raises:
        InputError: The address is not complete, or what reads it is not installed.
    """
    if scheme in WEB:
        parts = urlsplit(f"{scheme}://{rest}")
        if not parts.hostname:
            raise InputError(f"{root}: names no host")
        from lora_diag.checkpoints.stores_web import HttpStore

        user = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        return HttpStore(root, user, parts.query)
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise InputError(
            f"{root}: {scheme}:// takes no password and no query; credentials are found where the tools of that cloud "
            "look for them (environment, configuration files)"
        )
    if scheme == "hf":
        from lora_diag.checkpoints.stores_hub import open_hub

        return open_hub(rest.rstrip("/"), root)
    from lora_diag.checkpoints.stores_bucket import BucketStore

    return BucketStore(scheme)
