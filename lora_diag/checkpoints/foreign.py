"""Files and folders with weights in an unsupported form: recognized by name, and refused with a conversion command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lora_diag.errors import InputError

DCP = "is a part of a torch.distributed checkpoint; give its folder, with the file .metadata in it: {folder}"
DEEPSPEED = (
    "is one file of a DeepSpeed checkpoint; give the folder with those of all ranks, or convert it: "
    "python {tool} {root} out --safe_serialization"
)
FSDP = "holds FSDP shards; convert them first: accelerate merge-weights {shards} out"
ORBAX = (
    "is an Orbax checkpoint (JAX), which is not supported; convert it to safetensors first, for example with orbaxport"
)
MEGATRON = (
    "is a Megatron checkpoint, which is not supported; export it in Hugging Face's format first, for example with "
    "megatron-bridge"
)
TENSORRT = "is a TensorRT engine, whose weights are laid out for one GPU; give the checkpoint from which it was built"
HQQ = "is quantized by HQQ, which is not supported; give the unquantized checkpoint, or analyse the adapter alone"

# Pattern of a file name -> the message; the first match is used.
FOREIGN = (
    ("adapter_config.json", "is an adapter, not a checkpoint; give a full model"),
    ("pytorch_model_fsdp_*", FSDP),
    (".metadata", DCP),
    ("*.distcp", DCP),
    ("*zero_pp_rank_*", DEEPSPEED),
    ("mp_rank_*_model_states.pt", DEEPSPEED),
    ("_CHECKPOINT_METADATA", ORBAX),
    ("manifest.ocdbt", ORBAX),
    ("latest_checkpointed_iteration.txt", MEGATRON),
    ("model_optim_rng.pt", MEGATRON),
    ("*.engine", TENSORRT),
    ("*.plan", TENSORRT),
    ("qmodel.pt", HQQ),
)
# Files inside the folder of a training step, not next to it.
INSIDE_STEP = ("*zero_pp_rank_*", "mp_rank_*_model_states.pt")


def refuse_foreign(folder: Path, names: Sequence[str]) -> None:
    """Refuse weights in an unsupported form, with the command that converts them.

    Args:
        folder: The folder of the files.
        names: File names to check: all of a folder without readable weights, or the one requested file.

    Raises:
        InputError: A name matches such a form.
    """
    for pattern, message in FOREIGN:
        for name in names:
            if fnmatchcase(name, pattern):
                root = folder.parent if pattern in INSIDE_STEP else folder
                paths = {"folder": folder, "root": root, "tool": root / "zero_to_fp32.py", "shards": folder / name}
                quoted = {key: shlex.quote(str(path)) for key, path in paths.items()}
                raise InputError(f"{folder / name}: {message.format(**quoted)}")
