"""Declaration and options of ``geometry``: where an update lies in the base weights, next to chance
and rounding.
"""

from typing import Annotated

from lora_diag.feature import BASE_ARGUMENT, TUNED_ARGUMENT, Command, Feature, Figure, Section
from lora_diag.running.options import LayerOptions, Option


class GeometryOptions(LayerOptions, total=False):
    """Options of ``geometry``."""

    top: Annotated[int, Option(64, "Dimension of the leading singular spaces of W.", "K", least=1)]
    eta: Annotated[
        float,
        Option(1e-3, "Relative change up to which an entry is unchanged.", "E", between=(0, 1)),
    ]
    draws: Annotated[
        int | None,
        Option(None, "Draws of each baseline; default: 2, small layers 8.", "N", least=1),
    ]
    lens: Annotated[bool, Option(False, "Tokens that the leading directions of ΔW write and read.")]


MADE_BY = "loradiag geometry BASE TUNED -o geometry.jsonl"

FEATURE = Feature(
    __name__,
    "geometry",
    "Research",
    commands=(
        Command(
            help="Where an update lies in the weights, next to baselines.",
            examples=(
                "geometry base/ full_ft/ -o geometry.jsonl",
                "geometry base/ lora_r8/ --layers mlp --lens",
            ),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(GeometryOptions,),
            suggest="lora_diag.diagnostics.intruders.show:suggest_next",
        ),
    ),
    records=(".record:Geometry",),
    functions=(".measure:geometry",),
    statements=".show:geometry_lines",
    grids=".show:geometry_grids",
    section=Section("Geometry of the update"),
    questions=(
        ("movement", "Where does the update lie in the weights?"),
        ("rounding", "Where does the update lie in the weights?"),
        ("above", "Where does the update lie in the weights?"),
    ),
    figures=(
        Figure(
            "geometry",
            "changed entries in small and principal weights, with both baselines",
            page=".figures:make_masks_page",
            made_by=MADE_BY,
            by_color=False,
        ),
        Figure(
            "rotation",
            "rotation of the leading singular spaces, with both baselines",
            needs="geometry",
            page=".figures:make_angles_page",
            made_by=MADE_BY,
            by_color=False,
        ),
        Figure(
            "heads",
            "relative change of every attention head by depth",
            needs="geometry",
            page=".figures:make_heads_page",
            made_by=MADE_BY,
            by_color=False,
        ),
    ),
)
