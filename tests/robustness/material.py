"""Small, whole inputs of every kind that is read, from which the damaged ones are made."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

import lora_diag
from tests.adapters.making import normal, write
from tests.adapters.test_fuzz import STARTS
from tests.conftest import save_model, save_sharded
from tests.storage import packed
from tests.storage.gguf_files import llama, write_gguf
from tests.storage.quantizing import eight_bit, four_bit, scaled
from tests.storage.sharding import Canary, save_dcp
from tests.storage.test_patches import patch as save_patch
from tests.storage.test_zero import save_zero

W = "a.weight"
QUANTIZED: dict[str, dict[str, torch.Tensor]] = {
    "nf4": four_bit(W, (5, 13), block=8, nested=4)[0],
    "int8": eight_bit("a", (4, 6))[0],
    "fp8": scaled(W, (9, 7), (3, 2), (4, 4))[0],
    "rows": scaled(W, (5, 6), (5,), (1, 6), suffix="_scale")[0],
}
# Name -> tensors, weights and steps; configuration.
PACKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "ct": (
        packed.compressed("a", (6, 16), groups=2, zeros=True, ordered=True),
        {"quant_method": "compressed-tensors"},
    ),
    "nvfp4": (packed.float4("a", (4, 32)), {"quant_method": "compressed-tensors"}),
    "gptq": (packed.gptq("a", (16, 8)), {"quant_method": "gptq"}),
    "awq": (packed.awq("a", (8, 6)), {"quant_method": "awq", "version": "gemm"}),
    "mlx": (packed.mlx("a", (4, 64)), {"bits": 4, "group_size": 32}),
    "mxfp4": (packed.experts("a.experts.down_proj", (2, 32, 5)), {"quant_method": "mxfp4"}),
}
FP8_CONFIG = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
    "model_type": "llama",
}
SHAPES = {"lm_head.weight": (20, 12)} | {
    f"model.layers.{block}.{name}.weight": shape
    for block in range(2)
    for name, shape in {
        "self_attn.q_proj": (12, 12),
        "mlp.up_proj": (16, 12),
        "norm": (12,),
    }.items()
}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 12, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 20,
    "tie_word_embeddings": False,
}  # fmt: skip
POLICY = """title = "before it ships"

[coverage]
by = "energy"
minimum = 0.9
left_out = ["vector"]

[checks]
dead = "warning"

[[rule]]
name = "low-rank"
require = "energy.8 >= 0.1"
layers = "self_attn"
severity = "warning"
message = "train longer"

[[rule]]
name = "near"
require = "stable_rank < 100"
exclude = "lm_head"
depth = [0, 1]

[[waiver]]
rule = "near"
layers = "up_proj"
reason = "known"
expires = 2099-01-01
"""


def make(folder: Path) -> Path:
    """Write everything."""
    before = {name: torch.tensor(normal(*shape, seed=1)).float() for name, shape in SHAPES.items()}
    after = {n: v + 0.1 * torch.tensor(normal(*v.shape, seed=2)).float() for n, v in before.items()}
    save_model(folder / "base", before, CONFIG)
    save_model(folder / "tuned", after)
    save_sharded(folder / "sharded", after, shards=2)
    save_sharded(folder / "bins", after, shards=2, suffix="bin")
    torch.save(after, folder / "zip.pt")
    torch.save(after, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    (folder / "runs.pt").write_bytes(pickle.dumps({"w": Canary(folder / "ran")}, protocol=2))
    save_dcp(
        folder / "dcp",
        after,
        {"lm_head.weight": [[20], [6, 6]], "model.layers.0.mlp.up_proj.weight": [[9, 7], [12]]},
    )
    save_zero(folder / "zero", 2)
    changes = {
        name: ([5, 1, 9], torch.ones(3))
        for name in ("lm_head.weight", "model.layers.1.norm.weight")
    }
    save_patch(folder / "patch.safetensors", changes)
    (folder / "ranks").mkdir()
    for rank in range(2):
        part = {name: value.chunk(2)[rank].clone() for name, value in after.items()}
        torch.save(part, folder / "ranks" / f"model_world_size_2_rank_{rank}.pt")
    for name, tensors in QUANTIZED.items():
        save_model(folder / name, tensors, FP8_CONFIG if name == "fp8" else None)
    for name, ((tensors, *_), settings) in PACKED.items():
        save_model(folder / name, tensors, {"quantization_config": settings})
    adapters(folder, after)
    write_gguf(
        folder / "gguf.gguf",
        llama(2, 2),
        {
            "blk.0.attn_q.weight": ("Q8_0", (8, 32), bytes(range(34)) * 8),
            "blk.0.ffn_up.weight": ("Q4_K", (2, 256), bytes(range(144)) * 2),
            "blk.0.ffn_down.weight": ("MXFP4", (4, 32), bytes(range(100, 117)) * 4),
            "token_embd.weight": normal(6, 4, seed=3),
        },
    )
    (folder / "policy.toml").write_text(POLICY)
    for name in ("adapter-basic", "merge", "full-ft-drift"):
        shutil.copy(
            Path(lora_diag.__file__).parent / "gating" / "policies" / f"{name}.toml", folder
        )
    save_model(folder / "gradients", {n: v for n, v in before.items() if v.ndim == 2})
    (folder / "gradients" / "model.safetensors").rename(
        folder / "gradients" / "grad_step000005.safetensors"
    )
    results(folder)
    return folder


def adapters(folder: Path, base: dict[str, torch.Tensor]) -> None:
    """Write one adapter of every family, and the base of those that are not of the model above."""
    weights = {"fc.weight": normal(8, 6), "fc.bias": normal(8), "embed.weight": normal(8, 6)}
    write(folder / "fc" / "model.safetensors", weights)
    for number, (config, shapes) in enumerate(STARTS):
        at = folder / "adapters" / f"{number:02d}"
        name = (
            "adapter_model.safetensors"
            if config is not None
            else "pytorch_lora_weights.safetensors"
        )
        write(at / name, {key: normal(*shape) for key, shape in shapes.items()})
        if config is not None:
            (at / "adapter_config.json").write_text(json.dumps(config))
    for seed, name in enumerate(("lora", "lora2")):
        tensors = {}
        for key, value in base.items():
            if value.ndim == 2 and "lm_head" not in key:
                path = f"base_model.model.{key.removesuffix('.weight')}"
                tensors[f"{path}.lora_A.weight"] = normal(2, value.shape[1], seed=seed)
                tensors[f"{path}.lora_B.weight"] = normal(value.shape[0], 2, seed=seed + 9)
        write(folder / name / "adapter_model.safetensors", tensors)
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "up_proj"],
        }
        config |= {"rank_pattern": {}, "alpha_pattern": {"up_proj": 5}}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))


def results(folder: Path) -> None:
    """Measure the model above with every command that writes results."""
    base, tuned, lora, lora2 = (folder / name for name in ("base", "tuned", "lora", "lora2"))
    runs = folder / "runs"
    runs.mkdir()
    lora_diag.spectrum(base, tuned, output=runs / "spectrum.jsonl")
    lora_diag.residual(base, tuned, [lora, lora2], output=runs / "residual.jsonl")
    lora_diag.overlap(base, tuned, [folder / "gradients"], output=runs / "overlap.jsonl")
    lora_diag.interference([lora, lora2], base=base, output=runs / "interference.jsonl")
    lora_diag.intruders(base, tuned, output=runs / "intruders.jsonl")
    lora_diag.verify_merge(base, lora, tuned, output=runs / "verify-merge.jsonl")
    lora_diag.fleet([lora, lora2], output=runs / "fleet.jsonl")
    lora_diag.allocate(runs / "spectrum.jsonl", params="300").write(runs / "allocation.jsonl")
    lora_diag.gate(folder / "policy.toml", runs / "spectrum.jsonl").write(runs / "gate.jsonl")
    lora_diag.extract(base, tuned, folder / "extracted", rank=2).write(runs / "extraction.jsonl")
