"""Held-out losses of BASE, of each update on the text of its task, and of every candidate merge;
the choice among them.

What is judged is what would be written: the factors or the weights of a candidate are computed by
the code that writes the merge, into scratch files. Several λ multiply one output in float32; one
that is rounded to a shorter dtype is made for each λ, and weights that a checkpoint in another
dtype than BASE holds unchanged are rounded as in the file. The losses of all sequences are
recorded. With several candidates one is chosen by the first half of each text, and the numbers that
are shown are those of the second half, so that they are not the lowest by chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diag.decisions.merge import JudgeOptions, MergeMethod, MergeOptions
from lora_diag.decisions.merge.measure import MergeSettings, MergeTask, write_merge
from lora_diag.decisions.merge.record import MergedLoss
from lora_diag.deltas import Delta, FactoredDelta, Side, StoredDelta
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.metrics.statistics import MIN_SEQUENCES, paired_difference
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, LossesBySet
from lora_diag.models.swapping import Swapped
from lora_diag.records import RunInput
from lora_diag.rendering.text import quantity
from lora_diag.running.inputs import Comparison
from lora_diag.running.judging import require_finite
from lora_diag.running.options import select_options
from lora_diag.running.probing import ProbeRun, describe_texts
from lora_diag.running.updates import tuned_path
from lora_diag.storage import open_checkpoint

# A model whose losses are compared: ``base``, ``alone`` or a method, and λ of a method.
Model = tuple[str, float | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A merge that can be written.

    Args:
        method: Its method.
        weights: w_k.
        density: Fraction of entries to keep; None for a method without one.
    """

    method: MergeMethod
    weights: tuple[float, ...]
    density: float | None

    def weigh(self, task: MergeTask, paths: Sequence[str]) -> MergeTask:
        """Return a layer with the weights of this merge; ``paths`` are those of the updates."""
        by_path = dict(zip(paths, self.weights, strict=True))
        return replace(
            task, updates=tuple(replace(item, weight=by_path[item.name]) for item in task.updates)
        )


def read_tasks(texts: Sequence[Path | str], names: Sequence[str]) -> list[tuple[int | None, str]]:
    """Return the update, by its place, and the path of each text; None for a text of no update.

    A name may contain ``=``, as may a path: ``NAME=FILE`` is the text of an update unless only a
    file of that whole name exists.

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
        name = max((name for name in names if text.startswith(f"{name}=")), key=len, default=None)
        path = text if name is None else text[len(name) + 1 :]
        if name is not None and (Path(path).exists() or not Path(text).exists()):
            tasks.append((names.index(name), path))
        elif "=" not in text or Path(text).exists():
            tasks.append((None, text))
        else:
            unknown = text.partition("=")[0]
            raise UsageError(
                Given("eval", text),
                f"{unknown} names no update",
                f"use one of {', '.join(names)}, or FILE alone",
            )
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
        self,
        options: MergeOptions,
        base: Path | str,
        compared: Sequence[Comparison],
        names: Sequence[str],
    ) -> None:
        tasks = read_tasks(options["eval"], names)
        own = {**select_options(JudgeOptions, options), "eval": [path for _, path in tasks]}
        self._options, self._base, self._compared = options, base, compared
        self._run = ProbeRun("merge", own, JudgeOptions)
        self._run.check_files(base)
        self._run.open(base)
        self._texts = self._run.read_sets(
            [None if task is None else names[task] for task, _ in tasks]
        )
        self._task = {
            text_set.name: task for text_set, (task, _) in zip(self._texts, tasks, strict=True)
        }

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
            InputError: A file cannot be read or written, or a loss of BASE or an update is not
                finite.
        """
        scales = list(dict.fromkeys(map(float, self._options["scales"]))) or [settings.scale]
        count, run, texts = len(candidates) * len(scales), self._run, self._texts
        if count > 1:
            for each in texts:
                _require_halves(each)
        run.watch.total = (count + 1) * run.batches(texts)
        run.watch.total += run.batches([t for t in texts if self._task[t.name] is not None])
        merges = f"{quantity(count, 'merge')} on {quantity(len(texts), 'set')}"
        run.estimate(texts[0], f"BASE, each update on its text, and {merges}")
        base, alone = run.measure(texts, "BASE"), self._measure_alone()
        require_finite(str(self._base), base)
        require_finite("an update", alone)
        losses: dict[Model, LossesBySet] = {("base", None): base, ("alone", None): alone}
        exact = all((settings.dtype or side.dtype) == "float32" for side in sides.values())
        for candidate in candidates:
            for written in [1.0] if exact else scales:
                with tempfile.TemporaryDirectory(
                    prefix=f".{folder.name}.", dir=folder.parent
                ) as scratch:
                    own = replace(
                        settings,
                        method=candidate.method.name,
                        scale=written,
                        density=candidate.density or 1.0,
                    )
                    swapped = Swapped(
                        run.model, self._write(candidate, tasks, sides, own, Path(scratch)), 0
                    )
                    if self._options["checkpoint"] and settings.dtype:
                        self._round(settings.dtype)
                    for scale in scales if exact else [written]:
                        swapped.scale({}, scale / written)
                        label = f"{candidate.method.name} λ={scale:g}"
                        losses[candidate.method.name, scale] = run.measure(texts, label)
                    swapped.scale({}, 0.0)
        return list(self._make_records(losses, count > 1))

    def _measure_alone(self) -> LossesBySet:
        """Return the losses of each update on the texts of its task."""
        losses: LossesBySet = {}
        for index, compared in enumerate(self._compared):
            own = [each for each in self._texts if self._task[each.name] == index]
            if own:
                with Swapped(self._run.model, compared.pairing.deltas, 0).applied():
                    losses |= self._run.measure(own, tuned_path(compared))
        return losses

    @torch.no_grad()
    def _round(self, dtype: str) -> None:
        """Round all weights of the model, as those that a merge does not change are in a checkpoint
        of this dtype.
        """
        for parameter in self._run.model.module.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))

    def _write(
        self,
        candidate: Candidate,
        tasks: Sequence[MergeTask],
        sides: Mapping[str, Side],
        settings: MergeSettings,
        scratch: Path,
    ) -> Iterator[Delta]:
        """Write a candidate to scratch files; yield its layers, without those whose updates are
        zero or cancel.
        """
        paths = list(map(tuned_path, self._compared))
        for index, task in enumerate(tasks):
            file = scratch / f"{index}.safetensors"
            if (
                write_merge(candidate.weigh(task, paths), settings, file) is not None
                or not file.exists()
            ):
                continue
            base, layer = sides[task.layer], task.layer
            if task.base is None:
                yield FactoredDelta(
                    layer,
                    task.shape,
                    partial(_read_factors, file, task),
                    (base.dtype, "float32"),
                    base,
                )
            else:
                yield StoredDelta(
                    layer, task.shape, base, Side(open_checkpoint(file), "W"), task.is_matrix
                )

    def _make_records(
        self, losses: Mapping[Model, LossesBySet], choosing: bool
    ) -> Iterator[MergedLoss]:
        """Yield the records: of BASE, of updates alone, and of candidates, of which one
        is chosen.
        """
        base, alone = losses["base", None], losses["alone", None]
        half = {each.name: len(each.sequences) // 2 if choosing else 0 for each in self._texts}
        cost: dict[Model, float] = {}
        for model, own in losses.items():
            if model[1] is not None and all(found.is_finite for found in own.values()):
                cost[model] = self._weigh_rises(own, base | alone, half)
        if not cost:
            raise InputError(
                self._base, "no merge has a finite loss", "check the weights, or use $dtype float32"
            )
        best = min(cost, key=cost.__getitem__)
        for model, own in losses.items():
            for text_set in (each for each in self._texts if each.name in own):
                name, index = text_set.name, self._task[text_set.name]
                yield MergedLoss(
                    **own[name].on(text_set),
                    **own[name].by_sequence(is_base=model[0] == "base"),
                    method=model[0],
                    scale=model[1],
                    update=None if index is None else tuned_path(self._compared[index]),
                    skipped=half[name],
                    cost=cost.get(model),
                    chosen=model == best,
                    **_compare(own[name], base[name], alone.get(name), half[name]),
                )

    def _weigh_rises(
        self, own: LossesBySet, baseline: LossesBySet, half: Mapping[str, int]
    ) -> float:
        """Return what the choice minimizes: the rises of losses by the sequences that choose, all
        if they are 0.
        """
        rises = []
        for name, losses in own.items():
            first = slice(half[name] or None)
            rises.append(losses[first].minus(baseline[name][first])[0])
        return max(rises) if self._options["choose"] == "worst" else sum(rises) / len(rises)


def _require_halves(texts: Texts) -> None:
    """Require that one half of a text can choose the merge and the other report its loss.

    Raises:
        UsageError: It has too few sequences.
    """
    count = len(texts.sequences)
    if count < MIN_SEQUENCES:
        problem = f"has {quantity(count, 'sequence')}, and half of them choose the merge"
        fix = f"give at least {MIN_SEQUENCES}, or one $method and $scale"
        raise UsageError(Given("eval", texts.path), problem, fix)


def _compare(own: Losses, base: Losses, alone: Losses | None, first: int) -> dict[str, Any]:
    """Return the loss of a model on the sequences from ``first`` on, and its paired differences
    from BASE and from the update alone.
    """
    if not own.is_finite:
        return {"loss": None}
    rest = slice(first, None)
    own = own[rest]
    loss, loss_error = paired_difference(
        own.sums.tolist(), [0.0] * len(own.sums), own.counts.tolist()
    )
    change, change_error = own.minus(base[rest])
    fields = {
        "loss": loss,
        "loss_error": loss_error,
        "change": change,
        "change_error": change_error,
    }
    if alone is not None:
        gap, fields["gap_error"] = own.minus(alone[rest])
        fields["gap"] = gap
        fields["kept"] = -change / (gap - change) if gap > change else None
    return fields


def _read_factors(file: Path, task: MergeTask) -> tuple[Tensor, Tensor]:
    """Return B ``(out, r)`` and A ``(r, in)`` of a scratch file, for the weight as BASE
    stores it.
    """
    stored = open_checkpoint(file)
    b, a = (stored.read(name).view(stored[name].shape) for name in ("B", "A"))
    return (a.T, b.T) if task.transposed else (b, a)
