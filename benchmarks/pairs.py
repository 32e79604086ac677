"""Checkpoints to measure on, made on the spot: Llama shapes, bf16, updates of a
power-law spectrum.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measure import llama_layer

# Spectrum σ_i ∝ i^−0.7 and a relative size of 2% of the weights: what full fine-tunes look like
# (C(8) near 0.4).
POWER, SIZE = 0.7, 0.02


def update(
    rows: int, columns: int, generator: torch.Generator, power: float = POWER
) -> torch.Tensor:
    """Return a ΔW with σ_i close to a power law: Gaussian factors, scaled columns; no SVD needed to
    make it.
    """
    k, device = min(rows, columns), generator.device
    left = torch.randn(rows, k, generator=generator, device=device) / rows**0.5
    right = torch.randn(k, columns, generator=generator, device=device) / columns**0.5
    return (left * torch.arange(1, k + 1, device=device) ** -power) @ right


def weight(
    rows: int, columns: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a bf16 weight before and after, made on the device of the generator."""
    base = (
        torch.randn(rows, columns, generator=generator, device=generator.device) * 0.02
    ).bfloat16()
    delta = update(rows, columns, generator)
    delta *= SIZE * base.float().norm() / delta.norm()
    return base.cpu(), (base.float() + delta).bfloat16().cpu()


def make_pair(
    folder: Path, hidden: int, inner: int, kv: int, layers: int, device: str = "cpu"
) -> tuple[Path, Path]:
    """Write base/ and tuned/, one shard a layer, with the config.json that other tools ask for."""
    base, tuned = folder / "base", folder / "tuned"
    if (tuned / "model.safetensors.index.json").exists():
        return base, tuned
    weight_map: dict[str, str] = {}
    generator = torch.Generator(device).manual_seed(0)
    for side in (base, tuned):
        side.mkdir(parents=True, exist_ok=True)
    for layer in range(layers + 1):
        shard = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        before: dict[str, torch.Tensor] = {}
        after: dict[str, torch.Tensor] = {}
        if layer < layers:
            prefix = f"model.layers.{layer}."
            for name, rows, columns in llama_layer(hidden, inner, kv):
                before[prefix + name], after[prefix + name] = weight(rows, columns, generator)
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                before[prefix + name] = after[prefix + name] = torch.ones(hidden).bfloat16()
        else:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                before[name], after[name] = weight(256, hidden, generator)
            before["model.norm.weight"] = after["model.norm.weight"] = torch.ones(hidden).bfloat16()
        save_file(before, base / shard, {"format": "pt"})
        save_file(after, tuned / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(before, shard)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": kv // 64,
        "vocab_size": 256,
        "torch_dtype": "bfloat16",
    }
    for side in (base, tuned):
        (side / "config.json").write_text(json.dumps(config))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (side / "model.safetensors.index.json").write_text(json.dumps(index))
    return base, tuned


def make_file_pair(folder: Path, rows: int, columns: int) -> Path:
    """Write base/ and tuned/, each a file of one matrix."""
    sides = weight(rows, columns, torch.Generator().manual_seed(0))
    for side, matrix in zip(("base", "tuned"), sides, strict=True):
        (folder / side).mkdir(parents=True, exist_ok=True)
        save_file({"w.weight": matrix}, folder / side / "model.safetensors")
    return folder


def make_adapter(
    folder: Path,
    hidden: int,
    inner: int,
    kv: int,
    layers: int,
    rank: int,
    seed: int,
    bits: int = 32,
) -> Path:
    """Write a PEFT LoRA adapter on every matrix of a model, in float32 or in bf16."""
    if (folder / "adapter_model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, rows, columns in llama_layer(hidden, inner, kv):
            key = f"base_model.model.model.layers.{layer}.{name.removesuffix('.weight')}"
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                factor = torch.randn(shape, generator=generator)
                tensors[f"{key}.lora_{side}.weight"] = (
                    factor if bits == 32 else factor.to(torch.bfloat16)
                )
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    what, folder, *sizes = sys.argv[1:]
    {"make_pair": make_pair, "make_file_pair": make_file_pair, "make_adapter": make_adapter}[what](
        Path(folder), *map(int, sizes)
    )
