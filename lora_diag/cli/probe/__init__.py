"""``loradiag probe``: the diagnostics that run a model; one file each."""

from lora_diag.cli.probe.activations import activations
from lora_diag.cli.probe.curvature import curvature
from lora_diag.cli.probe.fisher import fisher
from lora_diag.cli.probe.intrinsic import intrinsic
from lora_diag.cli.probe.outputs import outputs
from lora_diag.cli.probe.sensitivity import sensitivity
from lora_diag.cli.probe.sweep import sweep
from lora_diag.cli.probe.truncation import truncation

PROBES = (truncation, activations, outputs, sweep, sensitivity, fisher, curvature, intrinsic)

__all__ = ["PROBES"]
