"""What the probes that train have in common: numbers that make sense, a text that is held out from, a timed step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_diag.errors import UsageError
from lora_diag.training.data import Texts, read_texts
from lora_diag.training.models import Model
from lora_diag.training.sweep import Training


def check_training(rates: Mapping[str, Sequence[float]], counts: Mapping[str, int | None], seed: int) -> None:
    """Refuse numbers that make no sense.

    Args:
        rates: Learning rates by their option.
        counts: Whole numbers from 1 up, by their option; None where it was not given.
        seed: Of the data's order.

    Raises:
        UsageError: There are such.
    """
    for option, given in rates.items():
        if not given or not all(0 < rate < 10 for rate in given):
            shown = ",".join(f"{rate:g}" for rate in given)
            raise UsageError(f"{option} {shown}: learning rates must lie between 0 and 10")
    for option, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
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


def timed(
    training: Training, sets: Sequence[Texts], run: Callable[[Training, list[Texts], Callable[[], None]], object]
) -> tuple[float, float]:
    """Return the seconds of one step, the second of two, and of one batch of an evaluation.

    Args:
        training: What all runs have in common.
        sets: Evaluation sets; the first gives the batch.
        run: Trains, then evaluates, and calls its last argument after every step and every batch.
    """
    ticks = [time.perf_counter()]
    first = sets[0].first(training.batch)
    run(replace(training, steps=2), [first], lambda: ticks.append(time.perf_counter()))
    return ticks[2] - ticks[1], ticks[3] - ticks[2]
