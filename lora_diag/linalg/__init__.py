"""torch matrices → norms, factors and bounds.

The rule on the door: this room knows no names, no files and no LoRA. A method is one file here, named by the method or
its paper, and one line in ``METHODS``.
"""

from lora_diag.linalg.decompose import METHODS, Factors, decompose
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.difference import Difference, difference

__all__ = ["METHODS", "Difference", "Factors", "decompose", "difference", "resolve_device"]
