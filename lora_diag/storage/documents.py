"""JSON files next to the weights, size-limited and required to hold an object; names of files;
texts for results.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from lora_diag.errors import InputError, damaged
from lora_diag.files import open_regular

# Configurations on the Hub are below 0.1 MB (below 2 MB with one label per class); an index takes
# about 100 bytes per tensor.
MAX_CONFIG_BYTES = 10_000_000
MAX_INDEX_BYTES = 100_000_000

# Settings of GPTQ that AutoGPTQ writes next to a config.json without them.
QUANTIZE_CONFIG = "quantize_config.json"


def loads(content: bytes | str) -> Any:
    r"""Return the value of JSON in which no object has a key twice.

    Readers differ in which of two values they take. A lone surrogate (``\ud800``), which results
    and adapters cannot hold, is refused, too.

    Raises:
        ValueError: The content is not JSON, or refused.
        RecursionError: The content is nested too deeply.
    """
    # json.loads would decode bytes of a lone surrogate.
    text = content if isinstance(content, str) else content.decode(json.detect_encoding(content))
    value = json.loads(text, object_pairs_hook=_build_object)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dictionary of these pairs; raise ValueError if a key repeats."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{repeated!r} appears twice")
    return entries


def read_object(path: Path, kind: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: The file.
        kind: Kind of file for error messages, such as ``shard index``.
        limit: Maximum size in bytes.

    Raises:
        InputError: The file is missing, too large, cannot be read, is not JSON, does not hold an
            object, or has a key twice.
    """
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{path}: is larger than {limit:,} bytes, too large for a {kind}")
        with open_regular(path) as file:
            content = loads(file.read())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "no such file; check the path" if missing else f"cannot be read: {error.strerror}"
        raise InputError(f"{path}: {problem}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not a readable {kind}: it is not UTF-8 text; write it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not a readable {kind} ({error}); write it again") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: is not a {kind}: it holds a {type(content).__name__}, not an object; correct "
            "it"
        )
    return content


def is_plain_name(name: Any) -> TypeGuard[str]:
    """Return whether a value from a file is the name of a file in the same folder, and no path to
    another.
    """
    return isinstance(name, str) and name not in {"", ".", ".."} and not set(name) & set("/\\\0")


def check_unicode(names: Iterable[str], path: Path) -> None:
    """Refuse names with a lone surrogate, which a results file cannot hold.

    Raises:
        InputError: There is such a name.
    """
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise damaged(path, f"a tensor name is not valid Unicode ({error})") from error
