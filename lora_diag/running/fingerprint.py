"""Words and numbers that stand for an input in a record: its path as text, and a fingerprint of what it holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lora_diag.checkpoints import Checkpoint, shown
from lora_diag.checkpoints.remote import RemotePath
from lora_diag.deltas import natural_order
from lora_diag.errors import InputError

# A checkpoint that is trained on keeps its names, shapes and sizes. So a few pages of each file are hashed, too: 64 KiB
# a shard cost nothing on any disk, and a fine-tuned weight rarely keeps a whole page.
SAMPLES = 16
SAMPLE_BYTES = 4096

# Read at a time for the hash of a whole file.
HASHED_BYTES = 2**20


def legible(text: Path | str) -> str:
    r"""Return a path, or words that hold one, as text that UTF-8 can write; other bytes are spelled out.

    What an address carries besides the place, such as a signature, is left out.

    >>> legible("caf\udce9.safetensors")
    'caf\\xe9.safetensors'
    """
    return shown(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def fingerprint(checkpoint: Checkpoint, settings: Mapping[str, Any] | None = None) -> str:
    """Return 16 hex digits that change when the input does.

    Hashed are every tensor's name, shape, dtype and storage format, the sizes of the files, some pages of each, and
    the settings; neither paths nor times, so that a copy of the same input has the same fingerprint. A change between
    the pages that keeps all sizes goes unnoticed: ``content_hash`` is for those who must know.

    Args:
        checkpoint: The opened checkpoint.
        settings: What else says how its tensors are read: an adapter's config.

    Raises:
        InputError: A file cannot be read.
    """
    found = hashlib.sha256()
    for name in sorted(checkpoint, key=natural_order):
        info = checkpoint[name]
        found.update(json.dumps([name, info.shape, info.dtype, info.stored]).encode())
    for file in files_of(checkpoint):
        try:
            for piece in _sampled(file):
                found.update(piece)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    found.update(json.dumps(dict(settings or {}), sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that hold a checkpoint's tensors; of pieces of tensors, those of the folder."""
    homes = {checkpoint.file_of(name) for name in checkpoint}
    return sorted({file for home in homes for file in (home.glob("*.safetensors") if home.is_dir() else [home])})


def content_hash(files: Sequence[Path]) -> str:
    """Return the SHA-256 of one file; of several, that of the list that ``sha256sum`` prints of them in their folder.

    Every byte is read: 1 to 2 GB take a second, if the disk gives them.

    Raises:
        InputError: A file cannot be read.
    """
    found = [(file.name, _file_hash(file)) for file in files]
    if len(found) == 1:
        return found[0][1]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in found).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    """Hash a file, once in the life of this process as long as it stays what it is: BASE may be named many times."""
    try:
        if isinstance(file, RemotePath):
            return _hashed(file, file.facts().size, file.facts().version)
        status = file.stat()
        return _hashed(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


@cache
def _hashed(file: Path, *_: object) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(HASHED_BYTES):
            found.update(piece)
    return found.hexdigest()


def _sampled(file: Path) -> Iterator[bytes]:
    """Yield a file's size and pages spread evenly over it, the first and the last among them.

    A store's own word for the version of a file, its ETag, stands for the pages: they would be a request each.
    """
    if isinstance(file, RemotePath) and file.facts().version:
        yield f"{file.facts().size};{file.facts().version}".encode()
        return
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size if not isinstance(file, RemotePath) else file.facts().size
        yield f"{size};".encode()
        last = max(0, size - SAMPLE_BYTES)
        for start in sorted({last * sample // (SAMPLES - 1) for sample in range(SAMPLES)}):
            stream.seek(start)
            yield stream.read(SAMPLE_BYTES)
