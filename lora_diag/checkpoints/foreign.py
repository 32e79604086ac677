"""Files and folders that hold weights in a form that is not read: told by their names, with the way out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lora_diag.errors import InputError

DCP = (
    "is a torch.distributed checkpoint, whose table of contents is a pickle and is not read; convert it first: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} out.pt"
)
DEEPSPEED = "is a DeepSpeed checkpoint; convert it first: python {tool} {root} out --safe_serialization"
FSDP = "holds FSDP shards; convert them first: accelerate merge-weights {shards} out"

# Pattern of a file name -> what it betrays. The first that matches speaks.
FOREIGN = (
    ("adapter_config.json", "is an adapter, not a checkpoint; a full model is wanted here"),
    ("pytorch_model_fsdp_*", FSDP),
    (".metadata", DCP),
    ("*.distcp", DCP),
    ("global_step*", DEEPSPEED),
    ("*zero_pp_rank_*", DEEPSPEED),
    ("mp_rank_*_model_states.pt", DEEPSPEED),
    ("*.gguf", "is GGUF, which is quantized for inference; give the checkpoint it was made from"),
)
# What lies inside the folder of a step rather than beside it.
INSIDE_STEP = ("*zero_pp_rank_*", "mp_rank_*_model_states.pt")


def refuse_foreign(folder: Path, names: Sequence[str]) -> None:
    """Refuse weights in a form that is not read, with the command that converts them.

    Args:
        folder: Where they lie.
        names: The names to look at: all of a folder without readable weights, or the one file that was asked for.

    Raises:
        InputError: One of the names betrays such a form.
    """
    for pattern, message in FOREIGN:
        for name in names:
            if fnmatchcase(name, pattern):
                root = folder.parent if pattern in INSIDE_STEP else folder
                words = {"folder": folder, "root": root, "tool": root / "zero_to_fp32.py", "shards": folder / name}
                quoted = {key: shlex.quote(str(path)) for key, path in words.items()}
                raise InputError(f"{folder / name}: {message.format(**quoted)}")
