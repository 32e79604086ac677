"""``probe sweep``: measure the loss of LoRA trained at each rank, also on weights rounded to those
of a quantized base.

Rounded values equal those of bitsandbytes (0.50.2 on a CPU: NF4 bit for bit, int8 up to one
rounding of float32). Modules are ordinary: memory is not reduced, products are in the model's own
dtype, and activations, which LLM.int8() also rounds, are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lora_diag.errors import Given, UsageError
from lora_diag.models.data import Texts
from lora_diag.models.opening import Model
from lora_diag.models.training import (
    Cell,
    Lora,
    TrainingSettings,
    layers_without_head,
    record_of,
    run_cell,
)
from lora_diag.probes.sweep import SweepOptions
from lora_diag.records import LeftOut, Probe, Results
from lora_diag.records.probe import Subject
from lora_diag.running.layers import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import Arm, TrainRun, Trial
from lora_diag.storage import open_checkpoint

# Quantiles of N(0, 1) with an exact zero: Dettmers et al. 2023, QLoRA, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Number of entries of a block of NF4; a block has one scale.
BLOCK = 64
GRIDS = ("nf4", "int8")


def to_nf4(weight: Tensor) -> Tensor:
    """Return the nearest NF4 values: 16 levels times the largest magnitude of each 64 consecutive
    entries.

    Args:
        weight: ``(out, in)``; blocks are in row-major order and may span rows.

    Example:
        >>> to_nf4(torch.tensor([[0.5, 0.1, -1.0, 0.0]])).tolist()[0][1:]
        [0.07958029955625534, -1.0, 0.0]
    """
    flat = weight.reshape(-1).float()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4, device=weight.device)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)
    places = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
    return (table[places] * largest).view(-1)[: len(flat)].view_as(weight).to(weight.dtype)


def to_int8(weight: Tensor) -> Tensor:
    """Return the nearest of 255 evenly spaced values per row: round(127·w/a)·a/127.

    Args:
        weight: ``(out, in)``; a is the largest magnitude of a row.

    Example:
        >>> to_int8(torch.tensor([[1.27, 0.004, 0.006]])).mul(100).round().tolist()
        [[127.0, 0.0, 1.0]]
    """
    largest = weight.float().abs().amax(1, keepdim=True)
    # 127 divided by the smallest float32 would be infinite.
    codes = (weight.float() * (127 / largest.clamp(min=1e-30))).round()
    return (codes * largest / 127).to(weight.dtype)


@contextmanager
def round_weights(layers: Iterable[nn.Module], grid: str | None) -> Iterator[None]:
    """Round the weights of linear layers within the block, then restore them.

    Args:
        layers: Linear layers, or transformers' Conv1D, whose weights are stored ``(in, out)``.
        grid: ``nf4`` or ``int8``; None to round nothing.

    Reference: Dettmers et al. 2023, QLoRA, equation 4; Dettmers et al. 2022, LLM.int8(), section
    3.1.
    """
    if grid is None:
        yield
        return
    to_grid = to_nf4 if grid == "nf4" else to_int8
    originals = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.weight
                assert isinstance(weight, Tensor)
                originals.append((weight, weight.detach().to("cpu", copy=True)))
                if isinstance(layer, nn.Linear):
                    weight.copy_(to_grid(weight))
                else:
                    weight.copy_(to_grid(weight.T.contiguous()).T)
        yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)


# Settings that ``resume`` extends, with the functions that join the values in the file and the new
# ones.
EXTENDABLE_SETTINGS: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("ranks", "lr", "full_lr"), lambda then, now: sorted({*then, *now})),
    "repeats": max,
    "widen": max,
}


@show_options
def probe_sweep(base: Path | str, **options: Unpack[SweepOptions]) -> Results[Any]:
    r"""Train a LoRA at every rank, with the same batches in the same order and number of steps, and
    compare losses.

    At every rank all learning rates are tried with the first seed; the rate with the lowest loss on
    the first evaluation set is also run with the other seeds.

    ``resume`` continues a sweep, interrupted or finished: runs in ``output`` are not repeated; more
    ``repeats``, a larger ``widen``, ``full``, and other ``ranks`` and ``lr`` are added; all other
    settings must be equal.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        data: Training text, JSONL or data set.
        eval: Held-out files of the same distribution; the first decides on the learning rate.
        shifted: Files of another distribution.
        ranks: Ranks r.
        lr: Peak learning rates of LoRA and BitFit.
        full: Also fine-tune BASE fully: every parameter, including embeddings and head.
        full_lr: Peak learning rates of full fine-tuning.
        bitfit: Also train biases and norms only.
        dora: Train DoRA: factors and a magnitude per output.
        rslora: Scale factors by alpha/√r, alpha = 16 at every rank.
        quantized: ``nf4`` or ``int8``: LoRA is trained on linear layers rounded to this grid. They
            are rounded but not packed: the values of a quantized base without its memory savings.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time,
            equal losses.
        steps: Number of updates of a run.
        repeats: Number of runs of each rank at its best rate; they differ in the initial factors,
            not in the data.
        gain_tolerance: Fraction of the gain that a smaller rank may lose and still be sufficient.
        target_modules: Modules to adapt, by PEFT's names; default all linear layers except the
            head.
        **options: ``SweepOptions``.

    Returns:
        The records are in ``whole``: BASE's losses, and those of every run, on each set.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, the training text is also an
            evaluation set, the output can be neither replaced nor resumed, or the extra ``train``,
            or a package for the engine or the data set, is not installed.
        InputError: An input cannot be read or the output written, the model cannot be opened or
            adapted, or the cluster cannot be reached.

    Example:
        >>> found = probe_sweep(
        ...     "sample_checkpoints/base",
        ...     data="train.txt",  # doctest: +SKIP
        ...     eval=["held_out.txt"],
        ...     ranks=[2, 8],
        ...     steps=50,
        ... )
        >>> [
        ...     (record.rank, record.lr, record.seed, record.loss) for record in found.whole
        ... ]  # doctest: +SKIP
    """
    run = TrainRun("probe sweep", options, SweepOptions)
    options = run.options
    ranks = check_ranks(options["ranks"])
    if (options["full"] or options["bitfit"]) and options["dtype"] != "float32":
        raise UsageError(
            Given("dtype", options["dtype"]),
            f"rounds away most steps of {'$full' if options['full'] else '$bitfit'}, while LoRA's "
            "factors stay float32",
            "use $dtype float32",
        )
    run.check_files(base)
    kind = Lora(tuple(options["target_modules"]) or None, options["dora"], options["rslora"])
    with run.joined():
        return _run_sweep(run, base, kind, ranks)


def _run_sweep(
    run: TrainRun[SweepOptions], base: Path | str, kind: Lora, ranks: Sequence[int]
) -> Results[Any]:
    """Open the model and the texts, train what the results file lacks, and return the results."""
    options = run.options
    quantized = options["quantized"]
    model, stored = run.open(base), open_checkpoint(base)
    run.read_all(kind)
    settings = _make_settings(run, kind, ranks)
    workers = run.workers(base, stored)

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        joined_settings = (
            run_records.run.settings
        )  # with the values of the sweep before it was resumed
        plan = run.plan_runs(run_records)

        def make_arm(
            subject: Subject, ranks: Sequence[int | None], rates: str, grid: str | None = None
        ) -> Arm:
            def make_trial(rank: int | None, lr: float, seed: int) -> Trial:
                cell = Cell(rank, lr, seed, subject)
                return Trial(cell.fields, cell.label, partial(run_cell, model, cell), cell)

            tried = {r.lr for r in run_records.records if r.subject == subject and r.lr is not None}
            train = partial(train_rounded, grid)
            return Arm(
                tuple(ranks),
                tuple(joined_settings[rates]),
                make_trial,
                tuple(sorted(tried)),
                workers,
                train,
            )

        def measure_base(grid: str = "") -> None:
            plan.measure_base(model, partial(record_of, name=grid), grid)

        lora = make_arm("lora", joined_settings["ranks"], "lr", quantized)
        arms = {"of LoRA": lora}
        if options["full"]:
            arms["of full fine-tuning"] = make_arm("full", [None], "full_lr")
        if options["bitfit"]:
            arms["of BitFit"] = make_arm("bitfit", [None], "lr")
        bases = sum(not plan.has(subject="base", name=grid) for grid in {"", quantized or ""})
        # A full fine-tune keeps a copy, gradients and AdamW's two moments.
        weights = sum(
            weight.numel() * weight.element_size() for weight in model.module.parameters()
        )
        methods = {name: [arm] for name, arm in arms.items()}
        plan.report_cost(methods, bases, 4 * weights if options["full"] else 0)
        measure_base()
        with round_weights(layers_without_head(model.module).values(), quantized):
            if quantized:
                measure_base(quantized)
            plan.run(lora)
        del arms["of LoRA"]
        for arm in arms.values():
            plan.run(arm)
        return []

    return run.over(run.inputs(stored), settings, measure_missing, EXTENDABLE_SETTINGS)


def _make_settings(run: TrainRun[SweepOptions], kind: Lora, ranks: Sequence[int]) -> dict[str, Any]:
    """Return the settings for the run record."""
    options = run.options
    return {
        "ranks": list(ranks),
        "lr": sorted(set(options["lr"])),
        "full_lr": sorted(set(options["full_lr"])) if options["full"] else None,
        "bitfit": options["bitfit"],
        "kind": kind.description,
        "quantized": options["quantized"],
        **run.training_settings(),
        "gain_tolerance": options["gain_tolerance"],
        "target_modules": list(options["target_modules"]) or "all-linear",
    }


def train_rounded(
    grid: str | None,
    model: Model,
    cell: Cell,
    training: TrainingSettings,
    sets: Sequence[Texts],
    after: Callable[[], None],
) -> list[Probe]:
    """Train one cell on BASE, rounded to ``grid`` unless that is None; return its records as
    ``run_cell`` does.
    """
    with round_weights(layers_without_head(model.module).values(), grid):
        return run_cell(model, cell, training, sets, after)
