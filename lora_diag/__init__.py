"""loradiag: rank diagnostics for fine-tuned models.

The functions mirror the commands and are imported when first used:

    >>> import lora_diag
    >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft")
    >>> len(results)
    30
"""

from typing import TYPE_CHECKING, Any

from lora_diag.errors import InconclusiveError as InconclusiveError
from lora_diag.errors import InputError as InputError
from lora_diag.errors import LoradiagError as LoradiagError
from lora_diag.errors import NothingComparedError as NothingComparedError
from lora_diag.errors import UsageError as UsageError
from lora_diag.version import __version__ as __version__

if TYPE_CHECKING:
    from lora_diag.catalog import read_results as read_results
    from lora_diag.decisions.allocate.run import allocate as allocate
    from lora_diag.decisions.extract.run import extract as extract
    from lora_diag.decisions.merge.run import merge as merge
    from lora_diag.decisions.plan.measure import plan as plan
    from lora_diag.decisions.plan_merge.measure import plan_merge as plan_merge
    from lora_diag.decisions.recover.measure import recover as recover
    from lora_diag.diagnostics.checkpoints.axolotl import AxolotlPlugin as AxolotlPlugin
    from lora_diag.diagnostics.checkpoints.measure import checkpoints as checkpoints
    from lora_diag.diagnostics.checkpoints.monitor import LoraMonitor as LoraMonitor
    from lora_diag.diagnostics.fleet.measure import fleet as fleet
    from lora_diag.diagnostics.geometry.measure import geometry as geometry
    from lora_diag.diagnostics.interference.measure import interference as interference
    from lora_diag.diagnostics.intruders.measure import intruders as intruders
    from lora_diag.diagnostics.overlap.measure import overlap as overlap
    from lora_diag.diagnostics.overlap.measure import subspaces as subspaces
    from lora_diag.diagnostics.overlap.recorder import GradientRecorder as GradientRecorder
    from lora_diag.diagnostics.portability.measure import make_portable as make_portable
    from lora_diag.diagnostics.portability.measure import portability as portability
    from lora_diag.diagnostics.residual.measure import residual as residual
    from lora_diag.diagnostics.spectrum.run import spectrum as spectrum
    from lora_diag.diagnostics.verify_merge.measure import verify_merge as verify_merge
    from lora_diag.gating.run import gate as gate
    from lora_diag.inspection.run import inspect as inspect
    from lora_diag.linting.run import lint as lint
    from lora_diag.plots.run import plot as plot
    from lora_diag.probes.activations.measure import probe_activations as probe_activations
    from lora_diag.probes.curvature.measure import probe_curvature as probe_curvature
    from lora_diag.probes.fisher.measure import probe_fisher as probe_fisher
    from lora_diag.probes.gain.measure import probe_gain as probe_gain
    from lora_diag.probes.intrinsic.measure import probe_intrinsic as probe_intrinsic
    from lora_diag.probes.outputs.measure import probe_outputs as probe_outputs
    from lora_diag.probes.sensitivity.measure import probe_sensitivity as probe_sensitivity
    from lora_diag.probes.strength.measure import probe_strength as probe_strength
    from lora_diag.probes.sweep.measure import probe_sweep as probe_sweep
    from lora_diag.probes.truncation.measure import probe_truncation as probe_truncation
    from lora_diag.records import Results as Results
    from lora_diag.reports.run import report as report
    from lora_diag.running.engines import Ray as Ray
    from lora_diag.tuning.run import tune as tune

# Public names besides the functions of the features.
_OTHER_EXPORTS = {
    "Ray": "lora_diag.running.engines",
    "Results": "lora_diag.records",
    "read_results": "lora_diag.catalog",
}


def __getattr__(name: str) -> Any:
    """Return a public name, imported when it is first used: ``import lora_diag`` is fast.

    Raises:
        AttributeError: There is no such name.
    """
    from importlib import import_module
    from importlib.util import find_spec

    if not name.startswith("_"):
        from lora_diag.calls import for_python
        from lora_diag.catalog import find_function

        if name in _OTHER_EXPORTS:
            return for_python(getattr(import_module(_OTHER_EXPORTS[name]), name))
        # ``from lora_diag import catalog`` asks here first, and must load no plugin.
        # A folder without modules, as an update of a clone may leave, is no package of that name.
        package = find_spec(f"{__name__}.{name}")
        if (package is None or package.origin is None) and (load := find_function(name)):
            return for_python(load())
    raise AttributeError(f"module 'lora_diag' has no attribute {name!r}")


def __dir__() -> list[str]:
    from lora_diag.catalog import functions as functions

    exported = {
        name for name, value in globals().items() if isinstance(value, type) and value is not Any
    }
    return sorted({"__version__", *exported, *_OTHER_EXPORTS, *functions()})
