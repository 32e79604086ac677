"""Open a checkpoint: its files by their headers, the tensors by plain names, its configuration.

``torch.compile``, FSDP and activation checkpointing wrap modules and add their attribute to every
name. No model has a module ``_orig_mod``, so these attributes are dropped anywhere in a name.
``module`` (DataParallel, DeepSpeed) could be a model's own name, so it is dropped only if every
name begins with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.errors import InputError, damaged
from lora_diag.storage import documents, integers, quantized, ranks
from lora_diag.storage.distributed import PIECES
from lora_diag.storage.documents import is_plain_name, read_object
from lora_diag.storage.gguf_model import GgufModel, derive_config, open_model
from lora_diag.storage.locating import (
    ADAPTER_CONFIG,
    WEIGHTS,
    Located,
    OpenFolder,
    WeightFiles,
    find_weights,
    locate_files,
    refuse_foreign,
)
from lora_diag.storage.pickled import TorchFile
from lora_diag.storage.remote import RemotePath
from lora_diag.storage.safetensors import SafetensorsFile
from lora_diag.storage.tensors import Checkpoint, TensorFile

if TYPE_CHECKING:
    import torch

# The formats, in the order in which they are tried.
FORMATS: tuple[type[SafetensorsFile] | type[GgufModel] | type[TorchFile], ...] = (
    SafetensorsFile,
    GgufModel,
    TorchFile,
)

OpenFile = SafetensorsFile | GgufModel | TorchFile

WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
PREFIX = "module."

# Names of PEFT factors in a running model contain the adapter's name; names in a saved adapter do
# not.
UNMERGED_FACTOR = re.compile(
    r"(.+)\.lora_(?:A|B|embedding_A|embedding_B)\.(?!weight$)[^.]+(?:\.weight)?"
)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint by its headers; see ``read_checkpoint``.

    Args:
        path: A file, a ``*.index.json``, a folder that contains either, a Hugging Face Hub id, or
            an address (``s3://``, ``gs://``, ``hf://``, ``https://``, ``http://``) of one of the
            first three.

    Raises:
        InputError: ``locate_files`` or ``read_checkpoint`` refuses it.
    """
    return read_checkpoint(locate_files(path))


def read_checkpoint(located: Located) -> Checkpoint:
    """Open a checkpoint by its headers; only files in torch's legacy format are loaded whole.

    A torch file at an address is downloaded.

    Returns:
        The checkpoint, with at least one tensor.

    Raises:
        InputError: Nothing readable was found, a file is damaged or missing, or the weights are in
            an unsupported form.
    """
    path, weights = located.path, find_weights(located.files)
    files, kind, notes = _open(weights)
    files, renaming_notes = drop_wrappers(files)
    models = [file for file in files if isinstance(file, GgufModel)]
    config = derive_config(models) if models else _read_config(weights)
    stored = Checkpoint(path, kind, files, config=config)
    if len(stored) == 0:
        raise InputError(f"{weights.path}: holds no tensors; save the model again")
    refuse_unmerged(stored)
    settings = _read_quantization(stored, weights)
    quantized.refuse_packed(stored, settings)
    files, zero_notes = quantized.dequantize(stored, settings)
    checkpoint = Checkpoint(path, kind, files, config=config)
    quantized.refuse_integer_weights(checkpoint)
    counts = quantized.count_quantized(checkpoint)
    origin = _note_origin(located)
    return replace(checkpoint, notes=(*origin, *notes, *renaming_notes, *counts, *zero_notes))


def _note_origin(located: Located) -> tuple[str, ...]:
    """Return a note on files that are not at the path as given, if there is one."""
    if isinstance(located.files, RemotePath):
        note = located.files.store.note
        return (note,) if note else ()
    if located.files != located.path:
        return (f"read from the Hugging Face cache: {located.files}",)
    return ()


def _read_config(weights: WeightFiles) -> dict[str, Any]:
    """Return the ``config.json`` of these weights; empty without one, or if it is that of an
    adapter's base.
    """
    has_usual_name = weights.path.name in WEIGHTS
    if not has_usual_name and (weights.folder / ADAPTER_CONFIG).is_file():
        return {}
    if not weights.config.is_file():
        return {}
    return read_object(weights.config, "model configuration", documents.MAX_CONFIG_BYTES)


def _read_quantization(stored: Checkpoint, weights: WeightFiles) -> Mapping[str, Any]:
    """Return ``quantization_config`` of a checkpoint, or for GPTQ ``quantize_config.json``; empty
    without either.
    """
    settings = quantized.find_quantization_config(stored.config)
    path = weights.folder / documents.QUANTIZE_CONFIG
    if settings or not any(name.endswith(integers.CODES) for name in stored) or not path.is_file():
        return settings
    return {
        "quant_method": "gptq",
        **read_object(path, "quantization configuration", documents.MAX_CONFIG_BYTES),
    }


def _open(weights: WeightFiles) -> tuple[tuple[TensorFile, ...], str, tuple[str, ...]]:
    """Open a file, the shards of an index or a folder of parts; return files, kind and notes."""
    path = weights.path
    files: Sequence[OpenFile | OpenFolder]
    notes: tuple[str, ...] = ()
    if weights.reader is not None:
        files = [_open_folder(path, weights.reader)]
        kind = files[0].label
    elif path.name.endswith(".index.json"):
        files, notes = _open_shards(path)
        kind = f"sharded {files[0].label}, {len(files)} files"
    else:
        opened = _open_file(path)
        files = open_model(path) if isinstance(opened, GgufModel) else [opened]
        kind = (
            f"{opened.label} file"
            if len(files) == 1
            else f"{opened.label} model, {len(files)} files"
        )
    own_notes = dict.fromkeys(note for file in files for note in file.notes)
    return tuple(files), kind, (*notes, *own_notes)


def _open_folder(folder: Path, reader: type[OpenFolder]) -> OpenFolder:
    """Open a folder of files that hold parts of tensors."""
    try:
        return reader(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error


def _open_file(path: Path) -> OpenFile:
    """Open one file in the first format that claims it; refuse files of unsupported forms and
    pieces of tensors.
    """
    refuse_foreign(path.parent, [path.name])
    if path.match(PIECES) or path.match(ranks.PATTERN):
        raise InputError(
            f"{path}: holds pieces of tensors, and other files the rest; give the folder "
            f"{path.parent}"
        )
    for file_format in FORMATS:
        try:
            if file_format.matches(path):
                return file_format(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty; copy or download it again")
    hint = (
        "; results files are read by inspect, report, plot, allocate and gate"
        if path.suffix == ".jsonl"
        else ""
    )
    fix = f"supported are .safetensors, .gguf and torch files (.bin, .pt, .pth, .ckpt){hint}"
    raise damaged(path, "unknown format", fix)


def _open_shards(index: Path) -> tuple[list[OpenFile], tuple[str, ...]]:
    """Open the shards that an index names, and check that they hold its tensors; return them and
    notes.

    Tensors that are not in the shard that the index gives for them are left out, with a note.
    """
    weight_map = _read_weight_map(index)
    shards = sorted(set(weight_map.values()))
    # The name must be plain, but a plain name may be a link into a Hub cache.
    if (wrong := next((shard for shard in shards if not is_plain_name(shard)), None)) is not None:
        raise InputError(
            f"{index}: the shard {wrong!r} is not a plain file name; write the index again"
        )

    def open_shard(shard: str) -> OpenFile:
        if not _is_file(index.parent / shard):
            raise InputError(
                f"{index}: the shard {shard} is missing from {index.parent}; copy or download it "
                "again"
            )
        return _open_file(index.parent / shard)

    opened: Iterable[OpenFile] = map(open_shard, shards)
    if isinstance(index, RemotePath):
        from lora_diag.storage.addresses import (
            map_concurrently,
        )  # imported only for remote files

        opened = map_concurrently(open_shard, shards)
    files = dict(zip(shards, opened, strict=True))
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise InputError(
                f"{index}: {name} is missing from the shard {shard}; copy or download the shard "
                "again"
            )
    extra = sorted(
        name
        for shard, file in files.items()
        for name in file.tensors
        if weight_map.get(name) != shard
    )
    notes: tuple[str, ...] = ()
    if extra:
        where = f"not where the index puts them, such as {extra[0]}"
        notes = (f"{len(extra)} tensors in the shards are {where}",)
    for shard, file in files.items():
        file.tensors = {
            name: info for name, info in file.tensors.items() if weight_map.get(name) == shard
        }
    return list(files.values()), notes


def _is_file(path: Path) -> bool:
    """Return whether a file exists; False also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, "shard index", documents.MAX_INDEX_BYTES).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or {*map(type, weight_map.values())} != {str}
    ):
        raise InputError(
            f"{index}: weight_map must map tensor names to file names; write the index again"
        )
    return weight_map


class Renamed(TensorFile):
    """A file whose tensors are presented under other names.

    Args:
        file: The file.
        stored: Presented name → name in the file, for all tensors of the file.
    """

    def __init__(self, file: TensorFile, stored: Mapping[str, str]) -> None:
        self._file, self._stored = file, stored
        self.path, self.notes, self.metadata = file.path, file.notes, file.metadata
        self.tensors = {name: replace(file.tensors[old], name=name) for name, old in stored.items()}

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
        The files, and a note if any name changed. If two tensors would get the same name, nothing
            changes.
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


def refuse_unmerged(source: Checkpoint) -> None:
    """Refuse the state dict of a running PEFT model, which has no ``lora_alpha``.

    Raises:
        InputError: A weight and the factors of its adapter are both present.
    """
    for name in source:
        match = UNMERGED_FACTOR.fullmatch(name)
        if match and any(
            f"{match[1]}.{suffix}" in source for suffix in ("base_layer.weight", "weight")
        ):
            problem = (
                f"is an unmerged PEFT state dict ({name} and its weight are both present) "
                "without lora_alpha"
            )
            fix = "save the adapter with save_pretrained(), or the model after merge_and_unload()"
            raise damaged(source.file_of(name), problem, fix)
