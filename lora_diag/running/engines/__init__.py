"""Engines: the mapping of a diagnostic over layers.

An engine measures layers concurrently, on this machine or on a cluster. It takes descriptors and
yields records in the order of the descriptors, not of completion; arrays never pass through it.
"""

from lora_diag.running.engines.local import MachineLayout, layout_for, run_local
from lora_diag.running.engines.ray import Ray, capacity_of, connect, run_ray

__all__ = ["MachineLayout", "Ray", "capacity_of", "connect", "layout_for", "run_local", "run_ray"]
