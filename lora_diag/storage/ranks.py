"""One torch file per rank, as verl and SkyRL save FSDP models: ``model_world_size_N_rank_R.pt``.

A value is a ``DTensor`` (a local tensor and a specification: device mesh, placements, shape of the
whole), a ``ShardedTensor`` (local tensors with their offsets) or a plain tensor.

A mesh is an array of ranks. Along one of its dimensions a tensor is either cut (``Shard(d)``:
``ceil(n / ranks)`` indices of dimension d per rank, the last ranks fewer) or repeated
(``Replicate``). Where two dimensions of the mesh cut the same one of the tensor, the first cuts it
into blocks and the second cuts the blocks. Plain tensors are repeated in files with distributed
ones; in files without, each holds rows of its rank (FSDP1).

Reference: ``torch.distributed.tensor._dtensor_spec``, ``.placement_types``; verl ``model_merger``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from lora_diag.errors import damaged
from lora_diag.storage.documents import MAX_CONFIG_BYTES, check_unicode, read_object
from lora_diag.storage.file_bytes import FileBytes, StoredTensor
from lora_diag.storage.inert import PickledObject, attribute
from lora_diag.storage.parts import (
    WRAPPERS,
    Archive,
    Box,
    Boxes,
    PartsFolder,
    are_sizes,
    unwrap_parameter,
)
from lora_diag.storage.tensors import WIDTH, TensorInfo

PATTERN = "model_world_size_*_rank_*.pt"
FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
# verl's settings, with the number of ranks.
CONFIG = "fsdp_config.json"
# Ranks that are read at most.
MAX_RANKS = 65_536
# A name and a reference to its tensor; a smaller pickle repeats the parts of other tensors.
BYTES_PER_PART = 8
COPY_ALL = "copy the files of all ranks"


@dataclass(frozen=True, slots=True)
class _RankPart:
    """The part of a tensor in the file of one rank.

    Args:
        tensor: Location of its entries.
        shape: Shape of the whole tensor; None if the rank's file does not state it.
        sharded_dims: For each dimension of the mesh, the tensor dimension that it splits; None
            where it repeats. None altogether for a plain tensor and a ``ShardedTensor``.
        coordinates: The rank's place in the mesh; empty without one.
        offsets: Offset of the part in the tensor, if the file has it (``ShardedTensor``).
    """

    tensor: StoredTensor
    shape: tuple[int, ...] | None = None
    sharded_dims: tuple[int | None, ...] | None = None
    coordinates: tuple[int, ...] = ()
    offsets: tuple[int, ...] | None = None


class RanksFolder(PartsFolder):
    """A folder of one torch file per rank, presented as one file of whole tensors.

    Args:
        folder: The folder.

    Raises:
        InputError: A file is missing, damaged or of another model, a tensor is of an unsupported
            class or placement, or the parts of a tensor do not fit together.
    """

    label = "one torch file per rank"
    config_folder = "huggingface"

    def __init__(self, folder: Path) -> None:
        by_name: dict[str, list[_RankPart]] = {}
        files = _find_files(folder)
        for rank, path in enumerate(files):
            for name, parts in _read_parts(path, rank).items():
                by_name.setdefault(name, []).extend(parts)
        if not by_name:
            raise damaged(folder, f"the files {PATTERN} hold no tensors")
        distributed = any(part.shape is not None for parts in by_name.values() for part in parts)
        notes = [f"assembled from the files of {len(files)} ranks"]
        if not distributed and len(files) > 1:
            notes.append(
                "the files do not say how tensors were cut: rows of all ranks are joined, as FSDP1 "
                "cuts"
            )
        joined = {
            name: _join_parts(folder, name, parts, len(files), distributed)
            for name, parts in by_name.items()
        }
        super().__init__(folder, joined, notes)

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether a folder holds such files."""
        return any(folder.glob(PATTERN))


def _find_files(folder: Path) -> list[Path]:
    """Return the file of every rank, in their order."""
    by_world_size: dict[int, dict[int, Path]] = {}
    for path in folder.glob(PATTERN):
        if match := FILE.fullmatch(path.name):
            by_world_size.setdefault(int(match[1]), {})[int(match[2])] = path
    if len(by_world_size) != 1:
        sizes = ", ".join(map(str, sorted(by_world_size)))
        raise damaged(
            folder,
            f"holds models of {len(by_world_size)} world sizes ({sizes})",
            "keep the files of one",
        )
    ((world, by_rank),) = by_world_size.items()
    if wrong := sorted(by_rank.keys() ^ set(range(world))):
        problem = "one too many" if wrong[0] in by_rank else "missing"
        raise damaged(folder, f"the file of rank {wrong[0]} of {world} is {problem}", COPY_ALL)
    config = folder / CONFIG
    settings = (
        read_object(config, "FSDP configuration", MAX_CONFIG_BYTES) if config.is_file() else {}
    )
    if (stated := settings.get("world_size", world)) != world:
        problem = (
            f"{CONFIG} says that {stated!r} ranks saved the model, but it holds the files of "
            f"{world}"
        )
        raise damaged(folder, problem, f"{COPY_ALL}, or keep those of one model")
    return [by_rank[rank] for rank in range(world)]


def _read_parts(path: Path, rank: int) -> dict[str, list[_RankPart]]:
    """Return the parts of tensors in the file of a rank, by the names of the tensors."""
    archive = Archive(FileBytes(path))
    state = archive.value
    if isinstance(state, dict):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict):
        raise damaged(path, "holds no named tensors")
    check_unicode((name for name in state if isinstance(name, str)), path)
    by_name: dict[str, list[_RankPart]] = {}
    parts_left = archive.pickle_bytes // BYTES_PER_PART
    for name, value in state.items():
        if isinstance(name, str) and (parts := _read_value_parts(archive, name, value, rank)):
            by_name[name] = parts
            parts_left -= len(parts)
        if parts_left < 0:
            raise damaged(path, f"{name} repeats the parts of other tensors")
    return by_name


def _read_value_parts(archive: Archive, name: str, value: Any, rank: int) -> list[_RankPart]:
    """Return the parts of a value of a state dict; none if it is no tensor."""
    value = unwrap_parameter(value)
    # ``_rebuild_from_type_v2(function, type, args, state)``: an object of a subclass of Tensor.
    if not isinstance(value, PickledObject) or value.name != "_rebuild_from_type_v2":
        tensor = archive.tensor(value, name)
        return [] if tensor is None else [_RankPart(tensor)]
    _, kind, _, state = value.args if value.args and len(value.args) == 4 else (None,) * 4
    kind = kind.name if isinstance(kind, PickledObject) else ""
    if kind == "ShardedTensor" and state is not None:
        return list(_read_sharded(archive, name, state))
    distributed = PickledObject("", kind, state=state if kind == "DTensor" else None)
    tensor, spec = archive.tensor(distributed.get("_local_tensor"), name), distributed.get("_spec")
    if tensor is None or not isinstance(spec, PickledObject):
        raise damaged(archive.file.path, f"{name} is a tensor of an unsupported class")
    return [_make_dtensor_part(archive, name, tensor, spec, rank)]


def _make_dtensor_part(
    archive: Archive, name: str, tensor: StoredTensor, spec: PickledObject, rank: int
) -> _RankPart:
    """Return the part of a DTensor that this rank holds."""
    path = archive.file.path
    shape, placements = attribute(spec.get("tensor_meta"), "shape", 0), spec.get("placements")
    if not are_sizes(shape) or not isinstance(placements, tuple | list):
        raise damaged(path, f"{name} does not give the shape of the whole tensor, or how it is cut")
    # ``are_sizes`` limits the coordinates, and so the placements, which are read below: many
    # tensors may share them.
    coordinates = _read_coordinates(archive, spec.get("mesh"), name, rank, len(placements))
    sharded_dims = tuple(
        _read_sharded_dim(path, name, placement, len(shape)) for placement in placements
    )
    return _RankPart(tensor, tuple(shape), sharded_dims, coordinates)


def _read_sharded_dim(path: Path, name: str, placement: Any, dimensions: int) -> int | None:
    """Return the tensor dimension that a placement cuts; None if it repeats the tensor."""
    kind = placement.name if isinstance(placement, PickledObject) else ""
    if kind == "Replicate":
        return None
    dim = attribute(placement, "dim", 0)
    if kind != "Shard" or type(dim) is not int or not 0 <= dim < dimensions:
        fix = (
            "merge the files first: python -m verl.model_merger merge --backend fsdp --local_dir "
            "DIR --target_dir out"
        )
        raise damaged(
            path, f"{name} is placed as {kind or 'nothing known'}, which is not supported", fix
        )
    return dim


def _read_coordinates(
    archive: Archive, mesh: Any, name: str, rank: int, dimensions: int
) -> tuple[int, ...]:
    """Return the place of this rank in the device mesh."""
    import numpy as np

    coordinates = attribute(mesh, "_coordinate_on_dim")
    if coordinates is None and dimensions == 1:
        coordinates = (rank,)
    if coordinates is None:
        ranks = archive.tensor(attribute(mesh, "mesh"), f"the mesh of {name}")
        if ranks is not None and ranks.numel <= MAX_RANKS and ranks.dtype in {"int32", "int64"}:
            found = np.flatnonzero(
                np.frombuffer(ranks.read_bytes(), f"<i{WIDTH[ranks.dtype]}") == rank
            ).tolist()
            coordinates = (
                tuple(map(int, np.unravel_index(found[0], ranks.shape))) if found else None
            )
    if (
        not are_sizes(coordinates)
        or len(coordinates) != dimensions
        or max(coordinates, default=0) >= MAX_RANKS
    ):
        raise damaged(
            archive.file.path,
            f"{name} does not give the position of rank {rank} in the device mesh",
        )
    return tuple(coordinates)


def _read_sharded(archive: Archive, name: str, state: Any) -> Iterator[_RankPart]:
    """Yield the parts of a ShardedTensor: its state is ``(local shards, metadata, …)``."""
    shards, meta = state[:2] if isinstance(state, tuple) and len(state) > 1 else (None, None)
    shape = attribute(meta, "size")
    if not isinstance(shards, list) or not are_sizes(shape):
        raise damaged(archive.file.path, f"{name} is a ShardedTensor without shards")
    for shard in shards:
        tensor = archive.tensor(attribute(shard, "tensor"), name)
        offsets = attribute(attribute(shard, "metadata"), "shard_offsets")
        if tensor is None or not are_sizes(offsets):
            raise damaged(archive.file.path, f"{name} is a ShardedTensor without offsets")
        yield _RankPart(tensor, tuple(shape), offsets=tuple(offsets))


def _join_parts(
    folder: Path, name: str, parts: list[_RankPart], world: int, distributed: bool
) -> Boxes:
    """Return a tensor put together from its parts; ``distributed`` is whether any tensor states how
    it is cut.
    """
    first = parts[0]
    if len({(part.tensor.dtype, part.shape, part.sharded_dims is None) for part in parts}) > 1:
        raise damaged(
            folder, f"the ranks disagree about {name}", "the folder holds files of two checkpoints"
        )
    if first.offsets is None and len(parts) != world:
        raise damaged(folder, f"{len(parts)} of {world} ranks hold {name}", COPY_ALL)
    shape = first.shape
    if first.offsets is not None:
        boxes = [Box(part.offsets or (), part.tensor.shape, part.tensor.fill) for part in parts]
    elif first.sharded_dims is not None:
        boxes = _place_in_mesh(folder, name, parts)
    elif distributed or world == 1 or first.tensor.shape == ():
        if len({part.tensor.shape for part in parts}) > 1:
            raise damaged(folder, f"{name} has several shapes on the ranks, and is not cut")
        shape = first.tensor.shape
        boxes = [Box((0,) * len(shape), shape, first.tensor.fill)]
    else:
        if len({part.tensor.shape[1:] for part in parts}) > 1 or any(
            not part.tensor.shape for part in parts
        ):
            raise damaged(folder, f"the rows of {name} have different shapes on the ranks")
        inner, tensors = first.tensor.shape[1:], [part.tensor for part in parts]
        *starts, rows = accumulate((tensor.shape[0] for tensor in tensors), initial=0)
        origin = (0,) * len(inner)
        boxes = [
            Box((row, *origin), of.shape, of.fill) for row, of in zip(starts, tensors, strict=True)
        ]
        shape = (rows, *inner)
    shape = shape or ()
    if outside := next(
        (box for box in boxes if not len(box.offsets) == len(box.sizes) == len(shape)), None
    ):
        raise damaged(
            folder, f"the part of {name} at {list(outside.offsets)} does not lie in the tensor"
        )
    return Boxes(TensorInfo(name, shape, first.tensor.dtype), boxes, folder)


def _place_in_mesh(folder: Path, name: str, parts: list[_RankPart]) -> list[Box]:
    """Return the boxes of a DTensor; of every repeated dimension of the mesh, one place is used."""
    shape, sharded_dims = parts[0].shape or (), parts[0].sharded_dims or ()
    by_coordinates = {part.coordinates: part for part in parts}
    if any(part.sharded_dims != sharded_dims for part in parts) or len(by_coordinates) != len(
        parts
    ):
        raise damaged(
            folder,
            f"the ranks disagree about how {name} is cut",
            "the folder holds two checkpoints",
        )
    counts = [max(places) + 1 for places in zip(*by_coordinates, strict=True)]
    if math.prod(counts) != len(by_coordinates):
        problem = f"the device mesh of {name} has {counts} places for {len(by_coordinates)} ranks"
        raise damaged(folder, problem, COPY_ALL)
    used = (
        range(1 if dim is None else count) for count, dim in zip(counts, sharded_dims, strict=True)
    )
    boxes = []
    for coordinates in product(*used):
        offsets, sizes = [0] * len(shape), list(shape)
        for position, count, dim in zip(coordinates, counts, sharded_dims, strict=True):
            if dim is not None:
                chunk = -(-sizes[dim] // count)
                begin = min(sizes[dim], position * chunk)
                offsets[dim] += begin
                sizes[dim] = min(chunk, sizes[dim] - begin)
        tensor = by_coordinates[coordinates].tensor
        if tensor.shape != tuple(sizes):
            problem = f"the part of {name} has shape {list(tensor.shape)} instead of {sizes}"
            raise damaged(tensor.file.path, problem, "the file belongs to another checkpoint")
        boxes.append(Box(tuple(offsets), tuple(sizes), tensor.fill))
    return boxes
