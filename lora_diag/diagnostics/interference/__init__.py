"""Declaration and options of ``interference``: angles, sums and merges of several updates of one
base.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import Argument, Command, Feature, Figure, Hint, Section
from lora_diag.running.options import OUTPUT, RANKS, WEIGHTS, LayerOptions, Option


class InterferenceOptions(LayerOptions, total=False):
    """Options of ``interference``."""

    weights: Annotated[Sequence[float] | None, WEIGHTS]
    ranks: Annotated[Sequence[int], RANKS]
    density: Annotated[
        float,
        Option(0.2, "Fraction of entries that TIES keeps; 0: no TIES or sign conflicts.", "D"),
    ]


class UnionOptions(TypedDict, total=False):
    """Option of the command for a further output, the spectra of the sums."""

    spectrum: Annotated[
        Path | None,
        Option(None, "Also write the spectra of the sums, for allocate.", "FILE", panel=OUTPUT),
    ]


FEATURE = Feature(
    __name__,
    "interference",
    "Understand",
    commands=(
        Command(
            run=".measure:compare_updates",
            help="Overlap of several updates, and the loss of merging them.",
            question="Do several updates interfere?",
            examples=(
                "interference lora_sql/ lora_chat/ lora_code/ -o interference.jsonl --spectrum "
                "union.jsonl",
            ),
            arguments=(
                Argument(
                    "inputs",
                    "BASE and two or more updates of it; adapters alone need no BASE.",
                    "[BASE] TUNED",
                    True,
                ),
            ),
            options=(InterferenceOptions, UnionOptions),
            suggest=".show:suggest_next",
            hints=(
                Hint(
                    "allocate {spectrum} --energy 0.9", "the rank that the sum needs in each layer"
                ),
                Hint("--spectrum union.jsonl", "then allocate union.jsonl: a rank for each layer"),
            ),
        ),
    ),
    records=(".record:Interference", ".record:Union"),
    functions=(".measure:interference",),
    statements=".show:interference_lines",
    grids=".show:interference_grids",
    section=Section("Several updates"),
    figures=(
        Figure(
            "angles",
            "principal angles between updates, compared with chance",
            needs="interference",
            options=("rank",),
            made_by="loradiag interference BASE TUNED TUNED -o interference.jsonl",
            by_color=False,
        ),
        Figure(
            "union",
            "rank of the sum of updates, compared with the sum of ranks",
            page=".figures:make_union_page",
            made_by="loradiag interference BASE TUNED TUNED -o interference.jsonl",
            by_color=False,
        ),
    ),
    questions=(
        ("interfere", "Do the updates interfere?"),
        ("rank_needed", "Which rank do all updates together need?"),
    ),
)
