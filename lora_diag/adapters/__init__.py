"""Adapter folders and files → named ΔW.

This package knows the key names of PEFT, kohya, diffusers, LyCORIS, MLX and GGUF. Opening reads
headers and configs and imports torch only for torch files; a plain low-rank update stays in
factored form. A family is one module of this package, or a part of one, and one entry of
``FAMILIES``; unsupported kinds are described in ``peft``.
"""

from lora_diag.adapters.adapter import FAMILIES, Adapter, open_adapter, read_adapter
from lora_diag.adapters.locating import Input, is_adapter, locate, open_input
from lora_diag.adapters.names import Location, drop_all_wrappers, is_same_part, match_names
from lora_diag.adapters.placing import Orientation
from lora_diag.adapters.updates import Shape

__all__ = [
    "FAMILIES",
    "Adapter",
    "Input",
    "Location",
    "Orientation",
    "Shape",
    "drop_all_wrappers",
    "is_adapter",
    "is_same_part",
    "locate",
    "match_names",
    "open_adapter",
    "open_input",
    "read_adapter",
]
