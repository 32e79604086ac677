"""Declaration and options of ``checkpoints``: a training run, at all its checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import Argument, Command, Feature, Figure, Hint, Section
from lora_diag.running.options import (
    BASE,
    OUTPUT,
    RANKS,
    ModelOptions,
    Notes,
    Option,
    RunOptions,
    Shifted,
)


class CheckpointsOptions(Shifted, ModelOptions, Notes, RunOptions, total=False):
    """Options of ``checkpoints``."""

    base: Annotated[str | Path | None, BASE]
    ranks: Annotated[Sequence[int], RANKS.by((1, 4, 16))]
    directions: Annotated[
        int, Option(4, "Largest singular directions whose spaces are compared.", "K", least=1)
    ]
    average: Annotated[
        Sequence[str],
        Option(
            (), "With --eval: averages of checkpoints to compare.", "uniform,ema[:DECAY],last:K"
        ),
    ]
    extrapolate: Annotated[
        Sequence[str],
        Option(
            (), "With --eval: extrapolations by F intervals; default F: 1.", "linear[:F],rank1[:F]"
        ),
    ]


class FollowOptions(TypedDict, total=False):
    """Options of watching a run."""

    follow: Annotated[
        bool,
        Option(
            False,
            "Refresh one table as checkpoints or records of LoraMonitor arrive.",
            panel=OUTPUT,
        ),
    ]
    on_view: Annotated[
        Callable[..., None] | None, Option(None, "Called at every look at a run.", cli=False)
    ]


FEATURE = Feature(
    __name__,
    "checkpoints",
    "Train",
    commands=(
        Command(
            help="A training run over its checkpoints, and which to keep.",
            question="Is the run healthy, and which checkpoint should I keep?",
            notes="Reads the outputs of transformers, TRL, axolotl, LLaMA-Factory and torchtune. "
            "Full checkpoints need "
            "BASE, before the run's folder or with --base.",
            examples=(
                "checkpoints out/ -o run.jsonl",
                "checkpoints base/ out/ --eval held_out.txt --shifted other.txt",
                "checkpoints step_*/ --base base/",
                "checkpoints out/ --follow",
            ),
            run=".measure:measure_run",
            suggest=".show:suggest_next",
            arguments=(
                Argument(
                    "inputs", "A run's folder, or its checkpoints.", "[BASE] RUN_DIR", many=True
                ),
            ),
            options=(CheckpointsOptions, FollowOptions),
            hints=(
                Hint(
                    "plot {output} --figure checkpoints", "curves, increments and overlaps by step"
                ),
                Hint("-o run.jsonl", "saves these results, for plot, report and gate"),
            ),
        ),
    ),
    records=(
        *(
            f".record:{name}"
            for name in (
                "CheckpointLayer",
                "RunCheckpoint",
                "Trajectory",
                "CheckpointChoice",
                "Combination",
            )
        ),
        "lora_diag.records.probe:Probe",
    ),
    functions=(".measure:checkpoints", ".monitor:LoraMonitor", ".axolotl:AxolotlPlugin"),
    statements=".show:checkpoints_lines",
    grids=".show:checkpoints_grids",
    section=Section("A training run", order=15),
    questions=(
        ("keep", "Which checkpoint to keep?"),
        ("verdict", "Did training go well?"),
        ("movement", "Does it still change?"),
    ),
    figures=(
        Figure(
            "checkpoints",
            "a training run: norms, energy in one direction, increments, overlap of the steps",
            needs="checkpoint_layer",
            made_by="loradiag checkpoints RUN_DIR -o run.jsonl",
            by_color=False,
        ),
    ),
)
