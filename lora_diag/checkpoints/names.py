"""Names of weights as wrappers store them, and the plain names under which they are presented.

``torch.compile``, FSDP and activation checkpointing wrap modules and add their attribute to every name. No model has a
module ``_orig_mod``, so these attributes are dropped anywhere in a name. ``module`` (DataParallel, DeepSpeed) could be
a model's own name, so it is dropped only if every name begins with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

from lora_diag.checkpoints.tensors import TensorFile, TensorInfo

if TYPE_CHECKING:
    import torch

WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIX = "module."


class Renamed:
    """A file whose tensors are presented under other names.

    Args:
        file: The file.
        stored: Presented name → name in the file, for all tensors of the file.
    """

    def __init__(self, file: TensorFile, stored: Mapping[str, str]) -> None:
        self._file = file
        self._stored = stored
        self.path = file.path
        self.notes = file.notes
        self.metadata = file.metadata
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, info.shape, info.dtype)
            for name, old in stored.items()
            if (info := file.tensors[old])
        }

    def __copy__(self) -> Renamed:
        """Copy the file as well: each copy has its own descriptor."""
        return Renamed(copy(self._file), self._stored)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop`` of a tensor, by its presented name."""
        return self._file.read(self._stored[name], start, stop)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, by its presented name."""
        return self._file.read_bytes(self._stored[name])


def drop_wrappers(files: Sequence[TensorFile]) -> tuple[tuple[TensorFile, ...], tuple[str, ...]]:
    """Present the tensors of a checkpoint without the attributes of wrappers.

    Args:
        files: The files of the checkpoint.

    Returns:
        The files, and a note if any name changed. If two tensors would get the same name, nothing changes.
    """
    stored = [name for file in files for name in file.tensors]
    plain = dict(zip(stored, plain_names(stored), strict=True))
    if all(old == new for old, new in plain.items()) or len(set(plain.values())) < len(plain):
        return tuple(files), ()
    old, new = next((old, new) for old, new in plain.items() if old != new)
    renamed = tuple(Renamed(file, {plain[name]: name for name in file.tensors}) for file in files)
    return renamed, (f"wrapper attributes are dropped from names: {old} is {new}",)


def plain_names(names: Sequence[str]) -> list[str]:
    """Drop the attributes of wrappers from names.

    >>> plain_names(["module._orig_mod.a.weight", "module._orig_mod.b._fsdp_wrapped_module.weight"])
    ['a.weight', 'b.weight']
    >>> plain_names(["module.weight", "head.weight"])
    ['module.weight', 'head.weight']
    """
    plain = [WRAPPER.sub("", name) for name in names]
    while plain and all(name.startswith(PREFIX) for name in plain):
        plain = [name.removeprefix(PREFIX) for name in plain]
    return plain
