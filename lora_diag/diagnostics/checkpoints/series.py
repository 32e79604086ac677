"""The checkpoints of a training run, in the order of their steps, with what the trainer logged.

Steps are read from names, as trainers write them, and from ``trainer_state.json`` of transformers: ``checkpoint-40``
(transformers, TRL, axolotl, LLaMA-Factory), ``step_40`` and ``epoch_1`` (torchtune), ``epoch=1-step=40.ckpt``
(Lightning), ``0000040_adapters.safetensors`` (MLX). The final model, in the run's own folder, counts as the last
checkpoint if it differs from all others.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_diag.adapters import is_adapter
from lora_diag.checkpoints import as_path, locate
from lora_diag.checkpoints.documents import read_object
from lora_diag.checkpoints.folder import WEIGHTS
from lora_diag.checkpoints.remote import RemotePath
from lora_diag.errors import InputError, NothingComparedError

STATE = "trainer_state.json"

# A log of 100,000 entries takes 20 MB.
MAX_STATE_BYTES = 500_000_000

# Names of checkpoints, the most specific first. Of a folder's entries, only those with such a name count.
_STEP = re.compile(r"(?:^|[-_.=])(?:checkpoint|ckpt|global_step|step|iter|iteration)[-_=]?(\d{1,12})(?![\d.]*\d)", re.I)
_EPOCH = re.compile(r"(?:^|[-_.=])(?:epoch|adapter)[-_=]?(\d{1,12})(?![\d.]*\d)", re.I)
_LEADING = re.compile(r"^(\d{1,12})_adapters\.safetensors$")


@dataclass(frozen=True, slots=True)
class Logged:
    """What a trainer logged, each by its step: training loss, evaluation loss, learning rate.

    Args:
        loss: Training loss.
        eval_loss: Evaluation loss.
        rate: Learning rate.
    """

    loss: Mapping[int, float] = field(default_factory=dict)
    eval_loss: Mapping[int, float] = field(default_factory=dict)
    rate: Mapping[int, float] = field(default_factory=dict)

    def mean_loss(self, after: int, step: int) -> float | None:
        """Return the mean of the training losses logged after a step, up to another; None without any."""
        losses = [loss for at, loss in self.loss.items() if after < at <= step]
        return math.fsum(losses) / len(losses) if losses else None

    def rate_at(self, step: int) -> float | None:
        """Return the learning rate of a step, linear between logged ones; None without a log."""
        steps = sorted(self.rate)
        if not steps:
            return None
        i = bisect_left(steps, step)
        if i == len(steps) or i == 0 or steps[i] == step:
            return self.rate[steps[min(i, len(steps) - 1)]]
        low, high = steps[i - 1], steps[i]
        return self.rate[low] + (self.rate[high] - self.rate[low]) * (step - low) / (high - low)

    def rates_between(self, after: int, step: int) -> tuple[float, float] | None:
        """Return Σ of the learning rates of the steps after one, up to another, and √Σ of their squares.

        Of long intervals, 1,000 evenly spaced steps stand for all.
        """
        count = step - after
        if count <= 0 or not self.rate:
            return None
        points = min(count, 1000)
        rates = [self.rate_at(after + round((i + 1) * count / points)) or 0.0 for i in range(points)]
        weight = count / points
        return weight * math.fsum(rates), math.sqrt(weight * math.fsum(rate * rate for rate in rates))


@dataclass(frozen=True, slots=True)
class Step:
    """One checkpoint.

    Args:
        step: Its training step, or epoch.
        path: Its path.
        final: Whether it is the final model in the run's own folder.
    """

    step: int
    path: Path
    final: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """The checkpoints of a run.

    Args:
        steps: In ascending order of their steps.
        logged: The trainer's log.
        final: The final model in the run's own folder, whose contents may be those of a checkpoint, with the last
            planned step, 0 if it is not known; None without one.
    """

    steps: tuple[Step, ...]
    logged: Logged
    final: Step | None = None


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint's name states; None if it states none.

    >>> [step_of(Path(name)) for name in ("out/checkpoint-40", "epoch_1", "epoch=1-step=40.ckpt", "model.safetensors")]
    [40, 1, 40, None]
    >>> step_of(Path("0000100_adapters.safetensors"))
    100
    """
    for pattern in (_STEP, _EPOCH, _LEADING):
        if found := pattern.findall(path.name):
            return int(found[-1])
    return None


def is_run(path: Path) -> bool:
    """Return whether a path is a folder that contains checkpoints with steps in their names."""
    return not isinstance(path, RemotePath) and path.is_dir() and any(_list_named(path))


def _list_named(folder: Path) -> list[Path]:
    """Return the entries of a run's folder whose names state a step, and which are folders or files of weights."""
    suffixes = {".safetensors", ".pt", ".ckpt", ".bin"}
    return [
        path for path in folder.iterdir() if step_of(path) is not None and (path.is_dir() or path.suffix in suffixes)
    ]


def find_series(paths: Sequence[Path | str]) -> Series:
    """Return the checkpoints of a run in the order of their steps.

    Args:
        paths: The run's folder; or its checkpoints, in any order.

    Raises:
        NothingComparedError: The folder contains no checkpoint.
        InputError: A path does not exist, its step is not known or contradicts its trainer state, two have one step, or
            a trainer state cannot be read.
    """
    located = [as_path(path) for path in paths]
    if len(located) > 1:
        chosen, root = located, None
    else:
        (root,) = located
        if not root.is_dir():
            problem = "is not a folder" if root.exists() else "no such folder"
            raise InputError(f"{root}: {problem}; give the folder of a training run, or several checkpoints")
        chosen = _list_named(root)
        if not chosen:
            raise NothingComparedError(
                f"{root}: contains no checkpoint with a step in its name, such as checkpoint-100 or step_100; give the "
                "folder that the trainer wrote them to, or several checkpoints"
            )
    states = {path: _read_state(path) for path in chosen}
    steps = sorted((Step(_choose_step(path, states[path]), path) for path in chosen), key=lambda step: step.step)
    for first, second in pairwise(steps):
        if first.step == second.step:
            raise InputError(f"{second.path}: is of step {second.step}, and so is {first.path}; give one of the two")
    latest = next((state for step in reversed(steps) if (state := states[step.path])), {})
    if root is None or not _holds_weights(root):
        return Series(tuple(steps), _parse_log(latest))
    latest = _read_state(root) or latest
    ended = max(_number(latest.get("global_step")) or 0, _number(latest.get("max_steps")) or 0)
    return Series(tuple(steps), _parse_log(latest), Step(ended, root, final=True))


def _holds_weights(folder: Path) -> bool:
    """Return whether a run's own folder holds a model: an adapter, or a checkpoint in a usual file."""
    return any((folder / name).is_file() for name in WEIGHTS) or is_adapter(locate(folder))


def _read_state(path: Path) -> dict[str, Any]:
    """Return the trainer state of a checkpoint; empty without one.

    Raises:
        InputError: It cannot be read.
    """
    file = path / STATE
    return read_object(file, "trainer state", MAX_STATE_BYTES) if path.is_dir() and file.is_file() else {}


def _number(value: Any) -> int | None:
    """Return a step from a trainer state; None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**12 else None


def _choose_step(path: Path, state: Mapping[str, Any]) -> int:
    """Return the step of a checkpoint.

    Raises:
        InputError: It is not known, or the name contradicts the trainer state.
    """
    named, recorded = step_of(path), _number(state.get("global_step"))
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if named is None and recorded is None:
        fix = "name it like checkpoint-100, or give the folder of the run"
        raise InputError(f"{path}: its step is not known: neither its name nor a {STATE} states it; {fix}")
    if _STEP.search(path.name) and recorded is not None and named != recorded:
        raise InputError(f"{path}: its name states step {named}, but its {STATE} step {recorded}; restore or rename it")
    return recorded if recorded is not None else named or 0


def _parse_log(state: Mapping[str, Any]) -> Logged:
    """Return losses and learning rates of a trainer state; entries in another form are ignored."""
    history = state.get("log_history")
    values: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}, "learning_rate": {}}
    for entry in history if isinstance(history, list) else []:
        step = _number(entry.get("step")) if isinstance(entry, dict) else None
        for name, by_step in values.items():
            value = entry.get(name) if step is not None else None
            if step is not None and isinstance(value, int | float) and math.isfinite(value) and value >= 0:
                by_step[step] = float(value)
    return Logged(values["loss"], values["eval_loss"], values["learning_rate"])
