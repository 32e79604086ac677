"""What ``LoraMonitor`` adds to a training step: processor time, with and without it in turn.

    python -m benchmarks.monitor BASE TEXT

Steps of one model alternate: one is measured (``every=1``), one is not. The table has the medians
of both and of their paired ratios, and what follows for ``every=50``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import print_table
from lora_diag import LoraMonitor

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def used(work: Callable[[], object]) -> float:
    """Return the processor seconds of a call, in all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(base: str, text: str, rank: int, pairs: int, tokens: int) -> list[str]:
    """Return the row of one rank; 0 for full fine-tuning."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rank:
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES)
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    ids = AutoTokenizer.from_pretrained(base)(Path(text).read_text(encoding="utf-8")[:40_000])[
        "input_ids"
    ]
    batch = torch.tensor(ids[:tokens]).reshape(-1, 128)

    def train() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        with LoraMonitor(Path(folder, "m.jsonl"), every=1).attach(model) as monitor:
            train()
            monitor.step()
            plain, with_monitor = [], []
            for _ in range(pairs):
                plain.append(used(train))
                with_monitor.append(used(train) + used(monitor.step))
        size = Path(folder, "m.jsonl").stat().st_size / (pairs + 1)
    ratios = [after / before for before, after in zip(plain, with_monitor, strict=True)]
    cost = statistics.median(ratios) - 1
    return [
        f"r={rank}" if rank else "full",
        f"{statistics.median(plain):.2f} s",
        f"{statistics.median(with_monitor):.2f} s",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"{100 * cost / 50:.2f}%",
        f"{size / 1000:.0f} kB",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("text")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = "training | step | measured step | paired ratio (range) | every=50 | records of a step"
    print_table(
        head,
        (compare(given.base, given.text, rank, given.pairs, given.tokens) for rank in (8, 64, 0)),
    )


if __name__ == "__main__":
    main()
