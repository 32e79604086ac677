"""DeepSpeed ZeRO 1, 2 and 3: the float32 master weights in the optimizer files of all ranks.

Stages 1 and 2: of each parameter group, the parts ``single_partition_of_fp32_groups`` of all ranks
make one vector, in which the group's parameters (``param_shapes`` of
``mp_rank_00_model_states.pt``) follow each other. Stage 3: every rank holds ⌈n / ranks⌉ entries of
each parameter, one parameter after the other, in ``fp32_flat_groups``. Frozen parameters and
buffers are in the model files. A folder without optimizer files has only the 16-bit weights of
stages 1 and 2.

Individually aligned parameters, model parallelism and separately partitioned experts are not
supported: use DeepSpeed's script.

Reference: ``deepspeed/utils/zero_to_fp32.py``.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError, damaged
from lora_diag.storage.documents import is_plain_name
from lora_diag.storage.file_bytes import FileBytes, StoredTensor
from lora_diag.storage.inert import attribute, describe
from lora_diag.storage.parts import Archive, Box, Boxes, PartsFolder, are_sizes
from lora_diag.storage.tensors import TensorInfo

OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_00_optim_states\.pt")
# File names: all optimizer files, the model file of stages 1 and 2, that of a rank in stage 3, and
# folders of steps.
STATES = "*_optim_states.pt"
WHOLE = "mp_rank_00_model_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
STEPS = "global_step[0-9]*"
MAX_TAG_BYTES = 1000
COPY_ALL = "copy the files of all ranks"

# Name and shape of the parameters of a group.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Optimizer:
    """The optimizer file of one rank: its stage, the number of ranks, flat tensors, and paddings of
    parameters.
    """

    archive: Archive
    stage: int
    ranks: int
    flats: tuple[StoredTensor, ...]
    paddings: list[int]


class ZeroFolder(PartsFolder):
    """A folder that DeepSpeed wrote, or that of one step in it, presented as one file of whole
    tensors.

    Args:
        folder: The folder.

    Raises:
        InputError: A file is missing, damaged or of unsupported parallelism, the parts do not fit
            together, or the folder holds several steps and does not name the latest.
    """

    label = "DeepSpeed ZeRO"

    def __init__(self, folder: Path) -> None:
        self.path = _find_step_folder(folder)
        root = folder if self.path != folder else folder.parent
        tool, quoted = (shlex.quote(str(path)) for path in (root / "zero_to_fp32.py", root))
        self._fix = f"convert it: python {tool} {quoted} out --safe_serialization"
        files = _find_rank_files(self.path)
        tensors = self._read_master_weights(files) if files else dict(self._read_model_weights())
        if not tensors:
            raise damaged(self.path, "holds no weights", self._fix)
        kind = (
            f"master weights of {len(files)} ranks"
            if files
            else "16-bit weights: there are no optimizer files"
        )
        super().__init__(self.path, tensors, (f"{self.path.name}: {kind}",))

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether DeepSpeed wrote a folder."""
        return any(folder.glob(STATES)) or (folder / WHOLE).is_file() or any(folder.glob(STEPS))

    def _read_model_weights(self) -> Iterator[tuple[str, Boxes]]:
        """Yield the 16-bit weights of the model file."""
        archive, state = _open_archive(self.path / WHOLE)
        for name, value in _get_dict(state, "module").items():
            if isinstance(name, str) and (tensor := archive.tensor(value, name)) is not None:
                yield name, self._join(name, tensor.shape, [tensor])

    def _read_master_weights(self, files: Sequence[Path]) -> dict[str, Boxes]:
        """Return the float32 weights of the optimizer files, then buffers, frozen ones and aliases
        of shared ones.
        """
        optimizers = [self._open_optimizer(path) for path in files]
        stage, ranks = optimizers[0].stage, len(files)
        if any((optimizer.stage, optimizer.ranks) != (stage, ranks) for optimizer in optimizers):
            world = max(optimizer.ranks for optimizer in optimizers)
            raise damaged(
                self.path, f"there are optimizer files of {ranks} ranks of {world}", COPY_ALL
            )
        archive, state = _open_archive(self.path / (WHOLE if stage < 3 else MODEL.format(0)))
        groups = self._read_groups(archive.file.path, state.get("param_shapes"))
        flats = [optimizer.flats for optimizer in optimizers]
        if stage < 3 and any(any(optimizer.paddings) for optimizer in optimizers):
            raise damaged(
                self.path, "aligns parameters one by one, which is not supported", self._fix
            )
        read = self._read_partitioned if stage == 3 else self._read_consecutive
        tensors = dict(read(groups, flats))
        tensors |= self._read_frozen_and_buffers(archive, state, ranks if stage == 3 else 1)
        for alias, name in _list_aliases(state.get("shared_params")):
            if name in tensors:
                tensors[alias] = tensors[name]
        return tensors

    def _read_consecutive(
        self, groups: list[Shapes], flats: Sequence[Sequence[StoredTensor]]
    ) -> Iterator[tuple[str, Boxes]]:
        """Yield the parameters of stages 1 and 2: those of a group follow each other in the parts
        of all ranks.
        """
        if any(len(flat) != len(groups) for flat in flats):
            raise damaged(
                self.path,
                f"a rank lacks some of the {len(groups)} groups of param_shapes",
                COPY_ALL,
            )
        for number, group in enumerate(groups):
            vector = [flat[number] for flat in flats]
            position, alignment = 0, 2 * len(flats)
            for name, shape in group.items():
                count = math.prod(shape)
                yield name, self._join(name, shape, self._slice(vector, position, count, name))
                position += count
            stored = sum(part.numel for part in vector)
            if -(-position // alignment) != -(-stored // alignment):
                problem = f"group {number} has {position:,} entries, but {stored:,} are stored"
                raise damaged(self.path, problem, self._fix)

    def _read_partitioned(
        self, groups: list[Shapes], flats: Sequence[Sequence[StoredTensor]]
    ) -> Iterator[tuple[str, Boxes]]:
        """Yield the parameters of stage 3, of each of which every rank holds an equal part, the
        last with padding.
        """
        position = 0
        for group in groups:
            for name, shape in group.items():
                count = -(-math.prod(shape) // len(flats))
                parts = [
                    part for flat in flats for part in self._slice(flat, position, count, name)
                ]
                yield name, self._join(name, shape, parts)
                position += count
        if position != (stored := sum(part.numel for part in flats[0])):
            raise damaged(
                self.path,
                f"a rank has {position:,} parameters, but {stored:,} are stored",
                self._fix,
            )

    def _read_frozen_and_buffers(
        self, archive: Archive, state: Mapping[Any, Any], ranks: int
    ) -> Iterator[tuple[str, Boxes]]:
        """Yield buffers, and frozen parameters from the model files of ``ranks`` ranks."""
        module = _get_dict(state, "module")
        buffers = state.get("buffer_names")
        names = buffers if isinstance(buffers, list) else []
        for name in names:
            if not isinstance(name, str):
                continue
            tensor = archive.tensor(module.get(name), name)
            if tensor is not None:
                yield name, self._join(name, tensor.shape, [tensor])
        if not (frozen := self._check_shapes(_get_dict(state, "frozen_param_shapes"))):
            return
        others = (_open_archive(self.path / MODEL.format(rank)) for rank in range(1, ranks))
        opened = [(archive, state), *others]
        for name, shape in frozen.items():
            parts = []
            for holder, values in opened:
                tensor = holder.tensor(_get_dict(values, "frozen_param_fragments").get(name), name)
                if tensor is None:
                    raise damaged(
                        holder.file.path,
                        f"has no part of {name:.200}, which is frozen",
                        "copy it again",
                    )
                parts.append(tensor)
            yield name, self._join(name, shape, parts)

    def _open_optimizer(self, path: Path) -> _Optimizer:
        """Return the optimizer file of a rank."""
        archive, values = _open_archive(path)
        state = _get_dict(values, "optimizer_state_dict")
        stage = state.get("zero_stage")
        stage = stage if type(stage) is int else attribute(stage, "value", 0)
        world = max(_list_numbers(state.get("partition_count")), default=0)
        if type(stage) is not int or not 0 <= stage <= 3 or world < 1:
            raise damaged(path, "is not an optimizer file of ZeRO", self._fix)
        stored = state.get("single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups")
        tensors = (
            [archive.tensor(value, path.name) for value in stored]
            if isinstance(stored, list | tuple)
            else []
        )
        flats = tuple(tensor for tensor in tensors if tensor is not None and len(tensor.shape) == 1)
        if not flats or len(flats) != len(tensors) or len({tensor.dtype for tensor in flats}) > 1:
            raise damaged(path, "holds no flat master weights", "copy it again")
        paddings = _list_numbers(state.get("param_alignment_paddings"))
        return _Optimizer(archive, max(1, stage), world, flats, paddings)

    def _slice(
        self, vector: Sequence[StoredTensor], start: int, count: int, name: str
    ) -> list[StoredTensor]:
        """Return a range of the concatenated tensors of a vector."""
        parts, begin = [], 0
        for tensor in vector:
            low, high = max(start, begin), min(start + count, begin + tensor.numel)
            if low < high:
                parts.append(tensor.cut(low - begin, high - low))
            begin += tensor.numel
        if start + count > begin:
            end = start + count
            raise damaged(
                self.path,
                f"{name:.200} lies up to entry {end:,}, but {begin:,} are stored",
                COPY_ALL,
            )
        return parts

    def _join(self, name: str, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> Boxes:
        """Return a tensor of the first entries of some tensors; what follows is padding."""
        numel, offset, boxes = math.prod(shape), 0, []
        for part in self._slice(parts, 0, numel, name):
            boxes.append(Box((offset,), part.shape, part.fill))
            offset += part.numel
        dtypes = {part.dtype for part in parts}
        if len(dtypes) > 1:
            raise damaged(
                self.path, f"the parts of {name:.200} have different dtypes", "copy all of one run"
            )
        dtype = dtypes.pop() if dtypes else "float32"
        return Boxes(TensorInfo(name, shape, dtype), boxes, self.path, (numel,))

    def _read_groups(self, path: Path, groups: Any) -> list[Shapes]:
        """Return the shapes of the parameters of all groups, after checking them."""
        if (
            not isinstance(groups, list)
            or not groups
            or not all(isinstance(group, dict) for group in groups)
        ):
            raise damaged(path, "gives no param_shapes", self._fix)
        names: set[str] = set()
        for group in groups:
            if not names.isdisjoint(self._check_shapes(group)):
                raise damaged(self.path, "two groups of param_shapes have one parameter", self._fix)
            names.update(group)
        return groups

    def _check_shapes(self, shapes: Mapping[Any, Any]) -> Shapes:
        """Return the shapes by name, after checking that names are text and shapes
        tuples of sizes.
        """
        for name, shape in shapes.items():
            if not isinstance(name, str) or not isinstance(shape, tuple) or not are_sizes(shape):
                raise damaged(
                    self.path, f"param_shapes gives {describe(name)} an invalid shape", self._fix
                )
        return dict(shapes)


def _get_dict(values: Any, key: str) -> Mapping[Any, Any]:
    """Return an entry that is a dictionary; empty if there is none."""
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, dict) else {}


def _find_step_folder(folder: Path) -> Path:
    """Return the folder of a step: the given one, the one that ``latest`` in it names, or the only
    one in it.
    """
    if any(folder.glob(STATES)) or (folder / WHOLE).is_file():
        return folder
    latest = folder / "latest"
    if latest.is_file() and latest.stat().st_size <= MAX_TAG_BYTES:
        tag = latest.read_bytes().decode(errors="replace").strip()
        if not is_plain_name(tag) or not (folder / tag).is_dir():
            raise damaged(
                latest,
                f"names {tag!r}, but {folder} has no such folder",
                "give the folder of a step",
            )
        return folder / tag
    steps = sorted(path for path in folder.glob(STEPS) if path.is_dir())
    if len(steps) != 1:
        raise InputError(
            f"{folder}: holds {len(steps)} steps of DeepSpeed and no file named latest; give one "
            "of them"
        )
    return steps[0]


def _find_rank_files(folder: Path) -> list[Path]:
    """Return the optimizer files in the order of the ranks; empty if there are none."""
    by_rank = {}
    for path in folder.glob(STATES):
        match = OPTIMIZER.fullmatch(path.name)
        if match is None:
            raise damaged(
                path, "is of unsupported model or expert parallelism", "convert it with DeepSpeed"
            )
        by_rank[int(match[1])] = path
    for rank, known in enumerate(sorted(by_rank)):
        if rank != known:
            raise damaged(folder, f"the optimizer file of rank {rank} is missing", COPY_ALL)
    return [by_rank[rank] for rank in sorted(by_rank)]


def _open_archive(path: Path) -> tuple[Archive, Mapping[Any, Any]]:
    """Return a file and the dictionary in it; an empty one if it holds another value."""
    if not path.is_file():
        raise damaged(path.parent, f"{path.name} is missing", COPY_ALL)
    archive = Archive(FileBytes(path))
    return archive, archive.value if isinstance(archive.value, dict) else {}


def _list_numbers(value: Any) -> list[int]:
    """Return the whole numbers of a value, of a list or of lists in a list; those of a repeated
    list once.
    """
    items = value if isinstance(value, list | tuple) else (value,)
    lists = {id(item): item for item in items if isinstance(item, list | tuple)}.values()
    return [number for part in (items, *lists) for number in part if type(number) is int]


def _list_aliases(value: Any) -> list[tuple[str, str]]:
    """Return the aliases of shared parameters, each with the name of its parameter."""
    if isinstance(value, dict):
        value = list(value.items())
    items = value if isinstance(value, list) else []
    pairs = [tuple(item) for item in items if isinstance(item, tuple | list) and len(item) == 2]
    return [
        (alias, name) for alias, name in pairs if isinstance(alias, str) and isinstance(name, str)
    ]
