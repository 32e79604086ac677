"""How a diagnostic is mapped over layers.

The rule on the door: this is the only room with a loop over layers. An engine takes descriptors and gives records, in
the order of the descriptors, whatever finishes first; arrays never pass through it.
"""

from lora_diag.running.engines.connection import Ray
from lora_diag.running.engines.local import Layout, layout_for, run_local
from lora_diag.running.engines.ray import run_ray

__all__ = ["Layout", "Ray", "layout_for", "run_local", "run_ray"]
