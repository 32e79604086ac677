"""The runs of probes that train: options, texts, the sequence of runs, and runs as tasks of a
cluster.

Every size is trained at every learning rate with the first seed, and at further rates if the best
is at the edge of the grid; then at its best rate with the other seeds. Finished runs are not
repeated. The probe determines the trained parameters.

On a cluster, a worker opens the model and the texts, trains, and returns the records. A task is a
small descriptor. What a worker opened is kept for its next tasks. BASE is measured, and a step
timed, in the submitting program.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lora_diag.errors import Given, InputError, UsageError
from lora_diag.linalg.devices import resolve_device
from lora_diag.models.data import Texts, read_texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import Model, open_model
from lora_diag.models.training import RECIPE, Lora, TrainingSettings, check_checkpointing
from lora_diag.records import RunInput, WholeRecord
from lora_diag.rendering.text import duration, quantity
from lora_diag.running.amounts import find_best_rates, next_rate
from lora_diag.running.engines import MachineLayout, Ray, capacity_of, connect, run_ray
from lora_diag.running.layers import plan_device
from lora_diag.running.options import G
from lora_diag.running.probing import ProbeRun, Reductions, describe_texts
from lora_diag.running.progress import ProgressReporter, RunRecords
from lora_diag.storage import Checkpoint

# A shape and a footprint by which the engine sends every run alone: its cost is above that of a
# batch of layers.
UNBATCHED_SHAPE, UNBATCHED_BYTES = (2**12, 2**12), 2**40

# Of a short step and of a longer one: smallest length of its sequences, and tokens in all.
SHORT_STEPS = ((2, 32), (8, 128))

MEMORY_FIX = "add a node with more, or lower $batch or $length"


@dataclass(frozen=True)
class Site:
    """What a worker opens for training runs.

    Args:
        base: The model.
        device: Its device on the worker.
        dtype: As in ``open_model``.
        length: As in ``open_model``.
        tokenizer: As in ``open_model``.
        texts: The training text, and then the evaluation sets, all without their sequences.
        max_sequences: Maximum number of sequences of an evaluation set; None for all.
        stored: BASE's files, by which the engine checks that a worker has the same.
    """

    base: str
    device: str
    dtype: str
    length: int | None
    tokenizer: str
    texts: tuple[Texts, ...]
    max_sequences: int | None
    stored: Checkpoint = field(compare=False)


@dataclass(frozen=True)
class RunTask:
    """One training run, as the engine takes it.

    Args:
        layer: Its label.
        work: Descriptor of the run.
        shape: That of a layer which the engine would send alone.
    """

    layer: str
    work: Any
    shape: tuple[int, ...] = UNBATCHED_SHAPE


# Trains one run on a worker; returns its records. Arguments: the model, the descriptor of the run,
# settings, evaluation sets, and a function to call after every step and batch.
TrainTask = Callable[
    [Model, Any, TrainingSettings, Sequence[Texts], Callable[[], None]], Sequence[Any]
]


@dataclass(frozen=True)
class ProbeWorkers:
    """The workers of one probe.

    Args:
        site: What each of them opens.
        on: The cluster.
        layout: Its ``budget`` is the number of concurrent runs of a node, in footprints.
        slots: Concurrent runs of the cluster when the probe was started.
    """

    site: Site
    on: Ray
    layout: MachineLayout
    slots: int

    def run(
        self,
        train: TrainTask,
        training: TrainingSettings,
        runs: Sequence[tuple[str, Any]],
        poll: Callable[[], None],
    ) -> Iterator[Sequence[Any]]:
        """Return an iterator over the records of every run, in the order of the runs.

        Args:
            train: A function of a module, with its settings bound.
            training: Settings shared by all runs.
            runs: Label and descriptor of each.
            poll: Called every few seconds; may raise to end all runs.
        """
        tasks = [RunTask(label, work) for label, work in runs]
        without_text = replace(training, texts=drop_sequences(training.texts))
        measure = partial(train_on_worker, self.site, train, without_text)
        return run_ray(
            measure, tasks, self.layout, lambda task: UNBATCHED_BYTES, self.on, poll, MEMORY_FIX
        )


def layout_of_runs(concurrent: int | None) -> MachineLayout:
    """Return the allocation of a node to concurrent runs; to one if their number is None."""
    return MachineLayout(torch.get_num_threads(), (concurrent or 1) * UNBATCHED_BYTES)


def train_on_worker(
    site: Site, train: TrainTask, training: TrainingSettings, task: RunTask
) -> Sequence[Any]:
    """Train one run on a worker of a cluster, and return its records.

    Args:
        site: What the worker opens.
        train: Trains the run.
        training: Settings shared by all runs, without the text.
        task: The run.
    """
    model, texts, sets = open_site(site)
    return train(model, task.work, replace(training, texts=texts), sets, lambda: None)


def drop_sequences(texts: Texts) -> Texts:
    """Return a text without its sequences: what a worker needs to read it."""
    return replace(texts, sequences=())


# What this process opened last.
_open: tuple[Site, Model, list[Texts]] | None = None


def open_site(site: Site) -> tuple[Model, Texts, list[Texts]]:
    """Return the model, the training text and the evaluation sets; what this process opened last is
    kept.
    """
    global _open
    if _open is None or _open[0] != site:
        _open = None  # two models may not fit
        model = open_model(
            site.base, torch.device(site.device), site.dtype, site.length, site.tokenizer
        )
        training_text, *sets = site.texts
        texts = [_read_same_texts(training_text, model, None)]
        texts += [_read_same_texts(described, model, site.max_sequences) for described in sets]
        _open = (site, model, texts)
    _, model, (text, *sets) = _open
    return model, text, sets


def _read_same_texts(described: Texts, model: Model, max_sequences: int | None) -> Texts:
    """Return a text with its sequences, read on this worker.

    Raises:
        InputError: It cannot be read, or differs from that of the run.
    """
    texts = read_texts(described.path, model, max_sequences, shifted=described.shifted)
    if texts.hash != described.hash:
        raise InputError(
            f"{described.path}: has other contents on the worker on {platform.node()}; put inputs "
            "on storage that all nodes share, or copy the same file to every node"
        )
    return texts


# Trains one run; returns its records. Arguments: as the last three of ``TrainTask``.
Train = Callable[[TrainingSettings, Sequence[Texts], Callable[[], None]], Sequence[WholeRecord]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One training run.

    Args:
        fields: Fields that identify its records.
        label: Label of its progress.
        train: Trains, evaluates on the given sets, calls its last argument after every step and
            every batch, and returns one record per set.
        work: Descriptor of the run for a worker of a cluster; None for a probe without an engine.
    """

    fields: Mapping[str, Any]
    label: str
    train: Train
    work: Any = None


@dataclass(frozen=True, slots=True)
class Arm:
    """A trained method with its grid of sizes and learning rates.

    Args:
        sizes: Ranks or dimensions, ascending; None for a method without sizes.
        rates: Learning rates, ascending.
        trial: The run of a size, a rate and a seed.
        earlier: Rates that an earlier run may have tried beyond the edge of a smaller grid; they
            are used, but not run.
        workers: The workers of a cluster; None to train its runs here, one after the other.
        train: Trains one of its runs on a worker; None to train its runs here.
    """

    sizes: tuple[int | None, ...]
    rates: tuple[float, ...]
    trial: Callable[[int | None, float, int], Trial]
    earlier: tuple[float, ...] = ()
    workers: ProbeWorkers | None = None
    train: TrainTask | None = None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The sequence of a probe's runs and its state.

    Args:
        training: Settings shared by all runs.
        sets: Evaluation sets; the first decides on learning rates.
        seeds: Number of runs of each size at its best rate.
        widen: Number of further rates if the best of a size is the lowest or highest tried.
        kept: The records.
    """

    training: TrainingSettings
    sets: Sequence[Texts]
    seeds: int
    widen: int
    kept: RunRecords[Any]

    @property
    def watch(self) -> ProgressReporter:
        """Callbacks for progress and notes."""
        return self.kept.watch

    @property
    def batches(self) -> int:
        """Number of batches of an evaluation on all sets."""
        return sum(texts.count_batches(self.training.batch) for texts in self.sets)

    def has(self, **fields: Any) -> bool:
        """Return whether every set has a record with these fields."""
        return self.kept.has([texts.name for texts in self.sets], **fields)

    def measure_base(
        self, model: Model, record: Callable[[Texts, Losses], WholeRecord], name: str | None = None
    ) -> None:
        """Measure BASE on every set and write the records, unless that is done.

        Args:
            model: BASE.
            record: Returns the record of a set.
            name: Name of these records, if BASE is measured more than once.
        """
        if not self.has(subject="base", **({} if name is None else {"name": name})):
            for texts in self.sets:
                self.kept.put(
                    record(
                        texts,
                        measure(
                            model, texts, self.training.batch, lambda: self.watch.batch("BASE")
                        ),
                    )
                )

    def report_cost(
        self, methods: Mapping[str, Sequence[Arm]], bases: int, extra_bytes: int, passes: int = 0
    ) -> None:
        """Time one step of each method and one evaluation batch, report the estimated cost, and set
        the expected total.

        Args:
            methods: The arms of each method, by what they train, such as ``of LoRA``; the first of
                each is timed.
            bases: Number of measurements of BASE.
            extra_bytes: Memory of training in addition to BASE.
            passes: Number of batches of another pass forward and back, each as long as a step.
        """
        self.watch.total = bases * self.batches + passes
        seconds, evaluation, costs = 0.0, 0.0, []
        for name, (arm, *others) in methods.items():
            cost = self.time_step(arm)
            runs = sum(map(self.count_unfinished, (arm, *others)))
            slots = 1 if arm.workers is None else arm.workers.slots
            seconds += passes * cost.seconds
            evaluation = cost.evaluation_seconds
            run_seconds = self.training.steps * cost.seconds + self.batches * evaluation
            seconds += math.ceil(runs / slots) * run_seconds
            self.expect(runs)
            costs.append(
                f"{quantity(runs, 'run')} {name} of {self.training.steps} steps of "
                f"{cost.seconds:.2g} s at most"
            )
        seconds += bases * self.batches * evaluation
        gib, arms = (
            extra_bytes / 2**30,
            [arm for of_method in methods.values() for arm in of_method],
        )
        self.watch.note(
            f"about {duration(seconds)}: {', '.join(costs)}, each evaluated on "
            f"{quantity(len(self.sets), 'set')}{self.describe_more_runs(arms)}"
            f"{f'; takes up to {gib:.1f} GiB in addition to BASE' if gib >= 0.1 else ''}"
        )

    def run(self, arm: Arm) -> None:
        """Run all rates with the first seed, and the best rate of each size with the others.

        In rounds of independent runs: the grid, one rate beyond it at each size that needs one, and
        so on, and last the other seeds.
        """
        first_seed = self.training.order
        rates = {size: self._iterate_rates(arm, size) for size in arm.sizes}
        tried = {size: list(islice(rates[size], len(arm.rates))) for size in arm.sizes}
        self._finish(
            arm, [arm.trial(size, rate, first_seed) for size in arm.sizes for rate in tried[size]]
        )
        while further := [
            (size, rate) for size, queue in rates.items() for rate in islice(queue, 1)
        ]:
            trials = [arm.trial(size, rate, first_seed) for size, rate in further]
            self.expect(sum(not self.has(**trial.fields) for trial in trials))
            self._finish(arm, trials)
            for size, rate in further:
                tried[size].append(rate)
        best = [
            (size, self._best_rate(arm, size, [*tried[size], *arm.earlier])) for size in arm.sizes
        ]
        chosen = [(size, rate) for size, rate in best if rate is not None]
        seeds = range(first_seed + 1, first_seed + self.seeds)
        self._finish(arm, [arm.trial(size, rate, seed) for seed in seeds for size, rate in chosen])

    def count_unfinished(self, arm: Arm) -> int:
        """Return the number of unfinished runs, except those beyond the grid, which are unknown in
        advance.
        """
        first_seed, count = self.training.order, 0
        for size in arm.sizes:
            best = self._best_rate(arm, size, [*self._iterate_rates(arm, size), *arm.earlier])
            runs = [arm.trial(size, rate, first_seed) for rate in arm.rates]
            other_seeds = range(first_seed + 1, first_seed + self.seeds)
            runs += [
                arm.trial(size, arm.rates[0] if best is None else best, seed)
                for seed in other_seeds
            ]
            count += sum(not self.has(**run.fields) for run in runs)
        return count

    def describe_more_runs(self, arms: Sequence[Arm]) -> str:
        """Return as text how many runs the edges of the grids may add; empty if none."""
        limit = self.widen * sum(len(arm.sizes) for arm in arms if len(arm.rates) > 1)
        runs = quantity(limit, "run")
        return f"; up to {runs} more if the best rate is at the edge of the grid" if limit else ""

    def expect(self, runs: int) -> None:
        """Add the steps and evaluation batches of a number of runs to the expected total."""
        self.watch.total += runs * (self.training.steps + self.batches)

    def time_step(self, arm: Arm) -> StepCost:
        """Measure a step at the largest size, and one evaluation batch."""
        return time_steps(arm.trial(arm.sizes[-1], 1e-6, 0).train, self.training, self.sets)

    def _finish(self, arm: Arm, trials: Sequence[Trial]) -> None:
        """Train the runs that are not finished, here or on the cluster, and write their records in
        this order.
        """
        unfinished = [trial for trial in trials if not self.has(**trial.fields)]
        if arm.workers is None or arm.train is None:
            for trial in unfinished:
                self.kept.put(
                    *trial.train(self.training, self.sets, partial(self.watch.batch, trial.label))
                )
            return
        poll = partial(self.watch.batch, f"{quantity(len(unfinished), 'run')} on the cluster", 0)
        runs = [(trial.label, trial.work) for trial in unfinished]
        for trial, records in zip(
            unfinished, arm.workers.run(arm.train, self.training, runs, poll), strict=True
        ):
            self.kept.put(*records)
            self.watch.batch(trial.label, self.training.steps + self.batches)

    def _iterate_rates(self, arm: Arm, size: int | None) -> Iterator[float]:
        """Yield the rates to try: the grid, then beyond its edge, each to be finished before the
        next is requested.
        """
        tried = list(arm.rates)
        yield from tried
        for _ in range(self.widen):
            best = self._best_rate(arm, size, tried)
            # A method that always diverged needs smaller steps.
            further = next_rate(tried, min(tried) if best is None else best)
            if further is None:
                return
            yield further
            tried.append(further)

    def _best_rate(self, arm: Arm, size: int | None, rates: Sequence[float]) -> float | None:
        """Return the rate of a size with the lowest loss of the first seed on the first set; None
        without a loss.
        """
        runs = []
        for rate in rates:  # without a record or a loss, a run is not finished or diverged
            fields = {**arm.trial(size, rate, self.training.order).fields, "set": self.sets[0].name}
            runs += [(size, record.loss, rate) for record in self.kept.find(**fields)]
        return find_best_rates(runs).get(size)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Cost of training.

    Args:
        seconds: Of one step.
        evaluation_seconds: Of one batch of an evaluation.
        error: Relative error of ``seconds``; 0 where a whole step was measured.
        saved_bytes: Tensors that a step keeps for its backward pass, frozen weights among them; 0
            where they are not counted.
    """

    seconds: float
    evaluation_seconds: float
    error: float = 0.0
    saved_bytes: int = 0


def time_steps(
    train: Callable[..., Any], training: TrainingSettings, sets: Sequence[Texts]
) -> StepCost:
    """Measure one training step, the second of two, and one batch of an evaluation.

    Args:
        train: Called with settings of two steps, a set of one batch, and a function to call after
            every step and batch.
        training: Settings shared by all runs.
        sets: Evaluation sets; one batch of the first is evaluated.
    """
    ticks = [time.perf_counter()]
    first_batch = sets[0].first(training.batch)
    train(replace(training, steps=2), [first_batch], lambda: ticks.append(time.perf_counter()))
    return StepCost(ticks[2] - ticks[1], ticks[3] - ticks[2])


def extrapolate_steps(
    train: Callable[..., Any], training: TrainingSettings, sets: Sequence[Texts]
) -> StepCost:
    """Return what ``time_steps`` would, from steps on the last tokens of sequences.

    Seconds are in proportion to the length. This counts the constant part of a step once per token,
    and no attention, which grows with the square of the length; ``error`` is the distance to the
    line through steps of two lengths, which has the constant part once. The saved bytes are on the
    line through those of two lengths, which is too low for attention that keeps its matrix.

    Args:
        train: As in ``time_steps``.
        training: Likewise.
        sets: Likewise.
    """

    def measure_tail(length: int) -> StepCost:
        short = replace(training, texts=training.texts.tail(length))
        with count_saved_bytes() as totals:
            cost = time_steps(train, short, [sets[0].tail(length)])
        return replace(cost, saved_bytes=max(totals, default=0))

    short, long = (max(least, tokens // training.batch) for least, tokens in SHORT_STEPS)
    small, large = measure_tail(short), measure_tail(long)
    longest = max(long, *(len(one.ids) for one in training.texts.sequences))
    factor = longest / long
    beyond = (longest - long) / (long - short)
    line = 1 + (1 - small.seconds / large.seconds) * beyond
    return StepCost(
        factor * large.seconds,
        factor * large.evaluation_seconds,
        abs(1 - max(1.0, line) / factor),
        large.saved_bytes + round((large.saved_bytes - small.saved_bytes) * beyond),
    )


@contextmanager
def count_saved_bytes() -> Iterator[list[int]]:
    """Yield a list that gets the bytes of the tensors saved for each backward pass."""
    sizes, totals = dict[int, int](), list[int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        if sizes:  # the first of a backward pass
            totals.append(sum(sizes.values()))
            sizes.clear()
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield totals


class TrainRun(ProbeRun[G]):
    """One run of a probe that trains.

    Args:
        command: Its name in the results file.
        options: Options given by the caller.
        group: The probe's options.

    Attributes:
        sets: Evaluation sets, once read.
        training: Settings shared by all runs, once the texts are read.
        on: The cluster to train on; None for this process.

    Raises:
        UsageError: An option is invalid.
        TypeError: An option is unknown or missing.
    """

    sets: list[Texts]
    training: TrainingSettings
    on: Ray | None = None

    def read_all(self, kind: Lora | None = None) -> None:
        """Read the text to train on and the evaluation sets; set ``sets`` and ``training``.

        ``kind`` is the form of the trained LoRA; None for ``Lora()``.

        Raises:
            UsageError: Two evaluation sets have one name, the training text is also an evaluation
                set, the model has no gradient checkpointing, or as ``read``.
        """
        self.sets, options = self.read_sets(), self.values
        texts = read_texts(options["data"], self.model)
        if existing := next(
            (held_out for held_out in self.sets if held_out.hash == texts.hash), None
        ):
            raise UsageError(
                f"{existing.path}: is the training text; give an evaluation set that is held out"
            )
        checkpointing = options.get("gradient_checkpointing", False)
        if checkpointing:
            check_checkpointing(self.model.module)
        self.training = TrainingSettings(
            texts,
            options["steps"],
            self.batch,
            options["seed"],
            kind or Lora(),
            checkpointing=checkpointing,
        )

    def count_train_tokens(
        self, sizes: float, rates: Sequence[float], step: float, extra: float = 0
    ) -> float:
        """Return the tokens of forward passes that take as long as the runs of a number of sizes.

        Args:
            sizes: Number of sizes, or of units.
            rates: Learning rates of each.
            step: Time of a step in forward passes of its batch.
            extra: Further time of a step, in tokens.
        """
        options, text = self.values, self.training.texts.sequences
        widened = options["widen"] * (len(rates) > 1)
        runs = sizes * (len(set(rates)) + widened + options["repeats"] - 1)
        tokens = self.batch * sum(len(sequence.ids) for sequence in text) / len(text)
        training = options["steps"] * (step * tokens + extra)
        return float(runs * (training + self.count_tokens(self.sets)))

    def fit_runs(self, count: Callable[[], float], reductions: Reductions) -> None:
        """Reduce options as ``fit`` does, and set ``sets`` and ``training`` again."""
        self.sets = self.fit(self.sets, count, reductions)
        self.training = replace(self.training, steps=self.values["steps"])

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Stay connected to the cluster of the option ``engine``, if there is one; set ``on`` and
        the device.

        If the cluster has GPUs, each of its tasks gets one, unless ``gpus_per_task`` is set or the
        device is the CPU. In the block, torch uses at most as many threads as a run has cores
        there.

        Raises:
            UsageError: An option is invalid or contradicts another, Ray is not installed, or the
                tasks have GPUs and this machine, where BASE is measured, has none.
        """
        on, concurrent = self.values["engine"], self.values["concurrent"]
        device = self.values["device"]
        if concurrent is not None and (on is None or concurrent < 1):
            raise UsageError(
                Given("concurrent", concurrent), "must be at least 1, and needs $engine ray"
            )
        if on is None:
            yield
            return
        on.check()
        cores = torch.get_num_threads()
        with connect(on, cores) as ray:
            has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
            if has_gpus and not on.gpus_per_task and device in {"auto", "cuda"}:
                on = replace(on, gpus_per_task=1.0)
            kind = plan_device(on, device).kind
            if kind == "cuda" and resolve_device("auto").type != "cuda":
                raise UsageError(
                    Given("engine", "ray"),
                    "its tasks have GPUs and this machine has none, on which BASE is measured",
                    "start loradiag on a node with a GPU, or add $device cpu",
                )
            if kind == "cuda" and concurrent is not None:
                raise UsageError(
                    Given("concurrent", concurrent),
                    "applies to the CPU only",
                    "share a GPU with $gpus_per_task 0.5",
                )
            self.on, self.values["device"] = on, kind
            # Cores of a run, whose step is timed here; the same where a search calls a sweep.
            _, cores_of_run = capacity_of(on, layout_of_runs(concurrent), UNBATCHED_BYTES)
            torch.set_num_threads(min(cores, cores_of_run))
            try:
                yield
            finally:
                torch.set_num_threads(cores)

    def workers(self, base: Path | str, stored: Checkpoint) -> ProbeWorkers | None:
        """Return the workers of the cluster, once the texts are read; None without a cluster.

        Args:
            base: BASE, as the workers open it.
            stored: Its files.
        """
        if self.on is None:
            return None
        options = self.values
        site = Site(
            base=str(base),
            **{
                name: options[name]
                for name in ("device", "dtype", "length", "tokenizer", "max_sequences")
            },
            texts=tuple(map(drop_sequences, (self.training.texts, *self.sets))),
            stored=stored,
        )
        layout = layout_of_runs(options["concurrent"])
        slots, _ = capacity_of(self.on, layout, UNBATCHED_BYTES)
        return ProbeWorkers(site, self.on, layout, slots)

    def inputs(self, stored: Checkpoint) -> list[RunInput]:
        """Return the descriptions of BASE and the texts for the run record."""
        return [
            self.describe(stored),
            describe_texts(self.training.texts, "data"),
            *map(describe_texts, self.sets),
        ]

    def training_settings(self) -> dict[str, Any]:
        """Return the training settings for the run record."""
        settings = self.settings("widen", "steps", "repeats", "seed")
        settings["order"] = self.training.order_hash
        settings["optimizer"] = RECIPE
        if self.training.checkpointing:
            settings["gradient_checkpointing"] = True
        return settings

    def plan_runs(self, kept: RunRecords[Any]) -> RunPlan:
        """Return the plan of the runs; with the seeds of the run record, which a resumed run may
        have extended.
        """
        return RunPlan(
            self.training, self.sets, kept.run.settings["repeats"], self.values["widen"], kept
        )
