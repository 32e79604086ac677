"""Declaration and options of ``spectrum``: singular values, energy, and rounding noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lora_diag.feature import Argument, Command, Feature, Figure, Hint
from lora_diag.running.options import (
    ACTIVATIONS,
    INPUTS,
    KFAC,
    RANKS,
    RECOVER,
    TOP,
    LayerOptions,
    Option,
)


class SpectrumOptions(LayerOptions, total=False):
    """Options of ``spectrum``."""

    ranks: Annotated[Sequence[int], RANKS]
    top: Annotated[int | None, TOP]
    gradients: Annotated[
        Sequence[str | Path],
        Option(
            (),
            "Folder or file of gradients to measure instead of an update; repeatable.",
            "PATH",
            panel=INPUTS,
        ),
    ]
    activations: Annotated[Path | str | None, ACTIVATIONS]
    kfac: Annotated[bool, KFAC]
    recover: Annotated[bool, RECOVER]


FEATURE = Feature(
    __name__,
    "spectrum",
    "Understand",
    commands=(
        Command(
            help="Singular values of an update ΔW, layer by layer.",
            question="Is the update low-rank, and do the files resolve it?",
            notes="Of many adapters: loradiag fleet. With --gradients, BASE only provides the "
            "names of the weights.",
            examples=(
                "spectrum base/ full_ft/ --ranks 8,16,64 -o results.jsonl",
                "spectrum base/ full_ft/ --activations activations.safetensors",
                "spectrum base/ --gradients gradients/ -o results.jsonl",
            ),
            arguments=(
                Argument("base", "Base checkpoint, or an adapter alone.", optional=True),
                Argument("tuned", "Fine-tuned checkpoint, or an adapter.", optional=True),
            ),
            options=(SpectrumOptions,),
            suggest=".show:suggest_next",
            hints=(
                Hint("allocate {output}", "ranks of each layer by several rules, and of a budget"),
                Hint("-o results.jsonl", "saves these results, for allocate"),
            ),
        ),
    ),
    records=(".record:Spectrum",),
    functions=(".run:spectrum",),
    table=".show:spectrum_table",
    statements=".show:summary_lines",
    questions=(
        ("low_rank", "Is the update low-rank?"),
        ("rank_used", "Is the update low-rank?"),
        ("rank_at_90", "Is the update low-rank?"),
        ("resolved", "Do the files resolve the update?"),
        ("moved", "How far did the weights move?"),
    ),
    figures=(
        Figure(
            "energy",
            "C(r): energy kept by the best adapter of each rank",
            needs="spectrum",
            page=".figures:make_energy_page",
            made_by="loradiag spectrum BASE TUNED -o spectrum.jsonl",
        ),
        Figure(
            "spectrum",
            "singular values and the noise edge of the files",
            made_by="loradiag spectrum BASE TUNED -o spectrum.jsonl",
        ),
    ),
)
