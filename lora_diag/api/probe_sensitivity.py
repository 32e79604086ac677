"""``probe sensitivity``: which layers are worth adapting, by adapting each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_diag.api.inputs import describe
from lora_diag.api.probing import (
    Kept,
    Watch,
    batches_of,
    check,
    check_files,
    counted,
    described,
    read_sets,
    run_of,
)
from lora_diag.api.training_runs import check_training, read_training, timed
from lora_diag.checkpoints import Checkpoint, open_checkpoint
from lora_diag.deltas import selector
from lora_diag.errors import NothingComparedError
from lora_diag.linalg import resolve_device
from lora_diag.planning.sensitivity import best_rate
from lora_diag.reports.text import duration
from lora_diag.results import AnyRecord, FirstOrder, LeftOut, Results, ResultsWriter, Sensitivity
from lora_diag.training.activations import linear_layers
from lora_diag.training.data import Texts
from lora_diag.training.losses import Losses, measure
from lora_diag.training.methods import Lora, inner_layers
from lora_diag.training.models import Model, Weights, open_model
from lora_diag.training.sensitivity import (
    Unit,
    adapted_alone,
    first_order,
    gradients,
    record_of,
    shape_of,
    units_of,
)
from lora_diag.training.sweep import RECIPE, Cell, Training

PER = ("layer", "block", "type")
RATES = (1e-3, 1e-2)


def probe_sensitivity(
    base: Path | str,
    *,
    data: Path | str,
    evaluate: Sequence[Path | str],
    shifted: Sequence[Path | str] = (),
    rank: int = 8,
    delta: int | None = None,
    per: str = "layer",
    rates: Sequence[float] = RATES,
    steps: int = 50,
    seeds: int = 1,
    seed: int = 0,
    layers: str | None = None,
    exclude: str | None = None,
    length: int | None = None,
    batch: int = 8,
    max_sequences: int | None = None,
    tokenizer: str = "auto",
    dtype: str = "float32",
    device: str = "auto",
    output: Path | str | None = None,
    resume: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_record: Callable[[AnyRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Results[Any]:
    r"""Train a LoRA on each layer alone, on the same batches in the same order, and measure ΔL_ℓ = L(BASE) − L.

    First the gradient of every layer at BASE is taken in one pass, for scores that cost next to nothing. Then each unit
    is adapted alone at every rate with the first seed, and with the others at the rate of its lowest loss on the first
    evaluation set.

    Args:
        base: The model: a folder that transformers can open, or a Hub id.
        data: What to train on: text or JSONL.
        evaluate: Held-out files of the same kind; the first decides on the learning rate.
        shifted: Files of another kind.
        rank: Rank r.
        delta: δ: train at r + δ, too, for the marginal gain L_ℓ(r) − L_ℓ(r + δ).
        per: What is adapted alone: each ``layer``, the layers of a ``block``, or of a module ``type``.
        rates: Peak learning rates.
        steps: Updates of a run.
        seeds: Runs of each unit at its best rate; they differ in the factors' initial values.
        seed: Of the data's order, and the first of the seeds.
        layers: Regular expression; only weights whose name contains a match.
        exclude: Regular expression; no weights whose name contains a match.
        length: Tokens of a sequence; by default 512 or what the model has room for.
        batch: Sequences in a batch, of training and of evaluation.
        max_sequences: Use the first so many sequences of each evaluation file.
        tokenizer: ``auto``, ``bytes`` or a folder.
        dtype: Of the weights while they run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        output: Results file, appended run by run.
        resume: Go on behind what an interrupted run left in ``output``; finished runs are not run again.
        on_progress: Called with what is being done, steps and batches done, and all of them.
        on_record: Called with every record, in the order of the file, as it comes.
        on_note: Called with the estimate of what it will cost, before it begins.

    Returns:
        The records are in ``whole``: a ``FirstOrder`` for every layer, then ``Sensitivity``: BASE's losses, and those
        of every run, set by set.

    Raises:
        UsageError: An option makes no sense, a text is trained on and evaluated, or the extra ``train`` is missing.
        InputError: An input cannot be read, or the model cannot be opened or adapted.
        NothingComparedError: No linear layer is selected.
    """
    check(batch, max_sequences, per=(per, PER))
    counts = {"--rank": rank, "--delta": delta, "--steps": steps, "--seeds": seeds}
    check_training({"--lr": rates}, counts, seed)
    check_files(evaluate, *shifted, data)
    selected = selector(layers, exclude)
    stored = open_checkpoint(base)
    model = open_model(base, resolve_device(device), dtype, length, tokenizer)
    sets = read_sets(model, evaluate, shifted, max_sequences)
    training = Training(read_training(data, model, sets), steps, batch, seed, Lora())
    names, left_out = _chosen(model, stored, selected)
    linear = {name: layer for name, layer in linear_layers(model.module).items() if name in names}
    settings = {
        "per": per,
        "rank": rank,
        "delta": delta,
        "rates": sorted(set(rates)),
        "steps": steps,
        "seeds": seeds,
        "seed": seed,
        "layers": layers,
        "exclude": exclude,
        "kind": training.kind.about,
        "optimizer": RECIPE,
    }
    inputs = (describe("base", stored), described(training.texts, "data"), *map(described, sets))
    run = run_of("probe sensitivity", inputs, settings, model, batch, dtype)
    watch = Watch(on_progress, on_record, on_note)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume) as writer:
        kept = Kept(writer, watch)
        if kept.finished is not None:
            return kept.finished
        ranks = (rank, rank + delta) if delta is not None else (rank,)
        units = units_of(linear, names, per)
        probe = _Probe(model, units, training, sets, ranks, tuple(sorted(set(rates))), seeds, kept, watch)
        probe.tell_cost()
        probe.score(linear, names)
        bases = probe.measure_base()
        for unit in units:
            probe.run(unit, bases)
        return kept.end(left_out)


def _chosen(model: Model, stored: Checkpoint, selected: Callable[[str], bool]) -> tuple[dict[str, str], list[LeftOut]]:
    """Return the linear layers to adapt, by their names in the model, with those in BASE; and the others, why.

    Raises:
        NothingComparedError: There is none.
    """
    weights, inner = Weights(model.module), inner_layers(model.module)
    known = {name: stored_name for stored_name in stored if (name := weights.name(stored_name)) is not None}
    names: dict[str, str] = {}
    left_out = []
    for name, layer in linear_layers(model.module).items():
        called = known.get(name, name)
        if name in inner and name in known and selected(called):
            names[name] = called
            continue
        detail = "the head is not adapted" if name not in inner else "was not selected"
        if name not in known:
            detail = "not stored under a name of its own in BASE (tied)"
        left_out.append(LeftOut(layer=called, shape=shape_of(layer), reason="not_selected", detail=detail))
    if not names:
        raise NothingComparedError(f"{stored.path}: no linear layer is selected, so there is nothing to adapt")
    return names, left_out


@dataclass(frozen=True, slots=True)
class _Probe:
    """A run as far as it is."""

    model: Model
    units: Sequence[Unit]
    training: Training
    sets: Sequence[Texts]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int
    kept: Kept
    watch: Watch

    @property
    def seed(self) -> int:
        """The first seed."""
        return self.training.order

    def score(self, layers: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Take the gradient of every layer at BASE, and keep what it says."""
        texts, batch = self._seen(), self.training.batch
        if self._scored():
            return
        found = gradients(self.model, layers, texts, batch, partial(self.watch.batch, "gradient"))
        self.kept.put(*(first_order(names[name], each, self.ranks[0], texts) for name, each in found.items()))

    def measure_base(self) -> dict[str, Losses]:
        """Measure BASE; again after an interruption, because errors need its losses sequence by sequence."""
        after, batch = partial(self.watch.batch, "BASE"), self.training.batch
        bases = {each.name: measure(self.model, each, batch, after) for each in self.sets}
        self.kept.put(*(record_of(each, bases[each.name]) for each in self.sets))
        return bases

    def run(self, unit: Unit, bases: Mapping[str, Losses]) -> None:
        """Adapt one unit at every rank: all rates with the first seed, the best with the others."""
        for rank in self.ranks:
            for lr in self.rates:
                self._run(unit, Cell(rank, lr, self.seed), bases)
            records = [record for record in self.kept.records if isinstance(record, Sensitivity)]
            best = best_rate(records, unit.name, rank, self.sets[0].name, self.seed)
            for more in range(1, self.seeds if best is not None else 1):
                self._run(unit, Cell(rank, best or 0.0, self.seed + more), bases)

    def _run(self, unit: Unit, cell: Cell, bases: Mapping[str, Losses]) -> None:
        if not self._has(unit.name, cell):
            after = partial(self.watch.batch, f"{unit.name} {cell.label}")
            self.kept.put(*adapted_alone(self.model, unit, cell, self.training, self.sets, bases, after))

    def _has(self, unit: str, cell: Cell) -> bool:
        return self.kept.has(self.sets, record="sensitivity", unit=unit, rank=cell.rank, lr=cell.lr, seed=cell.seed)

    def _scored(self) -> bool:
        return any(isinstance(record, FirstOrder) for record in self.kept.records)

    def _seen(self) -> Texts:
        """Return the sequences that a run sees, each once, in that order."""
        seen = dict.fromkeys(sequence for batch in self.training.batches() for sequence in batch)
        return replace(self.training.texts, sequences=tuple(seen))

    def tell_cost(self) -> None:
        """Time one step of the first unit, through which gradients go farthest, and tell what all will take."""
        first, cell = self.sets[0].first(self.training.batch), Cell(self.ranks[-1], 1e-6, 0)
        bases = {first.name: measure(self.model, first, self.training.batch)}
        step, evaluation = timed(
            self.training,
            self.sets,
            lambda once, sets, after: adapted_alone(self.model, self.units[0], cell, once, sets, bases, after),
        )
        batches = batches_of(self.sets, self.training.batch)
        runs = len(self.units) * len(self.ranks) * (len(self.rates) + self.seeds - 1) - self._done()
        passes = 0 if self._scored() else batches_of([self._seen()], self.training.batch)
        self.watch.total = runs * (self.training.steps + batches) + batches + passes
        seconds = (runs * self.training.steps + passes) * step + (runs + 1) * batches * evaluation
        sizes = sum(shape_of(layer)[0] * shape_of(layer)[1] for layer in inner_layers(self.model.module).values())
        memory = f"; gradients take {4 * sizes / 2**30:.1f} GiB" if passes and 4 * sizes >= 2**30 / 10 else ""
        self.watch.note(
            f"about {duration(seconds)}: {counted(runs, 'run', 'runs')} of {self.training.steps} steps of {step:.2g} s "
            f"at most ({counted(len(self.units), 'unit', 'units')}), each evaluated on "
            f"{counted(len(self.sets), 'set', 'sets')}{memory}"
        )

    def _done(self) -> int:
        """Count the runs that are finished already."""
        runs = {(r.unit, r.rank, r.lr, r.seed) for r in self.kept.records if isinstance(r, Sensitivity) and r.unit}
        return sum(self._has(unit, Cell(rank, lr, seed)) for unit, rank, lr, seed in runs if lr is not None)
