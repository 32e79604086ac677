"""Declaration and options of ``spectrum`` and ``gradient-spectrum``: singular values, energy, and rounding noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lora_diag.feature import Feature, Figure
from lora_diag.running.options import (
    ACTIVATIONS,
    KFAC,
    RANKS,
    RECOVER,
    TOP,
    Accuracy,
    Callbacks,
    LayerOptions,
    Option,
    Output,
    Resources,
    Resuming,
    Selection,
)

FEATURE = Feature(
    __name__,
    "spectrum",
    command=".command:spectrum",
    subcommands=(("gradient-spectrum", ".command:gradient_spectrum"),),
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
            panels=(".figures:energy",),
            made_by="loradiag spectrum BASE TUNED -o spectrum.jsonl",
        ),
        Figure(
            "spectrum",
            "singular values and the noise edge of the files",
            panels=(".figures:spectrum",),
            made_by="loradiag spectrum BASE TUNED -o spectrum.jsonl",
        ),
    ),
)


class GradientSpectrumOptions(Selection, Accuracy, Resources, Output, Resuming, Callbacks, total=False):
    """Options of ``gradient-spectrum``: no adapter takes part."""

    ranks: Annotated[Sequence[int], RANKS]
    top: Annotated[int | None, TOP]


class SpectrumOptions(LayerOptions, total=False):
    """Options of ``spectrum``."""

    ranks: Annotated[Sequence[int], RANKS]
    top: Annotated[int | None, TOP]
    gradients: Annotated[Sequence[Path | str], Option((), "Use gradient-spectrum.", "GRADIENTS...", hidden=True)]
    activations: Annotated[Path | str | None, ACTIVATIONS]
    kfac: Annotated[bool, KFAC]
    recover: Annotated[bool, RECOVER]
