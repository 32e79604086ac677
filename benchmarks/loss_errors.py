"""How often does the 95% interval of a difference of losses hold, if the sequences are windows of
one text?

    python -m benchmarks.loss_errors            3,000 windows, about 5 minutes on one core

The sample models are evaluated on source files of Python's standard library, one after another in
random order. A part of the text plays the user's file, all of it the text that the user asks about.
Coverage is the share of parts whose interval holds the mean over all windows: of N windows in a
row, and of N that are spread over a part 3 to 7 times as long (``--max-sequences``), by the formula
for independent sequences and by that of ``paired_difference``.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from benchmarks.measure import print_table
from lora_diag.metrics.statistics import degrees_of_freedom, paired_difference

SAMPLES, LENGTH, TRIALS = Path("sample_checkpoints"), 256, 1000


def windows(count: int) -> torch.Tensor:
    """Return bytes of the library's files, ``(count, LENGTH)``; as many files as it takes."""
    files = sorted(
        p
        for p in Path(sysconfig.get_path("stdlib")).rglob("*.py")
        if "site-packages" not in p.parts
    )
    random.Random(0).shuffle(files)
    content = bytearray()
    for file in files:
        content += file.read_bytes()
        if len(content) >= count * LENGTH:
            break
    return torch.frombuffer(content, dtype=torch.uint8)[: count * LENGTH].view(count, LENGTH).long()


@torch.no_grad()
def losses(name: str, ids: torch.Tensor) -> np.ndarray:
    """Return the negative log-likelihood of each window under a sample model."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    lora = name.startswith("lora")
    model = LlamaForCausalLM.from_pretrained(
        SAMPLES / ("base" if lora else name), dtype=torch.float32
    )
    if lora:
        model = PeftModel.from_pretrained(model, SAMPLES / name)
    sums = []
    for part in ids.split(64):
        logits = model.eval()(input_ids=part).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), part[:, 1:], reduction="none"
        )
        sums.append(each.double().sum(1))
    return torch.cat(sums).numpy()


def coverage(difference: np.ndarray, count: int, spread: bool) -> tuple[float, float]:
    """Return the coverage for independent sequences, and of ``paired_difference``."""
    rng, truth, hits = np.random.default_rng(count), difference.mean(), np.zeros(2)
    for _ in range(TRIALS):
        length = min(len(difference), count * int(rng.integers(3, 8))) if spread else count
        first = int(rng.integers(0, len(difference) - length + 1))
        chosen = difference[first + np.arange(count) * length // count]
        gap, error = paired_difference(chosen, np.zeros(count), np.ones(count))
        independent = chosen.std(ddof=1) / count**0.5 * stdtrit(count - 1, 0.975)
        assert error is not None
        hits += abs(gap - truth) <= np.array(
            [independent, error * stdtrit(degrees_of_freedom(count), 0.975)]
        )
    return hits[0] / TRIALS, hits[1] / TRIALS


def main(count: int = 3000) -> None:
    ids = windows(count)
    nll = {name: losses(name, ids) for name in ("base", "full_ft", "lora_r4", "lora_r16")}
    pairs = (("lora_r16", "full_ft"), ("lora_r4", "lora_r16"), ("full_ft", "base"))
    print_table(
        "difference | windows | in a row: independent | in a row: blocks | spread: independent | "
        "spread: blocks",
        (
            (
                f"{a} − {b}",
                n,
                *(f"{x:.0%}" for s in (False, True) for x in coverage(nll[a] - nll[b], n, s)),
            )
            for (a, b), n in product(pairs, (20, 60, 200))
        ),
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
