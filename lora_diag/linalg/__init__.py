"""torch matrices → norms, factors and bounds.

Independent of names, files and LoRA. A method is one file in this package, named after the method or its paper, and one
line in ``METHODS``.
"""

from lora_diag.linalg.decompose import METHODS, check_request, decompose
from lora_diag.linalg.devices import own_stream, resolve_device
from lora_diag.linalg.difference import Difference, difference, first_non_finite, norm
from lora_diag.linalg.distance import Products, principal_cosines, products, root
from lora_diag.linalg.factored import decompose_factored
from lora_diag.linalg.factors import Factors, grain, numerical_rank
from lora_diag.linalg.limited import Allowance, decompose_streamed, require, whole_bytes
from lora_diag.linalg.streamed import Streamed

__all__ = [
    "METHODS",
    "Allowance",
    "Difference",
    "Factors",
    "Products",
    "Streamed",
    "check_request",
    "decompose",
    "decompose_factored",
    "decompose_streamed",
    "difference",
    "first_non_finite",
    "grain",
    "norm",
    "numerical_rank",
    "own_stream",
    "principal_cosines",
    "products",
    "require",
    "resolve_device",
    "root",
    "whole_bytes",
]
