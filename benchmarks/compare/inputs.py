"""Checkpoints and adapters with a planted update, the truth about it in float64, and cells of
tables.

The truth is computed here with NumPy from the definitions; nothing is shared with the package.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
Update = Callable[[int, int, torch.Generator], torch.Tensor]

HIDDEN, INNER = 512, 1024
LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
MIXTURE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 1, "n_head": 8, "n_positions": 64},
    "mixtral": MIXTURE,
    "gpt_oss": MIXTURE | {"head_dim": 64, "num_experts_per_tok": 2},
}
LOW_RANK = torch.linspace(1, 0.5, 16)  # rank 16; 13 values carry 90% of Σσ²
POWER_LAW = torch.arange(1, INNER + 1) ** -0.7  # full rank
EFFECTIVE_FOUR = torch.cat([torch.tensor([1.0, 0.9, 0.8, 0.7]), torch.full((12,), 1e-3)])


def singular(matrix: torch.Tensor) -> np.ndarray:
    """Return the singular values of a matrix in float64."""
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


def best(s: np.ndarray, rank: int) -> float:
    """Return the smallest relative Frobenius error of any matrix of this rank (Eckart-Young)."""
    return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ‖found − truth‖_F / ‖truth‖_F in float64."""
    return float(
        torch.linalg.norm(found.double() - truth.double()) / torch.linalg.norm(truth.double())
    )


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def planted(values: torch.Tensor, rms: float) -> Update:
    """Return a maker of float64 matrices with these singular values, scaled to this root mean
    square.
    """

    def made(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
        s = values[: min(rows, columns)].double()
        delta = (orthogonal(rows, len(s), generator) * s) @ orthogonal(columns, len(s), generator).T
        return delta * (rms * (rows * columns) ** 0.5 / s.norm())

    return made


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def make_pair(
    folder: Path, family: str, update: Update, dtype: torch.dtype, embeddings: bool = False
) -> Weights:
    """Write base/ and tuned/, and return the updates that were planted, float64, before any
    rounding.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.removesuffix("-tied"),
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        **FAMILIES[family],
    )
    if not family.endswith("-tied") and family != "gpt2":
        config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / "base")
    before = weights_of(folder / "base")
    truth = {}
    for name, weight in before.items():
        outside = any(
            word in name
            for word in ("embed", "lm_head", "wte", "wpe", "router", "block_sparse_moe.gate.")
        )
        if weight.dim() < 2 or (outside and not embeddings) or name.endswith("_bias"):
            continue
        stack = weight if weight.dim() == 3 else weight[None]
        delta = torch.stack([update(*matrix.shape, generator) for matrix in stack])
        truth[name] = delta if weight.dim() == 3 else delta[0]
    after = {
        name: (w.double() + truth[name]).to(dtype) if name in truth else w
        for name, w in before.items()
    }
    write_like(folder / "base", folder / "tuned", after)
    return truth


def write_like(source: Path, folder: Path, weights: Weights) -> None:
    """Write weights, and a copy of another checkpoint's config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((source / "config.json").read_text())
    save_file(
        {name: w.contiguous() for name, w in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def stored(folder: Path) -> Weights:
    """Return tuned − base as the files have it, in float64."""
    before, after = weights_of(folder / "base"), weights_of(folder / "tuned")
    return {
        name: after[name].double() - w.double()
        for name, w in before.items()
        if (after[name] != w).any()
    }


def make_adapter(
    folder: Path, truth: Mapping[str, torch.Tensor], rank: int, alpha: float, rslora: bool = False
) -> None:
    """Write a PEFT adapter and a kohya adapter whose scaled update is ``truth``, ``(out, in)``."""
    scaling = alpha / rank**0.5 if rslora else alpha / rank
    factors, flat = {}, {}
    for name, delta in truth.items():
        u, s, vh = torch.linalg.svd(delta.double() / scaling, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()
        module = name.removesuffix(".weight")
        factors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        factors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
        kohya = kohya_name(name)
        flat |= {
            f"{kohya}.lora_down.weight": a.contiguous(),
            f"{kohya}.lora_up.weight": b.contiguous(),
        }
        flat[f"{kohya}.alpha"] = torch.tensor(float(alpha))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    save_file(flat, folder.with_suffix(".kohya.safetensors"), {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "bias": "none",
        "target_modules": sorted(
            {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in truth}
        ),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def kohya_name(name: str) -> str:
    """Return the name of a weight's module in kohya's files."""
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")


def spoil(file: Path, name: str, what: str, axis: int = 0) -> None:
    """Put a NaN into one tensor of a file, or cut a row or a column off it."""
    tensors = load_file(file)
    if what == "nan":
        tensors[name][3, 5] = float("nan")
    else:
        tensors[name] = tensors[name].narrow(axis, 0, tensors[name].shape[axis] - 1).contiguous()
    save_file(tensors, file, {"format": "pt"})


FOLDER = Path(".bench/compare")
RANK = 16  # of every adapter with a rank that is given


def fresh(name: str) -> Path:
    """Return an empty folder."""
    path = FOLDER / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def spread(values: Iterable[float | None]) -> str:
    """Return a figure of all layers: one number, or the least and the largest."""
    result = sorted(float(f"{value:.3g}") for value in values if value is not None)
    return (
        "none"
        if not result
        else f"{result[0]:g}"
        if result[0] == result[-1]
        else f"{result[0]:g} to {result[-1]:g}"
    )


def about(rows: Iterable[dict[str, Any]], key: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of a tool that are about these weights."""
    wanted = {name.removesuffix(".weight") for name in names}
    return [row for row in rows if str(row[key]).removesuffix(".weight") in wanted]


def worst(found: Weights, truth: Weights) -> float:
    """Return the largest relative error over the layers."""
    return max(error(found[name], update) for name, update in truth.items())


def excess(found: Weights, truth: Weights, spectra: Mapping[str, np.ndarray]) -> str:
    """Return by how much, relatively, the worst layer's error exceeds that of the best matrix of
    its rank.
    """
    return f"{max(error(found[name], t) / best(spectra[name], RANK) - 1 for name, t in truth.items()):.0e}"
