"""Bytes → named lazy tensors.

The rule on the door: this room knows files, headers, shards and dtypes. It knows no LoRA, no layer and no ΔW, and it
never runs code that a file carries. Opening reads headers only and does not import torch; numbers are read range by
range on request. A format is one file here and one line in ``FORMATS``.
"""

from lora_diag.checkpoints.addresses import shown
from lora_diag.checkpoints.folder import FORMATS, locate, open_checkpoint
from lora_diag.checkpoints.remote import as_path
from lora_diag.checkpoints.tensors import Checkpoint, TensorFile, TensorInfo

__all__ = ["FORMATS", "Checkpoint", "TensorFile", "TensorInfo", "as_path", "locate", "open_checkpoint", "shown"]
