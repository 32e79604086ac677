"""Benchmark of a GPU: every number checked against NumPy, then kernels, transfers and a whole pair, as Markdown.

    python -m tests.benchmarks.gpu                print the tables, in less than eight minutes (`make bench-gpu`)
    python -m tests.benchmarks.gpu --write        put them into docs/benchmarks.md, with the name of the card

Exit code 1 if a number is further from NumPy's than the bounds in the records allow.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lora_diag import residual, spectrum
from lora_diag.linalg import decompose, difference
from lora_diag.linalg.devices import move
from lora_diag.linalg.gram import gram_matrix
from tests.benchmarks.measure import machine
from tests.benchmarks.pairs import make_adapter, make_pair, weight
from tests.standin import GPU, counted

PAGE = Path("docs/benchmarks.md")
MARKS = "<!-- GPU tables -->\n", "<!-- end of GPU tables -->\n"
CPU = torch.device("cpu")

# Hidden and inner width, key-value width and layers of the pairs: of the check, and of the timed run.
FULL = {"matrices": ((4096, 4096), (4096, 11008)), "check": (1024, 2816, 256, 2), "timed": (2048, 8192, 512, 16)}
SMALL = {"matrices": ((160, 192),), "check": (128, 192, 64, 1), "timed": (128, 192, 64, 1)}  # for the tests

# Singular values of the records have 9 significant digits.
DIGITS = 1e-9


def waited(device: torch.device, work: Callable[[], object], runs: int = 5) -> float:
    """Return the median seconds of a call, with everything that it started on the device."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first compiles and allocates


def matrices(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """Return ΔW of every matrix of a pair by name, float64."""
    found = {}
    for shard in sorted(base.glob("*.safetensors")):
        before, after = load_file(shard), load_file(tuned / shard.name)
        found |= {n: (after[n].double() - before[n].double()).numpy() for n in before if before[n].ndim == 2}
    return found


def products(adapter: Path) -> dict[str, np.ndarray]:
    """Return s·B·A of every pair of factors by the name of the weight, float64; s = 2."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model.") + ".weight": 2
        * (tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()).numpy()
        for name in names
    }


def differences(device: torch.device, folder: Path, widths: tuple[int, ...]) -> Iterator[tuple[str, float, float]]:
    """Yield a number's name, the largest difference between device and NumPy in float64, and what is allowed.

    The sums of the r largest σ̂² may differ by ``energy_error``·‖ΔW‖_F² (Fan 1949), and so may each σ̂².
    """
    base, tuned = make_pair(folder / "check", *widths)
    adapter = make_adapter(folder / "adapter", *widths, 16, 0)
    changes, updates = matrices(base, tuned), products(adapter)
    values = {name: np.linalg.svd(each, compute_uv=False) for name, each in changes.items()}
    own = {name: np.linalg.svd(each, compute_uv=False) for name, each in updates.items()}
    for label, sides, top, true in (
        ("pair", (base, tuned), None, values),
        ("pair, top 16", (base, tuned), 16, values),
        ("adapter", (adapter, None), None, own),
    ):
        fro = curve = squares = 0.0
        for record in spectrum(*sides, top=top, device=str(device)):
            s = next(each for name, each in true.items() if record.layer in name)
            total, found = float((s**2).sum()), np.array(record.s)
            allowed = (record.energy_error + 4 * DIGITS) * total
            fro = max(fro, abs(record.fro / math.sqrt(total) - 1))
            gaps = np.cumsum(found**2) - np.cumsum(s[: len(found)] ** 2)
            curve = max(curve, float(np.abs(gaps).max()) / allowed)
            squares = max(squares, float(np.abs(found**2 - s[: len(found)] ** 2).max()) / allowed)
        yield f"{label}: ‖ΔW‖_F", fro, 1e-9
        yield f"{label}: C(r), as a fraction of its bound", curve, 1.0
        yield f"{label}: σ², as a fraction of the bound", squares, 1.0
    gap = 0.0
    for record in residual(base, tuned, [adapter], device=str(device)):
        change = changes.get(record.layer)
        if change is None or record.epsilon is None:  # a norm
            continue
        true_epsilon = np.linalg.norm(change - updates.get(record.layer, 0.0)) / np.linalg.norm(change)
        gap = max(gap, abs(record.epsilon / true_epsilon - 1))
    yield "residual: ε", gap, 1e-7


def kernels(device: torch.device, shapes: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str, float, float]]:
    """Yield shape, work, seconds on the device, and on the CPU where that is one call of the same work."""
    for rows, columns in shapes:
        name = f"{rows}×{columns}"
        base, tuned = weight(rows, columns, torch.Generator().manual_seed(0))
        host = tuned.float() - base.float()
        matrix = host.to(device)
        tall, fro = (matrix if rows >= columns else matrix.T), float(host.double().norm())
        gram = gram_matrix(tall)

        def blocks(
            base: torch.Tensor = base, tuned: torch.Tensor = tuned
        ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return zip(base.split(256), tuned.split(256), strict=True)

        work: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
            "transfer of both sides, bf16": (lambda b=base, t=tuned: (move(b, device), move(t, device)), None),
            "transfer, subtraction, norms, rounding": (
                lambda blocks=blocks, s=(rows, columns): difference(blocks(), s, device),
                lambda blocks=blocks, s=(rows, columns): difference(blocks(), s, CPU),
            ),
            "Gram matrix, float64": (lambda t=tall: gram_matrix(t), None),
            "its eigenvalues": (lambda g=gram: torch.linalg.eigvalsh(g, UPLO="L"), None),
            "full spectrum": (lambda m=matrix, f=fro: decompose(m, fro=f), lambda m=host, f=fro: decompose(m, fro=f)),
            "top 64": (
                lambda m=matrix, f=fro: decompose(m, fro=f, top=64),
                lambda m=host, f=fro: decompose(m, fro=f, top=64),
            ),
            "torch.linalg.svdvals, float32": (
                lambda m=matrix: torch.linalg.svdvals(m),
                lambda m=host: torch.linalg.svdvals(m),
            ),
        }
        for label, (own, cpu) in work.items():
            yield name, label, waited(device, own), waited(CPU, cpu, 1) if cpu else math.nan


def synchronisations(device: torch.device, shape: tuple[int, int]) -> int:
    """Return how often the CPU waits for the GPU, or for a stand-in, while a layer is read and decomposed."""
    base, tuned = weight(*shape, torch.Generator().manual_seed(0))
    rows = max(1, shape[0] // 16)

    def measure(device: torch.device) -> None:
        found = difference(zip(base.split(rows), tuned.split(rows), strict=True), shape, device)
        decompose(found.matrix, fro=found.fro)

    if device.type != "cuda":
        with counted() as mode:
            measure(GPU)
        return mode.waits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        measure(device)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def whole(device: torch.device, folder: Path, widths: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """Yield what was run on the timed pair, and its seconds; files are in the page cache."""
    base, tuned = make_pair(folder / "timed", *widths)
    for label, options in (("all values", {}), ("--top 64", {"top": 64})):
        for where in dict.fromkeys((str(device), "cpu")):
            start = time.perf_counter()
            spectrum(base, tuned, device=where, **options)
            yield f"{label}, {where}", time.perf_counter() - start


def report(device: torch.device, sizes: dict[str, tuple], folder: Path) -> tuple[str, bool]:
    """Return the tables as Markdown, and whether every number is within its bound."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: a stand-in on the CPU"
    lines = [f"{card}; {machine()}; torch {version('torch')}.", ""]
    good = True
    lines += ["| number | largest difference from NumPy | allowed |", "|---|---:|---:|"]
    for name, found, allowed in differences(device, folder, sizes["check"]):
        good = good and found <= allowed
        lines.append(f"| {name} | {found:.1e} | {allowed:.0e}{'' if found <= allowed else ' EXCEEDED'} |")
    lines += ["", "| matrix | work | ms | CPU, ms | CPU ÷ GPU |", "|---|---|---:|---:|---:|"]
    for shape, label, seconds, cpu in kernels(device, sizes["matrices"]):
        there = "| | |" if math.isnan(cpu) else f"| {cpu * 1e3:.1f} | {cpu / seconds:.1f} |"
        lines.append(f"| {shape} | {label} | {seconds * 1e3:.2f} {there}")
    waits = synchronisations(device, sizes["matrices"][0])
    name = "×".join(map(str, sizes["matrices"][0]))
    lines += ["", f"The CPU waits for the GPU {waits} times in a layer of {name} with all values."]
    lines += ["", "| whole pair | s |", "|---|---:|"]
    lines += [f"| {label} | {seconds:.2f} |" for label, seconds in whole(device, folder, sizes["timed"])]
    return "\n".join(lines) + "\n", good


def insert(page: str, text: str) -> str:
    """Replace the part of a page between the marks.

    Raises:
        ValueError: The page has no marks.
    """
    before, _, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"{PAGE} lacks the lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    return f"{before}{MARKS[0]}\n{text}\n{end}{after}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu as a stand-in")
    parser.add_argument("--small", action="store_true", help="small matrices, to test the script")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE}")
    chosen = parser.parse_args(words)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available; --device cpu runs the script on a stand-in", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        text, good = report(device, SMALL if chosen.small else FULL, Path(folder))
    print(text)
    if chosen.write:
        PAGE.write_text(insert(PAGE.read_text(), text))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
