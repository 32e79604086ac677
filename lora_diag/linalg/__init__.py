"""torch matrices → norms, factors and bounds.

Independent of names, files and LoRA. ``METHODS`` lists the methods of ``decompose``.
"""

from lora_diag.linalg.devices import resolve_device, use_own_stream
from lora_diag.linalg.difference import Difference, difference, first_non_finite, norm
from lora_diag.linalg.distance import compare_blocks, factor_moments, principal_cosines
from lora_diag.linalg.exact import Factors, decompose_factored, numerical_rank, rounding_threshold
from lora_diag.linalg.methods import (
    METHODS,
    Allowance,
    check_request,
    decompose,
    decompose_streamed,
    require_memory,
    whole_bytes,
)
from lora_diag.linalg.streamed import Streamed

__all__ = [
    "METHODS",
    "Allowance",
    "Difference",
    "Factors",
    "Streamed",
    "check_request",
    "compare_blocks",
    "decompose",
    "decompose_factored",
    "decompose_streamed",
    "difference",
    "factor_moments",
    "first_non_finite",
    "norm",
    "numerical_rank",
    "principal_cosines",
    "require_memory",
    "resolve_device",
    "rounding_threshold",
    "use_own_stream",
    "whole_bytes",
]
