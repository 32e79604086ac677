"""What needs a model: the only room that imports transformers, peft or accelerate (extra ``[train]``).

The rule on the door: it gives gradients and records, and leaves what they mean to the other rooms.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_diag.training.recorder import GradientRecorder
    from lora_diag.training.reference import Reference

# Public name -> module that defines it, imported when first used: not every one needs transformers.
_LAZY = {
    "GradientRecorder": "lora_diag.training.recorder",
    "Reference": "lora_diag.training.reference",
}

__all__ = ["GradientRecorder", "Reference"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lora_diag.training' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
