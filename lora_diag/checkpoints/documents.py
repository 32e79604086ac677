"""The JSON files beside the weights: read with a bound, and an object or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError

# The configurations on the Hub are below 0.1 MB (those with a label per class below 2 MB); an index takes about 100
# bytes a tensor.
MAX_CONFIG_BYTES = 10_000_000
MAX_INDEX_BYTES = 100_000_000


def loads(content: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    r"""Parse JSON whose strings are text: half a character (``\ud800``), which Python lets pass, is none.

    Names are written into results and adapters, where it could not stand.

    Args:
        content: The JSON.
        pairs: Makes an object of its pairs; None for a dictionary.

    Raises:
        ValueError: It is not JSON, or a string is not text.
    """
    value = json.loads(content, object_pairs_hook=pairs)
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_object(path: Path, words: str, limit: int) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        words: What it should be, for the message: ``shard index``.
        limit: Bytes beyond which it is not read.

    Raises:
        InputError: It is too large, cannot be read, is not JSON, or is not an object.
    """
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{path}: is larger than {limit:,} bytes, so it is not a {words}")
        content = loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a readable {words}: it holds no text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not a readable {words}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a {words}: it holds a {type(content).__name__}, not an object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return what ``config.json`` in a folder says; empty if there is none."""
    path = folder / "config.json"
    return read_object(path, "model configuration", MAX_CONFIG_BYTES) if path.is_file() else {}
