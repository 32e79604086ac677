"""``probe outputs`` (registration, options): held-out loss and outputs of adapters compared with the full fine-tune."""

from pathlib import Path
from typing import Annotated

from lora_diag.feature import Feature, Figure, Section
from lora_diag.running.options import REFERENCE, MissingAlpha, ProbeOptions, Shifted

FEATURE = Feature(
    __name__,
    "probe outputs",
    command=".command:outputs",
    records=("lora_diag.records.probe:Probe",),
    functions=(".measure:probe_outputs",),
    statements=".show:outputs_lines",
    grids=".show:outputs_grids",
    section=Section("Held-out loss and outputs", order=10, losses=True),
    questions=(("on", "Is the adapter as good as the full fine-tune?"),),
    figures=(
        Figure(
            "outputs",
            "held-out loss of each adapter compared with the full fine-tune",
            panels=(".figures:outputs",),
            made_by="loradiag probe outputs BASE TUNED ADAPTER --eval FILE -o outputs.jsonl",
            by_color=False,
        ),
        Figure(
            "depth",
            "distance of hidden states from the full fine-tune's, by depth",
            needs="outputs",
            page=".figures:make_depth_page",
            panels=(".figures:depth",),
            made_by="loradiag probe outputs BASE TUNED ADAPTER --eval FILE -o outputs.jsonl",
            by_color=False,
        ),
    ),
    named_by=("base", "tuned"),
)


class OutputsOptions(Shifted, ProbeOptions, MissingAlpha, total=False):
    """Options of ``probe outputs``."""

    reference: Annotated[str | Path | None, REFERENCE]
