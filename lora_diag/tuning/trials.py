"""Configurations of a search, decisions from their losses, and training runs outside the sweep.

Configurations are in PEFT's form. Decisions are the rank, whether a challenger is kept, and which
trials the curves justify. A challenger is compared with the incumbent on the same seeds and the
same sequences. It is kept only where its loss is significantly lower in-domain (two standard errors
of the paired differences, more with few seeds), and its mean loss is not higher on the shifted
sets: the incumbent wins ties.

Every run is recorded with its losses, and trained again only for an adapter that is missing. BASE
is unchanged afterwards.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from torch import nn

from lora_diag.errors import InputError
from lora_diag.metrics.statistics import errors_needed, paired_difference, paired_half
from lora_diag.models.data import Texts
from lora_diag.models.losses import measure
from lora_diag.models.opening import Model
from lora_diag.models.training import (
    Cell,
    Lora,
    TrainingSettings,
    add_lora,
    count_trained,
    layers_without_head,
    load_factors,
    losses_after,
)
from lora_diag.probes.outputs.measure import measure_outputs
from lora_diag.probes.sweep.measure import round_weights
from lora_diag.probes.sweep.verdict import Swept, find_diverged
from lora_diag.records import Probe
from lora_diag.running.judging import NamedModel
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import ProbeWorkers
from lora_diag.tuning.record import TunePlan, TuneTrial

DROPOUT, WEIGHT_DECAY = 0.1, 0.1


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration.

    Args:
        name: Identifies its runs.
        config: Content of ``adapter_config.json``.
        lr: Peak learning rate.
        steps: Updates.
        decay: Weight decay of AdamW.
        vectors: Whether BASE's biases and norms are trained, too.
    """

    name: str
    config: Mapping[str, Any]
    lr: float
    steps: int
    decay: float = 0.0
    vectors: bool = False


def _select_named(paths: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the paths of modules that PEFT finds by these names: a path, or its end
    after a dot.
    """
    ends = tuple(f".{name}" for name in names)
    return [path for path in paths if f".{path}".endswith(ends)]


def find_shortest_names(chosen: Sequence[str], all_paths: Collection[str]) -> list[str]:
    """Return names by which PEFT finds these modules: the last part of a path if it finds no
    others, else the path.

    Args:
        chosen: Paths of the modules to adapt.
        all_paths: Paths of all modules.

    Example:
        >>> find_shortest_names(["a.0.q", "a.1.q", "a.0.v"], ["a.0.q", "a.1.q", "a.0.v", "a.1.v"])
        ['a.0.v', 'q']
    """
    names: set[str] = set()
    for path in chosen:
        leaf = path.rpartition(".")[2]
        names.add(leaf if set(_select_named(all_paths, [leaf])) <= set(chosen) else path)
    return sorted(names)


def ranks_of(config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, int]:
    """Return the rank of each module as PEFT reads a configuration: 0 where it is no target.

    Args:
        config: Content of ``adapter_config.json``.
        paths: Paths of the modules.

    Example:
        >>> config = {"target_modules": ["q", "0.v"], "rank_pattern": {"1.q": 8}, "r": 4}
        >>> ranks_of(config, ["a.0.q", "a.1.q", "a.0.v", "a.1.v"])
        {'a.0.q': 4, 'a.1.q': 8, 'a.0.v': 4, 'a.1.v': 0}
    """
    ranks = dict.fromkeys(paths, 0)
    for path in _select_named(ranks, config["target_modules"]):
        matching_ranks = (
            rank
            for key, rank in config["rank_pattern"].items()
            if re.match(rf"(.*\.)?({key})$", path)
        )
        ranks[path] = next(matching_ranks, config["r"])
    return ranks


def change_variant(variant: Variant, trial: str) -> Variant:
    """Return a configuration with one change for stability.

    Args:
        variant: The incumbent.
        trial: ``dropout``, ``weight-decay``, ``half-alpha`` or ``fewer-steps``.

    Example:
        >>> from lora_diag.decisions.allocate.peft_config import make_config
        >>> one = Variant("uniform-r4", make_config(["q"], 4, 8), 1e-3, 100)
        >>> (
        ...     change_variant(one, "half-alpha").config["lora_alpha"],
        ...     change_variant(one, "fewer-steps").steps,
        ... )
        (4.0, 50)
    """
    config = variant.config
    halved_alphas = {key: alpha / 2 for key, alpha in config["alpha_pattern"].items()}
    changes: dict[str, dict[str, Any]] = {
        "dropout": {"config": {**config, "lora_dropout": DROPOUT}},
        "weight-decay": {"decay": WEIGHT_DECAY},
        "half-alpha": {
            "config": {
                **config,
                "lora_alpha": config["lora_alpha"] / 2,
                "alpha_pattern": halved_alphas,
            },
        },
        "fewer-steps": {"steps": max(1, variant.steps // 2)},
    }
    return replace(variant, name=f"{variant.name}+{trial}", **changes[trial])


# Regularization is justified if the held-out loss fell less than the training loss by this fraction
# of the gain.
OVERFIT_SHARE = 0.25
# Fraction of full fine-tuning's gain below which more than LoRA within the budget is considered.
SHORT_OF_FULL = 0.9

Outcome = Literal["better", "tie", "worse", "not known"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run on one set.

    Args:
        loss: Mean, in nats.
        nll: Summed negative log-likelihood of each sequence.
        train_loss: Mean over the last tenth of the steps; None where not finite.
    """

    loss: float
    nll: tuple[float, ...] = ()
    train_loss: float | None = None


# Runs of one configuration, by set and seed.
Runs = Mapping[str, Mapping[int, Measured]]


@dataclass(frozen=True, slots=True)
class Gap:
    """The challenger's loss minus the incumbent's, on the seeds that both have.

    Args:
        value: Mean over seeds, in nats.
        error: The larger of two standard errors: over paired seeds, and over paired sequences; of
            one seed, over sequences, or None if these were not compared.
        seeds: Number of these seeds.
        half: Half-width of the interval around 0 outside which it is significant, the larger of
            those by the two errors: two standard errors, more with few seeds or sequences
            (``errors_needed``). None if not known.
    """

    value: float
    error: float | None
    seeds: int
    half: float | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """A challenger compared with the incumbent.

    Args:
        outcome: ``better``, ``worse``: significantly; ``tie``: neither; ``not known``: one seed or
            none.
        kept: Whether it replaces the incumbent.
        own: On the set that decides; None without a common seed.
        shifted: Mean over the shifted sets with a common seed; None without any.
    """

    outcome: Outcome
    kept: bool
    own: Gap | None
    shifted: Gap | None


def gap_of(
    incumbent: Mapping[int, Measured],
    challenger: Mapping[int, Measured],
    predictions: Sequence[int],
) -> Gap | None:
    """Return the difference on one set; None without a seed that both have.

    Args:
        incumbent: Runs by seed.
        challenger: Runs by seed.
        predictions: Number of predictions of each sequence.

    Example:
        >>> runs = {0: Measured(1.0), 1: Measured(1.2)}, {0: Measured(0.9), 1: Measured(1.12)}
        >>> found = gap_of(*runs, ())
        >>> round(found.value, 6), round(found.error, 6)
        (-0.09, 0.01)
    """
    seeds = sorted(incumbent.keys() & challenger.keys())
    if not seeds:
        return None
    gaps = [challenger[seed].loss - incumbent[seed].loss for seed in seeds]
    if len(seeds) < 2:
        return Gap(gaps[0], None, 1)
    errors = [stdev(gaps) / math.sqrt(len(gaps))]
    halves = [errors[0] * errors_needed(len(gaps) - 1)]
    challenger_nll, incumbent_nll = (
        _average_nll([runs[seed] for seed in seeds]) for runs in (challenger, incumbent)
    )
    if len(challenger_nll) == len(incumbent_nll) == len(predictions) > 1:
        errors.append(paired_difference(challenger_nll, incumbent_nll, predictions)[1] or 0.0)
        halves.append(paired_half(errors[1], len(predictions)) or 0.0)
    return Gap(fmean(gaps), max(errors), len(seeds), max(halves))


def _average_nll(runs: Sequence[Measured]) -> list[float]:
    """Return the mean over runs of each sequence's NLL; empty if numbers of sequences differ."""
    if len({len(run.nll) for run in runs}) > 1:
        return []
    return [fmean(values) for values in zip(*(run.nll for run in runs), strict=True)]


def contest(
    incumbent: Runs,
    challenger: Runs,
    own: str,
    shifted: Sequence[str],
    predictions: Mapping[str, Sequence[int]],
) -> Contest:
    """Return the comparison of a challenger with the incumbent, and whether it is kept.

    Args:
        incumbent: Its runs.
        challenger: Its runs.
        own: The set that decides.
        shifted: Sets of another kind.
        predictions: Number of predictions of each sequence, by set.
    """
    gaps = {
        name: gap_of(incumbent.get(name, {}), challenger.get(name, {}), predictions.get(name, ()))
        for name in (own, *shifted)
    }
    own_gap = gaps.pop(own)
    shifted_gaps = [gap for gap in gaps.values() if gap is not None]
    shifted_gap = _pool_gaps(shifted_gaps)
    if own_gap is None or own_gap.half is None:
        return Contest("not known", False, own_gap, shifted_gap)
    is_better = own_gap.value < -own_gap.half
    outcome: Outcome = "tie"
    if is_better:
        outcome = "better"
    elif own_gap.value > own_gap.half:
        outcome = "worse"
    is_kept = is_better and all(gap.value <= 0 for gap in shifted_gaps)
    return Contest(outcome, is_kept, own_gap, shifted_gap)


def _pool_gaps(gaps: Sequence[Gap]) -> Gap | None:
    """Return the mean over sets, with errors treated as independent; None without sets."""
    if not gaps:
        return None
    errors = [gap.error for gap in gaps if gap.error is not None]
    error = (
        math.sqrt(math.fsum(e**2 for e in errors)) / len(gaps) if len(errors) == len(gaps) else None
    )
    return Gap(fmean(gap.value for gap in gaps), error, min(gap.seeds for gap in gaps))


@dataclass(frozen=True, slots=True)
class RankChoice:
    """The shared rank.

    Args:
        rank: r.
        lr: Its learning rate.
        significant: Whether it is shown to be enough; else it is chosen by the mean losses.
        why: The reason as text.
    """

    rank: int
    lr: float
    significant: bool
    why: str


def choose_rank(swept: Swept) -> RankChoice:
    """Return the smallest rank shown to be enough; where none is, the smallest by the mean losses,
    or of all, marked.

    Not the smallest that is not shown to be too small: the noisier the seeds, the smaller that is.
    On the sample model and Python source (4 seeds) it was r=4, whose test loss was 0.030 ± 0.005
    above that of r=16.

    Args:
        swept: A sweep with a loss at a rank.
    """
    verdict, rates = swept.verdict, {row.rank: row.lr for row in swept.rows if row.rank is not None}
    if verdict.rank is not None:
        rank, why = verdict.rank, "the smallest shown to be enough"
    elif verdict.answer is not None:
        rank = verdict.answer
        why = (
            "the smallest whose mean loss is within tolerance of every other's, which is not shown"
        )
    else:
        rank, why = min(rates), "the smallest"
    return RankChoice(rank, rates[rank], verdict.rank is not None, f"{verdict.outcome}: {why}")


def between(chosen: int, ranks: Iterable[int]) -> int | None:
    """Return the rounded geometric mean of a rank and the next lower one tried; None unless that is
    below its half.

    >>> between(16, [1, 4, 16]), between(4, [2, 4]), between(1, [1, 4]), between(24, [6, 24])
    (8, None, None, 12)
    """
    lower = max((rank for rank in ranks if rank < chosen), default=chosen)
    middle = round(math.sqrt(chosen * lower))
    return middle if lower < middle < chosen and 2 * lower < chosen else None


@dataclass(frozen=True, slots=True)
class Curves:
    """Gains of the chosen configuration, in nats below BASE's loss, from which its stability is
    judged.

    Args:
        gain: On the deciding set, mean over seeds.
        train_gain: On the training data at the end, mean over seeds; 0 if not known.
        spread: Standard deviation of its gain over seeds; None for one seed.
        tolerance: In nats.
        diverged: Number of runs of the sweep at its rank that diverged, at any rate up to its own.
        gain_shifted: On the first shifted set, mean over seeds; None without one.
    """

    gain: float
    train_gain: float
    spread: float | None
    tolerance: float
    diverged: int = 0
    gain_shifted: float | None = None


def stability_trials(curves: Curves) -> dict[str, str]:
    """Return the stability trials that the curves justify, each with its reason; none where
    training is sound.

    Example:
        >>> stability_trials(Curves(gain=0.5, train_gain=0.5, spread=0.001, tolerance=0.01))
        {}
        >>> [*stability_trials(Curves(gain=0.5, train_gain=1.1, spread=0.001, tolerance=0.01))]
        ['dropout', 'weight-decay', 'fewer-steps']
    """
    gain, train_gain = curves.gain, curves.train_gain
    overfit = unstable = worse = ""
    if train_gain - gain > OVERFIT_SHARE * max(gain, 0.0) and train_gain > 0:
        overfit = f"training loss fell by {train_gain:.3f}, held-out loss by {gain:.3f}"
    if curves.diverged:
        unstable = f"{curves.diverged} runs diverged at this rank"
    elif curves.spread is not None and curves.spread > 2 * curves.tolerance > 0:
        unstable = f"seeds differ by {curves.spread:.3f}, tolerance {curves.tolerance:.3f}"
    if curves.gain_shifted is not None and curves.gain_shifted < 0:
        worse = f"the loss on the shifted set rises by {-curves.gain_shifted:.3f}"
    reasons = {
        "dropout": overfit,
        "weight-decay": overfit,
        "half-alpha": unstable,
        "fewer-steps": overfit or worse,
    }
    return {name: why for name, why in reasons.items() if why}


def count_diverged(records: Sequence[Probe], rank: int, lr: float) -> int:
    """Return the number of LoRA runs of a sweep at this rank that diverged, at any learning rate up
    to this one.
    """
    diverged = find_diverged(records)
    return sum(
        subject == "lora" and tried_rank == rank and (tried_lr or 0.0) <= lr
        for subject, tried_rank, tried_lr, _ in diverged
    )


def escalation_reason(chosen: int, ranks: Sequence[int], share_of_full: float | None) -> str:
    """Return why more than the chosen rank is considered; empty where there is no reason.

    >>> escalation_reason(4, [1, 4, 16], 0.95)
    ''
    >>> escalation_reason(16, [1, 4, 16], None)
    'the largest rank within the budget was chosen'
    """
    if chosen == max(ranks):
        return "the largest rank within the budget was chosen"
    if share_of_full is not None and share_of_full < SHORT_OF_FULL:
        return f"{share_of_full:.0%} of full fine-tuning's gain is below {SHORT_OF_FULL:.0%}"
    return ""


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
        after: Called with a label after every step and every batch; or with a label and their
            number after several.
        workers: The workers of a cluster; None to train here.
    """

    model: Model
    training: TrainingSettings
    sets: Sequence[Texts]
    kept: RunRecords[Any]
    grid: str | None
    after: Callable[..., None]
    workers: ProbeWorkers | None = None

    @property
    def records(self) -> list[TuneTrial]:
        """All runs so far."""
        return [record for record in self.kept.records if isinstance(record, TuneTrial)]

    def _has(self, record: str = "tune_trial", **fields: Any) -> bool:
        """Return whether a record with these fields is there for every set."""
        return self.kept.has([texts.name for texts in self.sets], record=record, **fields)

    def train(self, *runs: TrialRun) -> None:
        """Train configurations, as far as that is not done yet; independent runs are trained
        concurrently on a cluster.

        Raises:
            InputError: An adapter that a worker wrote is not visible here, or see
                ``train_variant``.
        """
        todo = [
            run
            for run in runs
            if not (
                run.is_written
                and self._has(variant=run.variant.name, lr=run.variant.lr, seed=run.seed)
            )
        ]
        for run, records in zip(todo, self._collect_results(todo), strict=True):
            if not run.is_written:
                raise InputError(
                    run.folder,
                    "the adapter that a worker wrote is not visible here",
                    "put $output on storage that all nodes share",
                )
            self.kept.put(*records)

    def _collect_results(self, runs: Sequence[TrialRun]) -> Iterator[Sequence[TuneTrial]]:
        """Train runs, here or on the cluster, and yield the records of each."""
        train = partial(train_variant, self.grid)
        if self.workers is None:
            for run in runs:
                yield train(
                    self.model, run, self.training, self.sets, partial(self.after, run.label)
                )
            return
        poll = partial(self.after, f"{len(runs)} runs on the cluster", 0)
        results = self.workers.run(train, self.training, [(run.label, run) for run in runs], poll)
        batches = sum(texts.count_batches(self.training.batch) for texts in self.sets)
        for run, records in zip(runs, results, strict=True):
            self.after(run.label, run.variant.steps + batches)
            yield records

    def measure_base(self) -> None:
        """Measure BASE on every set and on as many training sequences as the largest set has,
        unless recorded.
        """
        if self._has(variant="base"):
            return
        train_texts = self.training.texts.first(max(len(texts.sequences) for texts in self.sets))
        with round_weights(layers_without_head(self.model.module).values(), self.grid):
            train_losses, *by_set = (
                measure(self.model, texts, self.training.batch, lambda: self.after("BASE"))
                for texts in (train_texts, *self.sets)
            )
        self.kept.put(
            *(
                TuneTrial(
                    variant="base",
                    params=0,
                    **losses.fields_of_run(texts, train_losses.mean),
                    **losses.by_sequence(is_base=True),
                )
                for texts, losses in zip(self.sets, by_set, strict=True)
            )
        )

    def compare_with_base(self, variant: Variant, folder: Path) -> None:
        """Compare the adapter of a configuration with BASE on every set, unless recorded.

        Args:
            variant: The configuration; it trains factors only.
            folder: Folder of its trained adapter.
        """
        if self._has(record="probe", name=variant.name):
            return
        with (
            round_weights(layers_without_head(self.model.module).values(), self.grid),
            add_lora(self.model, int(variant.config["r"]), Lora(config=variant.config)) as tuned,
        ):
            load_factors(tuned, folder / ADAPTER)
            tuned.module.disable_adapter_layers()
            contenders = [
                NamedModel("base"),
                NamedModel("adapter", variant.name, partial(_enable_adapter, tuned.module)),
            ]
            for texts in self.sets:
                self.kept.put(
                    *measure_outputs(self.model, contenders, texts, self.training.batch, self.after)
                )

    def copy(self, probes: Sequence[Probe], plan: TunePlan, total: int) -> None:
        """Record the runs of a sweep, so that one file has all losses.

        Args:
            probes: Records of ``probe sweep``.
            plan: The plan.
            total: Parameters of the model.
        """
        names = ("set", "shifted", "data", "tokens", "lr", "seed", "loss", "train_loss", "nll")
        self.kept.put(
            *(
                TuneTrial(
                    **{name: getattr(probe, name) for name in names},
                    variant="full" if probe.rank is None else uniform_name(probe.rank),
                    params=total if probe.rank is None else plan.params(probe.rank),
                    steps=plan.steps,
                )
                for probe in probes
                if probe.subject in {"lora", "full"}
            )
        )

    def runs(
        self, variant: Variant, seeds: Sequence[int] | None = None
    ) -> dict[str, dict[int, Measured]]:
        """Return the runs of a configuration that have a loss, by set and seed.

        Args:
            variant: The configuration.
            seeds: Only these; None for all.
        """
        by_set: dict[str, dict[int, Measured]] = {}
        for record in self.records:
            is_selected = (record.variant, record.lr) == (variant.name, variant.lr)
            if is_selected and record.loss is not None and (seeds is None or record.seed in seeds):
                by_set.setdefault(record.set, {})[record.seed] = Measured(
                    record.loss, record.nll, record.train_loss
                )
        return by_set

    @property
    def predictions(self) -> Mapping[str, tuple[int, ...]]:
        """Number of predictions of each sequence, by set."""
        return {
            record.set: record.predictions for record in self.records if record.variant == "base"
        }


def train_variant(
    grid: str | None,
    model: Model,
    run: TrialRun,
    training: TrainingSettings,
    sets: Sequence[Texts],
    after_step: Callable[[], None],
) -> list[TuneTrial]:
    """Train a configuration, here or on a worker of a cluster, and return its record on every set.

    Args:
        grid: Grid of BASE's linear layers; None without rounding.
        model: BASE; unchanged afterwards.
        run: The run.
        training: Settings shared by all runs.
        sets: Evaluation sets.
        after_step: Called after every step and every batch.
    """
    variant, params = run.variant, 0

    def keep(tuned: Model) -> None:
        nonlocal params
        params = count_trained(tuned)
        if run.folder is not None:
            save_adapter(tuned.module, run.folder)

    kind = Lora(config=variant.config, vectors=variant.vectors)
    training = replace(training, steps=variant.steps, kind=kind, decay=variant.decay)
    cell = Cell(int(variant.config["r"]), variant.lr, run.seed)
    with round_weights(layers_without_head(model.module).values(), grid):
        by_set, train_loss = losses_after(model, cell, training, sets, after_step, keep)
    return [
        TuneTrial(
            variant=variant.name,
            params=params,
            lr=variant.lr,
            steps=variant.steps,
            seed=run.seed,
            **losses.fields_of_run(texts, train_loss),
            **losses.by_sequence(is_base=False),
        )
        for texts, losses in zip(sets, by_set, strict=True)
    ]


def uniform_name(rank: int) -> str:
    """Return the name of the configuration of one rank everywhere."""
    return f"uniform-r{rank}"


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Provide an empty path for a folder, which replaces ``folder`` once the block ends without an
    error.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def save_adapter(module: Any, folder: Path) -> None:
    """Write PEFT's folder of a trained adapter; it replaces an earlier one once it is complete."""
    for config in (
        module.peft_config.values()
    ):  # PEFT keeps names as a set, whose order differs between processes
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
    with replace_folder(folder) as part:
        module.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)


@contextmanager
def _enable_adapter(module: Any) -> Iterator[None]:
    """Enable the adapter of a model, as PEFT wraps it, while the block runs."""
    module.enable_adapter_layers()
    yield
    module.disable_adapter_layers()


def target_modules(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers that are adapted, by their paths.

    Args:
        module: The model.
        names: As PEFT takes them; empty for all linear layers but the head.
    """
    layers = {
        name.removesuffix(".weight"): layer for name, layer in layers_without_head(module).items()
    }
    return {path: layers[path] for path in _select_named(layers, names)} if names else layers
