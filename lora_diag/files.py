"""A file is written beside its place and then renamed, so that it is never half there; and one process writes it.

Knows nothing of what is written. Results files that grow line by line have their own way (``records/writing.py``).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_diag.errors import InputError, UsageError

_LOG = logging.getLogger(__name__)

# How a file system says that it cannot do what was asked: some NFS mounts have no locks, some FUSE mounts no fsync.
_CANNOT = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF}
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write to, which takes the place of ``path`` once it is whole and on the disk.

    Whatever goes wrong, what was at ``path`` is still there and nothing is left beside it. A symbolic link stays one:
    the file that it points to is replaced.

    Raises:
        InputError: It cannot be written.
    """
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        yield beside
        sync(beside)
        beside.replace(place)
        sync(place.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Refuse, before any work, a file that ``replacing`` could not write; create nothing.

    Raises:
        UsageError: Something that is no file is there.
        InputError: It could not be written.
    """
    check_folder_of(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is not a file; choose another name")


def check_folder_of(path: Path, in_place: bool = False) -> None:
    """Refuse, before any work, what nothing could be written to: folders are not made of a typo in a path.

    Args:
        path: A file, or a folder that is to be made.
        in_place: A file that is there is written to, not replaced.

    Raises:
        InputError: There is no such folder, or nothing may be written there.
    """
    try:
        place = Path(os.path.realpath(path)) if path.is_symlink() else path
        place.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: cannot be written: {reason}") from error
    folder = place.parent
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {folder}; create it first")
    if not (os.access(place, os.W_OK) if exists and in_place else os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: cannot be written: permission denied")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, or leave everything as it was.

    Raises:
        UsageError: Something that is no file is there.
        InputError: It cannot be written.
    """
    check_place(path)
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a loss of power.

    A file system that has no such thing is let be.

    Raises:
        OSError: The disk took what was written and cannot keep it: it is full or broken.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return  # one that may be written to and not listed
        raise
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Do the same for an open file.

    Raises:
        OSError: As ``sync``.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def lock(path: Path, tries: int = 5) -> int:
    """Open a file and keep every other process from locking it, until it is closed or this process ends.

    One that is not there is created, empty. The lock is the system's own (``flock``): it ends with the process, however
    that ends, and nothing is left to clean up. Where the file system has no locks, that is said, and two processes are
    not kept apart.

    Args:
        path: The file.
        tries: How often it may turn out to have been replaced meanwhile, which is then no longer believed: a few file
            systems never tell one file by the same number twice.

    Returns:
        The descriptor to close.

    Raises:
        UsageError: Another process has it.
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(descriptor, path)
        # Replaced between the two calls, it is the old one that is locked.
        if tries <= 1 or _is_at(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return lock(path, tries - 1)


def _is_at(descriptor: int, path: Path) -> bool:
    """Say whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flock(descriptor: int, path: Path) -> None:
    try:
        import fcntl  # here: not every system has it

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return
    except OSError as error:
        if error.errno in _TAKEN:
            raise UsageError(
                f"{path}: another process is writing it now; wait until that has ended, or write to another place"
            ) from error
        if error.errno not in _CANNOT:
            raise
        _LOG.warning("%s: its file system has no locks: see to it that no other process writes it", path)
