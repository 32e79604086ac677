"""torch.distributed.checkpoint: a folder of ``.metadata`` and ``__RANK_NUMBER.distcp`` files, or of
safetensors.

``.metadata`` is a pickle. It gives, for every tensor, shape, dtype and the boxes in which it was
stored, and for every box a file and a range of bytes, which is a separate torch file. Both are read
as data (``inert``, ``parts``): no code runs, no process group is needed, and the reader does not
depend on the version of torch. A box is opened when its entries are read.

A training state holds the model next to an optimizer, under keys such as ``app.model.``. The
weights are those below the outermost key with the name of a model (``WRAPPERS``); without one,
everything that is not the state of an optimizer, scheduler, moving average, data loader or random
generator (``NOT_WEIGHTS``, ``MOMENTS``).

In safetensors, the files are named ``shard-…-model-…``. The header of each gives, under
``DCP_SHARDING_INFO``, the index of the whole tensor at which its piece begins. The headers do not
state the shape of the whole tensor: if the last pieces are missing, only the shape shows it.

Reference: ``torch.distributed.checkpoint.metadata``, ``.filesystem`` and ``.planner_helpers``;
``HuggingFaceStorageWriter(save_distributed=True)`` of torch ≥ 2.8.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError, damaged
from lora_diag.files import open_regular
from lora_diag.storage.documents import is_plain_name, loads
from lora_diag.storage.file_bytes import FileBytes, StoredTensor
from lora_diag.storage.inert import PickledObject, attribute, describe, load
from lora_diag.storage.parts import (
    MAX_DIMENSIONS,
    WRAPPERS,
    Archive,
    Box,
    Boxes,
    PartsFolder,
    are_sizes,
)
from lora_diag.storage.safetensors import SafetensorsFile
from lora_diag.storage.tensors import WIDTH, TensorInfo

INDEX = ".metadata"
# About 200 bytes per box: the optimizer and weights of 100 billion parameters on 1,000 ranks take
# 400 MB.
MAX_INDEX_BYTES = 500_000_000
# An index that is smaller repeats the description of a box instead of giving that of another.
BYTES_PER_BOX = 20
# Keys of a training state that hold no weights; and the last parts of an optimizer's.
NOT_WEIGHTS = re.compile(
    r"optim|sched|^ema$|train_state|dataloader|^rng|^step$|^extra_state$|^_extra_state$"
)
MOMENTS = re.compile(
    r"(^|\.)(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|master_param|step)$"
)

PIECES, PIECES_INFO = "shard-*-model-*.safetensors", "DCP_SHARDING_INFO"

# Offsets and sizes of a box.
Extent = tuple[tuple[int, ...], tuple[int, ...]]


class DistributedFolder(PartsFolder):
    """A folder written by ``torch.distributed.checkpoint.save``, presented as one file of whole
    tensors.

    Args:
        folder: The folder, with a file ``.metadata``.

    Raises:
        InputError: The index cannot be read or is damaged, a file is missing or too short, a tensor
            is compressed or has an unsupported dtype, the parts of a tensor do not fit together, or
            there are no weights, or those of several models.
    """

    label = "torch.distributed checkpoint"

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        state = _read_index(index)
        entries = {
            key: entry
            for key, entry in state["state_dict_metadata"].items()
            if isinstance(key, str)
            and isinstance(entry, PickledObject)
            and entry.name == "TensorStorageMetadata"
        }
        name_by_key, prefix = _choose_weights(index, entries, state.get("planner_data"))
        locations = _read_locations(state["storage_data"])
        files: dict[str, FileBytes] = {}
        tensors: dict[str, Boxes] = {}
        boxes_left = index.stat().st_size // BYTES_PER_BOX
        for key, name in name_by_key.items():
            info, extents = _read_description(index, key, name, entries[key])
            boxes_left -= len(extents)
            if boxes_left < 0:
                raise damaged(index, f"{key:.200} repeats the parts of other tensors")
            boxes = [
                _make_box(index, key, info, extent, locations.get((key, extent[0])), files)
                for extent in extents
            ]
            tensors[name] = Boxes(info, boxes, index)
        notes = [f"assembled from the parts in {len(files)} files"]
        if prefix:
            notes.append(f"the weights are those under {prefix} of a training state")
        if left_out := sorted(entries.keys() - name_by_key.keys()):
            notes.append(
                f"{len(left_out)} tensors that are no weights are left out, such as {left_out[0]}"
            )
        super().__init__(folder, tensors, notes)

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether a folder has a file ``.metadata``."""
        return (folder / INDEX).is_file()


class PiecesFolder(PartsFolder):
    """A folder of safetensors files with pieces of tensors, presented as one file of whole tensors.

    Args:
        folder: The folder, with at least one piece file.

    Raises:
        InputError: A file cannot be read or is damaged, or the pieces of a tensor differ in dtype
            or number of dimensions, overlap or leave gaps.
    """

    label = "torch.distributed safetensors"

    def __init__(self, folder: Path) -> None:
        files = [SafetensorsFile(path) for path in sorted(folder.glob(PIECES))]
        pieces: dict[str, list[Box]] = {}
        dtypes: dict[str, str] = {}
        for file in files:
            for name, offsets in _read_offsets(file):
                info = file.tensors[name]
                pieces.setdefault(name, []).append(Box(offsets, info.shape, file.locate(name).fill))
                dimensions = len(pieces[name][0].sizes)
                is_other_dtype = dtypes.setdefault(name, info.dtype) != info.dtype
                if is_other_dtype or dimensions != len(info.shape):
                    raise damaged(
                        file.path,
                        f"{name} is another tensor than in the files before",
                        "copy them again",
                    )
        tensors: dict[str, Boxes] = {}
        for name, boxes in pieces.items():
            shape = tuple(map(max, zip(*(box.ends for box in boxes), strict=True)))
            tensors[name] = Boxes(TensorInfo(name, shape, dtypes[name]), boxes, folder)
        super().__init__(folder, tensors, [f"assembled from the pieces in {len(files)} files"])

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether a folder holds such files."""
        return any(folder.glob(PIECES))


def _read_offsets(file: SafetensorsFile) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the first index of each piece in a file."""
    try:
        info: Any = loads(file.metadata[PIECES_INFO])
    except (KeyError, ValueError, RecursionError) as error:
        raise damaged(file.path, f"{PIECES_INFO} is missing from the header or invalid") from error
    for name, tensor in file.tensors.items():
        entry = info.get(name) if isinstance(info, dict) else None
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not are_sizes(offsets) or len(offsets) != len(tensor.shape):
            raise damaged(
                file.path,
                f"the start {offsets!r} of the piece of {name} is no index in {PIECES_INFO}",
            )
        yield name, tuple(offsets)


@dataclass(frozen=True)
class _StoredBox:
    """The torch file of one box, which is opened by the first read.

    Args:
        file: The file that holds it.
        span: Its first byte, and its number of bytes.
        info: Name, shape and dtype of the box in the index.
    """

    file: FileBytes
    span: tuple[int, int]
    info: TensorInfo

    @cached_property
    def tensor(self) -> StoredTensor:
        """Location of the entries.

        Raises:
            InputError: The file is damaged, or contradicts the index.
        """
        name = self.info.name
        archive = Archive(self.file, self.span, name)
        loaded = archive.tensor(archive.value, name)
        if loaded is None or (loaded.dtype, loaded.shape) != (self.info.dtype, self.info.shape):
            stored = "no tensor" if loaded is None else f"{loaded.dtype} {list(loaded.shape)}"
            problem = (
                f"{name} is {stored} in the file, but {self.info.dtype} "
                f"{list(self.info.shape)} in {INDEX}"
            )
            raise damaged(self.file.path, problem, "the folder holds files of two checkpoints")
        return loaded

    def fill(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with the bytes of the entries from ``start`` on; open the torch file if it
        is not.
        """
        self.tensor.fill(buffer, start)


def _read_index(index: Path) -> Mapping[str, Any]:
    """Return the fields of the index, after checking those that describe tensors and
    their parts.
    """
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise damaged(
                index, f"is larger than {MAX_INDEX_BYTES:,} bytes, too large for an index"
            )
        with open_regular(index) as file:
            content = file.read()
    except OSError as error:
        raise InputError(f"{index}: cannot be read: {error.strerror}") from error
    loaded = load(content, index, "the index")
    state = (
        loaded.state if isinstance(loaded, PickledObject) and isinstance(loaded.state, dict) else {}
    )
    if not all(isinstance(state.get(key), dict) for key in ("state_dict_metadata", "storage_data")):
        raise damaged(index, "is not the index of a torch.distributed checkpoint")
    return state


def _read_description(
    index: Path, key: str, name: str, entry: PickledObject
) -> tuple[TensorInfo, list[Extent]]:
    """Return the entry of a tensor in the index: its description, and the offsets and sizes of its
    boxes.
    """
    stored_dtype = attribute(entry.get("properties"), "dtype", 0)
    dtype = stored_dtype.name if isinstance(stored_dtype, PickledObject) else ""
    if dtype not in WIDTH:
        raise damaged(
            index, f"{key:.200} has the unsupported dtype {dtype!r}", "save it in another"
        )
    shape, chunks = entry.get("size"), entry.get("chunks")
    parts = chunks if isinstance(chunks, list) else [None]
    extents = [(attribute(part, "offsets"), attribute(part, "sizes")) for part in parts]
    if not all(map(are_sizes, (shape, *chain(*extents)))) or {
        len(shape),
        *map(len, chain(*extents)),
    } != {len(shape)}:
        raise damaged(index, f"the shape of {key:.200} or of a part of it in the index is invalid")
    return TensorInfo(name, tuple(shape), dtype), [
        (tuple(offsets), tuple(sizes)) for offsets, sizes in extents
    ]


def _read_locations(
    storage_data: Mapping[Any, Any],
) -> dict[tuple[str, tuple[int, ...]], PickledObject]:
    """Return the locations of the boxes, by the key of their tensor and their offsets."""
    locations = {}
    for key, location in storage_data.items():
        name, offset = attribute(key, "fqn"), attribute(key, "offset")
        if isinstance(location, PickledObject) and isinstance(name, str):
            locations[name, tuple(offset) if are_sizes(offset) else ()] = location
    return locations


def _make_box(
    index: Path,
    key: str,
    info: TensorInfo,
    extent: Extent,
    location: PickledObject | None,
    files: dict[str, FileBytes],
) -> Box:
    """Return one box of a tensor, after checking that its bytes are there; add its file to
    ``files``.
    """
    offsets, sizes = extent
    if location is None:
        raise InputError(
            f"{index}: the index does not say where the part of {key:.200} at {list(offsets)} is"
        )
    relative, offset, length = (
        location.get(field) for field in ("relative_path", "offset", "length")
    )
    if location.get("transform_descriptors"):
        raise damaged(
            index,
            f"{key:.200} is stored compressed, which is not supported",
            "save it uncompressed",
        )
    if not is_plain_name(relative) or not are_sizes((offset, length)):
        problem = (
            f"the file {describe(relative)} of {key:.200} is no plain file name, or its "
            "position wrong"
        )
        raise damaged(index, problem)
    path = index.parent / relative
    if relative not in files:
        if not path.is_file():
            raise damaged(
                index.parent,
                f"{relative} is missing, which holds parts of {key:.200}",
                "copy it again",
            )
        files[relative] = FileBytes(path)
    if offset + length > (size := files[relative].size):
        raise damaged(
            path,
            f"has {size:,} bytes, but {key:.200} lies up to byte {offset + length:,}",
            "copy it again",
        )
    if (needed := math.prod(sizes) * WIDTH[info.dtype]) > length:
        raise damaged(
            index,
            f"a part {list(sizes)} of {key:.200} takes {needed:,} bytes, but {length:,} are stored",
        )
    stored = _StoredBox(files[relative], (offset, length), TensorInfo(info.name, sizes, info.dtype))
    return Box(offsets, sizes, stored.fill)


def _choose_weights(
    index: Path, tensors: Mapping[str, PickledObject], planner_data: Any
) -> tuple[dict[str, str], str]:
    """Choose the weights among the tensors.

    Args:
        index: The index, for messages.
        tensors: Their entries in the index, by key.
        planner_data: Entry of the planner: of each key, the keys of the nested dictionaries that it
            was made from.

    Returns:
        Name by key, and the start of the keys that names leave out; empty if they are whole keys.

    Raises:
        InputError: There are no weights, or those of several models, or a name is repeated.
    """
    path_by_key = {key: _read_path(key, planner_data) for key in tensors}
    candidates = {
        key: path
        for key, path in path_by_key.items()
        if not any(NOT_WEIGHTS.search(part) for part in path[:-1]) and not MOMENTS.search(key)
    }
    by_prefix: dict[tuple[str, ...], list[str]] = {}
    for key, path in candidates.items():
        position = next((i for i, part in enumerate(path[:-1]) if part in WRAPPERS), None)
        if position is not None:
            by_prefix.setdefault(path[: position + 1], []).append(key)
    if len(by_prefix) > 1:
        names = ", ".join(sorted(".".join(prefix) for prefix in by_prefix)[:3])
        raise damaged(
            index.parent,
            f"holds the weights of {len(by_prefix)} models ({names})",
            "save one of them alone",
        )
    start, plain = (
        "",
        (
            key
            for key, path in candidates.items()
            if not NOT_WEIGHTS.search(path[0].partition(".")[0])
        ),
    )
    name_by_key = {key: key for key in plain}
    for prefix, keys in by_prefix.items():
        name_by_key = {key: ".".join(path_by_key[key][len(prefix) :]) for key in keys}
        start = ".".join(prefix) + "."
    repeated = [name for name, count in Counter(name_by_key.values()).items() if count > 1]
    if not name_by_key or repeated:
        problem = (
            f"two tensors are called {repeated[0]:.200}" if repeated else "it holds no weights"
        )
        raise damaged(index, problem, "save the model's state dict")
    return name_by_key, start


def _read_path(key: str, planner_data: Any) -> tuple[str, ...]:
    """Return the keys of the nested dictionaries that lead to a tensor; its own key if the planner
    gives none.
    """
    path: Any = planner_data.get(key) if isinstance(planner_data, dict) else None
    is_path = isinstance(path, tuple) and 0 < len(path) <= MAX_DIMENSIONS
    if not is_path or not all(isinstance(part, str) or are_sizes((part,)) for part in path):
        return (key,)
    return tuple(map(str, path))


def find_inner_folder(folder: Path) -> Path | None:
    """Return the checkpoint that accelerate wrote in the folder of a training step; None unless
    there is just one.
    """
    folders = [
        path for path in sorted(folder.glob("pytorch_model_fsdp_*")) if (path / INDEX).is_file()
    ]
    return folders[0] if len(folders) == 1 else None
