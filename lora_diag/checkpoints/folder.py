"""Open a path: a file, a shard index, or a folder that contains weights.

Weights in an unsupported form are recognized by the names of their files, and refused with advice
on their conversion.

``torch.compile``, FSDP and activation checkpointing wrap modules and add their attribute to every
name. No model has a module ``_orig_mod``, so these attributes are dropped anywhere in a name.
``module`` (DataParallel, DeepSpeed) could be a model's own name, so it is dropped only if every
name begins with it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints import documents, integers, quantized, ranks
from lora_diag.checkpoints.distributed import (
    PIECES,
    DistributedFolder,
    PiecesFolder,
    find_inner_folder,
)
from lora_diag.checkpoints.documents import is_plain_name, read_object
from lora_diag.checkpoints.gguf_model import GgufModel, derive_config, list_models, open_model
from lora_diag.checkpoints.pickled import TorchFile
from lora_diag.checkpoints.ranks import RanksFolder
from lora_diag.checkpoints.remote import RemotePath, as_path
from lora_diag.checkpoints.safetensors import SafetensorsFile
from lora_diag.checkpoints.tensors import Checkpoint, TensorFile
from lora_diag.checkpoints.zero import ZeroFolder
from lora_diag.errors import InputError, damaged

if TYPE_CHECKING:
    import torch

DCP = (
    "is a part of a torch.distributed checkpoint; give its folder, with the file .metadata in "
    "it: {folder}"
)
DEEPSPEED = (
    "is one file of a DeepSpeed checkpoint; give the folder with those of all ranks, or convert "
    "it: python {tool} {root} out --safe_serialization"
)
FSDP = "holds FSDP shards; convert them first: accelerate merge-weights {shards} out"
ORBAX = (
    "is an Orbax checkpoint (JAX), which is not supported; convert it to safetensors first, "
    "for example with orbaxport"
)
MEGATRON = (
    "is a Megatron checkpoint, which is not supported; export it in Hugging Face's format first, "
    "for example with megatron-bridge"
)
TENSORRT = (
    "is a TensorRT engine, whose weights are laid out for one GPU; give the checkpoint from which "
    "it was built"
)
HQQ = (
    "is quantized by HQQ, which is not supported; give the unquantized checkpoint, or analyse "
    "the adapter alone"
)

# Pattern of a file name -> the message; the first match is used.
FOREIGN = (
    ("adapter_config.json", "is an adapter, not a checkpoint; give a full model"),
    ("pytorch_model_fsdp_*", FSDP),
    (".metadata", DCP),
    ("*.distcp", DCP),
    ("*zero_pp_rank_*", DEEPSPEED),
    ("mp_rank_*_model_states.pt", DEEPSPEED),
    ("_CHECKPOINT_METADATA", ORBAX),
    ("manifest.ocdbt", ORBAX),
    ("latest_checkpointed_iteration.txt", MEGATRON),
    ("model_optim_rng.pt", MEGATRON),
    ("*.engine", TENSORRT),
    ("*.plan", TENSORRT),
    ("qmodel.pt", HQQ),
)
# Files inside the folder of a training step, not next to it.
INSIDE_STEP = ("*zero_pp_rank_*", "mp_rank_*_model_states.pt")


def refuse_foreign(folder: Path, names: Sequence[str]) -> None:
    """Refuse weights in an unsupported form, with advice on what to give or how to convert them.

    Args:
        folder: The folder of the files.
        names: Names of files in it.

    Raises:
        InputError: A name matches such a form.
    """
    for pattern, message in FOREIGN:
        for name in names:
            if fnmatchcase(name, pattern):
                root = folder.parent if pattern in INSIDE_STEP else folder
                paths = {
                    "folder": folder,
                    "root": root,
                    "tool": root / "zero_to_fp32.py",
                    "shards": folder / name,
                }
                quoted = {key: shlex.quote(str(path)) for key, path in paths.items()}
                raise InputError(f"{folder / name}: {message.format(**quoted)}")


# The formats, in the order in which they are tried.
FORMATS: tuple[type[SafetensorsFile] | type[GgufModel] | type[TorchFile], ...] = (
    SafetensorsFile,
    GgufModel,
    TorchFile,
)

OpenFile = SafetensorsFile | GgufModel | TorchFile

# Folders of files that hold parts of tensors, in the order in which they are tried.
OpenFolder = DistributedFolder | RanksFolder | ZeroFolder | PiecesFolder
FOLDERS: tuple[type[OpenFolder], ...] = (DistributedFolder, RanksFolder, ZeroFolder, PiecesFolder)

# Of these, the first that exists in a folder is read; transformers uses the same order.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)

WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
PREFIX = "module."

# Names of PEFT factors in a running model contain the adapter's name; names in a saved adapter do
# not.
UNMERGED_FACTOR = re.compile(
    r"(.+)\.lora_(?:A|B|embedding_A|embedding_B)\.(?!weight$)[^.]+(?:\.weight)?"
)

# Next to this file, config.json is that of the adapter's base, unless the weights have a name of
# ``WEIGHTS``.
ADAPTER_CONFIG = "adapter_config.json"


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint by its headers; only files in torch's legacy format are loaded whole.

    A Hub id that is not in the cache, and a torch file at an address, are downloaded.

    Args:
        path: A file, a ``*.index.json``, a folder that contains either, a Hugging Face Hub id, or
            an address (``s3://``, ``gs://``, ``hf://``, ``https://``, ``http://``) of one of the
            first three.

    Returns:
        The checkpoint, with at least one tensor.

    Raises:
        InputError: Nothing readable was found, a file is damaged or missing, or the weights are in
            an unsupported form.
    """
    located = locate(path)
    path = located if isinstance(located, RemotePath) else Path(path)
    source = _find_weights(located) if located.is_dir() else located
    files, kind, notes = _open(source)
    files, renaming_notes = drop_wrappers(files)
    models = [file for file in files if isinstance(file, GgufModel)]
    config = derive_config(models) if models else _read_config(source)
    stored = Checkpoint(path, kind, files, config=config)
    if len(stored) == 0:
        raise InputError(f"{source}: holds no tensors; save the model again")
    refuse_unmerged(stored)
    settings = _read_quantization(stored, source)
    quantized.refuse_packed(stored, settings)
    files, zero_notes = quantized.dequantize(stored, settings)
    location_notes = (f"read from the Hugging Face cache: {located}",) if located != path else ()
    if isinstance(located, RemotePath) and located.store.note:
        location_notes = (located.store.note,)
    checkpoint = Checkpoint(path, kind, files, config=config)
    quantized.refuse_integer_weights(checkpoint)
    counts = quantized.count_quantized(checkpoint)
    return replace(
        checkpoint, notes=(*location_notes, *notes, *renaming_notes, *counts, *zero_notes)
    )


def locate(path: Path | str) -> Path:
    """Return the path of an input: itself if it exists, else the folder of a Hub id, which is
    downloaded if needed.

    Raises:
        InputError: The path does not exist and is no Hub id, is a pipe or device, or cannot be
            fetched; or ``as_path`` refuses an address.
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the address")
        return path
    if os.path.exists(path):  # noqa: PTH110  (unlike Path.exists(), False also for names that no file can have)
        if not (path.is_file() or path.is_dir()):
            raise InputError(
                f"{path}: is not a file or folder; a pipe or device cannot be read by ranges"
            )
        return path
    check_exists(path)
    from lora_diag.checkpoints import hub  # imported only if the path is not local

    hub_id = hub.parse(path.as_posix())
    assert hub_id is not None
    return hub.fetch(hub_id, WEIGHTS)


def check_exists(path: Path | str) -> None:
    """Refuse a local path that does not exist; whether an address or a Hub id has files is not
    checked.

    Raises:
        InputError: The path does not exist, and is neither an address nor a Hub id; or ``as_path``
            refuses an address.
    """
    path = as_path(path)
    if isinstance(path, RemotePath) or os.path.exists(path):  # noqa: PTH110  (as above)
        return
    from lora_diag.checkpoints import hub

    if hub.parse(path.as_posix()) is None:
        raise InputError(f"{path}: no such file or folder; check the path")


def _read_config(source: Path) -> dict[str, Any]:
    """Return the ``config.json`` of these weights; empty without one, or if it is that of an
    adapter's base.
    """
    folder = source if source.is_dir() else source.parent
    of_base = source.name not in WEIGHTS and (folder / ADAPTER_CONFIG).is_file()
    config_folder = next(
        (kind.config_folder for kind in FOLDERS if source.is_dir() and kind.matches(folder)), ""
    )
    path = (folder / config_folder if config_folder else folder) / "config.json"
    is_given = path.is_file() and not of_base
    return read_object(path, "model configuration", documents.MAX_CONFIG_BYTES) if is_given else {}


def _read_quantization(stored: Checkpoint, source: Path) -> Mapping[str, Any]:
    """Return ``quantization_config`` of a checkpoint, or for GPTQ ``quantize_config.json``; empty
    without either.
    """
    settings = quantized.find_quantization_config(stored.config)
    path = (source if source.is_dir() else source.parent) / documents.QUANTIZE_CONFIG
    if settings or not any(name.endswith(integers.CODES) for name in stored) or not path.is_file():
        return settings
    return {
        "quant_method": "gptq",
        **read_object(path, "quantization configuration", documents.MAX_CONFIG_BYTES),
    }


def _open(source: Path) -> tuple[tuple[TensorFile, ...], str, tuple[str, ...]]:
    """Open a file, the shards of an index or a folder of pieces; return files, kind and notes."""
    files: Sequence[OpenFile | OpenFolder]
    notes: tuple[str, ...] = ()
    if source.is_dir():
        files = [_open_folder(source)]
        kind = files[0].label
    elif source.name.endswith(".index.json"):
        files, notes = _open_shards(source)
        kind = f"sharded {files[0].label}, {len(files)} files"
    else:
        opened = _open_file(source)
        files = open_model(source) if isinstance(opened, GgufModel) else [opened]
        kind = (
            f"{opened.label} file"
            if len(files) == 1
            else f"{opened.label} model, {len(files)} files"
        )
    return (
        tuple(files),
        kind,
        notes + tuple(dict.fromkeys(note for file in files for note in file.notes)),
    )


def _open_folder(folder: Path) -> OpenFolder:
    """Open a folder of files that hold parts of tensors."""
    try:
        opened = next((kind(folder) for kind in FOLDERS if kind.matches(folder)), None)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
    if opened is None:
        raise InputError(
            f"{folder}: is a folder, where a file with weights was expected; name the weights"
        )
    return opened


def _find_weights(folder: Path) -> Path:
    """Return what to open in a folder: a file, an index, or a folder of files with parts of
    tensors.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if any(kind.matches(folder) for kind in FOLDERS):
        return folder
    if inner := find_inner_folder(folder):
        return inner
    refuse_foreign(folder, sorted(path.name for path in folder.iterdir()))
    safetensors_files = sorted(folder.glob("*.safetensors"))
    models = safetensors_files or list_models(folder)
    if len(models) == 1:
        return models[0]
    if models and not safetensors_files:
        raise InputError(f"{folder}: holds {len(models)} GGUF models; name one of them")
    others = f"; it holds {len(models)} other .safetensors files: name one of them"
    hint = others if safetensors_files else _suggest_subfolders(folder)
    raise InputError(f"{folder}: no weights found; looked for {', '.join(WEIGHTS)}{hint}")


def _suggest_subfolders(folder: Path) -> str:
    """Return a hint that names subfolders with weights or an adapter, such as the checkpoints of a
    training run.

    Without any, it asks for a path with weights; it is empty for an address.
    """
    if isinstance(folder, RemotePath):
        return ""
    names = sorted(
        {
            path.parent.name
            for file in (*WEIGHTS, ADAPTER_CONFIG)
            for path in folder.glob(f"*/{file}")
        }
    )
    listing = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"; name one of its subfolders: {listing}"
        if names
        else "; give a folder or a file with weights"
    )


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
        from lora_diag.checkpoints.addresses import (
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
    notes = (
        (f"{len(extra)} tensors in the shards are missing from the index, such as {extra[0]}",)
        if extra
        else ()
    )
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
