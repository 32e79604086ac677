"""``probe truncation``, registration and options: held-out loss of the update truncated to each
rank.
"""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.feature import (
    BASE_ARGUMENT,
    SAVE_PROBE,
    TUNED_ARGUMENT,
    Command,
    Feature,
    Figure,
    Hint,
    Section,
)
from lora_diag.running.options import (
    BY_UNIT,
    MATCH_NORM,
    RANKS,
    LayerProbeOptions,
    MissingAlpha,
    Option,
    Shifted,
)


class TruncationOptions(Shifted, LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe truncation``."""

    ranks: Annotated[Sequence[int], RANKS.by((0, 1, 2, 4, 8, 16, 32, 64))]
    match_norm: Annotated[bool, MATCH_NORM]
    by: Annotated[str, BY_UNIT]
    untruncated: Annotated[
        str,
        Option(
            "tuned",
            "Norms, biases, embeddings and head: as in TUNED, or BASE.",
            "tuned|base",
            former="rest",
        ),
    ]


FEATURE = Feature(
    __name__,
    "probe truncation",
    "Understand",
    commands=(
        Command(
            help="Loss of the model at each rank of the update.",
            examples=(
                "probe truncation base/ full_ft/ --eval held_out.txt --ranks 0,4,16,64 -o "
                "truncation.jsonl",
            ),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(TruncationOptions,),
            shows=("json", "quiet", "verbose"),
            suggest=".show:suggest_next",
            hints=(
                Hint("probe sweep {base} --data TRAIN_TEXT", "trains at each rank"),
                SAVE_PROBE,
            ),
        ),
    ),
    records=("lora_diag.records.probe:Probe",),
    functions=(".measure:probe_truncation",),
    statements=".show:truncation_lines",
    grids=".show:truncation_grids",
    section=Section("Truncated update", order=12),
    questions=(("on", "How much of its gain does the truncated update keep?"),),
    figures=(
        Figure(
            "truncation",
            "held-out loss of the update truncated to each rank",
            made_by="loradiag probe truncation BASE TUNED --eval FILE -o truncation.jsonl",
        ),
        Figure(
            "alone",
            "cost of truncating one layer or module type alone",
            needs="truncation",
            page=".figures:make_alone_page",
            options=("rank",),
            made_by="loradiag probe truncation BASE TUNED --eval FILE --by type -o "
            "truncation.jsonl",
        ),
    ),
)
