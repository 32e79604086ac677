"""Names of stored tensors: attributes of wrappers are dropped, and unsupported quantized formats are refused.

``torch.compile``, FSDP and activation checkpointing wrap modules and add their attribute to every name. No model has a
module ``_orig_mod``, so these attributes are dropped anywhere in a name. ``module`` (DataParallel, DeepSpeed) could be
a model's own name, so it is dropped only if every name begins with it.

Unsupported formats of quantized weights are recognized by tensor names, dtypes or the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.tensors import FLOAT_DTYPES, Checkpoint, TensorFile, TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch


WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIX = "module."

# Endings of tensor names that a single method uses, the most specific first.
PACKED = (
    (".bitmask", "compressed-tensors (sparse)"),
    (".W_q", "HQQ"),
    (".codebooks", "AQLM"),
    ("._data", "quanto"),
)
# Endings that also occur on float tensors of ordinary models; they count only on tensors of other dtypes.
AMBIGUOUS = frozenset({"._data", ".bitmask"})

# Methods of ``quantization_config`` that are dequantized, as far as the tensors allow it.
READ_METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "gptq", "awq", "mxfp4")

# Formats in which every quantized weight is packed into tensors of other names.
PACKING_METHODS = ("gptq", "awq", "mxfp4")

METHOD_KEY = "quant_method in config.json"
FLOATS_ADVICE = "if these weights are plain floats, remove quantization_config from config.json"
NOT_FLOATS_ADVICE = (
    "the weights are not stored as floats; give the unquantized checkpoint, or analyse the adapter alone"
)

# Names of PEFT factors in a running model contain the adapter's name; names in a saved adapter do not.
UNMERGED_FACTOR = re.compile(r"(.+)\.lora_(?:A|B|embedding_A|embedding_B)\.(?!weight$)[^.]+(?:\.weight)?")


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
    stored_names = [name for file in files for name in file.tensors]
    plain = dict(zip(stored_names, plain_names(stored_names), strict=True))
    if all(old == new for old, new in plain.items()) or len(set(plain.values())) < len(plain):
        return tuple(files), ()
    old, new = next((old, new) for old, new in plain.items() if old != new)
    renamed = tuple(Renamed(file, {plain[name]: name for name in file.tensors}) for file in files)
    return renamed, (f"wrapper attributes are dropped from names: {old} is {new}",)


def plain_names(names: Sequence[str]) -> list[str]:
    """Return names without the attributes of wrappers.

    >>> plain_names(["module._orig_mod.a.weight", "module._orig_mod.b._fsdp_wrapped_module.weight"])
    ['a.weight', 'b.weight']
    >>> plain_names(["module.weight", "head.weight"])
    ['module.weight', 'head.weight']
    """
    plain = [WRAPPER.sub("", name) for name in names]
    while plain and all(name.startswith(PREFIX) for name in plain):
        plain = [name.removeprefix(PREFIX) for name in plain]
    return plain


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``quantization_config`` under any of its historical names; empty if there is none."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if isinstance(value := config.get(key), dict):
            return value
    return {}


def refuse_packed(source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse unsupported quantization methods.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.

    Raises:
        InputError: A tensor's name or the configuration belongs to such a method.
    """
    method = config.get("quant_method")
    suffixes = tuple(suffix for suffix, _ in PACKED)
    packed = [name for name in source if name.endswith(suffixes)]
    for suffix, label in PACKED:
        for name in packed:
            if name.endswith(suffix) and (suffix not in AMBIGUOUS or source[name].dtype not in FLOAT_DTYPES):
                label = str(method).upper() if method and str(method).upper() in label else label
                raise InputError(f"{source.file_of(name)}: is {label}-quantized ({name}); {NOT_FLOATS_ADVICE}")
    if method is not None and method not in READ_METHODS:
        raise InputError(
            f"{source.path}: is quantized with {method!r} ({METHOD_KEY}), which is not supported; {NOT_FLOATS_ADVICE}; "
            f"{FLOATS_ADVICE}"
        )


def refuse_unfound(source: Checkpoint, config: Mapping[str, Any], stored: Collection[str | None]) -> None:
    """Refuse a checkpoint that is packed according to its configuration but has no packed tensor.

    Args:
        source: The checkpoint as stored.
        config: Its ``quantization_config``.
        stored: Storage formats of the quantized weights that were found.

    Raises:
        InputError: None is of the configured method.
    """
    method = config.get("quant_method")
    if method in PACKING_METHODS and not any(str(kind).startswith(method) for kind in stored):
        raise InputError(
            f"{source.path}: is quantized with {method!r} ({METHOD_KEY}), but holds no such weight; {FLOATS_ADVICE}"
        )


def refuse_integer_weights(presented: Checkpoint) -> None:
    """Refuse integer matrices of no known format, which would otherwise be silently skipped.

    Args:
        presented: The checkpoint after dequantization.

    Raises:
        InputError: There is such a matrix.
    """
    for name in presented:
        info = presented[name]
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype.startswith(("int", "uint", "F4", "F6")):
            raise InputError(
                f"{presented.file_of(name)}: {name} is stored as {info.dtype}, in no known quantized format; "
                f"{NOT_FLOATS_ADVICE}"
            )


def refuse_unmerged(source: Checkpoint) -> None:
    """Refuse the state dict of a running PEFT model, which has no ``lora_alpha``.

    Raises:
        InputError: A weight and the factors of its adapter are both present.
    """
    for name in source:
        match = UNMERGED_FACTOR.fullmatch(name)
        if match and any(f"{match[1]}.{suffix}" in source for suffix in ("base_layer.weight", "weight")):
            raise InputError(
                f"{source.file_of(name)}: is an unmerged PEFT state dict ({name} and its weight are both present) "
                "without lora_alpha; save the adapter with save_pretrained(), or the model after merge_and_unload()"
            )
