"""``probe sweep``: which rank is enough, by training at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_diag.checkpoints import open_checkpoint
from lora_diag.errors import UsageError
from lora_diag.linalg import resolve_device
from lora_diag.models.losses import measure
from lora_diag.models.methods import Lora, inner_layers
from lora_diag.models.opening import Model, open_model
from lora_diag.models.training import RECIPE, Cell, Training, record_of, run_cell
from lora_diag.probes.sweep.rounding import GRIDS, rounded
from lora_diag.records import AnyRecord, Results, ResultsWriter
from lora_diag.records.probe import Subject
from lora_diag.rendering.text import duration
from lora_diag.running.inputs import describe
from lora_diag.running.probing import Kept, Watch, check, check_files, counted, described, read_sets, run_of
from lora_diag.running.training_runs import Arm, Trial, Walk, check_training, read_training

RANKS = (4, 8, 16, 32, 64)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
# Settings that a finished sweep takes more of with ``resume``: what was asked for before and now, together.
GROWS: dict[str, Callable[[Any, Any], Any]] = {
    "ranks": lambda then, now: sorted({*then, *now}),
    "rates": lambda then, now: sorted({*then, *now}),
    "full_rates": lambda then, now: sorted({*then, *now}),
    "seeds": max,
}
# LoRA's best rate is about ten times that of full fine-tuning (Schulman et al. 2025, LoRA Without Regret).
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4)


def probe_sweep(
    base: Path | str,
    *,
    data: Path | str,
    evaluate: Sequence[Path | str],
    shifted: Sequence[Path | str] = (),
    ranks: Sequence[int] = RANKS,
    rates: Sequence[float] = RATES,
    full: bool = False,
    full_rates: Sequence[float] = FULL_RATES,
    bitfit: bool = False,
    dora: bool = False,
    rslora: bool = False,
    quantized: str | None = None,
    steps: int = 100,
    widen: int = 2,
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
    overwrite: bool = False,
    verify: bool = False,
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
        rates: Peak learning rates, of LoRA and of BitFit.
        full: Fully fine-tune BASE, too: every parameter, embeddings and head included.
        full_rates: Peak learning rates of that.
        bitfit: Train its biases and norms alone, too.
        dora: Train DoRA: a magnitude for each output beside the factors.
        rslora: Scale factors by alpha/√r, alpha = 16 at every rank.
        quantized: ``nf4`` or ``int8``: LoRA is trained on BASE's linear layers as rounded to that grid. They are
            rounded and not packed: the numbers of a quantized base without the memory that it saves.
        widen: So many rates more, one step of the grid further each, where the best is the lowest or the highest tried.
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
        resume: Continue the sweep in ``output``, interrupted or finished; runs that are in it are not run again. More
            ``seeds``, other ``ranks`` and ``rates`` are added to those that it has; all else has to be the same.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the models; of texts it does so anyway.
        on_progress: Called with what is being done, steps and batches done, and all of them.
        on_record: Called with every record, in the order of the file, as it comes.
        on_note: Called with the estimate of what the sweep will cost, before it begins.

    Returns:
        The records are in ``whole``: BASE's losses, and those of every run, set by set.

    Raises:
        UsageError: An option makes no sense, a text is trained on and evaluated, or the extra ``train`` is missing.
        InputError: An input cannot be read, or the model cannot be opened or adapted.
    """
    check(batch, max_sequences, **({"quantized": (quantized, GRIDS)} if quantized is not None else {}))
    _check(ranks, tolerance)
    check_training({"--lr": rates, "--full-lr": full_rates}, {"--steps": steps, "--seeds": seeds}, widen, seed)
    if (full or bitfit) and dtype != "float32":
        raise UsageError(
            f"--dtype {dtype}: rounds most steps of {'--full' if full else '--bitfit'} away, while LoRA's factors stay "
            "float32; use --dtype float32"
        )
    check_files(evaluate, *shifted, data)
    model = open_model(base, resolve_device(device), dtype, length, tokenizer)
    sets = read_sets(model, evaluate, shifted, max_sequences)
    kind = Lora(tuple(targets) or None, dora, rslora)
    training = Training(read_training(data, model, sets), steps, batch, seed, kind)
    settings = {
        "ranks": sorted(set(ranks)),
        "rates": sorted(set(rates)),
        "full_rates": sorted(set(full_rates)) if full else None,
        "bitfit": bitfit,
        "kind": kind.about,
        "quantized": quantized,
        "widen": widen,
        "steps": steps,
        "seeds": seeds,
        "seed": seed,
        "order": training.order_hash,
        "tolerance": tolerance,
        "targets": list(targets) or "all-linear",
        "optimizer": RECIPE,
    }
    inputs = (
        describe("base", open_checkpoint(base), verify=verify),
        described(training.texts, "data"),
        *map(described, sets),
    )
    run = run_of("probe sweep", inputs, settings, model, batch, dtype)
    watch = Watch(on_progress, on_record, on_note)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume, overwrite, GROWS) as writer:
        kept = Kept(writer, watch)
        if kept.finished is not None:
            return kept.finished
        plan = writer.run.settings  # of a resumed sweep with what it had before
        sweep = _Sweep(model, Walk(training, sets, plan["seeds"], widen, kept, watch))
        arms = [sweep.arm("lora", plan["ranks"], plan["rates"], quantized)]
        arms += [sweep.arm("full", [None], plan["full_rates"], None)] if full else []
        arms += [sweep.arm("bitfit", [None], plan["rates"], None)] if bitfit else []
        sweep.tell_cost(arms)
        sweep.measure_base("")
        for arm in arms:
            sweep.run(arm)
        return kept.end([])


@dataclass(frozen=True, slots=True)
class _Arm:
    """What is trained, and on which BASE.

    Args:
        subject: LoRA, or a reference line.
        runs: Its ranks and rates.
        grid: What BASE's linear layers are rounded to; None for as they are.
    """

    subject: Subject
    runs: Arm
    grid: str | None = None


@dataclass(frozen=True, slots=True)
class _Sweep:
    """A sweep as far as it is."""

    model: Model
    walk: Walk

    def arm(self, subject: Subject, ranks: Sequence[int | None], rates: Sequence[float], grid: str | None) -> _Arm:
        """Return what is trained at a grid of ranks and rates."""
        tried = {r.lr for r in self.walk.kept.records if r.subject == subject and r.lr is not None}
        runs = Arm(tuple(ranks), tuple(sorted(set(rates))), partial(self._trial, subject), tuple(sorted(tried)))
        return _Arm(subject, runs, grid)

    def _trial(self, subject: Subject, rank: int | None, lr: float, seed: int) -> Trial:
        cell = Cell(rank, lr, seed, subject)
        return Trial(cell.fields, cell.label, partial(run_cell, self.model, cell))

    def measure_base(self, grid: str) -> None:
        """Measure BASE, rounded to a grid if there is one."""
        walk = self.walk
        for each in [] if walk.kept.has(walk.sets, subject="base", name=grid) else walk.sets:
            losses = measure(self.model, each, walk.training.batch, lambda: walk.watch.batch("BASE"))
            walk.kept.put(record_of(each, losses, name=grid))

    def run(self, arm: _Arm) -> None:
        """Train everything of an arm."""
        layers = inner_layers(self.model.module).values()
        with rounded(layers, arm.grid) if arm.grid else nullcontext():
            if arm.grid:
                self.measure_base(arm.grid)
            self.walk.run(arm.runs)

    def tell_cost(self, arms: Sequence[_Arm]) -> None:
        """Time one step of what is trained and one batch of an evaluation, and tell what the sweep will take."""
        walk = self.walk
        grids = {"", *(arm.grid or "" for arm in arms)}
        bases = sum(not walk.kept.has(walk.sets, subject="base", name=grid) for grid in grids)
        seconds, told, evaluation = 0.0, [], 0.0
        walk.watch.total = bases * walk.batches
        for arm in arms:
            step, evaluation = walk.timed(arm.runs)
            runs = walk.left(arm.runs)
            seconds += runs * (walk.training.steps * step + walk.batches * evaluation)
            walk.expect(runs)
            what = {"full": " of full fine-tuning", "bitfit": " of BitFit"}.get(arm.subject, "")
            told.append(f"{counted(runs, 'run', 'runs')}{what} of {walk.training.steps} steps of {step:.2g} s at most")
        walk.watch.note(
            f"about {duration(seconds + bases * walk.batches * evaluation)}: {', '.join(told)}, each evaluated on "
            f"{counted(len(walk.sets), 'set', 'sets')}{walk.more([arm.runs for arm in arms])}{self._copies(arms)}"
        )

    def _copies(self, arms: Sequence[_Arm]) -> str:
        """Say what memory a full fine-tune takes beside BASE: copy, gradients and AdamW's two moments."""
        if not any(arm.subject == "full" for arm in arms):
            return ""
        size = sum(each.numel() * each.element_size() for each in self.model.module.parameters()) / 2**30
        return f"; a full fine-tune takes {4 * size:.1f} GiB beside BASE" if 4 * size >= 0.1 else ""


def _check(ranks: Sequence[int], tolerance: float) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UsageError: There are such.
    """
    if not ranks or min(ranks) < 1:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 1 up")
    if not 0 < tolerance < 1:
        raise UsageError(f"--tolerance {tolerance}: must lie between 0 and 1")
