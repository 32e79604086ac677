"""loradiag: rank diagnostics for fine-tuned models.

The functions mirror the commands and are imported when first used:

    >>> import lora_diag
    >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft")
    >>> len(results)
    30
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_diag.errors import InputError, LoradiagError, NothingComparedError, UsageError
from lora_diag.version import __version__

if TYPE_CHECKING:
    from lora_diag.decisions.allocate.run import allocate
    from lora_diag.decisions.extract.run import extract
    from lora_diag.decisions.gate.run import gate
    from lora_diag.decisions.plan.run import plan
    from lora_diag.diagnostics.fleet.run import fleet
    from lora_diag.diagnostics.interference.run import interference
    from lora_diag.diagnostics.intruders.run import intruders
    from lora_diag.diagnostics.overlap.run import overlap, subspaces
    from lora_diag.diagnostics.residual.run import residual
    from lora_diag.diagnostics.spectrum.run import spectrum
    from lora_diag.diagnostics.verify_merge.run import verify_merge
    from lora_diag.inspection.run import inspect
    from lora_diag.plots.run import plot
    from lora_diag.probes.activations.run import probe_activations
    from lora_diag.probes.curvature.run import probe_curvature
    from lora_diag.probes.fisher.run import probe_fisher
    from lora_diag.probes.intrinsic.run import probe_intrinsic
    from lora_diag.probes.outputs.run import probe_outputs
    from lora_diag.probes.sensitivity.run import probe_sensitivity
    from lora_diag.probes.sweep.run import probe_sweep
    from lora_diag.probes.truncation.run import probe_truncation
    from lora_diag.records import Results, read_results
    from lora_diag.reports.run import report
    from lora_diag.running.engines import Ray

# Public name -> module that defines it.
_LAZY = {
    "Ray": "lora_diag.running.engines",
    "Results": "lora_diag.records",
    "allocate": "lora_diag.decisions.allocate.run",
    "extract": "lora_diag.decisions.extract.run",
    "fleet": "lora_diag.diagnostics.fleet.run",
    "gate": "lora_diag.decisions.gate.run",
    "inspect": "lora_diag.inspection.run",
    "interference": "lora_diag.diagnostics.interference.run",
    "intruders": "lora_diag.diagnostics.intruders.run",
    "overlap": "lora_diag.diagnostics.overlap.run",
    "plan": "lora_diag.decisions.plan.run",
    "plot": "lora_diag.plots.run",
    "probe_activations": "lora_diag.probes.activations.run",
    "probe_curvature": "lora_diag.probes.curvature.run",
    "probe_intrinsic": "lora_diag.probes.intrinsic.run",
    "probe_fisher": "lora_diag.probes.fisher.run",
    "probe_outputs": "lora_diag.probes.outputs.run",
    "probe_sensitivity": "lora_diag.probes.sensitivity.run",
    "probe_sweep": "lora_diag.probes.sweep.run",
    "probe_truncation": "lora_diag.probes.truncation.run",
    "read_results": "lora_diag.records",
    "report": "lora_diag.reports.run",
    "residual": "lora_diag.diagnostics.residual.run",
    "spectrum": "lora_diag.diagnostics.spectrum.run",
    "subspaces": "lora_diag.diagnostics.overlap.run",
    "verify_merge": "lora_diag.diagnostics.verify_merge.run",
}

__all__ = [
    "InputError",
    "LoradiagError",
    "NothingComparedError",
    "Ray",
    "Results",
    "UsageError",
    "__version__",
    "allocate",
    "extract",
    "fleet",
    "gate",
    "inspect",
    "interference",
    "intruders",
    "overlap",
    "plan",
    "plot",
    "probe_activations",
    "probe_curvature",
    "probe_fisher",
    "probe_intrinsic",
    "probe_outputs",
    "probe_sensitivity",
    "probe_sweep",
    "probe_truncation",
    "read_results",
    "report",
    "residual",
    "spectrum",
    "subspaces",
    "verify_merge",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lora_diag' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
