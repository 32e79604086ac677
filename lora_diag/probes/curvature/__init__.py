"""``probe curvature``, registration and options: curvature of the loss along the update."""

from collections.abc import Sequence
from dataclasses import replace
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
    RANKS,
    SEED,
    HeldOut,
    LayerProbeOptions,
    MissingAlpha,
    Option,
)


class CurvatureOptions(HeldOut, LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe curvature``."""

    ranks: Annotated[Sequence[int], RANKS.by((0, 1, 2, 4, 8, 16, 32, 64))]
    along: Annotated[
        Sequence[float],
        Option((0.1, 1.0), "Fractions of the way to the truncated update.", "T,T,..."),
    ]
    eigenvalues: Annotated[
        int, Option(5, "Largest eigenvalues to compute.", "K", least=1, former="top")
    ]
    trace_vectors: Annotated[
        int, Option(10, "Random vectors of the trace estimate.", "N", least=1, former="probes")
    ]
    ggn: Annotated[bool, Option(False, "Use the Gauss-Newton matrix, not the Hessian.")]
    by: Annotated[
        str,
        BY_UNIT.by(
            "all",
            metavar="all|layer",
            help="Eigenvalues of all layers together, or also of each alone.",
        ),
    ]
    seed: Annotated[int, SEED]


FEATURE = Feature(
    __name__,
    "probe curvature",
    "Research",
    commands=(
        Command(
            help="Curvature of the loss (Hessian, GGN), and a loss bound.",
            examples=("probe curvature base/ full_ft/ --max-sequences 16 --eval held_out.txt",),
            arguments=(BASE_ARGUMENT, replace(TUNED_ARGUMENT, optional=True)),
            options=(CurvatureOptions,),
            shows=("json", "quiet", "verbose"),
            hints=(
                Hint(
                    "probe truncation {base} {tuned}",
                    "the gap at every rank, on more text",
                ),
                Hint("probe sweep {base} --data TEXT", "which rank training needs"),
                SAVE_PROBE,
            ),
        ),
    ),
    records=(".record:Curvature", ".record:LossBound"),
    functions=(".measure:probe_curvature",),
    statements=".show:curvature_lines",
    grids=".show:curvature_grids",
    section=Section("Curvature of the loss", per="layer", order=14),
    questions=(
        ("bound", "How tight is the loss bound of a truncation?"),
        ("curvature", "How large is the curvature of the loss?"),
    ),
    figures=(
        Figure(
            "curvature",
            "curvature of the loss; modelled and measured loss gaps of truncations",
            made_by="loradiag probe curvature BASE TUNED --eval FILE -o curvature.jsonl",
        ),
    ),
)
