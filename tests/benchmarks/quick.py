"""Processor time of the kernels as ratios to plain NumPy or torch code in the same run, compared with stored ratios.

    python -m tests.benchmarks.quick              fail if a ratio exceeds 1.3 times the stored one (`make bench-quick`)
    python -m tests.benchmarks.quick --update     store the ratios of this processor

Ratios are stored per processor in ``quick.json``. One thread; the minimum of the runs, in turn with the reference, so
that other work on the machine affects both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_diag import spectrum
from lora_diag.linalg.difference import difference
from lora_diag.linalg.exact import decompose_factored
from lora_diag.linalg.methods import decompose
from tests.benchmarks.measure import processor
from tests.benchmarks.pairs import make_adapter, make_pair, update, weight
from tests.benchmarks.scripts import svdvals

BASELINE = Path(__file__).with_name("quick.json")
LIMIT = 1.3
SECONDS = 5.0  # of each kernel with its reference
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kernel:
    """A piece of work of the package and the plain code it is compared with.

    Args:
        name: Key in the baseline.
        own: The work.
        reference: The plain code.
        clock: Measures one call in processor seconds.
    """

    name: str
    own: Callable[[], object]
    reference: Callable[[], object]
    clock: Callable[[Callable[[], object]], float]


def here(work: Callable[[], object]) -> float:
    """Return the processor seconds of a call in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def elsewhere(work: Callable[[], object]) -> float:
    """Return the processor seconds of the processes that a call starts."""
    before = os.times()
    work()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def kernels(folder: Path) -> Iterator[Kernel]:
    """Yield the kernels, with inputs made in ``folder``."""
    seeded = torch.Generator().manual_seed(0)
    base, tuned = weight(1024, 1024, seeded)
    delta = tuned.float() - base.float()
    yield Kernel("full spectrum, 1024²", lambda: decompose(delta), lambda: torch.linalg.svdvals(delta), here)
    wide = update(1024, 4096, seeded)
    yield Kernel("full spectrum, 1024×4096", lambda: decompose(wide), lambda: torch.linalg.svdvals(wide), here)
    large = update(2048, 2048, seeded)
    fro = float(large.double().norm())
    thin = torch.randn(2048, 224, generator=seeded)
    yield Kernel(
        "top 64, 2048²", lambda: decompose(large, top=64, fro=fro), lambda: [large @ thin for _ in range(8)], here
    )
    flat = torch.randn(1024, 1024, generator=seeded)
    yield Kernel("top 64 of a flat spectrum, 1024²", lambda: decompose(flat, top=64), lambda: decompose(flat), here)
    b, a = torch.randn(4096, 16, generator=seeded), torch.randn(16, 11008, generator=seeded)
    yield Kernel(
        "factors of rank 16, 4096×11008",
        lambda: decompose_factored(b, a),
        lambda: (torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)),
        here,
    )
    left, right = weight(2048, 2048, seeded)
    yield Kernel(
        "subtraction, norms and rounding, bf16 2048²",
        lambda: difference(zip(left.split(512), right.split(512), strict=True), (2048, 2048), CPU),
        lambda: torch.linalg.vector_norm(right.float() - left.float(), dtype=torch.float64),
        here,
    )
    pair = make_pair(folder / "pair", 256, 512, 256, 8)
    yield Kernel("spectrum of a small pair, one call", lambda: spectrum(*pair), lambda: svdvals(*pair), here)
    adapter = make_adapter(folder / "adapter", 256, 512, 256, 8, 16, 0)
    yield Kernel(
        "loradiag spectrum ADAPTER, whole process",
        lambda: command("-m", "lora_diag", "spectrum", str(adapter), "-q"),
        lambda: command("-c", "import numpy, pydantic, typer"),
        elsewhere,
    )


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def ratio(kernel: Kernel) -> float:
    """Return the least time of a kernel divided by that of its reference."""
    own: list[float] = []
    plain: list[float] = []
    end = time.monotonic() + SECONDS
    while len(own) < 3 or time.monotonic() < end:
        own.append(kernel.clock(kernel.own))
        plain.append(kernel.clock(kernel.reference))
    return min(own[1:]) / min(plain[1:])  # without the first, which loads libraries


def compare(found: dict[str, float], stored: dict[str, float]) -> tuple[str, bool]:
    """Return a Markdown table of the ratios, and whether all are within the limit of the stored ones."""
    lines = ["| kernel | ratio | stored | change |", "|---|---:|---:|---:|"]
    good = True
    for name, now in found.items():
        if name not in stored:
            lines.append(f"| {name} | {now:.3g} | none | |")
            good = False
            continue
        change = now / stored[name]
        good = good and change <= LIMIT
        lines.append(
            f"| {name} | {now:.3g} | {stored[name]:.3g} | {change:.2f}{'' if change <= LIMIT else ' SLOWER'} |"
        )
    return "\n".join(lines), good


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="store the ratios of this processor")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {kernel.name: ratio(kernel) for kernel in kernels(Path(folder))}
    baseline: dict[str, dict[str, float]] = json.loads(BASELINE.read_text())
    text, good = compare(result, baseline.get(processor(), {}))
    print(f"{processor()}, one thread, processor time\n\n{text}")
    if chosen.update:
        baseline[processor()] = {name: float(f"{value:.4g}") for name, value in result.items()}
        BASELINE.write_text(json.dumps(baseline, indent=2, ensure_ascii=False) + "\n")
        return 0
    if processor() not in baseline:
        print(f"\n{BASELINE.name} has no ratios of this processor: run with --update on the code to compare with")
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
