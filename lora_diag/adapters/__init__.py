"""Adapter folders and files → named ΔW.

The rule on the door: the only room that knows the key names of PEFT, kohya, diffusers, LyCORIS or MLX. Opening reads
headers and configs and does not import torch; a plain low-rank update stays in factored form. A family is one file
here and one line in ``FAMILIES``; what is not read is named in ``refused``.
"""

from lora_diag.adapters.adapter import FAMILIES, Adapter, open_adapter
from lora_diag.adapters.names import Place, bare, is_same_part, match_names
from lora_diag.adapters.orientation import Orientation
from lora_diag.adapters.source import is_adapter
from lora_diag.adapters.updates import Shape

__all__ = [
    "FAMILIES",
    "Adapter",
    "Orientation",
    "Place",
    "Shape",
    "bare",
    "is_adapter",
    "is_same_part",
    "match_names",
    "open_adapter",
]
