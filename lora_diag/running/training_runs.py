"""What the probes that train have in common: numbers that make sense, a held-out text, and the walk over their runs.

The walk: every size at every learning rate with the first seed, and beyond them where the best is at their edge; then
the best rate of each size with the other seeds. It knows what is finished, so that nothing is run twice, and refuses to
know what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import UsageError
from lora_diag.models.data import Texts, read_texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.methods import Lora
from lora_diag.models.opening import Model
from lora_diag.models.training import Training
from lora_diag.records import RunInput, WholeRecord
from lora_diag.running.options import declared
from lora_diag.running.probing import ProbeRun, counted, described
from lora_diag.running.progress import Kept, Watch
from lora_diag.running.rates import MOST, beyond, lowest

Train = Callable[[Training, Sequence[Texts], Callable[[], None]], Sequence[WholeRecord]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run.

    Args:
        fields: By which its records are told from others.
        label: What it is called while it runs.
        train: Trains as told, evaluates on these sets, and calls its last argument after every step and every batch;
            gives one record a set.
    """

    fields: Mapping[str, Any]
    label: str
    train: Train


@dataclass(frozen=True, slots=True)
class Arm:
    """What is trained at a grid of sizes and learning rates.

    Args:
        sizes: Ranks or dimensions, ascending; None for what has no size.
        rates: Learning rates, ascending.
        trial: The run of a size, a rate and a seed.
        earlier: Rates that a resumed run may have tried beyond the edge of a smaller grid; none is run for their sake.
    """

    sizes: tuple[int | None, ...]
    rates: tuple[float, ...]
    trial: Callable[[int | None, float, int], Trial]
    earlier: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Walk:
    """The runs of a probe, as far as they are.

    Args:
        training: What all have in common.
        sets: Evaluation sets; the first decides on learning rates.
        seeds: Runs of each size at its best rate.
        widen: So many rates more where the best of a size is the lowest or the highest tried.
        kept: The records.
    """

    training: Training
    sets: Sequence[Texts]
    seeds: int
    widen: int
    kept: Kept[Any]

    @property
    def watch(self) -> Watch:
        """Who gets progress and notes."""
        return self.kept.watch

    @property
    def batches(self) -> int:
        """Batches of an evaluation on all sets."""
        return sum(-(-len(each.sequences) // self.training.batch) for each in self.sets)

    def has(self, **fields: Any) -> bool:
        """Say whether there is a record with these fields on every set."""
        return self.kept.has([each.name for each in self.sets], **fields)

    def measure_base(
        self, model: Model, record: Callable[[Texts, Losses], WholeRecord], name: str | None = None
    ) -> None:
        """Measure BASE on every set, if that is not done yet.

        Args:
            model: BASE.
            record: The record of a set.
            name: Name of these records, where BASE is measured more than once.
        """
        if not self.has(subject="base", **({} if name is None else {"name": name})):
            for each in self.sets:
                self.kept.put(record(each, measure(model, each, self.training.batch, lambda: self.watch.batch("BASE"))))

    def cost(self, arms: Sequence[Arm], bases: int) -> tuple[float, list[tuple[int, float]]]:
        """Time what is trained, and set how many steps and batches there will be.

        Args:
            arms: What is trained.
            bases: How many times BASE is to be measured.

        Returns:
            Seconds in all; and of each arm the runs that are left, and the seconds of a step.
        """
        self.watch.total = bases * self.batches
        seconds, found, evaluation = 0.0, [], 0.0
        for arm in arms:
            step, evaluation = self.timed(arm)
            runs = self.left(arm)
            seconds += runs * (self.training.steps * step + self.batches * evaluation)
            self.expect(runs)
            found.append((runs, step))
        return seconds + bases * self.batches * evaluation, found

    def run(self, arm: Arm) -> None:
        """Run all rates with the first seed, and the best rate of each size with the others."""
        first = self.training.order
        best = {}
        for size in arm.sizes:
            tried = []
            for rate in self._rates(arm, size):
                trial = arm.trial(size, rate, first)
                if rate not in arm.rates and not self._has(trial):
                    self.expect(1)
                self._finish(trial)
                tried.append(rate)
            best[size] = self._best(arm, size, [*tried, *arm.earlier])
        for seed in range(first + 1, first + self.seeds):
            for size, chosen in best.items():
                if chosen is not None:
                    self._finish(arm.trial(size, chosen, seed))

    def left(self, arm: Arm) -> int:
        """Count the runs that are not finished, but for those beyond the grid, of which nothing is known before."""
        first, left = self.training.order, 0
        for size in arm.sizes:
            best = self._best(arm, size, [*self._rates(arm, size), *arm.earlier])
            runs = [arm.trial(size, rate, first) for rate in arm.rates]
            others = range(first + 1, first + self.seeds)
            runs += [arm.trial(size, arm.rates[0] if best is None else best, seed) for seed in others]
            left += sum(not self._has(run) for run in runs)
        return left

    def more(self, arms: Sequence[Arm]) -> str:
        """Say how many runs the edges of the grids may add."""
        most = self.widen * sum(len(arm.sizes) for arm in arms if len(arm.rates) > 1)
        return f"; up to {counted(most, 'run', 'runs')} more where the best rate is at the edge" if most else ""

    def expect(self, runs: int) -> None:
        """Tell who watches of so many runs more."""
        self.watch.total += runs * (self.training.steps + self.batches)

    def timed(self, arm: Arm) -> tuple[float, float]:
        """Return the seconds of one step at the largest size, the second of two, and of one batch of an evaluation."""
        ticks = [time.perf_counter()]
        first = self.sets[0].first(self.training.batch)
        trial = arm.trial(arm.sizes[-1], 1e-6, 0)
        trial.train(replace(self.training, steps=2), [first], lambda: ticks.append(time.perf_counter()))
        return ticks[2] - ticks[1], ticks[3] - ticks[2]

    def _finish(self, trial: Trial) -> None:
        if not self._has(trial):
            self.kept.put(*trial.train(self.training, self.sets, lambda: self.watch.batch(trial.label)))

    def _has(self, trial: Trial) -> bool:
        return self.has(**trial.fields)

    def _rates(self, arm: Arm, size: int | None) -> Iterator[float]:
        """Yield the rates to try, each to be finished before the next is asked for: the grid, then beyond its edge."""
        tried = list(arm.rates)
        yield from tried
        for _ in range(self.widen):
            best = self._best(arm, size, tried)
            further = beyond(tried, min(tried) if best is None else best)  # what always diverged needs smaller steps
            if further is None:
                return
            yield further
            tried.append(further)

    def _best(self, arm: Arm, size: int | None, rates: Sequence[float]) -> float | None:
        """Return the rate of a size whose run of the first seed has the lowest loss on the first set, so far."""
        runs = ((size, self._loss(arm.trial(size, rate, self.training.order)), rate) for rate in rates)
        return lowest(runs).get(size)

    def _loss(self, trial: Trial) -> float | None:
        """Return the loss of a run on the first set; None where it diverged or is not finished."""
        fields = {**trial.fields, "set": self.sets[0].name}
        mine = (r for r in self.kept.records if all(getattr(r, name, ...) == value for name, value in fields.items()))
        return next((record.loss for record in mine), None)


class TrainRun(ProbeRun):
    """One run of a probe that trains.

    Args:
        command: As the results file names it.
        given: What the caller gave of the options.
        group: Which options the probe has.
        rates: Those that are learning rates.
        counts: Those that are whole numbers from 1 up; None where one was not given.

    Attributes:
        sets: Evaluation sets, once they are read.
        training: What all trained runs have in common, once the texts are read.

    Raises:
        UsageError: An option makes no sense.
    """

    sets: list[Texts]
    training: Training

    def __init__(
        self,
        command: str,
        given: Mapping[str, object],
        group: type,
        rates: Sequence[str],
        counts: Sequence[str],
    ) -> None:
        super().__init__(command, given, group)
        flags = {name: option.flag(name) for name, (_, option) in declared(group).items()}
        grids, numbers = ({flags[name]: self.options[name] for name in names} for names in (rates, counts))
        check_training(grids, numbers, self.options["widen"], self.options["seed"])

    def read_all(
        self,
        data: Path | str,
        evaluate: Sequence[Path | str],
        shifted: Sequence[Path | str],
        steps: int,
        kind: Lora | None = None,
    ) -> None:
        """Read the text to train on and the evaluation sets.

        Raises:
            UsageError: Two evaluation sets have one name, or a text is trained on and evaluated.
            InputError: A text cannot be read.
        """
        self.sets = self.read_sets(evaluate, shifted)
        texts = read_training(data, self.model, self.sets)
        self.training = Training(texts, steps, self.batch, self.options["seed"], kind or Lora())

    def inputs(self, stored: Checkpoint) -> list[RunInput]:
        """Return the inputs, for the run record."""
        return [self.describe(stored), described(self.training.texts, "data"), *map(described, self.sets)]

    def trained(self, seeds: int) -> dict[str, Any]:
        """Return the settings of training, for the run record."""
        widen, seed = self.options["widen"], self.options["seed"]
        return {
            "widen": widen,
            "steps": self.training.steps,
            "seeds": seeds,
            "seed": seed,
            "order": self.training.order_hash,
        }

    def walk(self, kept: Kept[Any], seeds: int) -> Walk:
        """Return the walk over the runs."""
        return Walk(self.training, self.sets, seeds, self.options["widen"], kept)


def check_training(
    rates: Mapping[str, Sequence[float]], counts: Mapping[str, int | None], widen: int, seed: int
) -> None:
    """Refuse numbers that make no sense.

    Args:
        rates: Learning rates by their option.
        counts: Whole numbers from 1 up, by their option; None where it was not given.
        widen: Rates to try beyond an edge.
        seed: Of the data's order.

    Raises:
        UsageError: There are such.
    """
    for option, given in rates.items():
        if not given or not all(0 < rate < MOST for rate in given):
            shown = ",".join(f"{rate:g}" for rate in given)
            raise UsageError(f"{option} {shown}: learning rates must lie between 0 and {MOST:g}")
    for option, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
    if widen < 0:
        raise UsageError(f"--widen {widen}: must be 0 or more")
    if not 0 <= seed < 2**31:
        raise UsageError(f"--seed {seed}: must be a whole number from 0 to 2^31 - 1")


def read_training(data: Path | str, model: Model, sets: Sequence[Texts]) -> Texts:
    """Read the text to train on.

    Raises:
        UsageError: It is one of the evaluation sets.
        InputError: It cannot be read.
    """
    texts = read_texts(data, model)
    if same := next((each for each in sets if each.hash == texts.hash), None):
        raise UsageError(f"{same.path}: is the text that is trained on; give one that is held out")
    return texts
