"""Records → figures: a panel on anyone's Matplotlib axes, or the whole page.

The rule on the door: the only room that imports Matplotlib; it measures nothing and opens no checkpoint.

    >>> import lora_diag
    >>> from lora_diag import plots
    >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft", layers="mlp")
    >>> ax = plots.energy(results.filter("up_proj"))  # one panel; give ax= to draw into a figure of your own
    >>> page = plots.figure("energy", results, width="column")  # what ``loradiag plot`` writes
    >>> [ax.get_title(loc="left") for ax in page.axes[:3]]
    ['mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj']
"""

from lora_diag.plots.allocation import allocation, budget
from lora_diag.plots.alone import alone
from lora_diag.plots.angles import angles
from lora_diag.plots.curvature import curvature
from lora_diag.plots.energy import energy
from lora_diag.plots.figures import FIGURES, FigureKind, figure, figure_named, why_not
from lora_diag.plots.fisher import fisher
from lora_diag.plots.fleet import fleet
from lora_diag.plots.heatmap import heatmap
from lora_diag.plots.intrinsic import intrinsic
from lora_diag.plots.outputs import depth, outputs
from lora_diag.plots.overlap import overlap
from lora_diag.plots.residual import residual
from lora_diag.plots.sensitivity import sensitivity
from lora_diag.plots.series import drawn
from lora_diag.plots.spectrum import spectrum
from lora_diag.plots.style import FORMATS, encoded
from lora_diag.plots.sweep import sweep
from lora_diag.plots.truncation import truncation
from lora_diag.plots.union import union

__all__ = [
    "FIGURES",
    "FORMATS",
    "FigureKind",
    "allocation",
    "alone",
    "angles",
    "budget",
    "curvature",
    "depth",
    "drawn",
    "encoded",
    "energy",
    "figure",
    "figure_named",
    "fisher",
    "fleet",
    "heatmap",
    "intrinsic",
    "outputs",
    "overlap",
    "residual",
    "sensitivity",
    "spectrum",
    "sweep",
    "truncation",
    "union",
    "why_not",
]
