"""What an input is: an adapter, a checkpoint or results; and the one function that opens the first
two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_diag.adapters.adapter import FAMILIES, Adapter, read_adapter
from lora_diag.adapters.source import ADAPTER_WEIGHTS, CONFIG, GGUF, StatedAlpha, find_single_file
from lora_diag.errors import InputError
from lora_diag.records import is_results_file
from lora_diag.storage import (
    Checkpoint,
    Located,
    locate_files,
    open_checkpoint,
    read_checkpoint,
)
from lora_diag.storage.gguf import GgufFile

Kind = Literal["adapter", "checkpoint", "results"]

# Names of tensors that occur only in adapters: those of the families, and of virtual tokens.
_MARKS = "|".join(re.escape(mark) for family in FAMILIES for mark in family.marks)
MARKS = re.compile(rf"(^|\.|_)({_MARKS}|prompt_embeddings)(\.|_|$)")
STARTS = tuple(start for family in FAMILIES for start in family.starts)


@dataclass(frozen=True, slots=True)
class Input(Located):
    """An input that exists, and what it is.

    Args:
        kind: ``checkpoint`` for all that is neither an adapter nor results, so that what cannot be
            read is refused where a checkpoint is opened. Patches and gradients are stored as
            checkpoints.
    """

    kind: Kind

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter."""
        return self.kind == "adapter"


def locate(path: Path | str) -> Input:
    """Return the files of a path, and what they are.

    Args:
        path: A path, a Hugging Face Hub id, which is downloaded if needed, or an address.
    """
    located = locate_files(path)
    kind: Kind = "checkpoint"
    if is_results_file(located.files):
        kind = "results"
    elif is_adapter(located.files):
        kind = "adapter"
    return Input(located.path, located.files, kind)


def open_input(source: Input, stated_alpha: StatedAlpha = None) -> Checkpoint | Adapter:
    """Open a checkpoint or an adapter by its headers; its type says which of the two it is.

    Args:
        source: The input.
        stated_alpha: α of an adapter whose files give none; ``rank`` for α = r.
    """
    return read_adapter(source, stated_alpha) if source.is_adapter else read_checkpoint(source)


def is_adapter(path: Path) -> bool:
    """Return whether a file or folder is read as an adapter, not as a checkpoint: by names of files
    and tensors or a GGUF header.

    False if nothing is there, or it cannot be read.
    """
    if path.is_dir():
        if (path / CONFIG).is_file() or any((path / name).is_file() for name in ADAPTER_WEIGHTS):
            return True
        return (single := find_single_file(path)) is not None and is_adapter(single)
    if path.is_file() and path.suffix == GGUF:
        return _is_gguf_adapter(path)
    if (
        not path.is_file()
        or path.suffix not in {".safetensors", ".bin", ".pt"}
        or path.name.endswith(".index.json")
    ):
        return False
    if path.name in ADAPTER_WEIGHTS:
        return True
    try:
        return any(name.startswith(STARTS) or MARKS.search(name) for name in open_checkpoint(path))
    except InputError:
        return False  # errors are reported when it is opened


def _is_gguf_adapter(path: Path) -> bool:
    """Return whether the header of a GGUF file is that of an adapter; False if it
    cannot be read.
    """
    try:
        return GgufFile(path).metadata.get("general.type") == "adapter"
    except InputError:
        return False  # errors are reported when it is opened
