"""``probe sweep``: which rank is enough, by training at each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    duration,
    read_sets,
    run_of,
)
from lora_diag.checkpoints import open_checkpoint
from lora_diag.errors import UsageError
from lora_diag.linalg import resolve_device
from lora_diag.planning.sweep import best_rates
from lora_diag.results import AnyRecord, Results, ResultsWriter
from lora_diag.training.data import Texts, read_texts
from lora_diag.training.losses import measure
from lora_diag.training.models import Model, open_model
from lora_diag.training.sweep import ALPHA_OVER_RANK, CLIP_NORM, WARMUP, Cell, Training, record_of, run_cell

RANKS = (4, 8, 16, 32, 64)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def probe_sweep(
    base: Path | str,
    *,
    data: Path | str,
    evaluate: Sequence[Path | str],
    shifted: Sequence[Path | str] = (),
    ranks: Sequence[int] = RANKS,
    rates: Sequence[float] = RATES,
    steps: int = 100,
    seeds: int = 2,
    seed: int = 0,
    tolerance: float = 0.02,
    targets: Sequence[str] = (),
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
    r"""Train a LoRA at every rank, on the same batches in the same order and for as many steps, and compare losses.

    At every rank all learning rates are tried with the first seed; the one with the lowest loss on the first evaluation
    set is run with the other seeds, too.

    Args:
        base: The model: a folder that transformers can open, or a Hub id.
        data: What to train on: text or JSONL.
        evaluate: Held-out files of the same kind; the first decides on the learning rate.
        shifted: Files of another kind.
        ranks: Ranks r.
        rates: Peak learning rates.
        steps: Updates of a run.
        seeds: Runs of each rank at its best rate; they differ in the factors' initial values, not in the data's order.
        seed: Of the data's order, and the first of the seeds.
        tolerance: Share of the gain that a smaller rank may lose and still be enough.
        targets: Modules to adapt, as PEFT names them; by default all linear layers but the head.
        length: Tokens of a sequence; by default 512 or what the model has room for.
        batch: Sequences in a batch, of training and of evaluation.
        max_sequences: Use the first so many sequences of each evaluation file.
        tokenizer: ``auto``, ``bytes`` or a folder.
        dtype: Of the weights while they run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        output: Results file, appended run by run.
        resume: Go on behind what an interrupted sweep left in ``output``; finished runs are not run again.
        on_progress: Called with what is being done, steps and batches done, and all of them.
        on_record: Called with every record, in the order of the file, as it comes.
        on_note: Called with the estimate of what the sweep will cost, before it begins.

    Returns:
        The records are in ``whole``: BASE's losses, and those of every run, set by set.

    Raises:
        UsageError: An option makes no sense, a text is trained on and evaluated, or the extra ``train`` is missing.
        InputError: An input cannot be read, or the model cannot be opened or adapted.
    """
    check(batch, max_sequences)
    _check(ranks, rates, steps, seeds, seed, tolerance)
    check_files(evaluate, *shifted, data)
    model = open_model(base, resolve_device(device), dtype, length, tokenizer)
    sets = read_sets(model, evaluate, shifted, max_sequences)
    training = Training(read_texts(data, model), steps, batch, seed, tuple(targets) or None)
    if same := next((each for each in sets if each.hash == training.texts.hash), None):
        raise UsageError(f"{same.path}: is the text that is trained on; give one that is held out")
    settings = {
        "ranks": sorted(set(ranks)),
        "rates": sorted(set(rates)),
        "steps": steps,
        "seeds": seeds,
        "seed": seed,
        "tolerance": tolerance,
        "targets": list(targets) or "all-linear",
        "alpha_over_rank": ALPHA_OVER_RANK,
        "optimizer": f"AdamW, no weight decay, gradient norm {CLIP_NORM:g}, warm-up {WARMUP:g}, cosine to 0",
    }
    inputs = (describe("base", open_checkpoint(base)), described(training.texts, "data"), *map(described, sets))
    run = run_of("probe sweep", inputs, settings, model, batch, dtype)
    watch = Watch(on_progress, on_record, on_note)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume) as writer:
        kept = Kept(writer, watch)
        if kept.finished is not None:
            return kept.finished
        first = [Cell(rank, lr, seed) for rank in sorted(set(ranks)) for lr in sorted(set(rates))]
        runs = len(first) + (seeds - 1) * len(set(ranks))
        done = sum(kept.has(sets, **cell.fields) for cell in first) + _more_done(kept, sets, seed)
        _tell_cost(model, training, sets, runs - done, max(ranks), watch)
        for each in [] if kept.has(sets, subject="base") else sets:
            kept.put(record_of(each, measure(model, each, batch, lambda: watch.batch("BASE"))))
        _run(model, first, training, sets, kept, watch)
        chosen = best_rates(kept.records, sets[0].name, seed)
        more = [Cell(rank, lr, seed + i) for i in range(1, seeds) for rank, lr in chosen.items()]
        _run(model, more, training, sets, kept, watch)
        return kept.end([])


def _check(ranks: Sequence[int], rates: Sequence[float], steps: int, seeds: int, seed: int, tolerance: float) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UsageError: There are such.
    """
    if not ranks or min(ranks) < 1:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 1 up")
    if not rates or not all(0 < rate < 10 for rate in rates):
        raise UsageError(f"--lr {','.join(f'{rate:g}' for rate in rates)}: learning rates must lie between 0 and 10")
    for option, value in (("--steps", steps), ("--seeds", seeds)):
        if value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
    if not 0 <= seed < 2**31:
        raise UsageError(f"--seed {seed}: must be a whole number from 0 to 2^31 - 1")
    if not 0 < tolerance < 1:
        raise UsageError(f"--tolerance {tolerance}: must lie between 0 and 1")


def _more_done(kept: Kept, sets: Sequence[Texts], seed: int) -> int:
    """Count the finished runs of other seeds than the first."""
    cells = {(r.rank, r.lr, r.seed) for r in kept.records if r.subject == "lora" and r.seed != seed}
    return sum(kept.has(sets, subject="lora", rank=rank, lr=lr, seed=other) for rank, lr, other in cells)


def _run(
    model: Model, cells: Sequence[Cell], training: Training, sets: Sequence[Texts], kept: Kept, watch: Watch
) -> None:
    for cell in cells:
        if not kept.has(sets, **cell.fields):
            label = f"r={cell.rank} lr={cell.lr:g} seed {cell.seed}"
            records = run_cell(model, cell, training, sets, training.batch, lambda label=label: watch.batch(label))  # type: ignore[misc]
            kept.put(*records)


def _tell_cost(model: Model, training: Training, sets: Sequence[Texts], runs: int, rank: int, watch: Watch) -> None:
    """Time one step at the largest rank and one batch of an evaluation, and tell what the sweep will take."""
    once, first = replace(training, steps=2), sets[0].first(training.batch)
    ticks = [time.perf_counter()]
    run_cell(model, Cell(rank, 1e-6, 0), once, [first], training.batch, lambda: ticks.append(time.perf_counter()))
    step, evaluation = ticks[2] - ticks[1], ticks[3] - ticks[2]
    batches = batches_of(sets, training.batch)
    watch.total = runs * (training.steps + batches) + batches
    seconds = runs * training.steps * step + (runs + 1) * batches * evaluation
    watch.note(
        f"about {duration(seconds)}: {counted(runs, 'run', 'runs')} of {training.steps} steps of {step:.2g} s at most, "
        f"each evaluated on {counted(len(sets), 'set', 'sets')}"
    )
