"""Read and write checkpoints: from bytes to lazy named tensors.

This package knows files, headers, shards and dtypes, but no LoRA, layers or ΔW, and never executes
code that a file contains. Opening a checkpoint reads headers and the settings of quantized weights,
and imports torch only for torch files; numbers are read on request, range by range. ``FORMATS``
lists the formats of files, ``locating.FOLDERS`` those of folders.
"""

from lora_diag.storage.addresses import hide_secrets
from lora_diag.storage.locating import Located, check_exists, locate_files
from lora_diag.storage.reading import FORMATS, open_checkpoint, read_checkpoint
from lora_diag.storage.remote import as_path
from lora_diag.storage.tensors import Checkpoint, TensorFile, TensorInfo

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Located",
    "TensorFile",
    "TensorInfo",
    "as_path",
    "check_exists",
    "hide_secrets",
    "locate_files",
    "open_checkpoint",
    "read_checkpoint",
]
