"""Processor time of the kernels as ratios to plain NumPy or torch code in the same run, compared
with stored ratios.

    python -m benchmarks.quick              fail if a ratio exceeds 1.3 times the stored one (`make bench-quick`)
    python -m benchmarks.quick --update     store the ratios of this processor

Ratios are stored per processor in ``quick.json``. One thread; the minimum of the runs, in turn with
the reference, so that other work on the machine affects both.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import Used, call, print_table, processor, run
from benchmarks.pairs import make_adapter, make_pair, update, weight
from benchmarks.scripts import svdvals
from lora_diag import spectrum
from lora_diag.linalg.difference import difference
from lora_diag.linalg.exact import decompose_factored
from lora_diag.linalg.methods import decompose

BASELINE = Path(__file__).with_name("quick.json")
LIMIT = 1.3
SECONDS = 5.0  # of each kernel with its reference
CPU = torch.device("cpu")


class Kernel(NamedTuple):
    """A piece of work of the package and the plain code it is compared with.

    Args:
        name: Key in the baseline.
        own: Does the work once.
        reference: Runs the plain code once.
    """

    name: str
    own: Callable[[], Used]
    reference: Callable[[], Used]


def kernels(folder: Path) -> Iterator[Kernel]:
    """Yield the kernels, with inputs made in ``folder``."""
    seeded = torch.Generator().manual_seed(0)
    base, tuned = weight(1024, 1024, seeded)
    delta = tuned.float() - base.float()
    yield Kernel(
        "full spectrum, 1024²",
        *timed(lambda: decompose(delta), lambda: torch.linalg.svdvals(delta)),
    )
    wide = update(1024, 4096, seeded)
    yield Kernel(
        "full spectrum, 1024×4096",
        *timed(lambda: decompose(wide), lambda: torch.linalg.svdvals(wide)),
    )
    large = update(2048, 2048, seeded)
    fro = float(large.double().norm())
    thin = torch.randn(2048, 224, generator=seeded)
    works = timed(
        lambda: decompose(large, top=64, fro=fro), lambda: [large @ thin for _ in range(8)]
    )
    yield Kernel("top 64, 2048²", *works)
    flat = torch.randn(1024, 1024, generator=seeded)
    works = timed(lambda: decompose(flat, top=64), lambda: decompose(flat))
    yield Kernel("top 64 of a flat spectrum, 1024²", *works)
    b, a = torch.randn(4096, 16, generator=seeded), torch.randn(16, 11008, generator=seeded)
    works = timed(
        lambda: decompose_factored(b, a),
        lambda: (torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)),
    )
    yield Kernel("factors of rank 16, 4096×11008", *works)
    left, right = weight(2048, 2048, seeded)
    works = timed(
        lambda: difference(zip(left.split(512), right.split(512), strict=True), (2048, 2048), CPU),
        lambda: torch.linalg.vector_norm(right.float() - left.float(), dtype=torch.float64),
    )
    yield Kernel("subtraction, norms and rounding, bf16 2048²", *works)
    pair = make_pair(folder / "pair", 256, 512, 256, 8)
    yield Kernel(
        "spectrum of a small pair, one call",
        *timed(lambda: spectrum(*pair), lambda: svdvals(*pair)),
    )
    adapter = make_adapter(folder / "adapter", 256, 512, 256, 8, 16, 0)
    words = [sys.executable, "-m", "lora_diag", "spectrum", adapter, "-q"]
    plain = [sys.executable, "-c", "import numpy, pydantic, typer"]
    yield Kernel(
        "loradiag spectrum ADAPTER, whole process", partial(run, words), partial(run, plain)
    )


def timed(*works: Callable[[], object]) -> Iterator[Callable[[], Used]]:
    """Return works that say what they took."""
    return (partial(call, work) for work in works)


def ratio(kernel: Kernel) -> float:
    """Return the least processor time of a kernel divided by that of its reference."""
    own: list[float] = []
    plain: list[float] = []
    end = time.monotonic() + SECONDS
    while len(own) < 3 or time.monotonic() < end:
        own.append(kernel.own().cpu)
        plain.append(kernel.reference().cpu)
    return min(own[1:]) / min(plain[1:])  # without the first, which loads libraries


def compare(
    found: dict[str, float], stored: dict[str, float]
) -> tuple[list[tuple[str, ...]], bool]:
    """Return rows of a table of the ratios, and whether all are within the limit of the stored
    ones.
    """
    changes = {
        name: now / stored[name] if name in stored else math.inf for name, now in found.items()
    }
    rows = [
        (
            name,
            f"{found[name]:.3g}",
            f"{stored.get(name, math.nan):.3g}",
            f"{x:.2f}{' SLOWER' if x > LIMIT else ''}",
        )
        for name, x in changes.items()
    ]
    return rows, max(changes.values()) <= LIMIT


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="store the ratios of this processor")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {kernel.name: ratio(kernel) for kernel in kernels(Path(folder))}
    baseline: dict[str, dict[str, float]] = json.loads(BASELINE.read_text())
    rows, good = compare(result, baseline.get(processor(), {}))
    print(f"{processor()}, one thread, processor time")
    print_table("kernel | ratio | stored | change", rows)
    if chosen.update:
        baseline[processor()] = {name: float(f"{value:.4g}") for name, value in result.items()}
        BASELINE.write_text(json.dumps(baseline, indent=2, ensure_ascii=False) + "\n")
        return 0
    if processor() not in baseline:
        print(
            f"\n{BASELINE.name} has no ratios of this processor: run with --update on the code to "
            "compare with"
        )
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
