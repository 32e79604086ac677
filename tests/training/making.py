"""Tiny models of transformers, and losses computed without the package."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import ROOT

SAMPLES = ROOT / "sample_checkpoints"
EVAL = SAMPLES / "eval"


def some_text(folder: Path, name: str = "held_out", windows: int = 3, length: int = 32, source="in_domain") -> Path:
    """The beginning of a sample text: so many windows, and a rest that is to be dropped."""
    path = folder / f"{name}.txt"
    path.write_bytes((EVAL / f"{source}.txt").read_bytes()[: windows * length + length // 2])
    return path


def gpt2(folder: Path, seed: int = 0, positions: int = 32) -> Path:
    """Tied head, Conv1D layers, biases; a vocabulary of 256."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=positions, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def bert(folder: Path, seed: int = 0) -> Path:
    """A classifier of three classes, one of them called ``spam``."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        id2label={0: "ham", 1: "spam", 2: "other"},
        label2id={"ham": 0, "spam": 1, "other": 2},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def moved(base: Path, folder: Path, size: float = 0.1, seed: int = 7) -> Path:
    """The same model with all weights moved."""
    rng = torch.Generator().manual_seed(seed)
    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * size)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a folder, float64."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value.double().numpy() for file in files for name, value in load_file(file).items()}


def best(delta: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of that rank, by NumPy's SVD."""
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def window_losses(folder: Path, weights: dict[str, np.ndarray], text: Path, length: int) -> np.ndarray:
    """Mean loss of each whole window, by the model's own loss."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])(config)
    state = {name: torch.from_numpy(value).float() for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.eval()
    ids = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    windows = ids[: len(ids) // length * length].view(-1, length)
    with torch.no_grad():
        return np.array([model(input_ids=one[None], labels=one[None]).loss.item() for one in windows])
