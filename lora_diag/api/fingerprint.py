"""Words and numbers that stand for an input in a record: its path as text, and a fingerprint of what it holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
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
    the settings; neither paths nor times, so that a copy of the same input has the same fingerprint.

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
    for file in sorted({path for name in checkpoint for path in _files(checkpoint.file_of(name))}):
        try:
            for piece in _sampled(file):
                found.update(piece)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    found.update(json.dumps(dict(settings or {}), sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """Return a file itself, or the weights in a folder whose files hold pieces of tensors."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


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
