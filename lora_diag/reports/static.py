"""The static figures of a page, those of ``loradiag plot``: what it shows where no script runs."""

from __future__ import annotations

import base64

from lora_diag.errors import InputError
from lora_diag.planning.evidence import Evidence
from lora_diag.reports.html import Picture
from lora_diag.reports.subject import labels

# Bytes from which on an SVG gives way to a PNG.
LARGE = 400_000


def pictures_of(evidence: Evidence) -> list[Picture]:
    """Return every figure that the records give.

    Raises:
        InputError: Matplotlib is not installed.
    """
    try:
        from lora_diag.plots.figures import FIGURES, usable, why_not
        from lora_diag.plots.series import Options, series_of
        from lora_diag.plots.style import SLIDE, encoded
    except ImportError as error:
        raise InputError(f"an HTML report needs {error.name}: pip install 'loradiag[report]'") from error
    names = labels([source.name for source in evidence.sources])
    series = series_of([source.results for source in evidence.sources], names)
    options = Options("layer", None, None)
    pictures = []
    for kind in FIGURES:
        if why_not(kind, series, options) is None:
            figure = kind.draw(usable(kind, series, options), SLIDE, options)
            drawn, form = encoded(figure, "svg", SLIDE), "svg+xml"
            if len(drawn) > LARGE:
                drawn, form = encoded(figure, "png", SLIDE), "png"
            pictures.append(Picture(kind.shows, f"Figure of {kind.name}: {kind.shows}.", _address(drawn, form)))
    return pictures


def _address(drawn: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(drawn).decode()}"
