"""Adapters written by hand, as the formats lay them out; no PEFT involved."""

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lora_diag.adapters import open_adapter
from lora_diag.deltas import DenseDelta, FactoredDelta, StoredDelta
from lora_diag.storage import open_checkpoint


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 numbers, in float64."""
    return (
        np.random.default_rng([seed, *shape])
        .standard_normal(shape)
        .astype(np.float32)
        .astype(np.float64)
    )


def write(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        name: torch.tensor(value, dtype=torch.float32).contiguous()
        for name, value in tensors.items()
    }
    save_file(stored, path, metadata)
    return path


def base(folder: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    write(folder / "base" / "model.safetensors", tensors)
    if config is not None:
        (folder / "base" / "config.json").write_text(json.dumps(config))
    return folder / "base"


def adapter(
    folder: Path, tensors: dict[str, np.ndarray], prefix: str = "base_model.model.", **config
) -> Path:
    """Write a PEFT adapter folder; ``config`` fills its config: LoRA of r = 2, alpha = 3 by
    default.
    """
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "peft_version": "0.21.2"} | config
    write(
        folder / "adapter" / "adapter_model.safetensors",
        {prefix + name: value for name, value in tensors.items()},
    )
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter"


def lora(
    folder: Path,
    updates: dict[str, tuple],
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    **config,
) -> Path:
    """Write a PEFT adapter from ``{layer: (B, A)}``, in their dtype by default: ΔW = scale·B·A."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, (b, a) in updates.items():
        key = f"base_model.model.{layer.removesuffix('.weight')}"
        tensors |= {
            f"{key}.lora_{side}.weight": torch.tensor(np.asarray(x))
            for side, x in (("B", b), ("A", a))
        }
        rank = b.shape[1]
    folder.mkdir(parents=True)
    stored = {name: value.to(dtype or value.dtype).contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": ["q_proj"],
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dense(delta) -> np.ndarray:
    """Return ΔW in float64; the delta makes the trip to another process first."""
    delta = pickle.loads(pickle.dumps(delta))
    if isinstance(delta, StoredDelta):
        rows = [(after.double() - before.double()).numpy() for before, after in delta.blocks()]
        return np.concatenate(rows)
    if isinstance(delta, FactoredDelta):
        b, a = delta.load()
        assert (b.shape[0], a.shape[1]) == delta.shape
        return b.double().numpy() @ a.double().numpy()
    assert isinstance(delta, DenseDelta)
    matrix = delta.load()
    assert tuple(matrix.shape) == delta.shape
    return matrix.double().numpy()


def product(folder: Path, layer: str) -> np.ndarray:
    """Return B·A of a layer of a PEFT adapter, without its scale, by NumPy."""
    factors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{layer.removesuffix('.weight')}"
    return (
        factors[f"{key}.lora_B.weight"].double().numpy()
        @ factors[f"{key}.lora_A.weight"].double().numpy()
    )


def changes(
    path: Path, on: Path | None, **options
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the ΔW of every layer, and the notes."""
    pairing, notes = open_adapter(path).pair(
        open_checkpoint(on) if on is not None else None, **options
    )
    return {delta.layer: dense(delta) for delta in pairing.deltas}, notes


def close(ours: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    """Assert that two matrices are equal up to float32 rounding."""
    expected = expected.reshape(ours.shape)
    assert np.linalg.norm(ours - expected) <= tolerance * max(np.linalg.norm(expected), 1e-30)
