"""Records → figures (extra ``[plot]``): a panel on anyone's Matplotlib axes, or the whole page.

The rule on the door: the only room that imports Matplotlib; it measures nothing and opens no checkpoint.

    >>> import lora_diag
    >>> from lora_diag import plots
    >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft", layers="mlp")
    >>> ax = plots.energy(results.filter("up_proj"))  # one panel; give ax= to draw into a figure of your own
    >>> page = plots.figure("energy", results, width="column")  # what ``loradiag plot`` writes
    >>> [ax.get_title(loc="left") for ax in page.axes[:3]]
    ['mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj']
"""

from lora_diag.decisions.allocate.figures import allocation, budget
from lora_diag.diagnostics.fleet.figures import fleet
from lora_diag.diagnostics.interference.figure_union import union
from lora_diag.diagnostics.interference.figures import angles
from lora_diag.diagnostics.overlap.figures import overlap
from lora_diag.diagnostics.residual.figures import residual
from lora_diag.diagnostics.spectrum.figure_energy import energy
from lora_diag.diagnostics.spectrum.figures import spectrum
from lora_diag.plots.figures import FIGURES, FigureKind, figure, figure_named, why_not
from lora_diag.plots.heatmap import heatmap
from lora_diag.probes.curvature.figures import curvature
from lora_diag.probes.fisher.figures import fisher
from lora_diag.probes.intrinsic.figures import intrinsic
from lora_diag.probes.outputs.figures import depth, outputs
from lora_diag.probes.sensitivity.figures import sensitivity
from lora_diag.probes.sweep.figures import sweep
from lora_diag.probes.truncation.figure_alone import alone
from lora_diag.probes.truncation.figures import truncation
from lora_diag.rendering.figures.series import drawn
from lora_diag.rendering.figures.style import FORMATS, encoded

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
