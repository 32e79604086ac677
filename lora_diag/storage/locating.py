"""Find the files of an input: which path a name stands for, and which of its files are weights.

Nothing is opened here: files are recognized by their names. Weights in an unsupported form are
refused with advice on their conversion.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lora_diag.errors import InputError
from lora_diag.storage.distributed import DistributedFolder, PiecesFolder, find_inner_folder
from lora_diag.storage.gguf_model import list_models
from lora_diag.storage.ranks import RanksFolder
from lora_diag.storage.remote import RemotePath, as_path
from lora_diag.storage.zero import ZeroFolder

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

# Next to this file, config.json is that of the adapter's base, unless the weights have a name of
# ``WEIGHTS``.
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Located:
    """An input that exists.

    Args:
        path: The path as given, for messages and records.
        files: Its file or folder: the path itself, or the folder of a Hub id in the cache.
    """

    path: Path
    files: Path


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights in a file or folder.

    Args:
        path: A file, a shard index, or a folder of files with parts of tensors.
        reader: The reader of such a folder; None for a file or an index.
    """

    path: Path
    reader: type[OpenFolder] | None = None

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.path.parent if self.reader is None else self.path

    @property
    def config(self) -> Path:
        """The ``config.json`` of a model with these weights."""
        subfolder = "" if self.reader is None else self.reader.config_folder
        folder = self.folder / subfolder if subfolder else self.folder
        return folder / "config.json"


def locate_files(path: Path | str) -> Located:
    """Return the file or folder of a path: itself if it exists, else the folder of a Hub id, which
    is downloaded if needed.

    Raises:
        InputError: The path does not exist and is no Hub id, is a pipe or device, or cannot be
            fetched; or ``as_path`` refuses an address.
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the address")
        return Located(path, path)
    if os.path.exists(path):  # noqa: PTH110  (unlike Path.exists(), False also for names that no file can have)
        if not (path.is_file() or path.is_dir()):
            raise InputError(
                f"{path}: is not a file or folder; a pipe or device cannot be read by ranges"
            )
        return Located(path, path)
    check_exists(path)
    from lora_diag.storage import hub  # imported only if the path is not local

    hub_id = hub.parse(path.as_posix())
    assert hub_id is not None
    return Located(path, hub.fetch(hub_id, WEIGHTS))


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
    from lora_diag.storage import hub

    if hub.parse(path.as_posix()) is None:
        raise InputError(f"{path}: no such file or folder; check the path")


def find_named_weights(folder: Path) -> Path | None:
    """Return the file or index of a folder that has a usual name of weights; None without one."""
    return next((path for name in WEIGHTS if (path := folder / name).is_file()), None)


def find_weights(files: Path) -> WeightFiles:
    """Return what to open: a file itself; of a folder, the weights in it.

    Raises:
        InputError: The folder contains none, several, or some in an unsupported form.
    """
    if not files.is_dir():
        return WeightFiles(files)
    folder = files
    if (named := find_named_weights(folder)) is not None:
        return WeightFiles(named)
    if (reader := _choose_reader(folder)) is not None:
        return WeightFiles(folder, reader)
    if (inner := find_inner_folder(folder)) is not None:
        return WeightFiles(inner, _choose_reader(inner))
    refuse_foreign(folder, sorted(path.name for path in folder.iterdir()))
    safetensors_files = sorted(folder.glob("*.safetensors"))
    models = safetensors_files or list_models(folder)
    if len(models) == 1:
        if models[0].is_dir():
            raise InputError(
                f"{models[0]}: is a folder, where a file with weights was expected; name the "
                "weights"
            )
        return WeightFiles(models[0])
    if models and not safetensors_files:
        raise InputError(f"{folder}: holds {len(models)} GGUF models; name one of them")
    others = f"; it holds {len(models)} other .safetensors files: name one of them"
    hint = others if safetensors_files else _suggest_subfolders(folder)
    raise InputError(f"{folder}: no weights found; looked for {', '.join(WEIGHTS)}{hint}")


def _choose_reader(folder: Path) -> type[OpenFolder] | None:
    """Return the reader of a folder of files with parts of tensors; None for any other folder."""
    return next((reader for reader in FOLDERS if reader.matches(folder)), None)


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
