"""``probe sensitivity``: which layers are worth adapting, by adapting each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_diag.checkpoints import Checkpoint, open_checkpoint
from lora_diag.deltas import selector
from lora_diag.errors import NothingComparedError
from lora_diag.linalg import resolve_device
from lora_diag.models.activations import linear_layers
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.methods import Lora, inner_layers
from lora_diag.models.opening import Model, Weights, open_model
from lora_diag.models.training import RECIPE, Cell, Training
from lora_diag.probes.sensitivity.measure import (
    Unit,
    adapted_alone,
    first_order,
    gradients,
    record_of,
    shape_of,
    units_of,
)
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records import AnyRecord, LeftOut, Results, ResultsWriter
from lora_diag.rendering.text import duration
from lora_diag.running.inputs import describe
from lora_diag.running.probing import (
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
from lora_diag.running.training_runs import Arm, Trial, Walk, check_training, read_training

PER = ("layer", "block", "type")
RATES = (3e-3, 1e-2)


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
    widen: int = 2,
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
    overwrite: bool = False,
    verify: bool = False,
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
        widen: So many rates more, one step of the grid further each, where the best is the lowest or the highest tried.
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
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the models; of texts it does so anyway.
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
    check_training({"--lr": rates}, counts, widen, seed)
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
        "widen": widen,
        "steps": steps,
        "seeds": seeds,
        "seed": seed,
        "order": training.order_hash,
        "layers": layers,
        "exclude": exclude,
        "kind": training.kind.about,
        "optimizer": RECIPE,
    }
    inputs = (describe("base", stored, verify=verify), described(training.texts, "data"), *map(described, sets))
    run = run_of("probe sensitivity", inputs, settings, model, batch, dtype)
    watch = Watch(on_progress, on_record, on_note)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume, overwrite) as writer:
        kept = Kept(writer, watch)
        if kept.finished is not None:
            return kept.finished
        ranks = (rank, rank + delta) if delta is not None else (rank,)
        walk = Walk(training, sets, seeds, widen, kept, watch)
        probe = _Probe(model, units_of(linear, names, per), ranks, tuple(sorted(set(rates))), walk)
        probe.tell_cost()
        probe.score(linear, names)
        probe.run(probe.measure_base())
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
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    walk: Walk

    def arm(self, unit: Unit, rank: int, bases: Mapping[str, Losses]) -> Arm:
        """Return one unit at one rank, at every rate; its gains are over the losses of BASE, by set."""
        return Arm((rank,), self.rates, partial(self._trial, unit, bases))

    def _trial(self, unit: Unit, bases: Mapping[str, Losses], rank: int | None, lr: float, seed: int) -> Trial:
        cell = Cell(rank, lr, seed)
        fields = {"record": "sensitivity", "unit": unit.name, "rank": rank, "lr": lr, "seed": seed}

        def train(training: Training, sets: Sequence[Texts], after: Callable[[], None]) -> list[Sensitivity]:
            return adapted_alone(self.model, unit, cell, training, sets, bases, after)

        return Trial(fields, f"{unit.name} {cell.label}", train)

    def score(self, layers: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Take the gradient of every layer at BASE, and keep what it says."""
        if self._scored():
            return
        texts, walk = self._seen(), self.walk
        found = gradients(self.model, layers, texts, walk.training.batch, partial(walk.watch.batch, "gradient"))
        walk.kept.put(*(first_order(names[name], each, self.ranks[0], texts) for name, each in found.items()))

    def measure_base(self) -> dict[str, Losses]:
        """Measure BASE; again after an interruption, because errors need its losses sequence by sequence."""
        walk = self.walk
        after = partial(walk.watch.batch, "BASE")
        bases = {each.name: measure(self.model, each, walk.training.batch, after) for each in walk.sets}
        walk.kept.put(*(record_of(each, bases[each.name]) for each in walk.sets))
        return bases

    def run(self, bases: Mapping[str, Losses]) -> None:
        """Adapt every unit at every rank."""
        for unit in self.units:
            for rank in self.ranks:
                self.walk.run(self.arm(unit, rank, bases))

    def _scored(self) -> bool:
        return any(isinstance(record, FirstOrder) for record in self.walk.kept.records)

    def _seen(self) -> Texts:
        """Return the sequences that a run sees, each once, in that order."""
        training = self.walk.training
        seen = dict.fromkeys(sequence for batch in training.batches() for sequence in batch)
        return replace(training.texts, sequences=tuple(seen))

    def tell_cost(self) -> None:
        """Time one step of the first unit, through which gradients go farthest, and tell what all will take."""
        walk, steps = self.walk, self.walk.training.steps
        first = walk.sets[0].first(walk.training.batch)
        bases = {first.name: measure(self.model, first, walk.training.batch)}
        step, evaluation = walk.timed(self.arm(self.units[0], self.ranks[-1], bases))
        arms = [self.arm(unit, rank, bases) for unit in self.units for rank in self.ranks]
        runs = sum(map(walk.left, arms))
        passes = 0 if self._scored() else batches_of([self._seen()], walk.training.batch)
        walk.watch.total = walk.batches + passes
        walk.expect(runs)
        seconds = (runs * steps + passes) * step + (runs + 1) * walk.batches * evaluation
        sizes = sum(shape_of(layer)[0] * shape_of(layer)[1] for layer in inner_layers(self.model.module).values())
        memory = f"; gradients take {4 * sizes / 2**30:.1f} GiB" if passes and 4 * sizes >= 2**30 / 10 else ""
        walk.watch.note(
            f"about {duration(seconds)}: {counted(runs, 'run', 'runs')} of {steps} steps of {step:.2g} s "
            f"at most ({counted(len(self.units), 'unit', 'units')}), each evaluated on "
            f"{counted(len(walk.sets), 'set', 'sets')}{walk.more(arms)}{memory}"
        )
