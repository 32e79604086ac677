"""DeepSpeed ZeRO 1, 2 and 3: the float32 master weights in the optimizer files of all ranks.

Stages 1 and 2: of each parameter group, the parts ``single_partition_of_fp32_groups`` of all ranks make one vector, in
which the group's parameters (``param_shapes`` of ``mp_rank_00_model_states.pt``) follow each other. Stage 3: every rank
holds ⌈n / ranks⌉ entries of each parameter, one parameter after the other, in ``fp32_flat_groups``. Frozen parameters
and buffers are in the model files. A folder without optimizer files has only the 16-bit weights of stages 1 and 2.

The files are read as data (``archives``). Individually aligned parameters, model parallelism and separately partitioned
experts are not supported: use DeepSpeed's script.

Reference: ``deepspeed/utils/zero_to_fp32.py``.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.archives import WIDTH, Archive, StoredTensor, are_sizes
from lora_diag.checkpoints.file_bytes import FileBytes
from lora_diag.checkpoints.inert import Record, describe
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_00_optim_states\.pt")
# File names: all optimizer files, the model file of stages 1 and 2, that of a rank in stage 3, and folders of steps.
STATES = "*_optim_states.pt"
WHOLE = "mp_rank_00_model_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
STEPS = "global_step[0-9]*"
MAX_TAG_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor as a concatenation of ranges of other tensors.

    Args:
        parts: Tensor, first entry in it, and number of entries.
    """

    parts: tuple[tuple[StoredTensor, int, int], ...]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop``."""
        import torch

        pieces, position = [], 0
        for tensor, begin, count in self.parts:
            low, high = max(start, position), min(stop, position + count)
            if low < high:
                pieces.append(tensor.read(begin + low - position, begin + high - position))
            position += count
        return torch.cat(pieces) if pieces else self.parts[0][0].read(0, 0)

    def read_bytes(self) -> bytes:
        """Return the bytes, without torch."""
        pieces = []
        for tensor, begin, count in self.parts:
            width = WIDTH[tensor.dtype]
            pieces.append(tensor.read_bytes()[begin * width : (begin + count) * width])
        return b"".join(pieces)


class ZeroFolder:
    """A folder that DeepSpeed wrote, or that of one step in it, presented as one file of whole tensors.

    Args:
        folder: The folder.

    Raises:
        InputError: A file is missing or damaged, or the parts do not fit together.
    """

    label = "DeepSpeed ZeRO"
    config_folder = ""

    def __init__(self, folder: Path) -> None:
        self._root, self.path = folder, _find_step_folder(folder)
        self.metadata: Mapping[str, str] = {}
        files = _find_rank_files(self.path)
        tensors = dict(self._read_model_weights() if not files else self._read_master_weights(files))
        if not tensors:
            raise InputError(f"{self.path}: holds no weights; {self._suggest_fix()}")
        try:
            "".join(tensors).encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which a results file cannot hold
            raise InputError(f"{self.path}: a tensor name is not valid Unicode ({error}); save it again") from error
        self._parts = {name: flat for name, (_, flat) in tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, shape, flat.parts[0][0].dtype) for name, (shape, flat) in tensors.items()
        }
        kind = f"master weights of {len(files)} ranks" if files else "16-bit weights: there are no optimizer files"
        self.notes: tuple[str, ...] = (f"{self.path.name}: {kind}",)

    @staticmethod
    def matches(folder: Path) -> bool:
        """Return whether DeepSpeed wrote a folder."""
        return any(folder.glob(STATES)) or (folder / WHOLE).is_file() or any(folder.glob(STEPS))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        return self._parts[name].read(start, stop)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, without torch."""
        return self._parts[name].read_bytes()

    def _suggest_fix(self) -> str:
        root = self.path.parent if self._root == self.path else self._root
        tool, folder = (shlex.quote(str(path)) for path in (root / "zero_to_fp32.py", root))
        return f"convert it: python {tool} {folder} out --safe_serialization"

    def _read_model_weights(self) -> Iterator[tuple[str, tuple[tuple[int, ...], Flat]]]:
        """Yield the 16-bit weights of the model file."""
        archive = _open_archive(self.path / WHOLE)
        module = archive.value.get("module") if isinstance(archive.value, dict) else None
        for name, value in module.items() if isinstance(module, dict) else ():
            tensor = archive.tensor(value, name) if isinstance(name, str) else None
            if tensor is not None:
                yield name, (tensor.shape, Flat(((tensor, 0, tensor.numel),)))

    def _read_master_weights(self, files: Sequence[Path]) -> Iterator[tuple[str, tuple[tuple[int, ...], Flat]]]:
        """Yield the float32 weights of the optimizer files, then buffers, frozen ones and aliases of shared ones."""
        states = [self._open_optimizer_file(path) for path in files]
        stage, ranks = states[0][1], len(files)
        runs = {(state_stage, world) for _, state_stage, world, _, _ in states}
        if runs != {(stage, ranks)}:
            largest = max(world for _, world in runs)
            raise InputError(
                f"{self.path}: there are optimizer files of {ranks} ranks of {largest}; copy all of one run"
            )
        archive = _open_archive(self.path / (WHOLE if stage < 3 else MODEL.format(0)))
        state = archive.value if isinstance(archive.value, dict) else {}
        groups = state.get("param_shapes")
        if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
            raise InputError(f"{archive.file.path}: gives no param_shapes; {self._suggest_fix()}")
        flats = [
            _find_tensors(part, values, path.name) for (part, _, _, values, _), path in zip(states, files, strict=True)
        ]
        if stage < 3:
            if any(any(_list_numbers(padding)) for *_, padding in states):
                raise InputError(
                    f"{self.path}: aligns parameters one by one, which is not supported; {self._suggest_fix()}"
                )
            tensors = dict(self._read_consecutive(groups, flats))
        else:
            tensors = dict(self._read_partitioned(groups, flats))
        tensors |= self._read_frozen_and_buffers(archive, state, stage, ranks)
        for alias, name in _list_aliases(state.get("shared_params")):
            if name in tensors:
                tensors[alias] = tensors[name]
        yield from tensors.items()

    def _read_consecutive(
        self, groups: Sequence[Mapping[Any, Any]], flats: Sequence[Sequence[StoredTensor]]
    ) -> Iterator[tuple[str, tuple[tuple[int, ...], Flat]]]:
        """Yield the parameters of stages 1 and 2: those of a group follow each other in the parts of all ranks."""
        if any(len(flat) != len(groups) for flat in flats):
            raise InputError(
                f"{self.path}: a rank does not hold the {len(groups)} groups of param_shapes; copy all files"
            )
        for number, group in enumerate(self._check_groups(groups)):
            vector = [flat[number] for flat in flats]
            position, alignment = 0, 2 * len(flats)
            for name, shape in group.items():
                count = math.prod(shape)
                yield name, (shape, self._slice(vector, position, count, name))
                position += count
            stored = sum(part.numel for part in vector)
            if -(-position // alignment) != -(-stored // alignment):
                raise InputError(
                    f"{self.path}: group {number} has {position:,} entries, but {stored:,} are stored; "
                    f"{self._suggest_fix()}"
                )

    def _read_partitioned(
        self, groups: Sequence[Mapping[Any, Any]], flats: Sequence[Sequence[StoredTensor]]
    ) -> Iterator[tuple[str, tuple[tuple[int, ...], Flat]]]:
        """Yield the parameters of stage 3, of each of which every rank holds an equal part, the last with padding."""
        position = 0
        for group in self._check_groups(groups):
            for name, shape in group.items():
                count = -(-math.prod(shape) // len(flats))
                parts = [part for flat in flats for part in self._slice(flat, position, count, name).parts]
                yield name, (shape, _drop_padding(parts, math.prod(shape)))
                position += count
        stored = sum(part.numel for part in flats[0])
        if position != stored:
            raise InputError(
                f"{self.path}: a rank has {position:,} parameters, but {stored:,} are stored; {self._suggest_fix()}"
            )

    def _read_frozen_and_buffers(
        self, archive: Archive, state: Mapping[Any, Any], stage: int, ranks: int
    ) -> dict[str, tuple[tuple[int, ...], Flat]]:
        """Return frozen parameters and buffers."""
        tensors: dict[str, tuple[tuple[int, ...], Flat]] = {}
        buffers, module = state.get("buffer_names"), state.get("module")
        for name in buffers if isinstance(buffers, list) else ():
            if not isinstance(name, str) or not isinstance(module, dict):
                continue
            tensor = archive.tensor(module.get(name), name)
            if tensor is not None:
                tensors[name] = tensor.shape, Flat(((tensor, 0, tensor.numel),))
        frozen = state.get("frozen_param_shapes")
        if not isinstance(frozen, dict) or not frozen:
            return tensors
        archives = [archive]
        if stage == 3:
            archives += [_open_archive(self.path / MODEL.format(rank)) for rank in range(1, ranks)]
        for name, shape in self._check_shapes(frozen).items():
            parts = []
            for rank_archive in archives:
                fragments = (
                    rank_archive.value.get("frozen_param_fragments") if isinstance(rank_archive.value, dict) else None
                )
                tensor = rank_archive.tensor(fragments.get(name), name) if isinstance(fragments, dict) else None
                if tensor is None:
                    raise InputError(
                        f"{rank_archive.file.path}: has no part of {name:.200}, which is frozen; copy it again"
                    )
                parts.append((tensor, 0, tensor.numel))
            if sum(count for *_, count in parts) < math.prod(shape):
                raise InputError(f"{self.path}: the parts of {name:.200} hold fewer entries than {list(shape)}")
            tensors[name] = shape, _drop_padding(parts, math.prod(shape))
        return tensors

    def _open_optimizer_file(self, path: Path) -> tuple[Archive, int, int, Any, Any]:
        """Return the file of a rank: archive, stage, number of ranks, its flat tensors, and paddings of parameters."""
        archive = _open_archive(path)
        stored = archive.value.get("optimizer_state_dict") if isinstance(archive.value, dict) else None
        state: dict[Any, Any] = stored if isinstance(stored, dict) else {}
        stage = state.get("zero_stage")
        if isinstance(stage, Record) and stage.args:
            stage = stage.args[0]
        world = max(_list_numbers(state.get("partition_count")), default=0)
        if type(stage) is not int or not 0 <= stage <= 3 or world < 1:
            raise InputError(f"{path}: is not an optimizer file of ZeRO; {self._suggest_fix()}")
        key = "single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"
        return archive, max(1, stage), world, state.get(key), state.get("param_alignment_paddings")

    def _slice(self, vector: Sequence[StoredTensor], start: int, count: int, name: str) -> Flat:
        """Return a range of the concatenated tensors of a vector."""
        parts, begin = [], 0
        for tensor in vector:
            low, high = max(start, begin), min(start + count, begin + tensor.numel)
            if low < high:
                parts.append((tensor, low - begin, high - low))
            begin += tensor.numel
        if start + count > begin or not vector:
            raise InputError(
                f"{self.path}: {name:.200} lies up to entry {start + count:,}, but {begin:,} are stored; copy all files"
            )
        return Flat(tuple(parts) or ((vector[0], 0, 0),))

    def _check_groups(self, groups: Sequence[Mapping[Any, Any]]) -> list[dict[str, tuple[int, ...]]]:
        """Return the shapes of the parameters of all groups, after checking them."""
        names: set[str] = set()
        checked = []
        for group in groups:
            if not names.isdisjoint(group):
                raise InputError(f"{self.path}: two groups of param_shapes have one parameter; {self._suggest_fix()}")
            checked.append(self._check_shapes(group))
            names.update(group)
        return checked

    def _check_shapes(self, shapes: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
        for name, shape in shapes.items():
            if not isinstance(name, str) or not isinstance(shape, tuple) or not are_sizes(shape):
                raise InputError(
                    f"{self.path}: param_shapes gives {describe(name)} an invalid shape; {self._suggest_fix()}"
                )
        return dict(shapes)


def _find_step_folder(folder: Path) -> Path:
    """Return the folder of a step: the given one, the one that ``latest`` in it names, or the only one in it."""
    if any(folder.glob(STATES)) or (folder / WHOLE).is_file():
        return folder
    latest = folder / "latest"
    if latest.is_file() and latest.stat().st_size <= MAX_TAG_BYTES:
        tag = latest.read_bytes().decode(errors="replace").strip()
        if tag in {"", ".", ".."} or set(tag) & set("/\\\0") or not (folder / tag).is_dir():
            raise InputError(f"{latest}: names {tag!r}, but {folder} has no such folder; give the folder of a step")
        return folder / tag
    steps = sorted(path for path in folder.glob(STEPS) if path.is_dir())
    if len(steps) != 1:
        raise InputError(f"{folder}: holds {len(steps)} steps of DeepSpeed and no file named latest; give one of them")
    return steps[0]


def _find_rank_files(folder: Path) -> list[Path]:
    """Return the optimizer file of every rank."""
    by_rank = {}
    for path in folder.glob(STATES):
        match = OPTIMIZER.fullmatch(path.name)
        if match is None:
            raise InputError(
                f"{path}: is from a run with model or expert parallelism, which is not supported; convert it with "
                "DeepSpeed"
            )
        by_rank[int(match[1])] = path
    missing = [rank for rank in range(max(by_rank, default=-1) + 1) if rank not in by_rank]
    if missing:
        raise InputError(f"{folder}: the optimizer file of rank {missing[0]} is missing; copy the files of all ranks")
    return [by_rank[rank] for rank in sorted(by_rank)]


def _open_archive(path: Path) -> Archive:
    if not path.is_file():
        raise InputError(f"{path.parent}: {path.name} is missing; copy the files of all ranks")
    return Archive(FileBytes(path), (0, path.stat().st_size), path.name)


def _find_tensors(archive: Archive, values: Any, name: str) -> list[StoredTensor]:
    """Return the flat tensors in a value of an optimizer file."""
    tensors = [archive.tensor(value, name) for value in values] if isinstance(values, list | tuple) else []
    flat = [tensor for tensor in tensors if tensor is not None and len(tensor.shape) == 1]
    if not flat or len(flat) != len(tensors) or len({tensor.dtype for tensor in flat}) > 1:
        raise InputError(f"{archive.file.path}: holds no flat master weights; copy it again")
    return flat


def _drop_padding(parts: Sequence[tuple[StoredTensor, int, int]], count: int) -> Flat:
    """Return the first ``count`` entries of some parts, without the padding at their end."""
    unpadded, left = [], count
    for tensor, begin, size in parts:
        if left > 0:
            unpadded.append((tensor, begin, min(size, left)))
        left -= size
    return Flat(tuple(unpadded) or ((parts[0][0], 0, 0),))


def _list_numbers(value: Any) -> list[int]:
    """Return the whole numbers of a value, of a list or of lists in a list; those of a repeated list once."""
    items = value if isinstance(value, list | tuple) else (value,)
    lists = {id(item): item for item in items if isinstance(item, list | tuple)}.values()
    return [number for part in (items, *lists) for number in part if type(number) is int]


def _list_aliases(value: Any) -> list[tuple[str, str]]:
    """Return the aliases of shared parameters, each with the name of its parameter."""
    items = value.items() if isinstance(value, dict) else value if isinstance(value, list) else ()
    pairs = [tuple(item) for item in items if isinstance(item, tuple | list) and len(item) == 2]
    return [(alias, name) for alias, name in pairs if isinstance(alias, str) and isinstance(name, str)]
