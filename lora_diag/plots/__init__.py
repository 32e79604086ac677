"""``plot``: figures of records, as single panels on a user's own Matplotlib axes or as whole pages.

Reads records only; opens no checkpoint.

    >>> import lora_diag
    >>> from lora_diag import plots
    >>> results = lora_diag.spectrum(
    ...     "sample_checkpoints/base", "sample_checkpoints/full_ft", layers="mlp"
    ... )
    >>> ax = plots.energy(
    ...     results.filter("up_proj")
    ... )  # one panel; give ax= to draw into a figure of your own
    >>> page = plots.figure("energy", results, width="column")  # what ``loradiag plot`` writes
    >>> [ax.get_title(loc="left") for ax in page.axes[:3]]
    ['mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj']
"""

from functools import partial
from typing import Any

from lora_diag.feature import RESULTS_ARGUMENT, Command, Feature, Figure, Hint, load

_EXPORTS = {
    "FIGURES": ".run:FIGURES",
    "FORMATS": "lora_diag.rendering.figures.style:FORMATS",
    "encode_figure": "lora_diag.rendering.figures.style:encode_figure",
    "figure": ".run:figure",
    "figure_named": ".run:figure_named",
    "why_not": ".run:why_not",
}


def __getattr__(name: str) -> Any:
    """Return a name of this package, or what draws one panel of the figure of this name, imported
    on first use.
    """
    if name in _EXPORTS:
        return load(_EXPORTS[name], __name__)
    if name not in __dir__():
        raise AttributeError(f"module 'lora_diag.plots' has no attribute {name!r}")
    return partial(load(".run:panel", __name__), name)


def __dir__() -> list[str]:
    from lora_diag.catalog import figures

    return sorted({*_EXPORTS, *(figure.name for _, figure in figures())})


FEATURE = Feature(
    __name__,
    "plot",
    "Show",
    commands=(
        Command(
            help="Draw figures of results for a paper or a slide.",
            examples=(
                'plot a.jsonl b.jsonl --label "full" --label "LoRA" --figure energy -o energy.pdf',
            ),
            arguments=(RESULTS_ARGUMENT,),
            options=(".options:OutputOptions", ".options:PlotOptions"),
            shows=("json", "quiet", "verbose"),
            hints=(Hint("report {results}", "all results on one page"),),
            table=".run:drawn_table",
        ),
    ),
    functions=(".run:plot",),
    figures=(
        Figure(
            "heatmap",
            "a field by module type and depth",
            needs="*",
            by_color=False,
            options=("field", "rank"),
        ),
    ),
)
