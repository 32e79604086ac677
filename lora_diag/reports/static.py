"""Static figures of a page, as in ``loradiag plot``, shown without scripts."""

from __future__ import annotations

import base64

from lora_diag.reports.evidence import Evidence
from lora_diag.reports.html import Image


def images_of(evidence: Evidence) -> list[Image]:
    """Return every figure that the records allow."""
    from lora_diag import plots  # deferred: importing Matplotlib takes half a second

    runs = [source.results for source in evidence.sources]
    files = [source.name for source in evidence.sources]
    images = []
    # Name in the page, figure, description, field of a heat map.
    kinds: list[tuple[str, str, str, str | None]] = [(kind.name, kind.name, kind.shows, None) for kind in plots.FIGURES]
    kinds.append(("intruders", "heatmap", "intruder dimensions by module type and depth", "intruders"))
    for name, kind, shows, field in kinds:
        if plots.why_not(kind, runs, field=field) is None:
            drawn = plots.encoded(plots.figure(kind, runs, field=field, files=files), "svg")
            address = f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode()}"
            images.append(Image(name, shows, f"Figure of {name}: {shows}.", address))
    return images
