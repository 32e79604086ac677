"""Training runs of ``tune`` outside the sweep: each runs once and is recorded with its losses.

BASE is unchanged after every run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lora_diag.decisions.tune.contest import Measured
from lora_diag.decisions.tune.record import TunePlan, TuneTrial
from lora_diag.decisions.tune.variants import Variant
from lora_diag.errors import InputError
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.methods import Lora, layers_without_head
from lora_diag.models.opening import Model
from lora_diag.models.training import Cell, Training, losses_after
from lora_diag.probes.sweep.rounding import round_weights
from lora_diag.records import Probe
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_workers import RunTask, Site, Workers, drop_sequences, open_site

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class TrialRun:
    """One run of a configuration.

    Args:
        variant: The configuration.
        seed: Seed of the factors' initial values.
        folder: Folder for the adapter; None to discard it.
    """

    variant: Variant
    seed: int
    folder: Path | None = None

    @property
    def label(self) -> str:
        """Label of its progress."""
        return f"{self.variant.name} seed {self.seed}"

    @property
    def is_written(self) -> bool:
        """Whether its adapter is there, if it is to be kept."""
        return self.folder is None or (self.folder / ADAPTER).is_file()


@dataclass(frozen=True, slots=True)
class Trials:
    """The runs of a search so far.

    Args:
        model: BASE.
        training: Settings shared by all runs.
        sets: Evaluation sets, those of the training's kind first.
        kept: The records.
        grid: Grid of BASE's linear layers; None without rounding.
        after: Called with a label after every step and every batch; with a number after as many of them.
        workers: The workers of a cluster; None to train here.
    """

    model: Model
    training: Training
    sets: Sequence[Texts]
    kept: RunRecords[Any]
    grid: str | None
    after: Callable[..., None]
    workers: Workers | None = None

    @property
    def records(self) -> list[TuneTrial]:
        """All runs so far."""
        return [record for record in self.kept.records if isinstance(record, TuneTrial)]

    def has(self, variant: Variant, seed: int) -> bool:
        """Return whether a run is finished."""
        fields = {"variant": variant.name, "lr": variant.lr, "seed": seed}
        return self.kept.has([texts.name for texts in self.sets], record="tune_trial", **fields)

    def train(self, *runs: TrialRun) -> None:
        """Train configurations, as far as that is not done yet; independent runs are trained concurrently on a cluster.

        Raises:
            InputError: An adapter that a worker wrote is not visible here.
        """
        todo = [run for run in runs if not (self.has(run.variant, run.seed) and run.is_written)]
        for run, records in zip(todo, self._collect_results(todo), strict=True):
            if not run.is_written:
                raise InputError(
                    f"{run.folder}: the adapter that a worker wrote is not visible here; put -o on storage that all "
                    "nodes share"
                )
            self.kept.put(*records)

    def _collect_results(self, runs: Sequence[TrialRun]) -> Iterator[Sequence[TuneTrial]]:
        """Yield the records of every run."""
        if self.workers is None:
            for run in runs:
                yield train_variant(
                    self.model, self.training, self.sets, self.grid, run, partial(self.after, run.label)
                )
            return
        without_text = replace(self.training, texts=drop_sequences(self.training.texts))
        poll = partial(self.after, f"{len(runs)} runs on the cluster", 0)
        on_worker = partial(train_on_worker, self.workers.site, without_text, self.grid)
        results = self.workers.run(on_worker, [(run.label, run) for run in runs], poll)
        batches = sum(-(-len(texts.sequences) // self.training.batch) for texts in self.sets)
        for run, records in zip(runs, results, strict=True):
            self.after(run.label, run.variant.steps + batches)
            yield records

    def measure_base(self) -> None:
        """Measure BASE on every set and on as much of the training data, unless recorded."""
        if self.kept.has([texts.name for texts in self.sets], record="tune_trial", variant="base"):
            return
        batch = self.training.batch
        layers = layers_without_head(self.model.module).values()
        with round_weights(layers, self.grid) if self.grid else nullcontext():
            train_texts = self.training.texts.first(max(len(texts.sequences) for texts in self.sets))
            train_loss = measure(self.model, train_texts, batch, lambda: self.after("BASE")).mean
            by_set = [measure(self.model, texts, batch, lambda: self.after("BASE")) for texts in self.sets]
        self.kept.put(
            *(trial_of(texts, losses, None, 0, 0, train_loss) for texts, losses in zip(self.sets, by_set, strict=True))
        )

    def copy(self, probes: Sequence[Probe], plan: TunePlan, total: int) -> None:
        """Record the runs of a sweep, so that one file has all losses.

        Args:
            probes: Records of ``probe sweep``.
            plan: The plan.
            total: Parameters of the model.
        """
        self.kept.put(
            *(
                TuneTrial(
                    set=probe.set,
                    shifted=probe.shifted,
                    data=probe.data,
                    tokens=probe.tokens,
                    variant="full" if probe.rank is None else uniform_name(probe.rank),
                    params=total if probe.rank is None else plan.params(probe.rank),
                    lr=probe.lr,
                    steps=plan.steps,
                    seed=probe.seed,
                    loss=probe.loss,
                    train_loss=probe.train_loss,
                    nll=probe.nll,
                )
                for probe in probes
                if probe.subject in {"lora", "full"}
            )
        )

    def runs(self, name: str, lr: float, seeds: Sequence[int] | None = None) -> dict[str, dict[int, Measured]]:
        """Return the runs of a configuration that have a loss, by set and seed.

        Args:
            name: The configuration.
            lr: Its learning rate.
            seeds: Only these; None for all.
        """
        by_set: dict[str, dict[int, Measured]] = {}
        for record in self.records:
            is_selected = (record.variant, record.lr) == (name, lr) and (seeds is None or record.seed in seeds)
            if is_selected and record.loss is not None:
                by_set.setdefault(record.set, {})[record.seed] = Measured(record.loss, record.nll)
        return by_set

    @property
    def predictions(self) -> Mapping[str, tuple[int, ...]]:
        """Number of predictions of each sequence, by set."""
        return {record.set: record.predictions for record in self.records if record.variant == "base"}


def train_variant(
    model: Model,
    training: Training,
    sets: Sequence[Texts],
    grid: str | None,
    run: TrialRun,
    after_step: Callable[[], None],
) -> list[TuneTrial]:
    """Train a configuration, and return its record on every set.

    Args:
        model: BASE; unchanged afterwards.
        training: Settings shared by all runs.
        sets: Evaluation sets.
        grid: Grid of BASE's linear layers; None without rounding.
        run: The run.
        after_step: Called after every step and every batch.
    """
    variant, params = run.variant, 0

    def keep(tuned: Model) -> None:
        nonlocal params
        params = sum(weight.numel() for weight in tuned.module.parameters() if weight.requires_grad)
        if run.folder is not None:
            save_adapter(tuned.module, run.folder)

    kind = Lora(config=variant.config, vectors=variant.vectors)
    training = replace(training, steps=variant.steps, kind=kind, decay=variant.decay)
    cell = Cell(int(variant.config["r"]), variant.lr, run.seed)
    with round_weights(layers_without_head(model.module).values(), grid):
        by_set, train_loss = losses_after(model, cell, training, sets, after_step, keep)
    return [
        trial_of(texts, losses, variant, run.seed, params, train_loss)
        for texts, losses in zip(sets, by_set, strict=True)
    ]


def train_on_worker(site: Site, training: Training, grid: str | None, task: RunTask) -> list[TuneTrial]:
    """Train a configuration on a worker of a cluster.

    Args:
        site: What the worker opens.
        training: Settings shared by all runs, without the text.
        grid: Grid of BASE's linear layers; None without rounding.
        task: Its ``work`` is a ``TrialRun``.
    """
    model, texts, sets = open_site(site)
    return train_variant(model, replace(training, texts=texts), sets, grid, task.work, lambda: None)


def uniform_name(rank: int) -> str:
    """Return the name of a uniform rank."""
    return f"uniform-r{rank}"


def trial_of(
    texts: Texts, losses: Losses, variant: Variant | None, seed: int, params: int, train_loss: float
) -> TuneTrial:
    """Return the record of a run on one set; of BASE without a configuration."""
    is_finite = train_loss == train_loss and abs(train_loss) != float("inf")
    return TuneTrial(
        **losses.on(texts),
        variant="base" if variant is None else variant.name,
        params=params,
        lr=None if variant is None else variant.lr,
        steps=0 if variant is None else variant.steps,
        seed=seed,
        loss=losses.mean if losses.is_finite else None,
        train_loss=train_loss if is_finite else None,
        nll=losses.rounded if losses.is_finite else (),
        predictions=tuple(int(count) for count in losses.counts) if variant is None else (),
    )


def save_adapter(module: Any, folder: Path) -> None:
    """Write PEFT's folder of a trained adapter; it replaces an earlier one once it is complete."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    for config in module.peft_config.values():  # PEFT keeps names as a set, whose order differs between processes
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
    module.save_pretrained(part)
    (part / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def save_copy(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Write an adapter's weights with another configuration to a temporary folder, then rename it."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    shutil.copyfile(source / ADAPTER, part / ADAPTER)
    (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def step_seconds(model: Model, cell: Cell, training: Training, sets: Sequence[Texts]) -> tuple[float, float]:
    """Return the seconds of one step, the second of two, and of one batch of an evaluation."""
    ticks = [time.perf_counter()]
    first = [sets[0].first(training.batch)]
    losses_after(model, cell, replace(training, steps=2), first, lambda: ticks.append(time.perf_counter()))
    return ticks[2] - ticks[1], ticks[3] - ticks[2]


def target_modules(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers that are adapted, by their paths.

    Args:
        module: The model.
        names: As PEFT takes them; empty for all linear layers but the head.
    """
    layers = {name.removesuffix(".weight"): layer for name, layer in layers_without_head(module).items()}
    if not names:
        return layers
    return {path: layer for path, layer in layers.items() if any(path == n or path.endswith(f".{n}") for n in names)}
