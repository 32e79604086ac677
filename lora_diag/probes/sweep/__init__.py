"""``probe sweep``, registration and options: held-out loss after training at several ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.feature import BASE_ARGUMENT, SAVE_PROBE, Command, Feature, Figure, Section
from lora_diag.running import options


class SweepOptions(options.Shifted, options.TrainOptions, options.TrainingRuns, total=False):
    """Options of ``probe sweep``."""

    data: Required[Annotated[Path | str, options.DATA]]
    ranks: Annotated[Sequence[int], options.RANKS]
    lr: Annotated[Sequence[float], options.LR.by((1e-4, 3e-4, 1e-3, 3e-3))]
    full: Annotated[bool, options.Option(False, "Also fine-tune all parameters, as a baseline.")]
    # LoRA's best rate is about ten times that of full fine-tuning (Schulman et al. 2025, LoRA
    # Without Regret); in two tasks of docs/evidence.md 6 and 2 times at r = 64, 20 at r = 8, 63 and
    # 20 at r = 1.
    full_lr: Annotated[Sequence[float], options.FULL_LR.by((1e-5, 3e-5, 1e-4, 3e-4))]
    bitfit: Annotated[
        bool, options.Option(False, "Also train biases and norms alone, as a baseline.")
    ]
    dora: Annotated[bool, options.DORA]
    rslora: Annotated[bool, options.RSLORA]
    quantized: Annotated[str | None, options.QUANTIZED]
    gradient_checkpointing: Annotated[bool, options.CHECKPOINTING]
    steps: Annotated[int, options.STEPS]
    repeats: Annotated[int, options.REPEATS]
    gain_tolerance: Annotated[float, options.GAIN_TOLERANCE]
    target_modules: Annotated[Sequence[str], options.TARGET_MODULES]


FEATURE = Feature(
    __name__,
    "probe sweep",
    "Train",
    commands=(
        Command(
            help="Loss of LoRA at each rank, learning rates tuned.",
            examples=(
                "probe sweep base/ --data train.txt --eval held_out.txt --steps 200 -o sweep.jsonl",
            ),
            arguments=(BASE_ARGUMENT,),
            options=(SweepOptions,),
            shows=("json", "quiet", "verbose"),
            suggest=".show:suggest_next",
            hints=(SAVE_PROBE,),
        ),
    ),
    records=("lora_diag.records.probe:Probe",),
    functions=(".measure:probe_sweep",),
    statements=".show:sweep_lines",
    grids=".show:sweep_grids",
    section=Section("Rank sweep", order=11),
    questions=(("on", "Which rank does training need?"),),
    figures=(
        Figure(
            "sweep",
            "held-out loss of LoRA trained at each rank",
            made_by="loradiag probe sweep BASE --data FILE --eval FILE -o sweep.jsonl",
        ),
    ),
)
