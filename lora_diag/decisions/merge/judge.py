"""Held-out losses of BASE, of each update on the text of its task, and of every candidate merge; the choice among them.

What is judged is what would be written: the factors or the weights of a candidate are computed by the code that writes
the merge, into scratch files, and λ multiplies them. The losses of all sequences are recorded. With several candidates
one is chosen by the first half of each text, and the numbers that are shown are those of the second half, so that they
are not the lowest by chance.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diag.checkpoints import open_checkpoint
from lora_diag.decisions.merge import JudgeOptions, Method
from lora_diag.decisions.merge.measure import MergeSettings, MergeTask, write_merge
from lora_diag.decisions.merge.record import MergedLoss
from lora_diag.deltas import DenseDelta, Side
from lora_diag.errors import InputError, UsageError
from lora_diag.metrics.statistics import paired_difference
from lora_diag.models.losses import Losses, measure
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.records import LeftOut, RunInput
from lora_diag.rendering.text import quantity
from lora_diag.running.inputs import Comparison
from lora_diag.running.options import list_options
from lora_diag.running.probing import ProbeRun, describe_texts

# Fewest sequences of a text of which one half chooses and the other reports.
MIN_SEQUENCES = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A merge that can be written.

    Args:
        method: Its method.
        weights: w_k.
        density: Fraction of entries to keep; None for a method without one.
    """

    method: Method
    weights: tuple[float, ...]
    density: float | None

    def weigh(self, task: MergeTask, paths: Sequence[str]) -> MergeTask:
        """Return a layer with the weights of this merge; ``paths`` are those of the updates."""
        by_path = dict(zip(paths, self.weights, strict=True))
        return replace(task, updates=tuple(replace(item, weight=by_path[item.name]) for item in task.updates))


def read_tasks(texts: Sequence[Path | str], names: Sequence[str]) -> list[tuple[int | None, str]]:
    """Return the update, by its place, and the path of each text; None for a text of no update.

    Args:
        texts: Each ``NAME=FILE`` or ``FILE``.
        names: Short names of the updates.

    Raises:
        UsageError: A name is that of no update.

    Example:
        >>> read_tasks(["chat=chat.txt", "other.txt"], ["sql", "chat"])
        [(1, 'chat.txt'), (None, 'other.txt')]
    """
    tasks: list[tuple[int | None, str]] = []
    for text in map(str, texts):
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            tasks.append((None, text))
        elif name in names:
            tasks.append((names.index(name), path))
        else:
            raise UsageError(f"--eval {text}: {name} names no update; use one of {', '.join(names)}, or FILE alone")
    return tasks


class MergeJudge:
    """The evaluation of candidate merges.

    Args:
        options: The options of ``merge``.
        base: Path of BASE.
        compared: BASE with each update.
        names: Short names of the updates.

    Raises:
        UsageError: An option is invalid, or the extra ``train`` is not installed.
        InputError: A text cannot be read, or transformers cannot open BASE.
    """

    def __init__(
        self, options: Mapping[str, Any], base: Path | str, compared: Sequence[Comparison], names: Sequence[str]
    ) -> None:
        tasks = read_tasks(options["evaluate"], names)
        own = {name: options[name] for name in list_options(JudgeOptions)} | {"evaluate": [path for _, path in tasks]}
        self._run, self._options, self._base, self._compared = (
            ProbeRun("merge", own, JudgeOptions),
            options,
            base,
            compared,
        )
        self._run.check_files(base)
        self._run.open(base)
        self._texts = self._run.read_sets()
        self._task = {text_set.name: task for text_set, (task, _) in zip(self._texts, tasks, strict=True)}
        self._base_losses: dict[str, Losses] = {}
        self._alone: dict[str, Losses] = {}

    @property
    def inputs(self) -> list[RunInput]:
        """The texts, for the run record."""
        return list(map(describe_texts, self._texts))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the evaluation, for the run record."""
        own = {"scales": list(self._options["scales"]), "choose": self._options["choose"]}
        return own | self._run.model_settings

    def judge(
        self,
        candidates: Sequence[Candidate],
        tasks: Sequence[MergeTask],
        sides: Mapping[str, Side],
        settings: MergeSettings,
        folder: Path,
    ) -> list[MergedLoss]:
        """Measure all losses and choose; return the records.

        Args:
            candidates: The merges to compare, each with every λ of ``scales``.
            tasks: The layers.
            sides: The location of each layer in BASE.
            settings: Settings of the merge; method, λ and density are those of a candidate.
            folder: Folder for scratch files; they are deleted.

        Raises:
            UsageError: A text has too few sequences to choose by one half and report the other.
            InputError: A file cannot be read or written, or a loss of BASE or an update is not finite.
        """
        scales = [float(scale) for scale in self._options["scales"]] or [settings.scale]
        choosing = len(candidates) * len(scales) > 1
        if choosing and (few := next((t for t in self._texts if len(t.sequences) < MIN_SEQUENCES), None)):
            problem = f"has {quantity(len(few.sequences), 'sequence')}, and half of them choose the merge"
            raise UsageError(
                f"--eval {few.path}: {problem}; give at least {MIN_SEQUENCES}, or one --method and --scale"
            )
        run, alone = self._run, [text_set for text_set in self._texts if self._task[text_set.name] is not None]
        passes = len(candidates) * len(scales) + 1
        run.watch.total = passes * run.batches(self._texts) + run.batches(alone)
        merges = quantity(len(candidates) * len(scales), "merge")
        run.estimate(
            self._texts[0], f"BASE, each update on its text, and {merges} on {quantity(len(self._texts), 'set')}"
        )
        self._measure_references()
        losses: dict[tuple[str, float], dict[str, Losses]] = {}
        for candidate in candidates:
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
                deltas = self._merge(candidate, tasks, sides, settings, Path(scratch))
                swapped = Swapped(run.model, deltas, 0)
                for scale in scales:
                    swapped.scale({}, scale)
                    losses[candidate.method.name, scale] = self._measure(f"{candidate.method.name} λ={scale:g}")
                swapped.scale({}, 0.0)
        return list(self._make_records(losses, choosing))

    def _measure(self, label: str) -> dict[str, Losses]:
        return {
            each.name: measure(self._run.model, each, self._run.batch, lambda: self._run.watch.batch(label))
            for each in self._texts
        }

    def _measure_references(self) -> None:
        """Measure BASE on every text, and each update on its own."""
        self._base_losses = self._measure("BASE")
        for index in sorted({task for task in self._task.values() if task is not None}):
            swapped = Swapped(self._run.model, self._compared[index].pairing.deltas, 0)
            swapped.arrange({}, FULL)
            label = self._compared[index].inputs[-1].path
            for text_set in (each for each in self._texts if self._task[each.name] == index):
                self._alone[text_set.name] = measure(
                    self._run.model, text_set, self._run.batch, partial(self._run.watch.batch, label)
                )
            swapped.arrange({})
        for losses, who in ((self._base_losses, self._base), (self._alone, "an update")):
            if bad := next((name for name, found in losses.items() if not found.is_finite), None):
                raise InputError(f"{who}: its loss on {bad} is not finite; check the weights, or use --dtype float32")

    def _merge(
        self,
        candidate: Candidate,
        tasks: Sequence[MergeTask],
        sides: Mapping[str, Side],
        settings: MergeSettings,
        scratch: Path,
    ) -> list[DenseDelta]:
        """Write a candidate with λ = 1 to scratch files; return its layers."""
        settings = replace(settings, method=candidate.method.name, scale=1.0, density=candidate.density or 1.0)
        paths, deltas = [each.inputs[-1].path for each in self._compared], []
        for index, task in enumerate(tasks):
            file = scratch / f"{index}.safetensors"
            written = write_merge(candidate.weigh(task, paths), settings, file)
            if isinstance(written, LeftOut) or not file.exists():
                continue  # every update of it is zero, or they cancel
            side, first = sides[task.layer], task.updates[0].delta
            load = partial(_read_written, file, task, side)
            deltas.append(DenseDelta(task.layer, task.shape, load, (side.dtype, "float32"), side, first.is_matrix))
        return deltas

    def _make_records(
        self, losses: Mapping[tuple[str, float], Mapping[str, Losses]], choosing: bool
    ) -> Iterator[MergedLoss]:
        """Yield the records: of BASE, of updates alone, and of candidates, of which one is chosen."""
        cost = {key: self._compare(own, choosing) for key, own in losses.items()}
        if not (finite := {key: value for key, value in cost.items() if math.isfinite(value)}):
            raise InputError(f"{self._base}: no merge has a finite loss; check the weights, or use --dtype float32")
        best = min(finite, key=finite.__getitem__)
        rows: list[tuple[str, float | None, Mapping[str, Losses]]] = [
            ("base", None, self._base_losses),
            ("alone", None, self._alone),
            *((method, scale, own) for (method, scale), own in losses.items()),
        ]
        for method, scale, own in rows:
            for text_set in (each for each in self._texts if each.name in own):
                name, found = text_set.name, own[text_set.name]
                index = self._task[name]
                half = len(text_set.sequences) // 2 if choosing else 0
                yield MergedLoss(
                    **found.on(text_set),
                    **found.by_sequence(is_base=method == "base"),
                    method=method,
                    scale=scale,
                    update=None if index is None else self._compared[index].inputs[-1].path,
                    skipped=half,
                    cost=None if scale is None or not math.isfinite(cost[method, scale]) else cost[method, scale],
                    chosen=scale is not None and (method, scale) == best,
                    **_compare(found, self._base_losses[name], self._alone.get(name), half),
                )

    def _compare(self, losses: Mapping[str, Losses], choosing: bool) -> float:
        """Return what is minimized: the largest, or mean, rise of the loss above each update alone on its text.

        On a text of no update it is that above BASE. Infinite if a loss is not finite.
        """
        rises = []
        for text_set in self._texts:
            name, own = text_set.name, losses[text_set.name]
            other = self._alone.get(name, self._base_losses[name])
            last = len(text_set.sequences) // 2 if choosing else len(text_set.sequences)
            rises.append(float((own.sums - other.sums)[:last].sum() / own.counts[:last].sum()))
        if not all(map(math.isfinite, rises)):
            return math.inf
        return max(rises) if self._options["choose"] == "worst" else sum(rises) / len(rises)


def _compare(own: Losses, base: Losses, alone: Losses | None, first: int) -> dict[str, Any]:
    """Return the loss of a model from a sequence on, and its paired differences from BASE and from the update alone."""
    if not own.is_finite:
        return {"loss": None}
    counts = own.counts[first:].tolist()

    def against(other: Tensor) -> tuple[float, float | None]:
        return paired_difference(own.sums[first:].tolist(), other[first:].tolist(), counts)

    loss, loss_error = against(torch.zeros_like(own.sums))
    change, change_error = against(base.sums)
    gap, gap_error = (None, None) if alone is None else against(alone.sums)
    gain = None if gap is None else gap - change
    return {
        "loss": loss,
        "loss_error": loss_error,
        "change": change,
        "change_error": change_error,
        "gap": gap,
        "gap_error": gap_error,
        "kept": -change / gain if gain is not None and gain > 0 else None,
    }


def _read_written(file: Path, task: MergeTask, side: Side) -> Tensor:
    """Return the update in a scratch file, ``(out, in)`` float64: B·A, or W' − W of a checkpoint."""
    stored = open_checkpoint(file)
    if task.base is not None:
        rows, columns = task.shape
        weight = side.read(0, rows * columns).double()
        return stored.read("W").double().view(task.shape) - weight.view(task.shape)
    b, a = (stored.read(name).view(stored[name].shape).double() for name in ("B", "A"))
    product = b @ a
    return product.T if task.transposed else product
