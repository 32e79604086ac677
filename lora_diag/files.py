"""Outputs: what may be written where, and how a file is replaced so that it is never half there.

One rule for every output of every command:

- Nothing is written through a symbolic link. A linked folder above the file is fine.
- A file that exists is replaced only if it carries the mark of the kind of file that is written (``Kind``), or if the
  user says so (``--overwrite``).
- An unfinished results file is never replaced, and no ``adapter_config.json`` is written beside weights.

Text gets a signature as its last line, a digest of all before it: a file that was edited by hand since is no longer
loradiag's own. Formats without comments are known by how they begin, Parquet by a key in its footer.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_diag.errors import InputError, UsageError

_LOG = logging.getLogger(__name__)

# How a file system says that it cannot do what was asked: some NFS mounts have no locks, some FUSE mounts no fsync.
_CANNOT = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF}
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}

# Not every system has it; where it is missing, the check of the path alone keeps from writing through a link.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)

# Folders of the system's own links to open files, such as /dev/stdout, which are followed.
_SYSTEM_LINKS = {"/dev", "/dev/fd", "/proc/self/fd"}

# Bytes read to find a mark: of the beginning, of the end (a Parquet footer of 10,000 columns has 3 MB), and of the end
# of a results file, whose last line is short.
_HEAD, _TAIL, _LAST_LINE = 1 << 12, 1 << 23, 1 << 16

# Weights for which a config of this name decides how they are read.
_CONFIG = "adapter_config.json"
_WEIGHTS = re.compile(
    r"(adapter_model|model|pytorch_model|pytorch_lora_weights|consolidated)\b.*\.(safetensors|bin|pth?|ckpt|json)|.*\.gguf",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file that loradiag writes, and its mark.

    Args:
        name: In messages, with its article.
        head: Regular expression that the first bytes match.
        tail: Regular expression that is found in the last bytes.
        comment: How the format writes a comment on a line of its own, for a signature; empty if it has none.

    A kind with neither is never replaced without ``--overwrite``: it is made to be edited, or costs hours.
    """

    name: str
    head: bytes | None = None
    tail: bytes | None = None
    comment: str = ""

    def sign(self, content: bytes) -> bytes:
        """Return the content with its signature as last line, where the format has comments."""
        if not self.comment:
            return content
        content = content if content.endswith(b"\n") else content + b"\n"
        return content + self._signature(content)

    def _signature(self, content: bytes) -> bytes:
        digest = hashlib.sha256(self.name.encode() + b"\0" + content).hexdigest()
        return f"{self.comment.format('loradiag ' + digest)}\n".encode()

    def is_at(self, path: Path) -> bool:
        """Return whether the file carries the mark of this kind.

        Raises:
            OSError: It cannot be read.
        """
        with path.open("rb") as file:
            if self.comment:
                content = file.read()
                body = content[: content.rstrip(b"\n").rfind(b"\n") + 1]
                return content == body + self._signature(body)
            if self.head is not None:
                return re.match(self.head, file.read(_HEAD), re.DOTALL) is not None
            return self.tail is not None and re.search(self.tail, _tail(file, _TAIL), re.DOTALL) is not None


def _tail(file: BinaryIO, size: int) -> bytes:
    file.seek(max(0, os.fstat(file.fileno()).st_size - size))
    return file.read()


RESULTS = Kind("a results file", head=rb'\{ *"record" *: *"run"')
PAGE = Kind("an HTML report", comment="<!-- {} -->")
MARKDOWN = Kind("a Markdown report", comment="<!-- {} -->")
CSV = Kind("a CSV table of records", head=rb"results(,record|\r?\n\Z)")
# The key "loradiag" with the value "report" among the key-value metadata, in Thrift's compact protocol.
PARQUET = Kind("a Parquet table of records", tail=rb"\x18\x08loradiag\x18\x06report.*PAR1\Z")
PNG = Kind("a figure", head=rb"\x89PNG\r\n\x1a\n.{25}\x00\x00\x00\x11tEXtSoftware\x00loradiag")
SVG = Kind("a figure", comment="<!-- {} -->")
PDF = Kind("a figure", comment="% {}")
JUNIT = Kind("a JUnit report", comment="<!-- {} -->")
SARIF = Kind(
    "a SARIF log",
    head=rb'\{\s*"\$schema": "[^"]*",\s*"version": "[^"]*",\s*"runs": \[\s*\{\s*"tool": \{\s*"driver": \{\s*'
    rb'"name": "loradiag"',
)
# JSON has no comments, and PEFT warns of keys that it does not know: the order of the first keys is the mark. PEFT
# itself writes them sorted.
CONFIG = Kind(
    "a PEFT config",
    head=rb'\{\n  "peft_type": "LORA",\n  "task_type": [^\n]*,\n  "base_model_name_or_path": [^\n]*,\n  "r": \d+,\n'
    rb'  "lora_alpha": [\d.e+-]+,\n  "rank_pattern": \{',
)
POLICY = Kind("a policy")
# Only the block between the marks of ``reports.model_card`` changes: any text may be there, but no page and no JSON.
CARD = Kind("a Markdown file", head=rb"(?!\s*(?:<!doctype|<\?xml|\{))[^\x00]*\Z")
SECOND_MOMENTS = Kind("a file of second moments")
SNAPSHOT = Kind("a gradient snapshot", head=rb'.{8}\{"__metadata__":\{[^}]*"kind":"gradient"')


def output_path(path: Path) -> Path:
    """Return where an output goes: the path as it is, or the file behind one of the system's own links."""
    return Path(os.path.realpath(path)) if str(path.parent) in _SYSTEM_LINKS and path.is_file() else path


def check_output(path: Path, kind: Kind, overwrite: bool = False, appending: bool = False) -> None:
    """Refuse, before any work, an output that would not be written; create nothing.

    Args:
        path: The file.
        kind: What is to be written.
        overwrite: Replace whatever file is there.
        appending: The writer takes care of an unfinished results file itself.

    Raises:
        UsageError: A link or something that is no file is there, or a file that is not replaced.
        InputError: It could not be written.
    """
    path = output_path(path)
    # Not Path.is_symlink(), which raises for names that no file can have.
    if os.path.islink(path) and str(path.parent) not in _SYSTEM_LINKS:  # noqa: PTH114
        raise UsageError(f"{path}: is a symbolic link, which is not followed; give the name of the file itself")
    check_folder_of(path, in_place=appending)
    if path.name.lower() == _CONFIG and (weights := _weights_beside(path)):
        raise UsageError(f"{path}: would change how the weights in {weights} are read; choose another folder")
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path}: is not a file; choose another name")
        if not found.st_size:
            return
        if not appending and is_unfinished(path):
            raise UsageError(f"{path}: holds an unfinished run; continue it with --resume, or delete it first")
        if not overwrite and not kind.is_at(path):
            raise UsageError(
                f"{path}: exists and is not {kind.name} as loradiag wrote it; choose another name, or replace it with "
                "--overwrite"
            )
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; choose another name") from error


def _weights_beside(path: Path) -> Path | None:
    names = (each for each in path.parent.iterdir() if _WEIGHTS.fullmatch(each.name))
    return min(names, default=None)


def is_unfinished(path: Path) -> bool:
    """Return whether a file is a results file without its ``end`` record.

    Raises:
        OSError: It cannot be read.
    """
    if not RESULTS.is_at(path):
        return False
    with path.open("rb") as file:
        last = _tail(file, _LAST_LINE).rstrip().rpartition(b"\n")[2]
    return re.match(rb'\{ *"record" *: *"end"', last) is None


def check_folder_of(path: Path, in_place: bool = False) -> None:
    """Refuse, before any work, what nothing could be written to: folders are not made of a typo in a path.

    Args:
        path: A file, or a folder that is to be made.
        in_place: A file that is there is written to, not replaced.

    Raises:
        InputError: There is no such folder, or nothing may be written there.
    """
    try:
        path.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: cannot be written: {reason}") from error
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {folder}; create it first")
    if not (os.access(path, os.W_OK) if exists and in_place else os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: cannot be written: permission denied")


@contextmanager
def replacing(path: Path, kind: Kind | None = None, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes the place of ``path`` once it is whole and on the disk.

    Whatever goes wrong, what was at ``path`` is still there and nothing is left beside it. What is there is checked
    once more at the end; a link that appears after that is replaced, never followed.

    Args:
        path: The file.
        kind: What is written; None for a file of a folder that loradiag is making.
        overwrite: Replace whatever file is there.

    Raises:
        UsageError: As ``check_output``.
        InputError: It cannot be written.
    """
    path = output_path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)  # of a killed process that had the same number, or a trap
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            sync_descriptor(file.fileno())
        if kind is not None:
            check_output(path, kind, overwrite)
        beside.replace(path)
        sync(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, kind: Kind | None = None, overwrite: bool = False) -> None:
    """Write a file, or leave everything as it was.

    Args:
        path: The file.
        content: Text is written as UTF-8.
        kind: What it is, which decides what it may replace and how it is signed; None for a file of a folder that
            loradiag is making.
        overwrite: Replace whatever file is there.

    Raises:
        UsageError: As ``check_output``.
        InputError: It cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    if kind is not None:
        check_output(path, kind, overwrite)
        content = kind.sign(content)
    with replacing(path, kind, overwrite) as file:
        file.write(content)


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
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
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
