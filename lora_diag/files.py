"""Write outputs: decide what may be written where, and replace files atomically; open only regular
files as inputs.

The same rules hold for every output of every command:

- Nothing is written through a symbolic link, except one in a system folder, such as /dev/stdout. A
  linked parent folder is allowed.
- An existing file is replaced only if it is empty, if it carries the mark of the kind of file being
  written (``Kind``), or with ``--overwrite``.
- An unfinished results file is never replaced, and no ``adapter_config.json`` is written into a
  folder with weights.

A file in a format with comments ends with a signature line, a digest of the content before it, so a
file that was edited by hand no longer counts as written by loradiag. Other formats carry their mark
among their first or last bytes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_diag.errors import InputError, UsageError

_LOG = logging.getLogger(__name__)

# Errors of file systems without an operation: some NFS mounts have no locks, some FUSE mounts no
# fsync.
_UNSUPPORTED = {
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOLCK,
    errno.EBADF,
}
_LOCKED = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}

# Missing on some systems, where only the check of the path prevents writing through a link.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)

# Folders of system links to open files, such as /dev/stdout; these links are followed.
_SYSTEM_LINK_FOLDERS = {"/dev", "/dev/fd", "/proc/self/fd"}

# Bytes searched for a mark: at the start of a file, at its end (a Parquet footer of 10,000 columns
# has 3 MB), and at the end of a results file, whose last line is short.
_HEAD, _TAIL, _LAST_LINE = 1 << 12, 1 << 23, 1 << 16

# Files whose interpretation changes when an adapter_config.json appears in their folder.
_CONFIG = "adapter_config.json"
_WEIGHTS = re.compile(
    r"(adapter_model|model|pytorch_model|pytorch_lora_weights|consolidated)\b.*\.(safetensors|bin|pth?|ckpt|json)|.*\.gguf",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file that loradiag writes, and its mark.

    A kind without a mark is replaced only with ``--overwrite``: such files are edited by hand or
    costly to compute.

    Args:
        name: Name in messages, with its article.
        mark: Regular expression that is found in the first and last bytes, joined.
        comment: Template of a comment line in this format, used for the signature; empty if the
            format has none.
    """

    name: str
    mark: bytes | None = None
    comment: str = ""

    def sign(self, content: bytes) -> bytes:
        """Return the content with its signature as the last line; unchanged if the format has no
        comments.
        """
        if not self.comment:
            return content
        content = content if content.endswith(b"\n") else content + b"\n"
        return content + self._make_signature(content)

    def _make_signature(self, content: bytes) -> bytes:
        """Return the signature line of the content before it."""
        digest = hashlib.sha256(self.name.encode() + b"\0" + content).hexdigest()
        return f"{self.comment.format('loradiag ' + digest)}\n".encode()

    def is_at(self, path: Path) -> bool:
        """Return whether the file carries the mark of this kind; False for a kind without a mark.

        Raises:
            OSError: The file cannot be read.
        """
        with path.open("rb") as file:
            if self.comment:
                content = file.read()
                body = content[: content.rstrip(b"\n").rfind(b"\n") + 1]
                return content == body + self._make_signature(body)
            if self.mark is None:
                return False
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD)
            file.seek(max(_HEAD, size - _TAIL))
            return re.search(self.mark, head + file.read(), re.DOTALL) is not None


RESULTS = Kind("a results file", rb'\A\{ *"record" *: *"run"')
PAGE = Kind("an HTML report", comment="<!-- {} -->")
MARKDOWN = Kind("a Markdown report", comment="<!-- {} -->")
CSV = Kind("a CSV table of records", rb"\Aresults(,record|\r?\n\Z)")
# The key "loradiag" with the value "report" in the metadata, each after its length.
PARQUET = Kind("a Parquet table of records", rb"\APAR1.*loradiag\x18\x06report.*PAR1\Z")
PNG = Kind("a figure", rb"\A\x89PNG.*tEXtSoftware\x00loradiag")
SVG = Kind("a figure", comment="<!-- {} -->")
PDF = Kind("a figure", comment="% {}")
JUNIT = Kind("a JUnit report", comment="<!-- {} -->")
# JSON has no comments, and PEFT warns about unknown keys, so the order of the first keys is the
# mark. PEFT itself writes them sorted.
CONFIG = Kind(
    "a PEFT config",
    rb'\A\{\n  "peft_type": "LORA",\n  "task_type": [^\n]*,\n'
    rb'  "base_model_name_or_path": [^\n]*,\n  "r": \d+,\n'
    rb'  "lora_alpha": [\d.e+-]+,\n  "rank_pattern": \{',
)
POLICY = Kind("a policy")
# Only the block between the marks of ``gating.show.model_card`` changes: any Markdown is accepted,
# but no HTML or JSON.
CARD = Kind("a Markdown file", rb"\A(?!\s*(?:<!doctype|<\?xml|\{))[^\x00]*\Z")
SECOND_MOMENTS = Kind("a file of second moments")
SNAPSHOT = Kind("a gradient snapshot", rb'\A.{8}\{"__metadata__":\{[^}]*"kind":"gradient"')


def resolve_output(path: Path) -> Path:
    """Return the path of an output; one in a system folder, such as /dev/stdout, is resolved if it
    leads to a file.
    """
    return (
        Path(os.path.realpath(path))
        if str(path.parent) in _SYSTEM_LINK_FOLDERS and path.is_file()
        else path
    )


def check_output(path: Path, kind: Kind, overwrite: bool = False, appending: bool = False) -> None:
    """Refuse an output that could not be written, before any work; create nothing.

    Args:
        path: The output file.
        kind: The kind of file to be written.
        overwrite: Replace any existing file except an unfinished results file.
        appending: Allow an unfinished results file, which the writer continues.

    Raises:
        UsageError: The path is a link or not a regular file, the existing file may not be replaced
            or is being written, or an ``adapter_config.json`` would be written into a folder with
            weights.
        InputError: The existing file cannot be read, or the output cannot be written.
    """
    path = resolve_output(path)
    # Path.is_symlink() would raise for names that no file can have.
    if os.path.islink(path) and str(path.parent) not in _SYSTEM_LINK_FOLDERS:  # noqa: PTH114
        raise UsageError(
            f"{path}: is a symbolic link, which is not followed; give the name of the file itself"
        )
    check_folder_of(path, in_place=appending)
    try:
        if path.name.lower() == _CONFIG and (weights := _find_weights_near(path)):
            raise UsageError(
                f"{path}: would change how the weights in {weights} are read; choose another folder"
            )
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            kind_found = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UsageError(f"{path}: is {kind_found}; choose another name")
        if not status.st_size:
            return
        if not appending and is_unfinished(path):
            os.close(
                lock(path)
            )  # refused while another process writes it, when it must not be deleted
            raise UsageError(
                path, "holds an unfinished run", "resume it with $resume, or delete the file"
            )
        if not overwrite and not kind.is_at(path):
            raise UsageError(
                path,
                f"exists and is not {kind.name} written by loradiag",
                "choose another name, or replace it with $overwrite",
            )
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; choose another name"
        ) from error


def check_outputs(
    inputs: Iterable[Path | str | None],
    outputs: Iterable[tuple[Path | None, Kind]],
    overwrite: bool,
) -> None:
    """Refuse outputs that would overwrite an input or each other, or that cannot be written, before
    any work.

    Args:
        inputs: Files that are read, or written by other means; None is skipped.
        outputs: The requested output files, and the kind of each; None is skipped.
        overwrite: As in ``check_output``; inputs are never replaced.

    Raises:
        UsageError: An output is refused.
    """
    used = {os.path.realpath(path) for path in inputs if path is not None}
    for path, kind in outputs:
        if path is None:
            continue
        if os.path.realpath(path) in used:
            raise UsageError(
                f"{path}: already read or written by this command; choose another name"
            )
        check_output(path, kind, overwrite)
        used.add(os.path.realpath(path))


def _find_weights_near(path: Path) -> Path | None:
    """Return the first file of weights in the folder of a path; None without one."""
    files = (file for file in path.parent.iterdir() if _WEIGHTS.fullmatch(file.name))
    return min(files, default=None)


def is_unfinished(path: Path) -> bool:
    """Return whether a file is a results file without its ``end`` record."""
    if not RESULTS.is_at(path):
        return False
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_LINE))
        last = file.read().rstrip().rpartition(b"\n")[2]
    return re.match(rb'\{ *"record" *: *"end"', last) is None


def check_folder_of(path: Path, in_place: bool = False) -> None:
    """Refuse a path that cannot be written, before any work; a missing parent folder is not
    created.

    Args:
        path: A file, or a folder to be created.
        in_place: Write to an existing file instead of replacing it.

    Raises:
        InputError: The parent folder is missing, permission is denied, or the name is invalid or
            too long.
    """
    try:
        with suppress(FileNotFoundError):
            # Temporary names are longer than that of the output, and the system limits them.
            (path.parent / f".{path.name}.part.{os.getpid()}").lstat()
        path.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: cannot be written: {reason}; choose another name") from error
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {folder}; create it first")
    if not (
        os.access(path, os.W_OK) if exists and in_place else os.access(folder, os.W_OK | os.X_OK)
    ):
        raise InputError(f"{path}: cannot be written: permission denied; choose another folder")


@contextmanager
def replacing(path: Path, kind: Kind | None = None, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Provide a temporary file that replaces ``path`` once it is complete and on disk.

    If anything fails before the replacement, the existing file is unchanged; the temporary file is
    removed. With a ``kind``, the output is checked before the replacement; a link that appears
    afterwards is replaced, never followed.

    Args:
        path: The output file.
        kind: The kind of file; None for a file in a folder that loradiag creates.
        overwrite: As in ``check_output``.

    Raises:
        InputError: See ``check_output``, or the file cannot be written; also in place of an
            ``OSError`` of the block.
    """
    path = resolve_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process with the same id, or planted
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            sync_descriptor(file.fileno())
        if kind is not None:
            check_output(path, kind, overwrite)
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    try:
        sync(path.parent)
    except OSError as error:
        _LOG.warning(
            "%s: was written, but may be lost in a loss of power: %s; check the disk",
            path,
            error.strerror,
        )


def write_whole(
    path: Path, content: str | bytes, kind: Kind | None = None, overwrite: bool = False
) -> None:
    """Write a file atomically: on failure, any existing file is unchanged or replaced as a whole.

    Args:
        path: The output file.
        content: The content; text is encoded as UTF-8.
        kind: The kind of file, which determines what it may replace and how it is signed; None for
            a file in a folder that loradiag creates.
        overwrite: As in ``check_output``.

    Raises:
        UsageError: See ``check_output``.
        InputError: See ``check_output``, or the file cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    if kind is not None:
        check_output(path, kind, overwrite)
        content = kind.sign(content)
    with replacing(path, kind, overwrite) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that it survives a loss of power.

    File systems without fsync, and folders that cannot be read, are skipped.

    Raises:
        OSError: The file cannot be opened, or the data cannot be stored: the disk is full or
            broken.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return  # the folder is writable but not readable
        raise
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Flush an open file to disk; file systems without fsync are skipped."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def lock(path: Path, tries: int = 5) -> int:
    """Open a file and lock it against other processes, until it is closed or this process ends.

    A missing file is created, empty. The lock is the system's (``flock``), so it ends with the
    process and leaves nothing to clean up. On a file system without locks, a warning is logged and
    the file is not locked; on a system without ``flock`` (Windows), it is not locked either.

    Args:
        path: The file.
        tries: Number of attempts if the file is replaced meanwhile. The last attempt accepts the
            opened file, since a few file systems never report the same inode twice.

    Returns:
        The file descriptor, which the caller closes.

    Raises:
        UsageError: Another process holds the lock.
        OSError: The file cannot be opened, or the lock fails for another reason than a file system
            without locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    try:
        _lock_file(descriptor, path)
        # A file that was replaced between the two calls is the old one: the lock would protect
        # nothing.
        if tries <= 1 or _is_at(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return lock(path, tries - 1)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_file(descriptor: int, path: Path) -> None:
    """Lock an open file as described in ``lock``.

    Raises:
        UsageError: Another process holds the lock.
        OSError: The lock fails for another reason than a file system without locks.
    """
    try:
        import fcntl  # not available on every system

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return
    except OSError as error:
        if error.errno in _LOCKED:
            raise UsageError(
                f"{path}: another process is writing it now; wait until it has ended, or choose "
                "another name"
            ) from error
        if error.errno not in _UNSUPPORTED:
            raise
        _LOG.warning(
            "%s: the file system has no locks; make sure that no other process writes this file",
            path,
        )


def open_regular(path: Path) -> BinaryIO:
    """Return a regular file, open for reading; a pipe in its place would wait for a writer, and a
    device has no end.

    Raises:
        InputError: The path is not a regular file.
        OSError: The file cannot be opened.
    """
    is_remote = hasattr(path, "file_info")  # a RemotePath, which opens itself
    return path.open("rb") if is_remote else os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """Return a descriptor of a regular file.

    Raises:
        InputError: The path is not a regular file.
        OSError: The file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it, opening a pipe waits
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(
            f"{path}: is not a regular file; a folder, pipe or device cannot be read in its place"
        )
    return descriptor
