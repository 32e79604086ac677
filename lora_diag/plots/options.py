"""Options of ``plot``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.catalog import figures
from lora_diag.running.options import BY_ROW, LAYERS, OUTPUT, SHOW_RANK, Option

# Derived from all features, including those of installed packages.
_NAMES = ("all", *(figure.name for _, figure in figures()))


class OutputOptions(TypedDict, total=False):
    """The output of the command."""

    output: Annotated[
        Path,
        Option(
            Path("figures"),
            "One .png, .svg or .pdf file, or a folder for all figures.",
            "FILE|FOLDER",
            "-o",
            OUTPUT,
        ),
    ]


class PlotOptions(TypedDict, total=False):
    """Options of ``plot``."""

    figure: Annotated[
        str | None,
        Option(
            None,
            f"One of {', '.join(_NAMES)}; default: all for a folder, the first that can be drawn "
            "for a file.",
            "FIGURE",
            panel=OUTPUT,
            completions=_NAMES,
        ),
    ]
    label: Annotated[
        Sequence[str],
        Option(
            (),
            "Label of each of RESULTS, in order; repeatable.",
            "NAME",
            panel=OUTPUT,
            former="labels",
        ),
    ]
    field: Annotated[
        str | None,
        Option(
            None,
            "Field of the heat map, e.g. energy.16; default: by the records.",
            "FIELD",
            panel=OUTPUT,
        ),
    ]
    show_rank: Annotated[int | None, SHOW_RANK]
    by: Annotated[str, BY_ROW.by("layer")]
    width: Annotated[
        str,
        Option(
            "slide",
            "Width: a paper's column (3.3 in) or a slide (10 in).",
            "column|slide",
            panel=OUTPUT,
        ),
    ]
    format: Annotated[
        str | None,
        Option(
            None,
            "Format; default: by the output's suffix, png in a folder.",
            "png|svg|pdf",
            panel=OUTPUT,
        ),
    ]
    plain: Annotated[
        bool, Option(False, "Omit title and notes, for a paper with its own caption.", panel=OUTPUT)
    ]
    layers: Annotated[str | None, LAYERS]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]
