"""A file is written beside its place and then renamed, so that it is never half there.

Knows nothing of what is written. Results files that grow line by line have their own way (``results/writing.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_diag.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write to, which takes the place of ``path`` once it is whole.

    Whatever goes wrong, what was at ``path`` is still there and nothing is left beside it. A symbolic link stays one:
    the file that it points to is replaced.

    Raises:
        InputError: It cannot be written.
    """
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(place)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, or leave everything as it was.

    Raises:
        InputError: It cannot be written.
    """
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
