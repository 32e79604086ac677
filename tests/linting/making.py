"""A small Llama, adapters on it, and configurations, for the rules of ``lint``."""

import json

import torch
import yaml
from safetensors.torch import save_file

from lora_diag.decisions.plan.architectures import weights_of
from tests.conftest import save_model

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
PEFT = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "up_proj"]}
MODULES = [
    f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
]


def make_base(folder, tied=False, dtype=torch.bfloat16, std=0.02):
    """Write a Llama whose weights are N(0, std)."""
    config = {**LLAMA, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    tensors = {
        name: (torch.randn(*shape) * std).to(dtype) for name, shape in weights_of(config, "x")
    }
    save_model(folder, tensors, config)
    return folder


def make_adapter(folder, rank=16, size=0.05, without=(), **config):
    """Write a PEFT adapter on ``MODULES``; B is N(0, size), or zero for 0."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    tensors = {}
    for module in MODULES:
        rows = 192 if "up_proj" in module else 128
        if module not in without:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, 128) / 128**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * size
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PEFT, "r": rank, **config}))
    return folder


def write_config(path, values):
    """Write a configuration in the format of its suffix."""
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return path
