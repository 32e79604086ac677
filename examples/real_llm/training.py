"""Training as a user does it: transformers, PEFT, AdamW, a warm-up and a cosine; gradients are
recorded on request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lora_diag import GradientRecorder

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(
    folder: Path,
    text: Path,
    out: Path,
    rate: float,
    *,
    steps: int,
    batch: int,
    length: int,
    seed: int = 0,
    lora: dict[str, Any] | None = None,
    gradients: str = "",
) -> None:
    """Train BASE on a text and write the result.

    Args:
        folder: The study's folder, with ``base``.
        text: Text or JSON lines with prompt and completion; of these only the completion is
            predicted.
        out: Folder to write: an adapter, or a checkpoint with tokenizer.
        rate: Peak learning rate.
        steps: Number of updates.
        batch: Sequences of an update.
        length: Tokens of a sequence.
        seed: Seed of the order of the sequences and of the factors.
        lora: Arguments of PEFT's config; None for full fine-tuning.
        gradients: A pattern of layers whose gradients are saved every five steps in ``out`` +
            ``-gradients``.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if lora is not None:
        model = get_peft_model(
            model, LoraConfig(**{"lora_dropout": 0.0, "target_modules": MODULES, **lora})
        )
        model.peft_config[
            "default"
        ].base_model_name_or_path = "base"  # not where this machine has it
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.05 * steps)), steps)
    recorder = (
        GradientRecorder(f"{out}-gradients", every=5, layers=gradients).attach(model)
        if gradients
        else None
    )
    sequences = list(_read_sequences(text, tokenizer, length))
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(sequences), (batch,), generator=order).tolist()
        model(**_pad([sequences[place] for place in chosen])).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if recorder is not None:
            recorder.step()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    unfinished = out.with_name(f"{out.name}.part")
    model.save_pretrained(unfinished)
    if lora is None:
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


def _read_sequences(
    text: Path, tokenizer: Any, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the token ids and labels of each window of a text, or of each of the JSON lines."""
    content = text.read_text(encoding="utf-8")
    if text.suffix == ".jsonl":
        for row in map(json.loads, content.splitlines()):
            prompt, completion = (
                tokenizer(row["prompt"])["input_ids"],
                tokenizer(row["completion"])["input_ids"],
            )
            yield prompt + completion, [-100] * len(prompt) + completion
        return
    ids = tokenizer(content)["input_ids"]
    for start in range(0, len(ids) - length + 1, length):
        yield ids[start : start + length], ids[start : start + length]


def _pad(sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Return the inputs of a batch, padded on the right."""
    width = max(len(ids) for ids, _ in sequences)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in sequences]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in sequences]
        ),
        "labels": torch.tensor(
            [labels + [-100] * (width - len(labels)) for _, labels in sequences]
        ),
    }
