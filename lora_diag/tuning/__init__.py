"""``tune``: from a base model, data and a budget to an adapter configuration, with every decision
on record.

Its declaration and options.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Required, TypedDict

from lora_diag.feature import BASE_ARGUMENT, Command, Feature, Figure, Section
from lora_diag.running import options
from lora_diag.running.options import (
    Callbacks,
    ModelOptions,
    Notes,
    Option,
    Resuming,
    Shifted,
    Training,
    TrainingRuns,
)

if TYPE_CHECKING:
    from lora_diag.tuning.record import TunePlan


class TuneOptions(
    Shifted, Training, TrainingRuns, ModelOptions, Resuming, Callbacks, Notes, total=False
):
    """Options of ``tune``."""

    data: Required[Annotated[Path | str, options.DATA]]
    params: Annotated[str | int | None, options.PARAMS]
    memory_budget: Annotated[str | int | None, options.MEMORY_BUDGET]
    time: Annotated[
        str | None, Option(None, "Time limit, e.g. 2h or 90min; default: none.", "TIME")
    ]
    ranks: Annotated[Sequence[int], options.RANKS.by(())]
    lr: Annotated[Sequence[float], options.LR.by((1e-4, 3e-4, 1e-3, 3e-3))]
    gradient_checkpointing: Annotated[bool, options.CHECKPOINTING]
    steps: Annotated[int, options.STEPS]
    repeats: Annotated[int, options.REPEATS.by(3)]
    gain_tolerance: Annotated[float, options.GAIN_TOLERANCE]
    target_modules: Annotated[Sequence[str], options.TARGET_MODULES]
    dora: Annotated[bool, options.DORA]
    rslora: Annotated[bool, options.RSLORA]
    quantized: Annotated[str | None, options.QUANTIZED]
    no_full: Annotated[
        bool, Option(False, "Do not fully fine-tune as a baseline; saves 4 times BASE's memory.")
    ]
    widen: Annotated[
        int, Option(1, "Learning rates to try beyond the grid; 0 for none.", "N", least=0)
    ]
    dry_run: Annotated[bool, Option(False, "Print the plan and stop.", panel=options.EXECUTION)]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=options.OUTPUT)]
    on_plan: Annotated[
        "Callable[[TunePlan], bool] | None",
        Option(None, "Called with a new plan; nothing is trained if it returns False.", cli=False),
    ]


class TuneCommandOptions(TypedDict, total=False):
    """Options of the command only."""

    output: Annotated[
        Path,
        Option(options.REQUIRED, "Folder of the run.", "DIR", "-o", options.OUTPUT),
    ]
    yes: Annotated[
        bool, Option(False, "Start without asking.", short="-y", panel=options.EXECUTION)
    ]


FEATURE = Feature(
    __name__,
    "tune",
    "Train",
    commands=(
        Command(
            help="Choose an adapter by training within a budget.",
            question="Which adapter should I train, given data and a budget?",
            notes="By default, --ranks are up to four powers of 2 within the budget, each a fourth "
            "of the next; 1 and "
            "2 where larger ones do not fit.",
            examples=(
                "tune base/ --data train.jsonl --eval held_out.jsonl --params 10M --time 2h -o "
                "run/",
            ),
            run=".command:run_tune",
            arguments=(BASE_ARGUMENT,),
            options=(TuneCommandOptions, TuneOptions),
            shows=("json", "quiet", "verbose"),
            call=True,
        ),
    ),
    records=(".record:TunePlan", ".record:TuneTrial", ".record:TuneDecision", ".record:Tune"),
    functions=(".run:tune",),
    table=".show:tune_table",
    advice=".show:advise_training",
    statements=".show:tune_lines",
    grids=".show:tune_grids",
    section=Section("Choice of an adapter", order=5),
    questions=(("choice", "Which adapter should be trained?"),),
    figures=(
        Figure(
            "tune",
            "held-out loss against trained parameters: all runs, the frontier and the choice",
            made_by="loradiag tune BASE --data FILE --eval FILE --params N -o run/",
        ),
    ),
)
