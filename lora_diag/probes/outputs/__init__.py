"""``probe outputs`` (registration, options): held-out loss and outputs of adapters compared with
the full fine-tune.
"""

from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import BASE_ARGUMENT, SAVE_PROBE, Argument, Command, Feature, Figure, Section
from lora_diag.running.options import INPUTS, REFERENCE, MissingAlpha, Option, ProbeOptions, Shifted


class OutputsOptions(Shifted, ProbeOptions, MissingAlpha, total=False):
    """Options of ``probe outputs``."""

    reference: Annotated[str | Path | None, REFERENCE]


class FullFineTune(TypedDict, total=False):
    """The full fine-tune, where it is no positional argument."""

    tuned: Annotated[
        str | None,
        Option(
            None,
            "Full fine-tune; default: the first of the models, if it is not an adapter.",
            "TUNED",
            panel=INPUTS,
        ),
    ]


FEATURE = Feature(
    __name__,
    "probe outputs",
    "Understand",
    commands=(
        Command(
            help="Losses and outputs of adapters and a full fine-tune.",
            question="Does it match the fine-tune in loss? What was forgotten?",
            run=".measure:compare_models",
            examples=(
                "probe outputs base/ full_ft/ lora_r8/ lora_r64/ --eval held_out.txt -o "
                "outputs.jsonl",
            ),
            arguments=(
                BASE_ARGUMENT,
                Argument(
                    "models",
                    "Full fine-tune, adapters, or both, in this order; adapters alone are compared "
                    "as equals, in the order of their steps.",
                    "[TUNED] [ADAPTER]",
                    many=True,
                ),
            ),
            options=(FullFineTune, OutputsOptions),
            shows=("json", "quiet", "verbose"),
            suggest=".show:suggest_next",
            hints=(SAVE_PROBE,),
        ),
    ),
    records=("lora_diag.records.probe:Probe",),
    functions=(".measure:probe_outputs",),
    statements=".show:outputs_lines",
    grids=".show:outputs_grids",
    section=Section("Held-out loss and outputs", order=10),
    questions=(("on", "Is the adapter as good as the full fine-tune?"),),
    figures=(
        Figure(
            "outputs",
            "held-out loss of each adapter compared with the full fine-tune",
            made_by="loradiag probe outputs BASE TUNED ADAPTER --eval FILE -o outputs.jsonl",
            by_color=False,
        ),
        Figure(
            "depth",
            "distance of hidden states from the full fine-tune's, by depth",
            needs="outputs",
            page=".figures:make_depth_page",
            made_by="loradiag probe outputs BASE TUNED ADAPTER --eval FILE -o outputs.jsonl",
            by_color=False,
        ),
    ),
    named_by=("base", "tuned"),
)
