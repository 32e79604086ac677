"""``probe strength``, registration and options: held-out loss at W_0 + t·ΔW, of the whole update or of its parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lora_diag.feature import BASE_ARGUMENT, SAVE_PROBE, TUNED_ARGUMENT, Command, Feature, Figure, Hint, Section
from lora_diag.running.options import OUTPUT, MissingAlpha, Option, ProbeOptions, Shifted

SCALES = Option(
    None,
    "Strengths t to measure besides 0 and 1; default: 0.25,0.5,...,1.5; with --by 0, with --write that of --scale.",
    "T,T,...",
    between=(-10, 10),
)


class StrengthOptions(Shifted, ProbeOptions, MissingAlpha, total=False):
    """Options of ``probe strength``."""

    scales: Annotated[Sequence[float] | None, SCALES]
    by: Annotated[
        str, Option("all", "Vary t of the whole update, or of one block or module type at a time.", "all|block|type")
    ]
    write: Annotated[
        Path | str | None, Option(None, "Write the adapter at --scale to a new folder.", "FOLDER", panel=OUTPUT)
    ]
    scale: Annotated[float | None, Option(None, "With --write: its strength t.", "T", panel=OUTPUT, between=(-10, 10))]
    part: Annotated[
        Sequence[str],
        Option((), "With --write and --by: the part at --scale, others at 1; repeatable.", "NAME", panel=OUTPUT),
    ]


FEATURE = Feature(
    __name__,
    "probe strength",
    "Understand",
    commands=(
        Command(
            help="Loss at each strength t of the update, W + t·ΔW.",
            examples=(
                "probe strength base/ adapter/ --eval held_out.txt --shifted other.txt -o strength.jsonl",
                "probe strength base/ adapter/ --eval held_out.txt --write adapter-0.8/ --scale 0.8",
            ),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(StrengthOptions,),
            shows=("json", "quiet", "verbose"),
            suggest=".show:suggest_next",
            hints=(Hint("portability {write} {base}", "the update that each serving program applies"), SAVE_PROBE),
        ),
    ),
    records=(".record:Strength", ".record:StrengthChoice"),
    functions=(".measure:probe_strength",),
    statements=".show:strength_lines",
    grids=".show:strength_grids",
    section=Section("Strength of the update", order=13),
    questions=(("strength", "How strong should the update act?"),),
    figures=(
        Figure(
            "strength",
            "gain on the task against loss on other texts, by strength of the update",
            made_by="loradiag probe strength BASE TUNED --eval FILE --shifted FILE -o strength.jsonl",
        ),
        Figure(
            "parts",
            "loss without one block or module type of the update",
            needs="strength",
            page=".figures:make_parts_page",
            made_by="loradiag probe strength BASE TUNED --eval FILE --by block -o strength.jsonl",
        ),
    ),
)
