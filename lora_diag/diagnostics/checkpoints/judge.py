"""Held-out losses of BASE, of the checkpoints of a run, and of their averages and extrapolations:
one model in memory.

Every model is BASE with its weights changed in place, and is evaluated on all sets before the next
one. A loss is recorded when it is measured, so that an interrupted run resumes after the last
model.

Averages and extrapolations are all Σ_t c_tΔW_t, with the same c_t in all layers:

- ``uniform``: c_t = 1/T; ``last:K``: that of the last K (Kaddour 2022, "Stop Wasting My Time!
  Saving Days of ImageNet and BERT Training with Latest Weight Averaging", arXiv 2209.14981).
- ``ema:D``: c_t ∝ D^(T−t), an exponential moving average without bias to its start.
- ``linear:F``: ΔW_T + F(ΔW_T − ΔW_{T−1}).
- ``rank1:F``: the first right singular vector v of the trajectory, the matrix with the rows ΔW_t,
  and the line through its coefficients ⟨ΔW_t, v⟩ over the steps s_t, by least squares, at s_T +
  F(s_T − s_{T−1}). With σ_1 and u of the Gram matrix ⟨ΔW_s, ΔW_t⟩ the coefficients are σ_1u_t and v
  = Σ_t u_tΔW_t/σ_1, so that no row is formed. RELEX does this for each tensor; here v is that of
  all layers together (Wei et al. 2026, "You Only Need Minimal RLVR Training: Extrapolating LLMs via
  Rank-1 Trajectories", arXiv 2605.21468).

An average of products B_tA_t is not the product of averages: as an adapter it has the factors
[c_1B_1 … c_TB_T] and [A_1; …; A_T], which ``merge --method sum`` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_diag.adapters.source import get_stated_alpha
from lora_diag.deltas import Delta, DenseDelta, row_spans
from lora_diag.diagnostics.checkpoints import CheckpointsOptions
from lora_diag.diagnostics.checkpoints.factors import Array
from lora_diag.diagnostics.checkpoints.held_out import choose_checkpoints, compare_combinations
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer, Combination, group_by
from lora_diag.diagnostics.checkpoints.series import Step
from lora_diag.diagnostics.checkpoints.verdict import sum_grams
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.layers.change import load_addend
from lora_diag.linalg.devices import resolve_device
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, LossesBySet
from lora_diag.models.opening import open_tokenizer
from lora_diag.models.swapping import Swapped
from lora_diag.records import Probe
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import compare
from lora_diag.running.judging import Judge, NamedModel, list_missing
from lora_diag.running.options import ProbeOptions, Shifted, select_options
from lora_diag.running.probing import ProbeRun, describe_texts
from lora_diag.running.progress import RunRecords
from lora_diag.storage import open_checkpoint

# Rules by option, with the default of their numbers; NaN for one that must be given.
RULES = {
    "average": {"uniform": 0.0, "ema": 0.8, "last": math.nan},
    "extrapolate": {"linear": 1.0, "rank1": 1.0},
}


@dataclass(frozen=True, slots=True)
class CombinationRule:
    """A rule that combines checkpoints.

    Args:
        kind: A name in ``RULES``.
        number: D, K or F; 0 for ``uniform``.
    """

    kind: str
    number: float = 0.0

    @property
    def name(self) -> str:
        """The rule as an option states it, with its number."""
        return self.kind if self.kind == "uniform" else f"{self.kind}:{self.number:g}"

    def weigh(self, steps: Sequence[int], gram: Array | None = None) -> Array:
        """Return c_t ``(T,)``.

        Args:
            steps: s_t, ascending, at least two.
            gram: ⟨ΔW_s, ΔW_t⟩ over all layers ``(T, T)``, for ``rank1``; None if it is not known.

        Raises:
            InputError: The Gram matrix is needed and not known.

        Example:
            >>> (
            ...     CombinationRule("last", 2).weigh([10, 20, 30]).tolist(),
            ...     CombinationRule("linear", 0.5).weigh([10, 20, 30]).tolist(),
            ... )
            ([0.0, 0.5, 0.5], [0.0, -0.5, 1.5])
        """
        ages = np.arange(len(steps) - 1.0, -1.0, -1.0)
        if self.kind == "linear":
            return np.where(ages == 0, 1 + self.number, np.where(ages == 1, -self.number, 0.0))
        if self.kind == "rank1":
            if gram is None:
                problem = "needs the products of all checkpoints in all layers"
                fix = "give finite checkpoints one by one, without $layers and $exclude"
                raise InputError(Given("extrapolate", self.name), problem, fix)
            u = np.linalg.eigh(gram).eigenvectors[:, -1]
            intervals = (np.array(steps) - steps[-1]) / (steps[-1] - steps[-2])
            return np.asarray(np.polyval(np.polyfit(intervals, u, 1), self.number) * u, np.float64)
        weights = (
            self.number**ages
            if self.kind == "ema"
            else np.where(ages < (self.number or math.inf), 1.0, 0.0)
        )
        return np.asarray(weights / weights.sum(), np.float64)


def read_rules(options: CheckpointsOptions, count: int) -> list[CombinationRule]:
    """Return the rules of the options.

    Args:
        options: All options.
        count: T, the number of checkpoints.

    Raises:
        UsageError: A rule is unknown, or its number is missing or out of range.
    """
    rules = []
    requested = {"average": options["average"], "extrapolate": options["extrapolate"]}
    for option, texts in requested.items():
        defaults = RULES[option]
        for text in texts:
            found = re.fullmatch(r"(\w+)(?::(\d*\.?\d+))?", text)
            kind, given = found.groups() if found else ("", None)
            number = defaults.get(kind, math.nan) if given is None else float(given)
            fits = {
                "uniform": given is None,
                "ema": 0 < number < 1,
                "last": number in range(2, count + 1),
            }
            if kind not in defaults or not fits.get(kind, number > 0):
                raise UsageError(
                    Given(option, text),
                    "unknown rule, or number out of range",
                    f"use $average uniform, ema:D (D < 1), last:K (K from 2 to {count}); "
                    "$extrapolate linear:F, rank1:F (F > 0)",
                )
            rules.append(CombinationRule(kind, number))
    return list(dict.fromkeys(rules))


def combine(deltas: Sequence[Delta], weights: Sequence[float]) -> DenseDelta:
    """Return Σ c_tΔW_t of one layer, computed when it is read.

    Args:
        deltas: ΔW_t, of one shape.
        weights: c_t.
    """
    first, load = deltas[0], partial(_add, deltas, weights)
    return DenseDelta(first.layer, first.shape, load, first.dtypes, first.base, first.is_matrix)


def _add(deltas: Sequence[Delta], weights: Sequence[float]) -> torch.Tensor:
    """Return a sum of updates, float64; each is read in row blocks, and of factors no other product
    is formed.
    """
    total = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        addend = load_addend(delta)
        for first, last in row_spans(delta.shape):
            total[first:last] += weight * addend.rows(first, last)
    return total


class JudgeOptions(Shifted, ProbeOptions, total=False):
    """Options of evaluating checkpoints on texts."""


class CheckpointJudge:
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

    def __init__(
        self, options: CheckpointsOptions, base: Path | str, steps: Sequence[Step]
    ) -> None:
        self._options, self._base, self._steps = options, base, steps
        own = select_options(JudgeOptions, options)
        self._run = ProbeRun("checkpoints", own, JudgeOptions)
        self._run.check_files(base)
        self._run.model = open_tokenizer(base, options["length"], options["tokenizer"])
        sets, stored = self._run.read_sets(), open_checkpoint(base)
        self._run.params = sum(math.prod(stored[name].shape) for name in stored)
        models = 1 + len(steps) + len(read_rules(options, len(steps)))
        self._texts = self._run.fit(sets, lambda: models * self._run.count_tokens(sets))
        self.inputs = tuple(map(describe_texts, self._texts))
        self.settings = {
            **self._run.model_settings,
            "device": resolve_device(options["device"]).type,
            "average": list(options["average"]),
            "extrapolate": list(options["extrapolate"]),
        }

    def judge(self, records: RunRecords[CheckpointLayer]) -> None:
        """Evaluate the models that have no records yet, and write the choice and the comparison of
        combinations.
        """
        bad = {record.step for record in records.layers if record.non_finite}
        finite = [step for step in self._steps if step.step not in bad]
        steps, paths = (
            tuple(step.step for step in finite),
            {legible(step.path): step.step for step in self._steps},
        )
        partial_gram = bad or self._options["layers"] or self._options["exclude"]
        gram = None if partial_gram else sum_grams(list(group_by(records.layers, "layer").values()))
        contenders = [NamedModel("base")]
        for step in self._steps:
            apply = partial(self._apply, self._read_updates, step.path)
            contenders.append(NamedModel("checkpoint", legible(step.path), apply))
        combinations = []
        for rule in read_rules(self._options, len(finite)):
            weights = tuple(rule.weigh(steps, gram).tolist())
            used = {
                step.path: weight for step, weight in zip(finite, weights, strict=True) if weight
            }
            apply = partial(self._apply, self._combine, used)
            contenders.append(NamedModel("combination", rule.name, apply))
            combinations.append(Combination(name=rule.name, steps=steps, weights=weights, by=""))
        if list_missing(records, self._texts, contenders):
            self._run.open(self._base)
            lost = {legible(step.path) for step in self._steps if step.step in bad}
            self._evaluate(contenders, lost, records)
        probes = [record for record in records.records if isinstance(record, Probe)]
        records.put(*choose_checkpoints(probes, paths))
        records.put(*compare_combinations(probes, paths, combinations))

    def _apply(
        self, read: Callable[[Any], Sequence[Delta]], what: Any
    ) -> AbstractContextManager[object]:
        """Return a context in which the model has the updates that ``read`` returns."""
        return Swapped(self._run.model, read(what), 0).applied()

    def _read_updates(self, path: Path) -> Sequence[Delta]:
        """Return all updates of a checkpoint: --layers and --exclude select those of other
        measurements.
        """
        allowed, alpha = self._options["allow_unmatched"], get_stated_alpha(self._options)
        return compare(self._base, path, allow_unmatched=allowed, stated_alpha=alpha).pairing.deltas

    def _combine(self, weights: Mapping[Path, float]) -> list[Delta]:
        """Return Σ c_tΔW_t of every layer, given c_t by path.

        Raises:
            InputError: A checkpoint lacks an update that others have, or one cannot be read.
        """
        by_layer: dict[str, list[Delta]] = {}
        for delta in chain.from_iterable(map(self._read_updates, weights)):
            by_layer.setdefault(delta.layer, []).append(delta)
        if partly := next(
            (layer for layer, deltas in by_layer.items() if len(deltas) < len(weights)), None
        ):
            raise InputError(
                f"{partly}: is not in all checkpoints, which cannot be combined; give those that "
                "have it"
            )
        return [combine(deltas, list(weights.values())) for deltas in by_layer.values()]

    def _evaluate(
        self,
        contenders: Sequence[NamedModel],
        lost: Collection[str],
        records: RunRecords[CheckpointLayer],
    ) -> None:
        """Write the missing losses of BASE, which comes first, and of the others; ``lost`` are the
        names of those that are not finite.

        Raises:
            InputError: An update cannot be read or does not fit BASE, or the loss of BASE is not
                finite.
        """

        def measure(contender: NamedModel) -> LossesBySet:
            if contender.name in lost:
                found = judge.found[0].items()
                return {name: Losses(own.sums * math.nan, own.counts) for name, own in found}
            with contender.applied():
                return self._run.measure(self._texts, contender.label)

        base, *others = contenders
        judge = Judge(self._run, self._texts, records, [base], measure, _make_record)
        judge.judge(others)


def _make_record(contender: NamedModel, texts: Texts, losses: Losses, base: Losses) -> Probe:
    """Return the record of a model on a set; it is compared with BASE by the rounded losses."""
    is_base = contender.subject == "base"
    fields = losses.fields_of_run(texts, None) | losses.by_sequence(is_base)
    if losses.is_finite and not is_base:
        fields |= losses.round().compare(base.round())
    return Probe(probe="checkpoints", **contender.fields, **fields)
