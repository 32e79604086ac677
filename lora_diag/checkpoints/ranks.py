"""One torch file per rank, as verl and SkyRL save FSDP models: ``model_world_size_N_rank_R.pt``.

A value is a ``DTensor`` (a local tensor and a specification: device mesh, placements, shape of the whole), a
``ShardedTensor`` (local tensors with their offsets) or a plain tensor. The files are read as data (``archives``).

A mesh is an array of ranks. Along one of its dimensions a tensor is either cut (``Shard(d)``: ``ceil(n / ranks)``
indices of dimension d per rank, the last ranks fewer) or repeated (``Replicate``). Where two dimensions of the mesh cut
the same one of the tensor, the first cuts it into blocks and the second cuts the blocks. Plain tensors are repeated in
files with distributed ones; in files without, each holds rows of its rank (FSDP1).

Reference: ``torch.distributed.tensor._dtensor_spec``, ``.placement_types``; verl ``model_merger``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.archives import (
    MAX_DIMENSIONS,
    WIDTH,
    Archive,
    StoredTensor,
    are_sizes,
    unwrap_parameter,
)
from lora_diag.checkpoints.documents import MAX_CONFIG_BYTES, read_object
from lora_diag.checkpoints.file_bytes import FileBytes
from lora_diag.checkpoints.inert import Record
from lora_diag.checkpoints.pieces import Box, Boxes
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

PATTERN = "model_world_size_*_rank_*.pt"
FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
# verl's settings, with the number of ranks.
CONFIG = "fsdp_config.json"
# Ranks that are read at most.
MAX_RANKS = 65_536
# A name and a reference to its tensor; a smaller pickle repeats the parts of other tensors.
BYTES_PER_PART = 8


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of a tensor in the file of one rank.

    Args:
        tensor: Location of its entries.
        shape: Shape of the whole tensor; None if the rank's file does not state it.
        sharded_dims: For each dimension of the mesh, the tensor dimension that it splits; None where it repeats. None
            altogether for a plain tensor.
        coordinates: The rank's place in the mesh.
        offsets: Offset of the part in the tensor, if the file has it (``ShardedTensor``).
    """

    tensor: StoredTensor
    shape: tuple[int, ...] | None = None
    sharded_dims: tuple[int | None, ...] | None = None
    coordinates: tuple[int, ...] = ()
    offsets: tuple[int, ...] | None = None


class RanksFolder:
    """A folder of one torch file per rank, presented as one file of whole tensors.

    Args:
        folder: The folder.

    Raises:
        InputError: A file is missing or damaged, or the parts of a tensor do not fit together.
    """

    label = "one torch file per rank"
    config_folder = "huggingface"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metadata: Mapping[str, str] = {}
        parts_by_name: dict[str, list[_Part]] = {}
        files = _find_files(folder)
        for rank, path in enumerate(files):
            for name, pieces in _read_parts(path, rank).items():
                parts_by_name.setdefault(name, []).extend(pieces)
        if not parts_by_name:
            raise InputError(f"{folder}: the files {PATTERN} hold no tensors; save the model again")
        distributed = any(
            part.sharded_dims is not None or part.offsets is not None for part in _flatten_parts(parts_by_name)
        )
        self._boxes = {
            name: _join_parts(folder, name, pieces, len(files), distributed) for name, pieces in parts_by_name.items()
        }
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, boxes.shape, parts_by_name[name][0].tensor.dtype)
            for name, boxes in self._boxes.items()
        }
        self.notes: tuple[str, ...] = (f"assembled from the files of {len(files)} ranks",)
        if not distributed and len(files) > 1:
            self.notes += ("the files do not say how tensors were cut: rows of all ranks are joined, as FSDP1 cuts",)

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether a folder holds such files."""
        return any(folder.glob(PATTERN))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        return self._boxes[name].read(start, stop)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        return self._boxes[name].read_bytes(WIDTH[self.tensors[name].dtype])


def _flatten_parts(parts_by_name: Mapping[str, list[_Part]]) -> Sequence[_Part]:
    return [part for of_tensor in parts_by_name.values() for part in of_tensor]


def _find_files(folder: Path) -> list[Path]:
    """Return the file of every rank, in their order."""
    by_world_size: dict[int, dict[int, Path]] = {}
    for path in folder.glob(PATTERN):
        if match := FILE.fullmatch(path.name):
            by_world_size.setdefault(int(match[1]), {})[int(match[2])] = path
    if len(by_world_size) != 1:
        sizes = ", ".join(map(str, sorted(by_world_size)))
        raise InputError(f"{folder}: holds models of {len(by_world_size)} world sizes ({sizes}); keep the files of one")
    ((world, by_rank),) = by_world_size.items()
    missing = [rank for rank in range(min(world, MAX_RANKS)) if rank not in by_rank]
    if missing or len(by_rank) != world:
        raise InputError(
            f"{folder}: the file of rank {missing[0] if missing else world} of {world} is "
            f"{'missing' if missing else 'one too many'}; copy the files of all ranks"
        )
    config = folder / CONFIG
    settings = read_object(config, "FSDP configuration", MAX_CONFIG_BYTES) if config.is_file() else {}
    if (stated := settings.get("world_size", world)) != world:
        raise InputError(
            f"{folder}: {CONFIG} says that {stated!r} ranks saved the model, but it holds the files of {world}; copy "
            "the files of all ranks, or keep those of one model"
        )
    return [by_rank[rank] for rank in range(world)]


def _read_parts(path: Path, rank: int) -> dict[str, list[_Part]]:
    """Return the parts of tensors in the file of a rank, by the names of the tensors."""
    file = FileBytes(path)
    archive = Archive(file, (0, path.stat().st_size), path.name)
    state = archive.value
    for key in ("state_dict", "model", "module", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds no named tensors; save the model again")
    try:
        "".join(name for name in state if isinstance(name, str)).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which a results file cannot hold
        raise InputError(f"{path}: a tensor name is not valid Unicode ({error}); save it again") from error
    parts_by_name: dict[str, list[_Part]] = {}
    parts_left = archive.pickle_bytes // BYTES_PER_PART
    for name, value in state.items():
        if isinstance(name, str) and (parts := _read_value_parts(archive, name, value, rank)):
            parts_by_name[name] = parts
            parts_left -= len(parts)
        if parts_left < 0:
            raise InputError(f"{path}: {name} repeats the parts of other tensors; save the model again")
    return parts_by_name


def _read_value_parts(archive: Archive, name: str, value: Any, rank: int) -> list[_Part]:
    """Return the parts of a value of a state dict; none if it is no tensor."""
    value = unwrap_parameter(value)
    local, spec = _read_dtensor(value)
    if local is not None and isinstance(spec, Record):
        tensor = archive.tensor(local, name)
        if tensor is not None:
            return [_make_dtensor_part(archive, name, tensor, spec, rank)]
    state = _find_state(value, "ShardedTensor")
    if state is not None:
        return _read_sharded(archive, name, state)
    tensor = archive.tensor(value, name)
    if tensor is None and isinstance(value, Record) and value.name == "_rebuild_from_type_v2":
        raise InputError(f"{archive.file.path}: {name} is a tensor of an unsupported class; save the model again")
    return [] if tensor is None else [_Part(tensor)]


def _find_state(value: Any, name: str) -> Any:
    """Return the state of an object of the subclass ``name`` of Tensor; None for any other value."""
    if isinstance(value, Record) and value.name == "_rebuild_from_type_v2" and value.args and len(value.args) == 4:
        kind = value.args[1]
        return value.args[3] if isinstance(kind, Record) and kind.name == name else None
    return None


def _read_dtensor(value: Any) -> tuple[Any, Any]:
    """Return the local tensor and the specification of a DTensor; None twice for any other value.

    ``_rebuild_from_type_v2(function, type, args, state)``, and the state is that of the object.
    """
    state = _find_state(value, "DTensor")
    if state is not None:
        for fields in state[:2] if isinstance(state, tuple) else (state,):  # (dictionary, slots): DTensor has slots
            if isinstance(fields, dict) and "_local_tensor" in fields:
                return fields["_local_tensor"], fields.get("_spec")
    return None, None


def _make_dtensor_part(archive: Archive, name: str, tensor: StoredTensor, spec: Record, rank: int) -> _Part:
    """Return the part of a DTensor that this rank holds."""
    path = archive.file.path
    meta = spec.get("tensor_meta")
    shape = meta.args[0] if isinstance(meta, Record) and meta.args else None
    if shape is None and isinstance(meta, Record):
        shape = meta.get("shape")
    if not isinstance(shape, tuple) or not are_sizes(shape):
        raise InputError(f"{path}: {name} does not give the shape of the whole tensor; save the model again")
    placements = spec.get("placements")
    if not isinstance(placements, tuple | list) or len(placements) > MAX_DIMENSIONS:
        raise InputError(f"{path}: {name} does not say how it is cut; save the model again")
    sharded_dims = tuple(_read_sharded_dim(path, name, placement, len(shape)) for placement in placements)
    coordinates = _read_coordinates(archive, spec.get("mesh"), name, rank, len(sharded_dims))
    return _Part(tensor, shape, sharded_dims, coordinates)


def _read_sharded_dim(path: Path, name: str, placement: Any, dimensions: int) -> int | None:
    """Return the tensor dimension that a placement cuts; None if it repeats the tensor."""
    kind = placement.name if isinstance(placement, Record) else ""
    if kind == "Replicate":
        return None
    dim = placement.get("dim") if isinstance(placement, Record) else None
    if dim is None and isinstance(placement, Record) and placement.args:
        dim = placement.args[0]
    if kind != "Shard" or type(dim) is not int or not 0 <= dim < dimensions:
        raise InputError(
            f"{path}: {name} is placed as {kind or 'nothing known'}, which is not supported; merge the files first: "
            "python -m verl.model_merger merge --backend fsdp --local_dir DIR --target_dir out"
        )
    return dim


def _read_coordinates(archive: Archive, mesh: Any, name: str, rank: int, dimensions: int) -> tuple[int, ...]:
    """Return the place of this rank in the device mesh."""
    coordinates = mesh.get("_coordinate_on_dim") if isinstance(mesh, Record) else None
    if coordinates is None and dimensions == 1:
        coordinates = (rank,)
    if coordinates is None and isinstance(mesh, Record):
        mesh_tensor = archive.tensor(mesh.get("mesh"), f"the mesh of {name}")
        if mesh_tensor is not None and mesh_tensor.numel <= MAX_RANKS and mesh_tensor.dtype in {"int32", "int64"}:
            width, content = WIDTH[mesh_tensor.dtype], mesh_tensor.read_bytes()
            ranks = [
                int.from_bytes(content[start : start + width], "little") for start in range(0, len(content), width)
            ]
            coordinates = _unravel_index(ranks.index(rank), mesh_tensor.shape) if rank in ranks else None
    if (
        not isinstance(coordinates, tuple | list)
        or len(coordinates) != dimensions
        or not all(type(coordinate) is int and 0 <= coordinate < MAX_RANKS for coordinate in coordinates)
    ):
        raise InputError(
            f"{archive.file.path}: {name} does not give the position of rank {rank} in the device mesh; save it again"
        )
    return tuple(coordinates)


def _unravel_index(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    coordinates: list[int] = []
    for size in reversed(shape):
        index, coordinate = divmod(index, size)
        coordinates.insert(0, coordinate)
    return tuple(coordinates)


def _read_sharded(archive: Archive, name: str, state: Any) -> list[_Part]:
    """Return the parts of a ShardedTensor: its state is ``(local shards, metadata, …)``."""
    shards, meta = state[:2] if isinstance(state, tuple) and len(state) > 1 else (None, None)
    shape = meta.get("size") if isinstance(meta, Record) else None
    if not isinstance(shards, list) or not isinstance(shape, tuple) or not are_sizes(shape):
        raise InputError(f"{archive.file.path}: {name} is a ShardedTensor without shards; save the model again")
    parts = []
    for shard in shards:
        shard_meta = shard.get("metadata") if isinstance(shard, Record) else None
        tensor = archive.tensor(shard.get("tensor"), name) if isinstance(shard, Record) else None
        offsets = shard_meta.get("shard_offsets") if isinstance(shard_meta, Record) else None
        if tensor is None or offsets is None or not are_sizes(offsets):
            raise InputError(f"{archive.file.path}: {name} is a ShardedTensor without offsets; save the model again")
        parts.append(_Part(tensor, shape, offsets=tuple(offsets)))
    return parts


def _join_parts(folder: Path, name: str, parts: list[_Part], world: int, distributed: bool) -> Boxes:
    """Return a tensor put together from its parts; ``distributed`` is whether any tensor states how it is cut."""
    first = parts[0]
    if len({(part.tensor.dtype, part.shape, part.sharded_dims is None) for part in parts}) > 1:
        raise InputError(f"{folder}: the ranks disagree about {name}; the folder holds files of two checkpoints")
    if first.offsets is not None:
        shape = first.shape or ()
        boxes = [_make_box(folder, name, part, part.offsets or (), shape) for part in parts]
        return Boxes(name, shape, boxes, folder)
    if len(parts) != world:
        raise InputError(f"{folder}: {len(parts)} of {world} ranks hold {name}; copy the files of all ranks")
    if first.sharded_dims is not None:
        return _assemble_parts(folder, name, parts)
    shapes = {part.tensor.shape for part in parts}
    if distributed or world == 1 or first.tensor.shape == ():
        if len(shapes) > 1:
            raise InputError(f"{folder}: {name} has several shapes on the ranks, and is not cut; save the model again")
        box = Box((0,) * len(first.tensor.shape), first.tensor.shape, first.tensor)
        return Boxes(name, first.tensor.shape, [box], folder)
    if len({shape[1:] for shape in shapes}) > 1:
        raise InputError(f"{folder}: the rows of {name} have different shapes on the ranks; save the model again")
    boxes, row = [], 0
    for part in parts:
        boxes.append(_make_box(folder, name, part, (row, *(0 for _ in part.tensor.shape[1:])), None))
        row += part.tensor.shape[0]
    return Boxes(name, (row, *first.tensor.shape[1:]), boxes, folder)


def _make_box(folder: Path, name: str, part: _Part, offsets: tuple[int, ...], shape: tuple[int, ...] | None) -> Box:
    sizes = part.tensor.shape
    if len(offsets) != len(sizes) or (shape is not None and len(shape) != len(sizes)):
        raise InputError(f"{folder}: the part of {name} at {list(offsets)} does not lie in the tensor; save it again")
    return Box(offsets, sizes, part.tensor)


def _assemble_parts(folder: Path, name: str, parts: list[_Part]) -> Boxes:
    """Return a DTensor put together from its parts; of every repeated dimension of the mesh, one place is used."""
    shape, sharded_dims = parts[0].shape or (), parts[0].sharded_dims or ()
    by_coordinates = {part.coordinates: part for part in parts}
    if any(part.sharded_dims != sharded_dims for part in parts) or len(by_coordinates) != len(parts):
        raise InputError(f"{folder}: the ranks disagree about how {name} is cut; the folder holds two checkpoints")
    counts = [max(coordinates[d] for coordinates in by_coordinates) + 1 for d in range(len(sharded_dims))]
    if math.prod(counts) != len(by_coordinates):
        raise InputError(
            f"{folder}: the device mesh of {name} has {counts} places for {len(by_coordinates)} ranks; copy all files"
        )
    places = product(
        *(
            range(count) if sharded_dim is not None else (0,)
            for count, sharded_dim in zip(counts, sharded_dims, strict=True)
        )
    )
    boxes = []
    for coordinates in places:
        offsets = [0] * len(shape)
        sizes = list(shape)
        for position, count, sharded_dim in zip(coordinates, counts, sharded_dims, strict=True):
            if sharded_dim is not None:
                chunk = -(-sizes[sharded_dim] // count)
                begin = min(sizes[sharded_dim], position * chunk)
                offsets[sharded_dim] += begin
                sizes[sharded_dim] = min(chunk, sizes[sharded_dim] - begin)
        part = by_coordinates[coordinates]
        if part.tensor.shape != tuple(sizes):
            raise InputError(
                f"{part.tensor.file.path}: the part of {name} has shape {list(part.tensor.shape)} instead of {sizes}; "
                "the file belongs to another checkpoint"
            )
        boxes.append(Box(tuple(offsets), tuple(sizes), part.tensor))
    return Boxes(name, shape, boxes, folder)
