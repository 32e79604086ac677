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
    from lora_diag.api.allocate import allocate
    from lora_diag.api.extract import extract
    from lora_diag.api.fleet import fleet
    from lora_diag.api.gate import gate
    from lora_diag.api.inspect import inspect
    from lora_diag.api.interference import interference
    from lora_diag.api.intruders import intruders
    from lora_diag.api.overlap import overlap, subspaces
    from lora_diag.api.plan import plan
    from lora_diag.api.plot import plot
    from lora_diag.api.probe import probe_truncation
    from lora_diag.api.probe_activations import probe_activations
    from lora_diag.api.probe_curvature import probe_curvature
    from lora_diag.api.probe_fisher import probe_fisher
    from lora_diag.api.probe_intrinsic import probe_intrinsic
    from lora_diag.api.probe_outputs import probe_outputs
    from lora_diag.api.probe_sensitivity import probe_sensitivity
    from lora_diag.api.probe_sweep import probe_sweep
    from lora_diag.api.report import report
    from lora_diag.api.residual import residual
    from lora_diag.api.spectrum import spectrum
    from lora_diag.api.verify_merge import verify_merge
    from lora_diag.engines import Ray
    from lora_diag.results import Results, read_results

# Public name -> module that defines it.
_LAZY = {
    "Ray": "lora_diag.engines",
    "Results": "lora_diag.results",
    "allocate": "lora_diag.api.allocate",
    "extract": "lora_diag.api.extract",
    "fleet": "lora_diag.api.fleet",
    "gate": "lora_diag.api.gate",
    "inspect": "lora_diag.api.inspect",
    "interference": "lora_diag.api.interference",
    "intruders": "lora_diag.api.intruders",
    "overlap": "lora_diag.api.overlap",
    "plan": "lora_diag.api.plan",
    "plot": "lora_diag.api.plot",
    "probe_activations": "lora_diag.api.probe_activations",
    "probe_curvature": "lora_diag.api.probe_curvature",
    "probe_intrinsic": "lora_diag.api.probe_intrinsic",
    "probe_fisher": "lora_diag.api.probe_fisher",
    "probe_outputs": "lora_diag.api.probe_outputs",
    "probe_sensitivity": "lora_diag.api.probe_sensitivity",
    "probe_sweep": "lora_diag.api.probe_sweep",
    "probe_truncation": "lora_diag.api.probe",
    "read_results": "lora_diag.results",
    "report": "lora_diag.api.report",
    "residual": "lora_diag.api.residual",
    "spectrum": "lora_diag.api.spectrum",
    "subspaces": "lora_diag.api.overlap",
    "verify_merge": "lora_diag.api.verify_merge",
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
