"""Merges of an adapter, and BASE alone, rounded to storage formats and written dequantized; a
checkpoint as GGUF.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize, quantize
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def _round_fp8(weight: Tensor) -> Tensor:
    """Return a matrix in float8_e4m3fn with one scale per row, as float32."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def _round_gguf(weight: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Return a matrix in a block format of llama.cpp, as float32."""
    return torch.from_numpy(
        dequantize(quantize(np.ascontiguousarray(weight.numpy()), kind), kind).copy()
    )


# By the names that ``plan-merge --to`` has.
ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda weight: weight.bfloat16().float(),
    "fp8": _round_fp8,
    "mxfp4": lambda weight: _round_gguf(weight, GGMLQuantizationType.MXFP4),
    **{
        kind.name.lower(): lambda weight, kind=kind: _round_gguf(weight, kind)
        for kind in (
            GGMLQuantizationType.Q8_0,
            GGMLQuantizationType.Q4_0,
            GGMLQuantizationType.Q4_1,
        )
    },
}


@torch.no_grad()
def write_merge(folder: Path, adapter: Path, name: str) -> None:
    """Write ``rounded-NAME`` and ``merged-NAME``: the linear layers of BASE and of the merge,
    rounded to a format.

    Args:
        folder: The study's folder, with ``base``.
        adapter: The adapter to merge.
        name: Name of the format.
    """
    for out, merge in ((f"rounded-{name}", False), (f"merged-{name}", True)):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        if merge:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        for key, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in key:
                module.weight.copy_(ROUND[name](module.weight))
        model.save_pretrained(folder / out)
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / out)


def write_gguf(base: Path, checkpoint: Path, out: Path) -> None:
    """Write BASE's GGUF file with the linear layers of a checkpoint in Q4_1, with the order of rows
    of llama.cpp.

    Args:
        base: GGUF file of BASE, a Llama whose linear layers are in Q4_1.
        checkpoint: Folder of a checkpoint of the same model.
        out: File to write.
    """
    unfinished = out.with_suffix(".part")
    shutil.copy(base, unfinished)
    file = GGUFReader(unfinished, "r+")
    stored = {
        tensor.name: tensor
        for tensor in file.tensors
        if tensor.tensor_type == GGMLQuantizationType.Q4_1
    }
    heads = {
        part: int(file.fields[f"llama.attention.head_count{key}"].contents())
        for part, key in (("q", ""), ("k", "_kv"))
    }
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, int(file.fields["llama.block_count"].contents()))
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        tensor = stored.get(names.get_name(name, (".weight",)) or "")
        if tensor is None:
            continue
        rows = weight.numpy()
        if (part := name.split(".")[-2].removesuffix("_proj")) in heads:
            rows = (
                rows.reshape(heads[part], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
            )
        tensor.data[:] = quantize(np.ascontiguousarray(rows), GGMLQuantizationType.Q4_1)
    file.data.flush()
    unfinished.rename(out)
