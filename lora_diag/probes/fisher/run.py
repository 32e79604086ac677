"""``probe fisher``: measure the exact Fisher information of the part that a truncation discards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from lora_diag.checkpoints import open_checkpoint
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.models.activations import linear_layers
from lora_diag.models.data import Texts
from lora_diag.models.gradients import Draw
from lora_diag.models.opening import Model, Weights
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.models.truncating import truncated_layers
from lora_diag.probes.fisher.effects import BaseOutputs, effect, read_before
from lora_diag.probes.fisher.measure import Tail, add_up, groups_of, tail_of
from lora_diag.probes.fisher.options import FisherOptions
from lora_diag.probes.fisher.record import Effect, Fisher
from lora_diag.records import LeftOut, Results
from lora_diag.running.measuring import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import ProbeRun, check_files, describe_texts, left_out, pluralize
from lora_diag.running.progress import RunRecords

# Cost of a backward pass in forward passes, in addition to its own forward pass.
_BACKWARD = 3


@show_options
def probe_fisher(
    base: Path | str,
    tuned: Path | str,
    **options: Unpack[FisherOptions],
) -> Results[Any]:
    r"""Measure F_ℓ(r) = Σ_s⟨∇ℓ_s, ΔW − ΔW_r⟩²/N of every layer and rank, with gradients of the loss at TUNED.

    ∇ℓ_s is the gradient of the summed loss of sequence s with respect to the layer's weight, N the number of
    predictions; F(r)/2 estimates the mean KL by which truncating this layer alone to rank r changes the predictions.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter.
        data: Text or JSONL whose loss is differentiated.
        evaluate: One held-out file on which every layer is truncated alone, for comparison with the estimates; implies
            ``measure``.
        measure: Truncate every layer alone and measure, on ``evaluate``, or on ``data`` without it.
        ranks: Ranks r of measurements and of the other estimates; F is given for all ranks.
        labels: ``data`` for the text's own labels; ``model`` for labels sampled from TUNED.
        seed: Seed of the sampled labels.
        **options: ``FisherOptions``.

    Returns:
        The records are in ``whole``: one ``Fisher`` per layer.

    Raises:
        UsageError: An option is invalid, or the extra ``train`` is not installed.
        InputError: An input cannot be read, or transformers cannot open BASE.
        NothingComparedError: The checkpoints have no weight in common, or no linear layer is selected.

    Reference:
        Kunstner, Balles and Hennig 2019, "Limitations of the empirical Fisher approximation for natural gradient
        descent", equations 2 and 3 (the two kinds of labels).

    Example:
        >>> found = probe_fisher("sample_checkpoints/base", "sample_checkpoints/full_ft",
        ...     data="sample_checkpoints/eval/in_domain.txt", layers="q_proj")  # doctest: +SKIP
        >>> [(record.layer, record.fro) for record in found.whole]  # doctest: +SKIP
    """
    run = ProbeRun("probe fisher", options, FisherOptions)
    data, evaluate, measure = (run.options[name] for name in ("data", "evaluate", "measure"))
    labels, seed = run.options["labels"], run.options["seed"]
    requested = check_ranks(run.options["ranks"])
    if len(evaluate) > 1:
        raise UsageError("--eval: F is compared with measurements on one set; give one file")
    check_files([base, tuned], [data, *evaluate])
    compared = run.compare(base, tuned)
    deltas = compared.pairing.deltas
    chosen = truncated_layers(deltas, **run.selection)
    model = run.open(base)
    texts = run.read(data)
    held_out = run.read(evaluate[0]) if evaluate else texts if measure else None
    swapped = Swapped(model, deltas, max(requested))
    modules, rest = _find_modules(model, chosen)
    if not modules:
        raise NothingComparedError(
            f"{open_checkpoint(base).path}: no changed linear layer is selected; change --layers or --exclude"
        )
    probe = _Probe(run, swapped, modules, texts, held_out, requested, Draw(labels, seed))

    def measure_missing(kept: RunRecords[Any]) -> list[LeftOut]:
        done = {record.layer for record in kept.records}
        todo = {layer: chosen[layer] for layer in modules if layer not in done}
        probe.report_cost(todo)
        problems = list[LeftOut]()
        for item in probe.run(todo):
            if isinstance(item, Fisher):
                kept.put(item)
            else:
                problems.append(item)
        return [*left_out(compared.pairing, swapped.absent), *rest, *problems]

    settings = {"ranks": list(requested), "labels": labels, "seed": seed, **run.selection}
    sets = [describe_texts(texts, "data"), *([describe_texts(held_out)] if held_out is not None else [])]
    return run.over([*compared.inputs, *sets], settings, measure_missing)


def _find_modules(model: Model, chosen: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Any], list[LeftOut]]:
    """Return the linear layer of each matrix, and the matrices that belong to none."""
    weights, linear = Weights(model.module), linear_layers(model.module)
    modules: dict[str, Any] = {}
    unmeasured = []
    for layer, shape in chosen.items():
        name = weights.name(layer)
        if name is not None and name in linear:
            modules[layer] = linear[name]
        else:
            detail = "not a linear layer of its own, so its inputs and output gradients are not to be had"
            unmeasured.append(LeftOut(layer=layer, shape=shape, reason="no_gradient", detail=detail))
    return modules, unmeasured


@dataclass(frozen=True)
class _Probe:
    """State of a run."""

    probe_run: ProbeRun
    swapped: Swapped
    modules: Mapping[str, Any]
    texts: Texts
    held_out: Texts | None
    ranks: tuple[int, ...]
    draw: Draw

    def report_cost(self, todo: Mapping[str, tuple[int, int]]) -> None:
        """Report the estimated cost: passes forward and backward, and a forward pass per truncation."""
        passes = sum(1 for _ in groups_of(todo))
        changes = sum(rank < min(shape) for shape in todo.values() for rank in self.ranks)
        batches, measured = passes * self.probe_run.batches([self.texts]), 0
        if self.held_out is not None:
            measured = (changes + 1) * self.probe_run.batches([self.held_out])
        self.probe_run.watch.total = batches + measured
        description = (
            f"{pluralize(len(todo), 'layer', 'layers')}, {pluralize(passes, 'pass', 'passes')} forward and back"
        )
        if self.held_out is not None:
            description += f" and {changes} truncations measured"
        self.probe_run.estimate(
            self.texts, description, "; a backward pass counts as three", _BACKWARD * batches + measured
        )

    def run(self, todo: Mapping[str, tuple[int, int]]) -> Iterator[Fisher | LeftOut]:
        """Yield the records of all layers, in the order of BASE."""
        self._restore_tuned()
        before: BaseOutputs | None = None
        if self.held_out is not None and todo:
            before = read_before(
                self.probe_run.model, self.held_out, self.probe_run.batch, partial(self.probe_run.watch.batch, "TUNED")
            )
        for group in groups_of(todo):
            tails = {layer: tail_of(self.modules[layer], self.swapped.factors(layer)) for layer in group}
            draw = Draw(self.draw.labels, self.draw.seed)  # every pass uses the same labels
            after = partial(self.probe_run.watch.batch, "gradients")
            predictions = add_up(self.probe_run.model, self.texts, tails, self.probe_run.batch, draw, after)
            for layer, tail in tails.items():
                if tail.problem:
                    yield LeftOut(layer=layer, shape=todo[layer], reason="no_gradient", detail=tail.problem)
                else:
                    yield self._record(layer, todo[layer], tail, predictions, before)

    def _record(
        self, layer: str, shape: tuple[int, int], tail: Tail, predictions: int, before: BaseOutputs | None
    ) -> Fisher:
        curve = (tail.squares / predictions).tolist()
        if not all(value < float("inf") for value in curve):
            raise InputError(f"{layer}: the gradients are not finite; use --dtype float32")
        last = len(curve) - 1
        weight, data, kfac = (energy.clamp(min=0) for energy in tail.energies)
        scale = tail.tokens / predictions

        def at(values: Any, factor: float = 1.0) -> dict[str, float]:
            return {str(rank): float(values[min(rank, last)]) * factor + 0.0 for rank in self.ranks}

        return Fisher(
            layer=layer,
            shape=shape,
            set=self.texts.name,
            labels=self.draw.labels,
            sequences=len(self.texts.sequences),
            predictions=predictions,
            tokens=tail.tokens,
            fro=tail.fro,
            fisher=tuple(float(f"{value:.9g}") for value in curve),
            linear=at(tail.total, -1 / predictions),
            weight=at(weight),
            data=at(data),
            kfac=at(kfac, scale),
            on=self.held_out.name if self.held_out is not None else None,
            effect=self._measure_effects(layer, shape, before),
        )

    def _measure_effects(
        self, layer: str, shape: tuple[int, int], before: BaseOutputs | None
    ) -> dict[str, Effect] | None:
        """Return the effect of truncating one layer alone, at every rank below its full one."""
        if before is None or self.held_out is None:
            return None
        effects = {}
        for rank in self.ranks:
            if rank < min(shape):
                self._restore_tuned({layer: rank})
                after = partial(self.probe_run.watch.batch, f"{layer} r={rank}")
                effects[str(rank)] = effect(self.probe_run.model, self.held_out, before, self.probe_run.batch, after)
        self._restore_tuned()
        return effects

    def _restore_tuned(self, except_layers: Mapping[str, int] | None = None) -> None:
        self.swapped.arrange({**dict.fromkeys(self.swapped.layers, FULL), **(except_layers or {})})
