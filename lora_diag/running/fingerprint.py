"""Identification of inputs in records: the path as text, and a fingerprint of the contents."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lora_diag.adapters.source import AdapterFiles
from lora_diag.deltas import natural_order
from lora_diag.errors import InputError
from lora_diag.storage import Checkpoint, hide_secrets
from lora_diag.storage.distributed import INDEX
from lora_diag.storage.remote import RemotePath

# A checkpoint in training keeps its names, shapes and sizes, so file contents are hashed, too:
# every byte of a file of up to WHOLE_BYTES and of an adapter; of a larger file one page per STRIDE,
# 0.4% of it. A tensor of at least a stride and a page contains a whole hashed page, and training or
# scaling rarely leaves a page unchanged.
WHOLE_BYTES = 2**26
STRIDE = 2**20
SAMPLE_BYTES = 4096

# Sampled pages of a remote file without a version from its server; each is a request.
REMOTE_SAMPLES = 16

# Hex digits of a fingerprint.
DIGITS = 32

# Files with parts of tensors, in a folder that is read as one file.
PARTS = ("*.safetensors", ".metadata", "*.distcp", "model_world_size_*.pt", "*_states.pt")


def legible(text: Path | str) -> str:
    r"""Return a path, or text that contains one, in valid UTF-8; other bytes are escaped.

    Passwords and signatures of addresses are removed.

    >>> legible("caf\udce9.safetensors")
    'caf\\xe9.safetensors'
    """
    return hide_secrets(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def fingerprint_of_adapter(source: AdapterFiles) -> str:
    """Return the fingerprint of an adapter, from its config and every byte of its weights, if they
    are local.
    """
    source = source.stored or source  # options of the user are not part of the files
    return fingerprint(
        source.checkpoint, source.config.values if source.config is not None else None, whole=True
    )


def fingerprint(
    checkpoint: Checkpoint, settings: Mapping[str, Any] | None = None, whole: bool = False
) -> str:
    """Return 32 hex digits that identify the contents of a checkpoint and change with nearly every
    change of them.

    The hash covers name, shape, dtype and storage format of every tensor, the sizes of the files,
    their bytes (for files of more than 64 MiB one page of 4 KiB per MiB), and the settings. Paths
    and times are not included, so a copy has the same fingerprint. The bytes of a remote file are
    replaced by its ETag or, without one, by sampled pages, so that the fingerprint differs from
    that of a local copy. A change between the sampled pages of a large file that keeps its size is
    not detected; use ``content_hash`` to detect every change.

    Args:
        checkpoint: The opened checkpoint.
        settings: Other data that determine how tensors are read: an adapter's config.
        whole: Whether to hash every byte of large local files.

    Raises:
        InputError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint, key=natural_order):
        info = checkpoint[name]
        digest.update(json.dumps([name, info.shape, info.dtype, info.stored]).encode())
    for file in files_of(checkpoint):
        try:
            digest.update(_digest_file(file, whole))
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    digest.update(json.dumps(dict(settings or {}), sort_keys=True, default=str).encode())
    return digest.hexdigest()[:DIGITS]


def names_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the distinct names of a checkpoint: from its config, its Hub id or address, and its
    folder.
    """
    path = checkpoint.path
    stored = str(checkpoint.config.get("_name_or_path") or "")
    real_path = str(path) if isinstance(path, RemotePath) else os.path.realpath(path)
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", f"{real_path}/")
    folder = real_path
    if path.suffix in {".safetensors", ".bin", ".pt", ".json"}:
        folder = os.path.dirname(real_path)  # noqa: PTH120
    folder_name = f"{cached[1]}/{cached[2]}" if cached else os.path.basename(folder)  # noqa: PTH119
    remote_id = () if os.path.exists(path) else (str(path),)  # noqa: PTH110  (a Hub id or an address)
    return tuple(dict.fromkeys(name for name in (stored, *remote_id, folder_name) if name))


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that hold a checkpoint's tensors; for parts of tensors, all such files of
    the folder.

    For sparse patches they are those of the patches, without those of BASE.

    A web server does not list them: their index takes their place.
    """
    found: set[Path] = set()
    for source in {checkpoint.file_of(name) for name in checkpoint}:
        parts = (
            [file for pattern in PARTS for file in source.glob(pattern)]
            if source.is_dir()
            else [source]
        )
        found.update(parts or (file for file in [source / INDEX] if file.is_file()))
    return sorted(found)


def content_hash(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a file; for several files, that of the list printed by ``sha256sum`` in
    their folder.

    Every byte is read, at 1 to 2 GB per second if the disk is fast enough.
    """
    hashes = [(file.name, _hash_file_once(file)) for file in files]
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256(
        "".join(f"{digest}  {name}\n" for name, digest in hashes).encode()
    ).hexdigest()


def _hash_file_once(file: Path) -> str:
    """Return the SHA-256 of a file, computed once per process while it stays unchanged: BASE may
    occur many times.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        if isinstance(file, RemotePath):
            return _hash_file(file, file.file_info().size, file.file_info().version)
        status = file.stat()
        return _hash_file(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


@cache
def _hash_file(file: Path, *_: object) -> str:
    """Return the SHA-256 of a file; the other arguments are the key of the cache: size and version
    of the file.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_file(file: Path, whole: bool) -> bytes:
    """Return the fingerprint of one file: the hash of its bytes, or of its size and sampled pages.

    For a remote file with an ETag, the ETag replaces the pages, each of which would be a request.
    """
    if isinstance(file, RemotePath):
        size, version = file.file_info().size, file.file_info().version
        if version:
            return f"{size};{version}".encode()
        return _digest_sample(file, size, max(1, size // (REMOTE_SAMPLES - 1)))
    status = file.stat()
    if whole or status.st_size <= WHOLE_BYTES:
        return _hash_file(file, status.st_size, status.st_mtime_ns).encode()
    return _digest_sample(file, status.st_size, STRIDE, status.st_mtime_ns)


@cache
def _digest_sample(file: Path, size: int, stride: int, *_: object) -> bytes:
    """Return the hash of a file's size, one page per stride and its last page; the rest is the key
    of the cache.
    """
    digest = hashlib.sha256(f"{size};".encode())
    last = max(0, size - SAMPLE_BYTES)
    with file.open("rb") as stream:
        for start in [*range(0, last, stride), last]:
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
