"""Tiny models of transformers, and losses computed without the package."""

import json
import math
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file

from lora_diag.models import training
from tests.conftest import ROOT
from tests.oracles import best_approximation

SAMPLES = ROOT / "sample_checkpoints"
EVAL = SAMPLES / "eval"
best = best_approximation


def some_text(
    folder: Path, name: str = "held_out", windows: int = 3, length: int = 32, source="in_domain"
) -> Path:
    """The beginning of a sample text: so many windows, and a rest that is to be dropped."""
    path = folder / f"{name}.txt"
    path.write_bytes((EVAL / f"{source}.txt").read_bytes()[: windows * length + length // 2])
    return path


def training_case(folder: Path) -> tuple[Path, Path, Path, Path]:
    """BASE, a text to train on, one held out, one shifted."""
    texts = (("train", 7, "in_domain"), ("held_out", 4, "shifted"), ("other", 3, "shifted"))
    return gpt2(folder / "base"), *(
        some_text(folder, name, windows, source=source) for name, windows, source in texts
    )


def diverge_at(monkeypatch, diverging: float) -> None:
    """Let training with this peak rate diverge."""
    real = training.rate_at
    monkeypatch.setattr(
        training, "rate_at", lambda s, n, peak: math.nan if peak == diverging else real(s, n, peak)
    )


def gpt2(folder: Path, seed: int = 0, positions: int = 32) -> Path:
    """Tied head, Conv1D layers, biases; a vocabulary of 256."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=positions,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
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


def opened(folder: Path, adapter: Path | None = None, **options):
    """The model of a folder, as transformers builds it and PEFT adapts it, in evaluation mode."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, **options)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


def moved(base: Path, folder: Path, size: float = 0.1, seed: int = 7) -> Path:
    """The same model with all weights moved."""
    rng, model = torch.Generator().manual_seed(seed), opened(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * size)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a folder, float64."""
    files = sorted(folder.glob("*.safetensors"))
    return {
        name: value.double().numpy() for file in files for name, value in load_file(file).items()
    }


def window_losses(
    folder: Path, weights: dict[str, np.ndarray], text: Path, length: int
) -> np.ndarray:
    """Mean loss of each whole window, by the model's own loss."""
    model = opened(folder)
    state = {name: torch.from_numpy(value).float() for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        return np.array(
            [
                model(input_ids=one[None], labels=one[None]).loss.item()
                for one in ids_of(text, length)
            ]
        )


def ids_of(text, length=32):
    """The bytes of a text in whole windows."""
    ids = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].view(-1, length)


def loss_of(model, text: Path) -> float:
    """The mean loss over whole windows, by the model's own loss."""
    ids = ids_of(text)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def trained(
    base, train, held, rank, lr, seed, steps, batch, order, change=lambda model: None, **options
):
    """The loss after training, by a plain loop; of all that ``rank`` names where that
    is no number.
    """
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    change(model)
    torch.manual_seed(seed)
    if isinstance(rank, int):
        model.requires_grad_(False)
        options = {
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "fan_in_fan_out": True,
            **options,
        }
        model = peft.get_peft_model(
            model, peft.LoraConfig(**({"target_modules": "all-linear"} | options))
        )
    for name, parameter in model.named_parameters() if not isinstance(rank, int) else ():
        parameter.requires_grad_(rank == "full" or name.endswith(".bias") or ".ln_" in name)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss_after(
        model,
        weights,
        lambda ids: model(ids, labels=ids).loss,
        train,
        held,
        lr,
        steps,
        batch,
        order,
    )


def loss_after(model, weights, loss_of, train, held, lr, steps, batch, order):
    """The held-out loss after training weights by a plain loop, where ``loss_of`` gives the loss of
    some windows.
    """
    windows, optimizer = ids_of(train), torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    generator, pool = torch.Generator().manual_seed(order), []
    warmup = max(1, round(0.05 * steps))
    model.train()
    for step in range(steps):
        while len(pool) < batch:
            pool += torch.randperm(len(windows), generator=generator).tolist()
        chosen, pool = pool[:batch], pool[batch:]
        rise, fall = (
            (step + 1) / warmup,
            0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps - warmup))),
        )
        optimizer.param_groups[0]["lr"] = lr * (rise if step < warmup else fall)
        optimizer.zero_grad()
        loss_of(windows[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return loss_of(ids_of(held)).item()


def labelled(file: Path, texts, labels=(0, 1, 2)) -> Path:
    """JSON lines of a classifier: texts, and labels in turns."""
    lines = ({"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def lettered(folder, name, count, shift=0):
    """JSON lines of a classifier: one letter of three, repeated, and its class."""
    return labelled(
        folder / f"{name}.jsonl", [chr(97 + i % 3) * (4 + i + shift) for i in range(count)]
    )
