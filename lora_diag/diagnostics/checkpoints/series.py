"""The checkpoints of a training run, in the order of their steps, with what the trainer logged.

Steps are read from names, as trainers write them, and from ``trainer_state.json`` of transformers:
``checkpoint-40`` (transformers, TRL, axolotl, LLaMA-Factory), ``step_40`` and ``epoch_1``
(torchtune), ``epoch=1-step=40.ckpt`` (Lightning), ``0000040_adapters.safetensors`` (MLX). The final
model, in the run's own folder, counts as the last checkpoint if it differs from all others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from lora_diag.adapters import is_adapter
from lora_diag.diagnostics.checkpoints.trainer import STATE, Log, read_log
from lora_diag.errors import InputError, NothingComparedError
from lora_diag.storage import as_path
from lora_diag.storage.locating import find_named_weights
from lora_diag.storage.remote import RemotePath

# Results file that ``LoraMonitor`` writes in the folder of a run.
MONITOR = "monitor.jsonl"

# Steps in names of checkpoints, the most specific pattern first.
_STEP = re.compile(
    r"(?:^|[-_.=])(?:checkpoint|ckpt|global_step|step|iter|iteration)[-_=]?(\d{1,12})(?![\d.]*\d)",
    re.I,
)
_EPOCH = re.compile(r"(?:^|[-_.=])(?:epoch|adapter)[-_=]?(\d{1,12})(?![\d.]*\d)", re.I)
_LEADING = re.compile(r"^(\d{1,12})_adapters\.safetensors$")
# Names of what a trainer or a copy has not finished: ``tmp-checkpoint-40``, ``.checkpoint-40``,
# ``step_40.part``.
_UNFINISHED = re.compile(r"^(\.|tmp)|\.(part|tmp|incomplete)$")
# Files of a trainer that are no weights.
_STATES = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)\b|rng_state_\d|optim_states"
)
_SUFFIXES = {".safetensors", ".pt", ".ckpt", ".bin"}

# Steps between two checkpoints that are summed one by one; of more, as many evenly spaced ones
# stand for all.
_MAX_POINTS = 1000


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
class CheckpointSeries:
    """The checkpoints of a run, and what the trainer logged by step.

    Args:
        steps: In ascending order of their steps.
        final: The final model in the run's own folder, whose contents may be those of a checkpoint,
            with the last planned step, 0 if it is not known; None without one.
        losses: Training losses.
        eval_losses: Evaluation losses.
        rates: Learning rates.
        foreign: Steps of checkpoints whose log contradicts that of the one before: of another run.
    """

    steps: tuple[Step, ...]
    final: Step | None
    losses: Mapping[int, float]
    eval_losses: Mapping[int, float]
    rates: Mapping[int, float]
    foreign: Set[int] = frozenset()

    def logged_between(self, after: int, step: int) -> dict[str, float | None]:
        """Return the fields of a checkpoint's record that the trainer logged, given the step of the
        one before.
        """
        losses = [loss for at, loss in self.losses.items() if after < at <= step]
        logged: dict[str, float | None] = {
            "train_loss": math.fsum(losses) / len(losses) if losses else None,
            "eval_loss": self.eval_losses.get(step),
        }
        if self.rates and step > after:
            known = sorted(self.rates)
            steps = np.linspace(step, after, min(step - after, _MAX_POINTS), endpoint=False)
            rates = np.interp(steps, known, [self.rates[at] for at in known])
            logged |= {"rate": float(rates[0]), "rate_sum": (step - after) * float(rates.mean())}
        return logged


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint's name states; None if it states none.

    >>> [
    ...     step_of(Path(name))
    ...     for name in (
    ...         "out/checkpoint-40",
    ...         "epoch_1",
    ...         "epoch=1-step=40.ckpt",
    ...         "model.safetensors",
    ...     )
    ... ]
    [40, 1, 40, None]
    >>> step_of(Path("0000100_adapters.safetensors"))
    100
    """
    found = [
        match for pattern in (_STEP, _EPOCH, _LEADING) for match in pattern.findall(path.name)[-1:]
    ]
    return int(found[0]) if found else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the entries of a folder whose names state a step, and which are folders or files of
    weights.
    """
    if isinstance(folder, RemotePath) or not folder.is_dir():
        return []
    named = [
        path
        for path in folder.iterdir()
        if step_of(path) is not None and not _UNFINISHED.search(path.name)
    ]
    return [path for path in named if path.is_dir() or path.suffix in _SUFFIXES]


def holds_weights(folder: Path) -> bool:
    """Return whether a file in the folder of a checkpoint may hold weights, and not only what else
    a trainer saves.
    """
    return any(
        path.suffix in _SUFFIXES and not _STATES.match(path.name) for path in folder.rglob("*")
    )


def find_series(paths: Sequence[Path | str]) -> CheckpointSeries:
    """Return the checkpoints of a run in the order of their steps.

    Args:
        paths: The run's folder; or its checkpoints, in any order.

    Raises:
        NothingComparedError: The folder contains no checkpoint.
        InputError: A path does not exist, its step is not known or contradicts its trainer state,
            two have one step, or a trainer state cannot be read.
    """
    located, final = [as_path(path) for path in paths], None
    if missing := [path for path in located if not path.exists()]:
        raise InputError(f"{missing[0]}: no such file or folder; check the path")
    chosen = located if len(located) > 1 else list_checkpoints(located[0])
    if not chosen:
        problem = "contains no checkpoint with a step in its name, such as checkpoint-100"
        fix = "give the folder that the trainer wrote them to, or several checkpoints"
        raise NothingComparedError(f"{located[0]}: {problem}; {fix}")
    steps, foreign, log = _order(chosen)
    for first, second in pairwise(steps):
        if first.step == second.step:
            raise InputError(
                f"{second.path}: is of step {second.step}, and so is {first.path}; give one of the "
                "two"
            )
    if len(located) == 1 and (find_named_weights(located[0]) or is_adapter(located[0])):
        log = read_log(located[0]) or log
        final = Step(max(log.step or 0, log.planned or 0), located[0], final=True)
    return make_series(steps, final, log, foreign)


def _order(paths: Sequence[Path]) -> tuple[list[Step], Set[int], Log]:
    """Return checkpoints in the order of their steps, those of another run than the one before, and
    the last log.

    Logs are read one after the other, and two are in memory at a time.
    """
    steps, foreign = list[Step](), set[int]()
    last, last_step = Log(), 0
    before: Log | None = None
    for path in sorted(paths, key=lambda path: step_of(path) or 0):
        log = read_log(path)
        step = _choose_step(path, log or Log())
        steps.append(Step(step, path))
        if log is None:
            continue
        if before is not None and log.contradicts(before):
            foreign.add(step)
        before = log
        if step >= last_step:
            last, last_step = log, step
    return sorted(steps, key=lambda step: step.step), foreign, last


def _choose_step(path: Path, log: Log) -> int:
    """Return the step of a checkpoint.

    Raises:
        InputError: It is not known, or the name contradicts the trainer state.
    """
    named, recorded = step_of(path), log.step
    if _STEP.search(path.name) and recorded not in {None, named}:
        problem = f"its name states step {named}, but its {STATE} step {recorded}"
        raise InputError(f"{path}: {problem}; restore or rename it")
    if (step := named if recorded is None else recorded) is None:
        fix = "name it like checkpoint-100, or give the folder of the run"
        raise InputError(
            f"{path}: its step is not known: neither its name nor a {STATE} states it; {fix}"
        )
    return step


def make_series(
    steps: Sequence[Step], final: Step | None, log: Log, foreign: Set[int] = frozenset()
) -> CheckpointSeries:
    """Return the checkpoints of a run with what its trainer logged."""
    values = log.values
    return CheckpointSeries(
        tuple(steps), final, values["loss"], values["eval_loss"], values["learning_rate"], foreign
    )
