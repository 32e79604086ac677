"""``probe gain``: integrate the gradient along the straight path from BASE to TUNED.

    L(W_0) − L(W_0 + ΔW) = Σ_ℓ Σ_i a_ℓi,    a_ℓi = −σ_i ∫_0^1 u_iᵀ ∇_ℓL(W_0 + tΔW) v_i dt.

Every node of the quadrature is one pass forward and back over the text, for as many layers as fit
into memory. Embeddings, head, norms and biases are whole terms of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from lora_diag.deltas import selector
from lora_diag.errors import Given, InputError, NothingComparedError, UsageError
from lora_diag.metrics.statistics import paired_errors
from lora_diag.models.data import Texts, check_names, name_apart
from lora_diag.models.directions import run_backward
from lora_diag.models.losses import Draw, Losses
from lora_diag.models.swapping import Swapped
from lora_diag.probes.gain import GainOptions
from lora_diag.probes.gain.choice import THRESHOLDS
from lora_diag.probes.gain.integral import Integral, Layer, groups_of, layers_of
from lora_diag.probes.gain.parts import SEARCH, Parts, list_groups
from lora_diag.probes.gain.quadrature import Quadrature
from lora_diag.probes.gain.record import Gain, LayerGain, count_parts
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.text import quantity
from lora_diag.running.options import show_options
from lora_diag.running.probing import SEQUENCES, ProbeRun, describe_texts, left_out
from lora_diag.running.progress import RunRecords
from lora_diag.storage import open_checkpoint

# Cost of a pass forward and back, in forward passes.
_BACKWARD = 3

# Fractions of a layer's gain for which records give the number of directions.
SHARES = (0.5, 0.9, 0.95)


@show_options
def probe_gain(base: Path | str, tuned: Path | str, **options: Unpack[GainOptions]) -> Results[Any]:
    r"""Attribute the gain in loss, L(W_0) − L(W_0 + ΔW), to the layers and directions of ΔW.

    a_ℓi = −σ_i ∫_0^1 u_iᵀ ∇_ℓL(W_0 + tΔW) v_i dt adds up to the gain over all layers and
    directions; ∇L is computed at the nodes of a Gauss–Lobatto rule. The completeness residual and
    an error of quadrature of every layer are in the records.

    Args:
        base: Base model: a folder that transformers can open.
        tuned: Fine-tuned checkpoint or adapter.
        data: Text, JSONL or data set whose loss is attributed.
        eval: One file that judges choices: the smallest uniform rank and number of directions that
            keep 90% of its gain are found. For the file of ``data``, the first 60% of each text
            choose and the last 30% judge.
        shifted: One file of another distribution, for the same integral of its loss; with ``eval``
            also the losses on both without what could be dropped. It is split likewise.
        measure: Measure the loss without, and with only, the update of each module type or layer.
        by: ``type`` or ``layer``.
        nodes: Number K of nodes, odd.
        top: Number of largest singular directions to split; the others are one term.
        layers: Only these are attributed; the path moves all of ΔW.
        **options: ``GainOptions``.

    Returns:
        The records are in ``whole``: one ``LayerGain`` per layer and text, one ``Gain`` per text,
            one ``GainLoss`` per measured part of the update and text.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, the output can be neither replaced nor
            resumed, or the extra ``train``, or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, transformers cannot open BASE, or
            ΔW of a layer, a loss or a gradient is not finite.
        NothingComparedError: The checkpoints have no weight in common, or no layer is selected.

    Reference:
        Aumann and Shapley 1974, "Values of non-atomic games"; Zenke, Poole and Ganguli 2017,
        "Continual learning through synaptic intelligence", arXiv 1703.04200, and Lan et al. 2019,
        "LCA: loss change allocation for neural network training", arXiv 1909.01440 (the integral
        along the path of training).

    Example:
        >>> found = probe_gain(
        ...     "sample_checkpoints/base",
        ...     "sample_checkpoints/lora_r16",
        ...     data="sample_checkpoints/eval/in_domain.txt",
        ... )  # doctest: +SKIP
        >>> [(record.layer, record.gain) for record in found.whole_of(LayerGain)]  # doctest: +SKIP
    """
    run = ProbeRun("probe gain", options, GainOptions)
    if run.options["nodes"] % 2 == 0:
        raise UsageError(Given("nodes", run.options["nodes"]), "must be odd")
    for name in ("eval", "shifted"):
        if len(run.values[name]) > 1:
            raise UsageError(Given(name), "takes one text here", "give one file")
    run.check_files(base, tuned, needs_set=False)
    compared = run.compare(base, tuned)
    model = run.open(base)
    swapped = Swapped(model, compared.pairing.deltas, run.options["top"])
    deltas = {delta.layer: delta for delta in compared.pairing.deltas}
    moved = {name: deltas[name] for name in swapped.layers}
    is_selected = selector(**run.selection)
    chosen = {name: delta for name, delta in moved.items() if is_selected(name)}
    layers, problems = layers_of(model.module, chosen)
    if not layers:
        raise NothingComparedError(
            open_checkpoint(base).path,
            "no changed layer is selected that the model has",
            "change $layers or $exclude",
        )
    chooses, judges = _read_texts(run)
    sets = [*chooses, *judges]
    groups = len(list_groups(layers, run.options["by"])) + 2

    def probe() -> _Probe:
        rule = Quadrature.of(run.options["nodes"])
        return _Probe(run, swapped, layers, rule, len(layers) == len(moved))

    def count_tokens() -> float:
        passes = _BACKWARD * len(probe().groups(layers, chooses[0])) * run.options["nodes"]
        passes += groups * run.options["measure"]
        losses = (2 * SEARCH + len(THRESHOLDS)) * run.count_tokens(judges)
        return passes * run.count_tokens(chooses) + losses

    texts = run.fit(sets, count_tokens, (*SEQUENCES, ("nodes", 3)))
    chooses, judges = texts[: len(chooses)], texts[len(chooses) :]

    def measure_missing(records: RunRecords[Any]) -> list[LeftOut]:
        missing = {
            layer: LeftOut(
                layer=layer, shape=moved[layer].shape, reason="no_gradient", detail=problem
            )
            for layer, problem in problems.items()
        }
        probe().report_cost(chooses)
        for each in chooses:
            missing |= probe().measure(each, records)
        parts = Parts(run, swapped, records)
        if run.options["measure"]:
            parts.measure_groups(chooses, run.options["by"])
        if judges:
            parts.measure_choices(judges)
        return [*left_out(compared.pairing, swapped.absent), *missing.values()]

    settings = {**run.settings("nodes", "top", "measure", "by"), **run.selection}
    described = [describe_texts(chooses[0], "data"), *map(describe_texts, texts[1:])]
    return run.over([*compared.inputs, *described], settings, measure_missing)


def _read_texts(run: ProbeRun[GainOptions]) -> tuple[list[Texts], list[Texts]]:
    """Return the texts whose loss is attributed, and those that judge choices; the shifted ones are
    last.

    Raises:
        UsageError: Two texts have one name.
        InputError: A text cannot be read or split, or one that judges also chose.
    """
    options = run.options
    data = run.read(options["data"])
    judges = [run.read(path) for path in options["eval"]]
    if judges and judges[0].hash == data.hash:
        judges = []
    shifted = [run.read(path, shifted=True) for path in options["shifted"]]
    labels = ["data", *("eval" for _ in judges), *("shifted" for _ in shifted)]
    data, *rest = name_apart([data, *judges, *shifted], labels)
    check_names([data, *rest])
    judges, shifted = rest[: len(judges)], rest[len(judges) :]
    if not options["eval"]:
        return [data, *shifted], []
    pairs = [(data, judges[0]) if judges else data.split(), *(one.split() for one in shifted)]
    return [chooses for chooses, _ in pairs], [judge.apart_from(own) for own, judge in pairs]


@dataclass(frozen=True)
class _Probe:
    """What the measurements of a run share.

    Args:
        run: The run; its model has the weights of ``swapped``.
        swapped: The weights.
        layers: The layers to measure.
        rule: The quadrature.
        is_complete: Whether they are all layers that the path moves.
    """

    run: ProbeRun[GainOptions]
    swapped: Swapped
    layers: Mapping[str, Layer]
    rule: Quadrature
    is_complete: bool

    def groups(self, layers: Mapping[str, Layer], texts: Texts) -> list[list[str]]:
        """Return the layers of each pass over a text."""
        return groups_of(layers, len(texts.sequences), self.run.options["top"])

    def report_cost(self, texts: Sequence[Texts]) -> None:
        """Report the estimated cost: passes forward and back."""
        passes = len(self.groups(self.layers, texts[0])) * len(self.rule.nodes)
        self.run.watch.total = passes * self.run.batches(texts)
        work = f"{quantity(len(self.layers), 'layer')}, {passes} passes forward and back"
        note = "; a backward pass counts as three"
        self.run.estimate(texts[0], work, note, _BACKWARD * self.run.watch.total)

    def measure(self, texts: Texts, records: RunRecords[Any]) -> dict[str, LeftOut]:
        """Write the records of one text that are missing; return the layers without one."""
        missing: dict[str, LeftOut] = {}
        if records.has([texts.name], record="gain"):
            return missing
        done = {record.layer for record in records.find(record="layer_gain", set=texts.name)}
        todo = {name: layer for name, layer in self.layers.items() if name not in done}
        losses: list[Losses] = []
        for group in self.groups(todo, texts):
            sums, losses = self._integrate({name: todo[name] for name in group}, texts)
            for name, integral in sums.items():
                if integral.problem:
                    shape = todo[name].delta.shape
                    missing[name] = LeftOut(
                        layer=name, shape=shape, reason="no_gradient", detail=integral.problem
                    )
                else:
                    records.put(self._record(name, integral, texts, losses[0]))
        found = list(records.find(record="layer_gain", set=texts.name))
        records.put(self._summarize(found, texts, losses, self.is_complete and not missing))
        return missing

    def _integrate(
        self, layers: Mapping[str, Layer], texts: Texts
    ) -> tuple[dict[str, Integral], list[Losses]]:
        """Return the integrals of layers, and the losses at every node in the order of the text."""
        count, top = len(texts.sequences), self.run.options["top"]
        integrals = {
            name: Integral(name, layer, self.swapped, top, count) for name, layer in layers.items()
        }
        trackers = [tracker for integral in integrals.values() for tracker in integral.trackers]
        losses = []
        for t, weight in zip(self.rule.nodes, self.rule.weights, strict=True):
            self.swapped.scale({}, float(t))
            sums, counts = [0.0] * count, [0] * count
            for integral in integrals.values():
                integral.along.append(0.0)
            batches = run_backward(self.run.model, texts, trackers, self.run.batch, Draw())
            for places, batch in batches:
                for place, nll, n in zip(places, batch.sums, batch.counts, strict=True):
                    sums[place], counts[place] = float(nll), int(n)
                for integral in integrals.values():
                    integral.add(places, float(weight))
                self.run.watch.batch(f"t = {t:.2f}")
            losses.append(Losses.of(sums, counts))
        return integrals, losses

    def _record(self, name: str, integral: Integral, texts: Texts, losses: Losses) -> LayerGain:
        """Return the record of a layer.

        Raises:
            InputError: The gradients are not finite.
        """
        terms = -integral.terms
        if not np.isfinite(terms).all():
            raise InputError(name, "the gradients are not finite", "use $dtype float32")
        counts, split = losses.counts.tolist(), len(integral.sigma)
        by_sequence = terms[:, -1] if integral.has_whole else terms.sum(1)
        total = float(by_sequence.sum()) / losses.tokens
        means = terms[:, :split].sum(0) / losses.tokens
        errors = paired_errors(terms[:, :split], counts)
        own = paired_errors(by_sequence[:, None], counts)
        along = -np.array(integral.along) / losses.tokens
        return LayerGain(
            set=texts.name,
            shifted=texts.shifted,
            layer=name,
            shape=self.layers[name].delta.shape,
            fro=integral.fro,
            gain=total,
            gain_error=None if own is None else float(own[0]),
            quadrature_error=abs(total - float(along @ self.rule.embedded)),
            along=tuple(along.tolist()),
            by_sequence=tuple(round(value, 6) for value in by_sequence.tolist()),
            sigma=tuple(integral.sigma),
            directions=tuple(float(f"{value:.6g}") for value in means),
            direction_errors=() if errors is None else tuple(float(f"{e:.3g}") for e in errors),
            rest=total - float(means.sum()) if split and integral.has_whole else 0.0,
            negative=float(means[means < 0].sum()) if split else min(0.0, total),
            count_at={str(share): count_parts(means, total, share) for share in SHARES},
        )

    def _summarize(
        self, found: Sequence[LayerGain], texts: Texts, losses: Sequence[Losses], is_complete: bool
    ) -> Gain:
        """Return the record of a text from those of its layers and the losses along the path."""
        base, tuned = losses[0], losses[-1]
        gain, error = base.minus(tuned)
        attributed = math.fsum(record.gain for record in found)
        embedded = math.fsum(float(self.rule.embedded @ record.along) for record in found)
        highest = max(losses, key=lambda each: each.mean)
        above, above_error = highest.minus(max(base, tuned, key=lambda each: each.mean))
        magnitude = math.fsum(abs(record.gain) for record in found)
        return Gain(
            set=texts.name,
            shifted=texts.shifted,
            data=texts.hash,
            tokens=base.tokens,
            nodes=tuple(self.rule.nodes.tolist()),
            losses=tuple(each.mean for each in losses),
            gain=gain,
            gain_error=error,
            attributed=attributed,
            residual=gain - attributed if is_complete else None,
            quadrature_error=abs(attributed - embedded),
            cancellation=magnitude / abs(attributed) if attributed else None,
            barrier=above,
            barrier_error=above_error if above > 0 else None,
            base_nll=base.rounded,
            tuned_nll=tuned.rounded,
            predictions=tuple(map(int, base.counts)),
        )
