"""Makes the sample checkpoints of this folder: a base model, a full fine-tune, two LoRA fine-tunes,
gradients, a run.

A small Llama-architecture byte-level language model is trained on the English text of Python's
reference documentation, then fine-tuned on Python source code, once with all weights and twice with
LoRA. Everything the run needs comes with CPython; nothing is downloaded.

Usage:
    python sample_checkpoints/make.py [--out DIR] [--quick]
"""

import argparse
import hashlib
import json
import math
import shutil
import string
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from platform import python_version
from pydoc_data.topics import topics

import peft
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
STDLIB = Path(sysconfig.get_paths()["stdlib"])

CONTEXT = 256
BATCH = 16
CLIP_NORM = 1.0
ADAM_BETAS = (0.9, 0.95)
# The order of floating-point sums depends on the thread count, so a fixed count is part of being
# reproducible.
THREADS = 2
MODEL_SEED = 0

LORA_RANKS = (4, 16)
LORA_ALPHA_OVER_RANK = 2
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_SEED = 2

RUN_RANK, RUN_EVERY = 4, 10

# Many topics repeat passages of other topics; these five do not (checked in `topics_corpus`).
EVAL_TOPICS = ("binary", "import", "objects", "strings", "typesmapping")
SHARED_RUN_WORDS = 12

PYTHON_PACKAGES = ("asyncio", "email", "json", "unittest")
EVAL_FILES = ("asyncio/queues.py", "email/_policybase.py", "json/encoder.py", "unittest/suite.py")
MAX_PYTHON_BYTES = 1_000_000

# Checkpoint name, then text name, to nats per byte.
Losses = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of one training run; linear warm-up, then cosine decay to zero."""

    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    data_seed: int

    def rate_at(self, step: int) -> float:
        """Learning rate of the update numbered `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Plan:
    """The schedules of all runs.

    `full` and `lora` share steps and data seed, hence see the same batches in order.
    """

    base: Schedule
    full: Schedule
    lora: Schedule

    @property
    def gradient_steps(self) -> tuple[int, ...]:
        """Steps of the full fine-tune whose gradient is kept: the first, 10 %, 50 % and
        the last.
        """
        steps = self.full.steps
        return (0, steps // 10, steps // 2, steps - 1)


PLAN = Plan(
    base=Schedule(steps=1000, warmup=100, learning_rate=2e-3, weight_decay=0.1, data_seed=0),
    full=Schedule(steps=400, warmup=20, learning_rate=5e-4, weight_decay=0.0, data_seed=1),
    lora=Schedule(steps=400, warmup=20, learning_rate=5e-3, weight_decay=0.0, data_seed=1),
)
QUICK_PLAN = Plan(
    base=Schedule(steps=60, warmup=10, learning_rate=2e-3, weight_decay=0.1, data_seed=0),
    full=Schedule(steps=20, warmup=4, learning_rate=5e-4, weight_decay=0.0, data_seed=1),
    lora=Schedule(steps=20, warmup=4, learning_rate=5e-3, weight_decay=0.0, data_seed=1),
)


RUN = Schedule(steps=100, warmup=5, learning_rate=5e-3, weight_decay=0.0, data_seed=0)
QUICK_RUN = Schedule(steps=20, warmup=2, learning_rate=5e-3, weight_decay=0.0, data_seed=0)


@dataclass(frozen=True)
class Corpus:
    """A training text and a held-out text of the same kind, as UTF-8 bytes."""

    train: bytes
    held_out: bytes


def log(message: str) -> None:
    """Reports progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of SHARED_RUN_WORDS consecutive words of `text`, whatever its line breaks."""
    words = text.split()
    return {
        tuple(words[i : i + SHARED_RUN_WORDS]) for i in range(len(words) - SHARED_RUN_WORDS + 1)
    }


def topics_corpus() -> Corpus:
    """English text of `pydoc_data.topics`, split by whole topics.

    Raises:
        ValueError: If a held-out topic shares a passage with a training topic.
    """
    train = [text for name, text in sorted(topics.items()) if name not in EVAL_TOPICS]
    seen = set().union(*map(word_runs, train))
    leaked = [name for name in EVAL_TOPICS if word_runs(topics[name]) & seen]
    if leaked:
        raise ValueError(
            f"held-out topics share passages with training topics: {', '.join(leaked)}"
        )
    held_out = [topics[name] for name in EVAL_TOPICS]
    return Corpus("\n\n".join(train).encode(), "\n\n".join(held_out).encode())


def python_corpus() -> Corpus:
    """Python source of a few standard library packages, split by whole files."""
    held_out = [STDLIB / name for name in EVAL_FILES]
    files = [
        file for package in PYTHON_PACKAGES for file in sorted((STDLIB / package).glob("*.py"))
    ]
    train = b"\n".join(file.read_bytes() for file in files if file not in held_out)
    return Corpus(train[:MAX_PYTHON_BYTES], b"\n".join(file.read_bytes() for file in held_out))


def token_ids(text: bytes) -> Tensor:
    """The bytes of `text` as token ids."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def new_model() -> transformers.LlamaForCausalLM:
    """An untrained model; the same weights at every call."""
    torch.manual_seed(MODEL_SEED)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-byte cross-entropy in nats per byte, the mean over a batch of windows."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def batches(text: bytes, schedule: Schedule) -> Iterator[Tensor]:
    """One batch a step: windows of CONTEXT bytes at random offsets drawn from the data seed."""
    ids = token_ids(text)
    generator = torch.Generator().manual_seed(schedule.data_seed)
    for _ in range(schedule.steps):
        offsets = torch.randint(len(ids) - CONTEXT + 1, (BATCH,), generator=generator)
        yield torch.stack([ids[offset : offset + CONTEXT] for offset in offsets.tolist()])


def train(
    name: str,
    model: nn.Module,
    text: bytes,
    schedule: Schedule,
    after_backward: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains the parameters of `model` that require gradients.

    Args:
        name: What progress reports call this run.
        model: Causal language model; changed in place.
        text: Training text.
        schedule: Hyperparameters of the run.
        after_backward: Called with the step number once the gradient is there, before it is
            clipped.
        after_step: Called with the step number and its training loss once the weights are updated.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=ADAM_BETAS, weight_decay=schedule.weight_decay)
    model.train()
    start = time.monotonic()
    for step, ids in enumerate(batches(text, schedule)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        optimizer.zero_grad()
        loss = mean_loss(model, ids)
        loss.backward()
        after_backward(step)
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        after_step(step, loss.item())
        if step % 100 == 0 or step == schedule.steps - 1:
            log(
                f"{name}: step {step:4d}, training loss {loss.item():.3f}, "
                f"{time.monotonic() - start:.0f} s"
            )


@torch.no_grad()
def held_out_loss(model: nn.Module, text: bytes) -> float:
    """Loss in nats per byte over consecutive windows of CONTEXT bytes; an incomplete last window is
    left out.
    """
    model.eval()
    ids = token_ids(text)
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = sum(mean_loss(model, chunk).item() * len(chunk) for chunk in windows.split(BATCH))
    return total / len(windows)


def load_base(out: Path) -> transformers.LlamaForCausalLM:
    """The base model as saved."""
    return transformers.LlamaForCausalLM.from_pretrained(out / "base")


def with_sorted_metadata(serialized: bytes) -> bytes:
    """The same safetensors file with its metadata keys in sorted order; the library's order changes
    between runs.
    """
    size = int.from_bytes(serialized[:8], "little")
    header = json.loads(serialized[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    rewritten = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    return len(rewritten).to_bytes(8, "little") + rewritten + serialized[8 + size :]


def save_gradients(model: nn.Module, step: int, folder: Path) -> None:
    """Saves the gradient of every weight under the weight's name."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    serialized = safetensors.torch.save(gradients, metadata={"step": str(step), "kind": "gradient"})
    (folder / f"grad_step{step:06d}.safetensors").write_bytes(with_sorted_metadata(serialized))


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Saves a LoRA adapter so that its files do not depend on the machine or the run."""
    # PEFT would otherwise look the base model up to see whether its embeddings changed.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "../base"
    # PEFT keeps the target modules in a set, whose order changes between runs.
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_base(out: Path, plan: Plan, text: bytes) -> None:
    """Trains the base model from scratch."""
    model = new_model()
    train("base", model, text, plan.base)
    # The size gives three shards, so that readers of sharded checkpoints have something to read.
    model.save_pretrained(out / "base", max_shard_size="1300KB")


def make_full_fine_tune(out: Path, plan: Plan, text: bytes) -> None:
    """Fine-tunes all weights of the base model and keeps gradients on the way."""
    model = load_base(out)
    folder = out / "gradients"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("grad_step*.safetensors"):
        stale.unlink()

    def keep_gradients(step: int) -> None:
        if step in plan.gradient_steps:
            save_gradients(model, step, folder)

    train("full_ft", model, text, plan.full, keep_gradients)
    model.save_pretrained(out / "full_ft")


def new_adapter(out: Path, rank: int, seed: int) -> peft.PeftModel:
    """LoRA factors on all linear layers of the base model, before training."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=LORA_ALPHA_OVER_RANK * rank,
        lora_dropout=0.0,
        target_modules=list(LORA_TARGETS),
    )
    return peft.get_peft_model(load_base(out), config)


def make_lora_fine_tune(out: Path, plan: Plan, text: bytes, rank: int) -> None:
    """Fine-tunes LoRA factors on all linear layers of the base model."""
    model = new_adapter(out, rank, LORA_SEED)
    train(f"lora_r{rank}", model, text, plan.lora)
    save_adapter(model, out / f"lora_r{rank}")


def make_run(out: Path, schedule: Schedule, text: bytes) -> None:
    """Fine-tunes LoRA factors and keeps checkpoints on the way, in the layout of a trainer of
    transformers.
    """
    model = new_adapter(out, RUN_RANK, schedule.data_seed)
    logged: list[dict[str, float]] = []

    def keep_checkpoint(step: int, loss: float) -> None:
        number = step + 1
        if number % RUN_EVERY == 0:
            logged.append(
                {"step": number, "loss": round(loss, 4), "learning_rate": schedule.rate_at(step)}
            )
            folder = out / "run" / f"checkpoint-{number}"
            save_adapter(model, folder)
            state = {"global_step": number, "max_steps": schedule.steps, "log_history": logged}
            (folder / "trainer_state.json").write_text(
                json.dumps(state, indent=1) + "\n", encoding="utf-8"
            )

    train("run", model, text, schedule, after_step=keep_checkpoint)


def saved_models(out: Path) -> Iterator[tuple[str, nn.Module]]:
    """All models of the folder, read back from their files."""
    yield "base", load_base(out)
    yield "full_ft", transformers.LlamaForCausalLM.from_pretrained(out / "full_ft")
    for rank in LORA_RANKS:
        yield f"lora_r{rank}", peft.PeftModel.from_pretrained(load_base(out), out / f"lora_r{rank}")


def measure_losses(out: Path) -> Losses:
    """Held-out losses of all saved models on the saved texts."""
    texts = {name: (out / "eval" / f"{name}.txt").read_bytes() for name in ("in_domain", "shifted")}
    losses = {}
    for model_name, model in saved_models(out):
        losses[model_name] = {
            name: round(held_out_loss(model, text), 4) for name, text in texts.items()
        }
        log(f"{model_name}: held-out losses {losses[model_name]}")
    return losses


def versions() -> dict[str, str]:
    """Versions of what the weights depend on."""
    return {
        "python": python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def describe_run(plan: Plan, corpora: Mapping[str, Corpus]) -> dict[str, object]:
    """What a reader needs to compare another run with this one."""
    return {
        "schedules": asdict(plan),
        "batch": BATCH,
        "context": CONTEXT,
        "adam_betas": ADAM_BETAS,
        "clip_norm": CLIP_NORM,
        "threads": THREADS,
        "model_seed": MODEL_SEED,
        "lora": {"ranks": LORA_RANKS, "alpha_over_rank": LORA_ALPHA_OVER_RANK, "seed": LORA_SEED},
        "training_texts": {
            name: {"bytes": len(corpus.train), "sha256": hashlib.sha256(corpus.train).hexdigest()}
            for name, corpus in corpora.items()
        },
        "versions": versions(),
    }


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table, first column left-aligned, the others right-aligned."""
    rule = ("---", *("---:" for _ in header[1:]))
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *rows))


def losses_table(losses: Losses) -> str:
    """The losses of all checkpoints on both held-out texts."""
    return table(
        ("checkpoint", "`in_domain.txt` (Python)", "`shifted.txt` (English)"),
        [
            (f"`{name}`", f"{row['in_domain']:.3f}", f"{row['shifted']:.3f}")
            for name, row in losses.items()
        ],
    )


def schedules_table(plan: Plan) -> str:
    """The hyperparameters in which the runs differ."""
    runs = {"`base`": plan.base, "`full_ft`": plan.full, "`lora_r4`, `lora_r16`": plan.lora}
    return table(
        ("run", "steps", "warm-up steps", "peak learning rate", "weight decay", "data seed"),
        [
            (
                name,
                run.steps,
                run.warmup,
                f"{run.learning_rate:g}",
                f"{run.weight_decay:g}",
                run.data_seed,
            )
            for name, run in runs.items()
        ],
    )


def write_readme(out: Path, losses: Losses, plan: Plan, corpora: Mapping[str, Corpus]) -> None:
    """Fills README.template.md with the numbers of this run."""
    template = string.Template((HERE / "README.template.md").read_text(encoding="utf-8"))
    text = template.substitute(
        versions(),
        losses=losses_table(losses),
        schedules=schedules_table(plan),
        batch=BATCH,
        context=CONTEXT,
        clip_norm=f"{CLIP_NORM:g}",
        beta1=ADAM_BETAS[0],
        beta2=ADAM_BETAS[1],
        threads=THREADS,
        model_seed=MODEL_SEED,
        lora_seed=LORA_SEED,
        gradient_steps=", ".join(map(str, plan.gradient_steps)),
        english_train=f"{len(corpora['english'].train):,}",
        english_eval=f"{len(corpora['english'].held_out):,}",
        python_train=f"{len(corpora['python'].train):,}",
        python_eval=f"{len(corpora['python'].held_out):,}",
        eval_topics=", ".join(f"`{name}`" for name in EVAL_TOPICS),
        eval_files=", ".join(f"`{name}`" for name in EVAL_FILES),
        packages=", ".join(f"`{name}`" for name in PYTHON_PACKAGES),
        full_rate=f"{plan.full.learning_rate:g}",
        lora_rate=f"{plan.lora.learning_rate:g}",
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def write_eval_texts(out: Path, corpora: Mapping[str, Corpus]) -> None:
    """Writes the held-out texts with the licence they are under."""
    folder = out / "eval"
    folder.mkdir(exist_ok=True)
    (folder / "in_domain.txt").write_bytes(corpora["python"].held_out)
    (folder / "shifted.txt").write_bytes(corpora["english"].held_out)
    licence = STDLIB / "LICENSE.txt"
    # Some distributions of Python leave the file out; the copy of an earlier run then stays.
    if licence.exists():
        shutil.copyfile(licence, folder / "LICENSE.txt")


def make_all(out: Path, plan: Plan, run: Schedule) -> None:
    """Makes every file of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    corpora = {"english": topics_corpus(), "python": python_corpus()}
    write_eval_texts(out, corpora)
    make_base(out, plan, corpora["english"].train)
    make_full_fine_tune(out, plan, corpora["python"].train)
    for rank in LORA_RANKS:
        make_lora_fine_tune(out, plan, corpora["python"].train, rank)
    make_run(out, run, corpora["python"].train)
    losses = measure_losses(out)
    report = {"unit": "nats per byte", "losses": losses, **describe_run(plan, corpora)}
    (out / "losses.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_readme(out, losses, plan, corpora)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the sample checkpoints.")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write to (default: the script's own)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="very few steps, to try the script; needs --out"
    )
    arguments = parser.parse_args()
    if arguments.quick and arguments.out.resolve() == HERE:
        parser.error("--quick would replace the real checkpoints; give another folder with --out")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    start = time.monotonic()
    make_all(arguments.out, *((QUICK_PLAN, QUICK_RUN) if arguments.quick else (PLAN, RUN)))
    log(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
