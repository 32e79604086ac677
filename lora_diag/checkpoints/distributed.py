"""torch.distributed.checkpoint: a folder of ``.metadata`` and ``__RANK_NUMBER.distcp`` files.

``.metadata`` is a pickle. It gives, for every tensor, shape, dtype and the boxes in which it was stored, and for every
box a file and a range of bytes, which is a separate torch file. Both are read as data (``inert``, ``archives``): no
code runs, no process group is needed, and the reader does not depend on the version of torch. A box is opened when its
entries are read.

A training state holds the model next to an optimizer, under keys such as ``app.model.``. The weights are those below
the outermost key with the name of a model (``WRAPPERS``); without one, everything that is not an optimizer's.

Reference: ``torch.distributed.checkpoint.metadata``, ``.filesystem`` and ``.planner_helpers``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.archives import MAX_DIMENSIONS, WIDTH, Archive, StoredTensor, are_sizes
from lora_diag.checkpoints.file_bytes import FileBytes
from lora_diag.checkpoints.inert import Record, describe, load
from lora_diag.checkpoints.pickled import WRAPPERS
from lora_diag.checkpoints.pieces import Box, Boxes
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.errors import InputError
from lora_diag.files import open_regular

if TYPE_CHECKING:
    import torch

INDEX = ".metadata"
# About 200 bytes per box: the optimizer and weights of 100 billion parameters on 1,000 ranks take 400 MB.
MAX_INDEX_BYTES = 500_000_000
# An index that is smaller repeats the description of a box instead of giving that of another.
BYTES_PER_BOX = 20
# Keys of a training state that hold no weights; and the last parts of an optimizer's.
NOT_WEIGHTS = re.compile(r"optim|sched|^ema$|train_state|dataloader|^rng|^step$|^extra_state$|^_extra_state$")
MOMENTS = re.compile(r"(^|\.)(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|master_param|step)$")


class DistributedFolder:
    """A folder written by ``torch.distributed.checkpoint.save``, presented as one file of whole tensors.

    Args:
        folder: The folder, with a file ``.metadata``.

    Raises:
        InputError: The index is damaged, a file is missing or too short, the parts of a tensor do not fit together, or
            there are no weights, or those of several models.
    """

    label = "torch.distributed checkpoint"
    config_folder = ""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metadata: Mapping[str, str] = {}
        index = folder / INDEX
        state = _read_index(index)
        tensors = {
            key: entry
            for key, entry in state["state_dict_metadata"].items()
            if isinstance(key, str) and _is_tensor(entry)
        }
        name_by_key, prefix = _choose_weights(index, tensors, state.get("planner_data"))
        locations = _read_locations(index, state["storage_data"])
        files: dict[str, tuple[FileBytes, int]] = {}
        info_by_name: dict[str, TensorInfo] = {}
        self.tensors: Mapping[str, TensorInfo] = info_by_name
        self._boxes: dict[str, Boxes] = {}
        boxes_left = index.stat().st_size // BYTES_PER_BOX
        for key, name in name_by_key.items():
            info, extents = _read_description(index, key, name, tensors[key])
            boxes_left -= len(extents)
            if boxes_left < 0:
                raise InputError(f"{index}: {key:.200} repeats the parts of other tensors; save the checkpoint again")
            boxes = [_make_box(folder, key, name, info.dtype, extent, locations, files) for extent in extents]
            self._boxes[name] = Boxes(name, info.shape, boxes, index)
            info_by_name[name] = info
        self.notes: tuple[str, ...] = (f"assembled from the parts in {len(files)} files",)
        if prefix:
            self.notes += (f"the weights are those under {prefix} of a training state",)
        if left_out := sorted(set(tensors) - set(name_by_key)):
            self.notes += (f"{len(left_out)} tensors that are no weights are left out, such as {left_out[0]}",)

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether a folder is such a checkpoint."""
        return (folder / INDEX).is_file()

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        return self._boxes[name].read(start, stop)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        return self._boxes[name].read_bytes(WIDTH[self.tensors[name].dtype])


@dataclass(frozen=True)
class _StoredBox:
    """The torch file of one box, which is opened by the first read.

    Args:
        file: The file that holds it.
        span: Its first byte, and its number of bytes.
        name: The tensor.
        dtype: Dtype in the index.
        shape: Shape of the box in the index.
    """

    file: FileBytes
    span: tuple[int, int]
    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def tensor(self) -> StoredTensor:
        """Location of the entries.

        Raises:
            InputError: The file is damaged, or contradicts the index.
        """
        archive = Archive(self.file, self.span, self.name)
        loaded = archive.tensor(archive.value, self.name)
        if loaded is None:
            raise InputError(f"{self.file.path}: no tensor is stored where {self.name} should be; save it again")
        if (loaded.dtype, loaded.shape) != (self.dtype, self.shape):
            raise InputError(
                f"{self.file.path}: {self.name} is {loaded.dtype} {list(loaded.shape)} in the file, but {self.dtype} "
                f"{list(self.shape)} in {INDEX}; the folder holds files of two checkpoints"
            )
        return loaded

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor.read(start, stop)

    def read_bytes(self) -> bytes:
        return self.tensor.read_bytes()


def _read_index(index: Path) -> Mapping[str, Any]:
    """Return the fields of the index, after checking that it has those that are used."""
    try:
        size = index.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise InputError(
                f"{index}: is larger than {MAX_INDEX_BYTES:,} bytes, too large for an index; save the checkpoint again"
            )
        with open_regular(index) as file:
            content = file.read()
    except OSError as error:
        raise InputError(f"{index}: cannot be read: {error.strerror}") from error
    loaded = load(content, index, "the index")
    state = loaded.state if isinstance(loaded, Record) and loaded.name == "Metadata" else None
    if not isinstance(state, dict) or not all(
        isinstance(state.get(key), dict) for key in ("state_dict_metadata", "storage_data")
    ):
        raise InputError(f"{index}: is not the index of a torch.distributed checkpoint; save it again")
    return state


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, Record) and entry.name == "TensorStorageMetadata"


def _read_sizes(index: Path, key: str, value: Any) -> tuple[int, ...]:
    if not are_sizes(value):
        raise InputError(f"{index}: the shape of {key:.200} in the index is invalid; save the checkpoint again")
    return tuple(value)


def _read_description(
    index: Path, key: str, name: str, entry: Record
) -> tuple[TensorInfo, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Return the entry of a tensor in the index: its description, and the offsets and sizes of its boxes."""
    shape = _read_sizes(index, key, entry.get("size"))
    properties = entry.get("properties")
    stored_dtype = (
        properties.state[0] if isinstance(properties, Record) and isinstance(properties.state, tuple) else None
    )
    if stored_dtype is None and isinstance(properties, Record):
        stored_dtype = properties.get("dtype")
    dtype = stored_dtype.name if isinstance(stored_dtype, Record) else ""
    if dtype not in WIDTH:
        raise InputError(f"{index}: {key:.200} has the unsupported dtype {dtype!r}; save it in another")
    extents = []
    chunks = entry.get("chunks")
    if not isinstance(chunks, list) or not all(isinstance(chunk, Record) for chunk in chunks):
        raise InputError(f"{index}: the parts of {key:.200} are not described; save the checkpoint again")
    for chunk in chunks:
        offsets, sizes = (_read_sizes(index, key, chunk.get(field)) for field in ("offsets", "sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise InputError(
                f"{index}: a part of {key:.200} has {len(sizes)} dimensions instead of {len(shape)}; save it again"
            )
        extents.append((offsets, sizes))
    return TensorInfo(name, shape, dtype), extents


def _read_locations(index: Path, storage_data: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], Record]:
    """Return the locations of the boxes, by the key of their tensor and their offsets."""
    locations = {}
    for key, location in storage_data.items():
        if isinstance(key, Record) and isinstance(location, Record) and isinstance(key.get("fqn"), str):
            offset = key.get("offset")
            locations[key.get("fqn"), tuple(offset) if are_sizes(offset) else ()] = location
    return locations


def _make_box(
    folder: Path,
    key: str,
    name: str,
    dtype: str,
    extent: tuple[tuple[int, ...], tuple[int, ...]],
    locations: Mapping[tuple[str, tuple[int, ...]], Record],
    files: dict[str, tuple[FileBytes, int]],
) -> Box:
    """Return one box of a tensor, after checking that its bytes are there; add its file and size to ``files``."""
    offsets, sizes = extent
    location = locations.get((key, offsets))
    if location is None:
        raise InputError(f"{folder / INDEX}: the index does not say where the part of {key:.200} at {list(offsets)} is")
    relative, offset, length = (location.get(field) for field in ("relative_path", "offset", "length"))
    if location.get("transform_descriptors"):
        raise InputError(
            f"{folder / INDEX}: {key:.200} is stored compressed, which is not supported; save it uncompressed"
        )
    if not isinstance(relative, str) or relative in {"", ".", ".."} or set(relative) & set("/\\\0"):
        raise InputError(
            f"{folder / INDEX}: the file {describe(relative)} of {key:.200} is not a plain file name; save it again"
        )
    if not all(type(value) is int and 0 <= value < 2**63 for value in (offset, length)):
        raise InputError(f"{folder / INDEX}: the position of {key:.200} is not valid; save the checkpoint again")
    if relative not in files:
        path = folder / relative
        if not path.is_file():
            raise InputError(f"{folder}: {relative} is missing, which holds parts of {key:.200}; copy it again")
        files[relative] = (FileBytes(path), path.stat().st_size)
    file, size = files[relative]
    if offset + length > size:
        raise InputError(
            f"{file.path}: has {size:,} bytes, but {key:.200} lies up to byte {offset + length:,}; copy it again"
        )
    if (needed := math.prod(sizes) * WIDTH[dtype]) > length:
        raise InputError(
            f"{folder / INDEX}: the part of {key:.200} with shape {list(sizes)} takes {needed:,} bytes, but {length:,} "
            "are stored; save the checkpoint again"
        )
    return Box(offsets, sizes, _StoredBox(file, (offset, length), name, dtype, sizes))


def _choose_weights(index: Path, tensors: Mapping[str, Record], planner_data: Any) -> tuple[dict[str, str], str]:
    """Choose the weights among the tensors.

    Args:
        index: The index, for messages.
        tensors: Their entries in the index, by key.
        planner_data: Entry of the planner: of each key, the keys of the nested dictionaries that it was made from.

    Returns:
        Name by key, and the start of the keys that names leave out; empty if they are whole keys.

    Raises:
        InputError: There are no weights, or those of several models, or a name is repeated or not valid Unicode.
    """
    path_by_key = {key: _read_path(key, planner_data) for key in tensors}
    not_weights = {
        key
        for key, path in path_by_key.items()
        if any(NOT_WEIGHTS.search(part) for part in path[:-1]) or _is_moment(key)
    }
    by_prefix: dict[tuple[str, ...], list[str]] = {}
    for key, path in path_by_key.items():
        position = next((i for i, part in enumerate(path[:-1]) if part in WRAPPERS), None)
        if position is not None and key not in not_weights:
            by_prefix.setdefault(path[: position + 1], []).append(key)
    if len(by_prefix) > 1:
        names = ", ".join(sorted(".".join(prefix) for prefix in by_prefix)[:3])
        raise InputError(
            f"{index.parent}: holds the weights of {len(by_prefix)} models ({names}); save one of them alone"
        )
    if by_prefix:
        ((prefix, keys),) = by_prefix.items()
        name_by_key = {key: ".".join(path_by_key[key][len(prefix) :]) for key in keys}
        start = ".".join(prefix) + "."
    else:
        root_by_key = {key: path_by_key[key][0].partition(".")[0] for key in tensors}
        name_by_key = {
            key: key for key in tensors if key not in not_weights and not NOT_WEIGHTS.search(root_by_key[key])
        }
        start = ""
    repeated = [name for name, count in Counter(name_by_key.values()).items() if count > 1]
    if not name_by_key or repeated:
        problem = f"two tensors are called {repeated[0]:.200}" if repeated else "it holds no weights"
        raise InputError(f"{index}: {problem}; save the model's state dict")
    try:
        "".join(name_by_key.values()).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which a results file cannot hold
        raise InputError(f"{index}: a tensor name is not valid Unicode ({error}); save it again") from error
    return name_by_key, start


def _read_path(key: str, planner_data: Any) -> tuple[str, ...]:
    """Return the keys of the nested dictionaries that lead to a tensor; its own key if the planner gives none."""
    path = planner_data.get(key) if isinstance(planner_data, dict) else None
    if (
        isinstance(path, tuple)
        and 0 < len(path) <= MAX_DIMENSIONS
        and all(isinstance(part, str) or are_sizes((part,)) for part in path)
    ):
        return tuple(map(str, path))
    return (key,)


def _is_moment(key: str) -> bool:
    """Return whether a key belongs to the state of an optimizer."""
    return MOMENTS.search(key) is not None


def folder_within(folder: Path) -> Path | None:
    """Return the only checkpoint that accelerate wrote inside the folder of a training step; None without one."""
    folders = [path for path in sorted(folder.glob("pytorch_model_fsdp_*")) if (path / INDEX).is_file()]
    return folders[0] if len(folders) == 1 else None
