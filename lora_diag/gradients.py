"""Gradient snapshots: the training step of each file, and the location of each weight's gradient in
it.

Handles files, steps and names; numbers are measured by ``linalg``.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diag.adapters import Location, match_names
from lora_diag.deltas import Side, Unpaired, matrices, natural_order, row_spans
from lora_diag.errors import InputError
from lora_diag.storage import Checkpoint, locate_files, open_checkpoint
from lora_diag.storage.locating import WEIGHTS, find_named_weights
from lora_diag.storage.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

INDEX = ".index.json"

# The last number in a file's name: ``grad_step000040`` is of step 40.
_NUMBER = re.compile(r"(\d+)\D*$")


@dataclass(frozen=True, slots=True)
class GradientStep:
    """The gradients of one training step.

    Args:
        step: Number of optimizer steps before the gradients were taken.
        checkpoint: The gradients, by name.
    """

    step: int
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Location of G_t of one weight.

    Args:
        step: t.
        side: The stored entries.
    """

    step: int
    side: Side

    def blocks(self, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Yield the rows of G_t in blocks, ``(rows, in)`` in the stored dtype, in order.

        The file is closed afterwards: a run may have more steps than a process may have open files.
        """
        name, start = self.side.name, self.side.offset
        file = copy.copy(next(file for file in self.side.checkpoint.files if name in file.tensors))
        for first, last in row_spans(shape):
            stored = file.read(name, start + first * shape[1], start + last * shape[1])
            yield stored.view(last - first, shape[1])


@dataclass(frozen=True, slots=True)
class History:
    """The gradients of one weight over the steps.

    Args:
        layer: The weight's name in BASE; without BASE, in the gradients.
        shape: ``(out, in)``.
        snapshots: One per step that has this weight, in the order of the steps.
    """

    layer: str
    shape: tuple[int, int]
    snapshots: tuple[Snapshot, ...]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Distinct dtypes of the stored snapshots."""
        return tuple(dict.fromkeys(snapshot.side.dtype for snapshot in self.snapshots))


def open_steps(paths: Sequence[Path | str]) -> tuple[GradientStep, ...]:
    """Open gradient snapshots, reading their headers only.

    The step number is ``step`` in the metadata, else the last number in the name of the file; in
    that of its folder if the file has a usual name of weights, such as ``model.safetensors``.

    Args:
        paths: Files of one step each, shard indices, folders with the weights of one step, or
            folders of such steps.

    Returns:
        The steps in ascending order.

    Raises:
        InputError: A path cannot be read, holds no gradients, has no valid step number or several,
            or repeats a step.
    """
    steps: dict[int, GradientStep] = {}
    for source in chain.from_iterable(_find_sources(locate_files(path).files) for path in paths):
        checkpoint = open_checkpoint(source)
        number = _parse_step(checkpoint, source)
        existing = steps.setdefault(number, GradientStep(number, checkpoint))
        if existing.checkpoint is not checkpoint:
            raise InputError(
                f"{source}: step {number} is also in {existing.checkpoint.path}; give each step "
                "once"
            )
    return tuple(steps[number] for number in sorted(steps))


def _find_sources(path: Path) -> list[Path]:
    """Return the checkpoints of gradients in a path, one per step.

    Raises:
        InputError: The folder cannot be read, or holds no gradients.
    """
    if not path.is_dir() or find_named_weights(path) is not None:
        return [path]
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    indices = [file for file in files if file.name.endswith(f".safetensors{INDEX}")]
    shards = {file.path for index in indices for file in open_checkpoint(index).files}
    single = [
        file
        for file in files
        if file.suffix == ".safetensors" and file.is_file() and file not in shards
    ]
    folders = [file for file in files if file.is_dir() and any(file.glob("*.safetensors"))]
    sources = sorted([*indices, *single, *folders])
    if not sources:
        raise InputError(
            f"{path}: holds no gradients; looked for one .safetensors file or one folder of shards "
            "a step"
        )
    return sources


def _parse_step(checkpoint: Checkpoint, path: Path) -> int:
    """Return the step number of a snapshot.

    Raises:
        InputError: Neither metadata nor file name has a step number, that in the metadata is
            invalid, or its shards disagree.
    """
    steps_found = {
        word for file in checkpoint.files if (word := file.metadata.get("step")) is not None
    }
    if len(steps_found) > 1:
        raise InputError(
            f"{path}: its shards are from different steps: {', '.join(sorted(steps_found))}"
        )
    if steps_found:
        (word,) = steps_found
        if not (word.isascii() and word.isdecimal() and len(word) < 16):
            raise InputError(
                f"{path}: the step in its metadata is {word!r}, not a whole number from 0 up; "
                "correct it"
            )
        return int(word)
    stem = path.name.removesuffix(INDEX).removesuffix(path.suffix) if path.is_file() else path.name
    name = path.parent.name if path.name in WEIGHTS else stem
    match = _NUMBER.search(name)
    if match is None:
        raise InputError(
            f"{path}: no training step is known; put it into the file's metadata or its name, such "
            "as grad_step000040"
        )
    return int(match[1])


def histories(
    steps: Sequence[GradientStep], base: Checkpoint | None
) -> tuple[tuple[History, ...], tuple[Unpaired, ...]]:
    """Collect the gradients of every weight over the steps.

    Args:
        steps: The snapshots.
        base: Checkpoint that gives the layer names; None to use the names of the gradients.

    Returns:
        The histories of the matrices, and the tensors that are empty, no float matrices or not in
            ``base``, both in
        natural order of their names.

    Raises:
        InputError: A weight has two gradients in one step, or gradients of different shapes.
    """
    snapshots: dict[str, list[Snapshot]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    unpaired: dict[str, Unpaired] = {}
    for step in steps:
        located, skipped = _locate_matrices(step.checkpoint, base)
        unpaired = skipped | unpaired
        for layer, shape, side in located:
            earlier = snapshots.setdefault(layer, [])
            if earlier and earlier[-1].step == step.step:
                raise InputError(
                    f"{step.checkpoint.path}: {earlier[-1].side.name} and {side.name} are both "
                    f"gradients of {layer}; remove one of them"
                )
            if shapes.setdefault(layer, shape) != shape:
                raise InputError(
                    f"{step.checkpoint.path}: {side.name} is {list(shape)}, and "
                    f"{list(shapes[layer])} in "
                    f"{earlier[-1].side.checkpoint.path}; use gradients of one model"
                )
            earlier.append(Snapshot(step.step, side))
    ordered = sorted(snapshots, key=natural_order)
    collected = tuple(History(layer, shapes[layer], tuple(snapshots[layer])) for layer in ordered)
    return collected, tuple(unpaired[name] for name in sorted(unpaired, key=natural_order))


def _locate_matrices(
    gradients: Checkpoint, base: Checkpoint | None
) -> tuple[list[tuple[str, tuple[int, int], Side]], dict[str, Unpaired]]:
    """Return layer, shape and location of every matrix in one snapshot, and the tensors that are
    left out, by name.
    """
    unpaired: dict[str, Unpaired] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in gradients:
        info = gradients[name]
        if info.dtype not in FLOAT_DTYPES:
            unpaired[name] = Unpaired(
                name, info.shape, "not_float", f"a gradient stored as {info.dtype}"
            )
        elif info.numel == 0:
            unpaired[name] = Unpaired(name, info.shape, "empty", "has no entries")
        elif len(info.shape) < 2:
            unpaired[name] = Unpaired(name, info.shape, "vector", "1-D: a gradient without rank")
        else:
            shapes[name] = info.shape
    if base is None:
        whole = [
            (layer, shape, Side(gradients, name, index * shape[0] * shape[1]))
            for name in shapes
            for index, (layer, shape) in enumerate(matrices(name, shapes[name]))
        ]
        return whole, unpaired
    locations, missing = match_names(shapes, base)
    for name, why in missing.items():
        unpaired[name] = Unpaired(
            name, shapes[name], "not_in_base", f"a gradient of no weight of BASE: {why}"
        )
    return [
        locate_rows(gradients, name, location) for name in locations for location in locations[name]
    ], unpaired


def locate_rows(
    stored: Checkpoint, name: str, location: Location
) -> tuple[str, tuple[int, int], Side]:
    """Return layer, shape and location of the rows of a stored tensor that belong to one weight of
    BASE.
    """
    shape, (*rows, columns) = stored[name].shape, location.shape
    row = location.index * (shape[1] if len(shape) == 3 else 0) + (
        location.rows[0] if location.rows else 0
    )
    return location.layer, (math.prod(rows), columns), Side(stored, name, row * columns)
