"""Held-out losses of BASE, of the checkpoints of a run, and of their averages and extrapolations: one model in memory.

Every model is BASE with its weights changed in place, and is evaluated on all sets before the next one. A loss is
recorded when it is measured, so that an interrupted run resumes after the last model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_diag.adapters.source import get_stated_alpha
from lora_diag.deltas import Delta, row_spans
from lora_diag.diagnostics.checkpoints.averages import RULES, Rule, combine, read_rules
from lora_diag.diagnostics.checkpoints.held_out import choose_checkpoints, compare_combinations
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer
from lora_diag.diagnostics.checkpoints.series import Step
from lora_diag.errors import InputError
from lora_diag.layers.change import load_addend
from lora_diag.linalg.devices import resolve_device
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import open_tokens
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.records import Probe, RunInput
from lora_diag.records.probe import Subject
from lora_diag.rendering.text import quantity
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import compare
from lora_diag.running.options import ProbeOptions, Shifted, list_options
from lora_diag.running.probing import ProbeRun, describe_texts
from lora_diag.running.progress import RunRecords

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class JudgeOptions(Shifted, ProbeOptions, total=False):
    """Options of evaluating checkpoints on texts."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A model to evaluate.

    Args:
        subject: Kind of model.
        name: Path of a checkpoint, rule of a combination, empty for BASE.
        read: Returns its updates; None for a checkpoint that is not finite, which has no loss.
    """

    subject: Subject
    name: str
    read: Callable[[], Sequence[Delta]] | None


class Judge:
    """The evaluation of a run's checkpoints on held-out texts.

    Args:
        options: Options of ``checkpoints``, with evaluation sets.
        base: Path of BASE.
        steps: The checkpoints, in order.

    Attributes:
        inputs: The texts, for the run record.
        settings: Settings of the evaluation, likewise.

    Raises:
        UsageError: An option is invalid, or the extra ``train`` is not installed.
        InputError: A text does not exist or cannot be read, or transformers cannot open BASE.
    """

    def __init__(self, options: Mapping[str, Any], base: Path | str, steps: Sequence[Step]) -> None:
        self._options, self._base, self._steps = options, base, steps
        self._run = ProbeRun("checkpoints", {name: options[name] for name in list_options(JudgeOptions)}, JudgeOptions)
        self._run.check_files(base)
        self._run.model = open_tokens(base, options["length"], options["tokenizer"])
        self._texts = self._run.read_sets()
        self._read_rules(len(steps))
        self.inputs: list[RunInput] = list(map(describe_texts, self._texts))
        rules = {option.strip("-"): list(options[option.strip("-")]) for option in RULES}
        self.settings = {**self._run.model_settings, "device": resolve_device(options["device"]).type, **rules}

    def judge(self, records: RunRecords[CheckpointLayer]) -> None:
        """Evaluate the models that have no records yet, and write the choice and the comparison of combinations.

        Raises:
            UsageError: A rule needs more checkpoints than are finite.
            InputError: An update cannot be read or does not fit BASE, or the loss of BASE is not finite.
        """
        bad = {record.step for record in records.layers if record.non_finite}
        finite = [step for step in self._steps if step.step not in bad]
        rules = self._read_rules(len(finite))
        contenders = [Contender("base", "", tuple)]
        for step in self._steps:
            read = None if step.step in bad else partial(self._read_updates, step)
            contenders.append(Contender("checkpoint", legible(step.path), read))
        if rules:
            combiner = Combiner([step.step for step in finite], list(map(self._read_updates, finite)), records.layers)
            contenders += [Contender("combination", rule.name, partial(combiner.combine, rule)) for rule in rules]
        self._evaluate(contenders, records)
        probes = [record for record in records.records if isinstance(record, Probe)]
        paths = {legible(step.path): step.step for step in self._steps}
        records.put(*choose_checkpoints(probes, paths))
        steps = tuple(step.step for step in finite)
        weights = {rule.name: () if rule.by_layer else tuple(rule.weigh(steps).tolist()) for rule in rules}
        records.put(*compare_combinations(probes, paths, steps, weights))

    def _read_rules(self, count: int) -> list[Rule]:
        """Return all rules for a number of checkpoints.

        Raises:
            UsageError: A rule is invalid.
        """
        return [rule for option in RULES for rule in read_rules(option, self._options[option.strip("-")], count)]

    def _read_updates(self, step: Step) -> Sequence[Delta]:
        """Return all updates of a checkpoint, also those that --layers and --exclude leave out of other measurements.

        Raises:
            InputError: It cannot be read, or does not fit BASE.
        """
        allowed, alpha = self._options["allow_unmatched"], get_stated_alpha(self._options)
        return compare(self._base, step.path, allow_unmatched=allowed, stated_alpha=alpha).pairing.deltas

    def _evaluate(self, contenders: Sequence[Contender], records: RunRecords[CheckpointLayer]) -> None:
        """Write the missing losses of BASE, which comes first, and of the others.

        Raises:
            InputError: An update cannot be read or does not fit BASE, or the loss of BASE is not finite.
        """
        run, sets = self._run, [text_set.name for text_set in self._texts]
        todo = [each for each in contenders if not records.has(sets, subject=each.subject, name=each.name)]
        if not todo:
            return
        model = run.open(self._base)
        run.watch.total = run.batches(self._texts) * sum(each.read is not None for each in todo)
        run.estimate(self._texts[0], f"{quantity(len(todo), 'model')} on {quantity(len(self._texts), 'set')}")
        for contender in todo:
            swapped = Swapped(model, contender.read() if contender.read is not None else (), 0)
            swapped.arrange({}, FULL)
            for text_set in self._texts:
                base: Probe | None = next(records.find(subject="base", set=text_set.name), None)
                fields: dict[str, Any] = {"loss": None, "nll": ()}
                if contender.read is not None or base is None:
                    losses = measure(model, text_set, run.batch, partial(run.watch.batch, contender.name or "BASE"))
                    fields = {**losses.fields_of_run(text_set, None), **losses.by_sequence(contender.subject == "base")}
                if base is None and fields["loss"] is None:
                    raise InputError(f"{self._base}: its loss is not finite; check the weights, or use --dtype float32")
                if base is not None:
                    fields = {**{name: getattr(base, name) for name in ("set", "shifted", "data", "tokens")}, **fields}
                    if fields["nll"]:
                        own, other = (Losses.of(nll, base.predictions) for nll in (fields["nll"], base.nll))
                        fields |= own.compare(other)
                records.put(Probe(probe="checkpoints", subject=contender.subject, name=contender.name, **fields))
            swapped.arrange({})


@dataclass(frozen=True, slots=True)
class Combiner:
    """The checkpoints that averages and extrapolations combine.

    Args:
        steps: Their steps.
        updates: The updates of each.
        layers: The records of their layers, with the products of the updates.
    """

    steps: Sequence[int]
    updates: Sequence[Sequence[Delta]]
    layers: Sequence[CheckpointLayer]

    def combine(self, rule: Rule) -> list[Delta]:
        """Return Σ c_tΔW_t of every layer.

        Raises:
            InputError: A checkpoint lacks an update that others have, or one cannot be read.
        """
        aligned: dict[str, list[Delta]] = {}
        for delta in (delta for deltas in self.updates for delta in deltas):
            aligned.setdefault(delta.layer, []).append(delta)
        if partly := next((layer for layer, deltas in aligned.items() if len(deltas) < len(self.steps)), None):
            raise InputError(f"{partly}: is not in all checkpoints, which cannot be combined; give those that have it")
        grams = self._read_grams() if rule.by_layer else {}
        combined = []
        for layer, deltas in aligned.items():
            gram = None
            if rule.by_layer:
                gram = grams[layer] if layer in grams else _multiply(deltas)
            combined.append(combine(deltas, rule.weigh(self.steps, gram).tolist()))
        return combined

    def _read_grams(self) -> dict[str, Array]:
        """Return ⟨ΔW_s, ΔW_t⟩ of the layers whose records have all of them."""
        by_layer: dict[str, list[CheckpointLayer]] = {}
        for record in self.layers:
            by_layer.setdefault(record.layer, []).append(record)
        grams = {}
        for layer, group in by_layer.items():
            whole = np.full((len(group), len(group)), np.nan)
            for t, record in enumerate(group):
                known = len(record.gram)
                whole[t, :known] = whole[:known, t] = np.array(record.gram, np.float64)  # null becomes NaN
            chosen = [t for t, record in enumerate(group) if record.step in self.steps]
            part = whole[np.ix_(chosen, chosen)]
            if np.isfinite(part).all():
                grams[layer] = part
        return grams


def _multiply(deltas: Sequence[Delta]) -> Array:
    """Return ⟨ΔW_s, ΔW_t⟩ of one layer, ``(T, T)``, from blocks of the same rows of all updates."""
    addends, shape = list(map(load_addend, deltas)), deltas[0].shape
    gram = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for first, last in row_spans((shape[0], shape[1] * len(deltas))):
        stack = torch.stack([addend.rows(first, last).reshape(-1) for addend in addends])
        gram += stack @ stack.T
    product: Array = gram.numpy()
    return product
