"""``loradiag probe``: the diagnostics that run a model; one file each."""

from lora_diag.probes.activations.command import activations
from lora_diag.probes.curvature.command import curvature
from lora_diag.probes.fisher.command import fisher
from lora_diag.probes.intrinsic.command import intrinsic
from lora_diag.probes.outputs.command import outputs
from lora_diag.probes.sensitivity.command import sensitivity
from lora_diag.probes.sweep.command import sweep
from lora_diag.probes.truncation.command import truncation

PROBES = (truncation, activations, outputs, sweep, sensitivity, fisher, curvature, intrinsic)

__all__ = ["PROBES"]
