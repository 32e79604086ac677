"""Speed, memory and accuracy beside the alternatives, in one run, as Markdown.

    python -m tests.benchmarks                    everything but the peers
    python -m tests.benchmarks matrix --peers     one part; with other tools, installed in environments of their own

Files are made in ``.bench/`` and kept for the next run. Timings mean something on an otherwise idle machine only.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import in_turn, llama_layer, machine, run, table

FOLDER = Path(".bench")
LORADIAG = [sys.executable, "-m", "lora_diag", "spectrum"]
SCRIPT = [sys.executable, "-m", "tests.benchmarks.scripts"]


def compile_as_installed() -> None:
    """Compile the package into ``.bench``, for all commands: ``pip`` does so when it installs, also the other tools."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(FOLDER.resolve() / "bytecode")
    package = find_spec("lora_diag")
    assert package is not None
    subprocess.run([sys.executable, "-m", "compileall", "-q", *(package.submodule_search_locations or [])], check=True)


def made(what: str, *arguments: Any) -> Any:
    """Make files in a process of its own: the system counts this process's memory to the commands that it starts."""
    subprocess.run([sys.executable, "-m", "tests.benchmarks.pairs", what, *map(str, arguments)], check=True)
    folder = arguments[0]
    return (folder / "base", folder / "tuned") if what == "make_pair" else folder


def best(work: Callable[[], object], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def kernels(peers: bool) -> None:
    """Methods on one matrix in memory, beside torch.linalg.svdvals."""
    import numpy as np
    import torch

    from lora_diag.linalg.exact import gram_matrix
    from lora_diag.linalg.methods import decompose
    from tests.benchmarks.pairs import update, weight

    print("| matrix | work | s | svdvals ÷ this | largest error of C(r) against float64 | certified |")
    print("|---|---|---:|---:|---:|---:|")
    for rows, columns in ((4096, 4096), (4096, 11008)):
        base, tuned = weight(rows, columns, torch.Generator().manual_seed(0))
        matrix = tuned.float() - base.float()
        fro = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        truth = np.cumsum(torch.linalg.svdvals(matrix.double()).numpy() ** 2) / fro**2
        plain = best(lambda m=matrix: torch.linalg.svdvals(m), 1)
        gram = gram_matrix(matrix if rows >= columns else matrix.T)
        own = best(lambda m=matrix: gram_matrix(m if len(m) >= m.shape[1] else m.T)) + best(
            lambda g=gram: torch.linalg.eigvalsh(g)
        )
        clean = update(rows, columns, torch.Generator().manual_seed(0))
        clean_fro = float(torch.linalg.vector_norm(clean, dtype=torch.float64))
        clean_truth = np.cumsum(torch.linalg.svdvals(clean.double()).numpy() ** 2) / clean_fro**2
        cases = {
            "full spectrum": (matrix, fro, truth, {}),
            "top 64, bf16 pair": (matrix, fro, truth, {"top": 64}),
            "top 64, the update before rounding": (clean, clean_fro, clean_truth, {"top": 64}),
        }
        print(f"| {rows}×{columns} | torch.linalg.svdvals, float32 | {plain:.2f} | 1.0 | | |")
        print(f"| {rows}×{columns} | product and eigenvalues alone | {own:.2f} | {plain / own:.1f} | | |")
        for name, (a, norm, true, options) in cases.items():
            result = decompose(a, fro=norm, **options)
            seconds = best(lambda a=a, norm=norm, options=options: decompose(a, fro=norm, **options))
            curve = np.cumsum(result.s.numpy() ** 2) / norm**2
            error = np.abs(curve - true[: len(curve)]).max()
            print(
                f"| {rows}×{columns} | {name} ({result.method}) | {seconds:.2f} | {plain / seconds:.1f} | "
                f"{error:.1e} | {result.energy_error:.1e} |"
            )


def spectra(peers: bool) -> None:
    """The 64 largest values against all of them, over spectra: time, method and certified bound."""
    from tests.benchmarks.spectra import spectra_table

    spectra_table(((2048, 2048), (5632, 2048), (4096, 4096)))


def matrix(peers: bool) -> None:
    """One bf16 layer, whole processes, beside other tools."""
    base, tuned = made("make_pair", FOLDER / "layer", 2048, 5632, 256, 1)
    commands: dict[str, Sequence[str]] = {
        "floor: read both, subtract, norm": [*SCRIPT, "floor", base, tuned],
        "loradiag spectrum": [*LORADIAG, base, tuned, "-q"],
        "loradiag spectrum --top 64": [*LORADIAG, base, tuned, "-q", "--top", "64"],
        "torch.linalg.svdvals loop": [*SCRIPT, "svdvals", base, tuned],
    }
    if peers:
        commands |= peer_commands(base, tuned)
    print(table(in_turn(commands, 5), "loradiag spectrum"))


def model(peers: bool) -> None:
    """A 1 B-parameter sharded bf16 pair, whole processes; other tools on a quarter of its layers."""
    for layers in (16, 4) if peers else (16,):
        base, tuned = made("make_pair", FOLDER / f"model{layers}", 2048, 8192, 512, layers)
        commands: dict[str, Sequence[str]] = {
            "floor: read both, subtract, norm": [*SCRIPT, "floor", base, tuned],
            "loradiag spectrum": [*LORADIAG, base, tuned, "-q"],
            "loradiag spectrum --top 64": [*LORADIAG, base, tuned, "-q", "--top", "64"],
        }
        if layers == 4:
            commands["modeldelta"] = peer_commands(base, tuned)["modeldelta"]
        print(f"\n{layers} layers\n\n{table(in_turn(commands, 1), 'loradiag spectrum')}", flush=True)


def residual(peers: bool) -> None:
    """Three adapters compared with a 1 B-parameter full fine-tune, beside its spectrum alone; whole processes."""
    base, tuned = made("make_pair", FOLDER / "model16", 2048, 8192, 512, 16)
    three = [made("make_adapter", FOLDER / f"adapter16_r{r}", 2048, 8192, 512, 16, r, r) for r in (8, 16, 64)]
    commands: dict[str, Sequence[str]] = {
        "loradiag spectrum": [*LORADIAG, base, tuned, "-q"],
        "loradiag residual, 3 adapters": [*LORADIAG[:-1], "residual", base, tuned, *three, "-q"],
    }
    print(table(in_turn(commands, 1), "loradiag spectrum"))


# A 7B model: hidden, inner, width of keys and values, layers; and the rank.
SEVEN = (4096, 11008, 4096, 32, 16)


def adapters(peers: bool) -> None:
    """A rank-16 adapter on all 224 matrices of a 7B model, whole processes."""
    for bits, dtype in ((16, "bf16"), (32, "float32")):
        path = made("make_adapter", FOLDER / f"adapter_{dtype}", *SEVEN, 0, bits)
        commands: dict[str, Sequence[str]] = {
            "loradiag --version (start-up)": [sys.executable, "-m", "lora_diag", "--version"],
            "import torch": [sys.executable, "-c", "import torch"],
            "loradiag spectrum ADAPTER": [*LORADIAG, path, "-q"],
        }
        if bits == 32:
            commands = {name: words for name, words in commands.items() if "ADAPTER" in name}
        if peers:
            audit = ["audit", "--peft-dir", path, "--json", "--layers"]
            commands["gradience audit"] = [peer("gradience") / "gradience", *audit]
        print(f"\n{dtype}\n\n{table(in_turn(commands, 5), 'loradiag spectrum ADAPTER')}", flush=True)


BARE = Path(__file__).with_name("grams.py")


def fleet(peers: bool) -> None:
    """40 different rank-16 adapters of a 7B model in bf16 (3.2 GB, in the page cache), one process a tool."""
    paths = [made("make_adapter", FOLDER / "fleet7" / str(seed), *SEVEN, seed, 16) for seed in range(40)]
    some = [sys.executable, "-m", "lora_diag", "fleet", *paths[:2], "-q"]
    commands: dict[str, Sequence[str]] = {
        "loradiag fleet, 2 adapters": some,
        "loradiag fleet, 40 adapters": [*some[:-3], *paths, "-q"],
        "bare NumPy loop: read, decode, Gram matrices, 40 adapters": [sys.executable, BARE, *paths],
        "lora_diag.spectrum in a loop, 40 adapters": [*SCRIPT, "loradiag_each", *paths],
    }
    if peers:
        script = Path(__file__).with_name("scripts.py")
        commands["gradience, audit_lora_peft_dir, 40 adapters"] = [
            peer("gradience") / "python",
            script,
            "gradience_each",
            *paths,
        ]
    figures = in_turn(commands, 3)
    print(table(figures, "loradiag fleet, 40 adapters"), flush=True)
    few, many = (figures[f"loradiag fleet, {count} adapters"] for count in (2, 40))
    for name in ("wall", "cpu"):
        low, high = (statistics.median(getattr(figure, name)) for figure in (few, many))
        print(f"\n{name}: {(high - low) / 38:.3f} s an adapter")
    thousand = FOLDER / "fleet1000"
    thousand.mkdir(exist_ok=True)
    for number in range(1000):
        if not (thousand / str(number)).exists():
            (thousand / str(number)).symlink_to(paths[number % len(paths)].resolve())
    wall, cpu, peak = run([*some[:-3], str(thousand / "*"), "-q"])
    print(f"\n1,000 adapters, each file 25 times: wall {wall:.0f} s, processor {cpu:.0f} s, peak {peak:.0f} MiB")
    start = time.perf_counter()
    singular_values_by_definition()
    plain = (time.perf_counter() - start) * SEVEN[3]
    print(f"\ntorch.linalg.svdvals(B @ A), from one of 32 layers: {plain:.0f} s for one adapter")


def singular_values_by_definition() -> None:
    """Form B·A of every matrix of one layer of the 7B model and compute its singular values."""
    import torch

    for _, rows, columns in llama_layer(*SEVEN[:3]):
        torch.linalg.svdvals(torch.randn(rows, SEVEN[4]) @ torch.randn(SEVEN[4], columns))


def reading(peers: bool) -> None:
    """A 1 B-parameter pair that is not in the page cache."""
    from tests.benchmarks.reading import reading_table

    print(reading_table(*made("make_pair", FOLDER / "model16", 2048, 8192, 512, 16)))


def rounding(peers: bool) -> None:
    """The rounding floor on planted updates."""
    from tests.benchmarks.rounding import rounding_table

    print(rounding_table())


def recovery(peers: bool) -> None:
    """Time and memory of `recover` on one matrix of which bfloat16 storage hides an update, whole and in row blocks."""
    for limit in ((), ("512",)):
        subprocess.run([sys.executable, "-m", "tests.benchmarks.recovery", "speed", "4096", *limit], check=True)


def peer(name: str) -> Path:
    """Install another tool in an environment of its own, once, and say where its commands are."""
    home = FOLDER.resolve() / "peers" / name
    if not (home / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [home / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, name, "torch", "safetensors"], check=True)
        (home / "done").touch()
    return home / "bin"


def peer_commands(base: Path, tuned: Path) -> dict[str, Sequence[str]]:
    """Say how the tools are run that compare checkpoints."""
    extract = ["--model", tuned, "--base-model", base, "--out-path", FOLDER.resolve() / "extracted", "--max-rank", "8"]
    return {
        "modeldelta": [peer("modeldelta") / "python", "-m", "modeldelta", base, tuned, "-q", "-o", FOLDER / "m.json"],
        "mergekit-extract-lora, r=8": [peer("mergekit") / "mergekit-extract-lora", *extract],
        "WeightWatcher, deltas": [
            peer("weightwatcher") / "python",
            "tests/benchmarks/scripts.py",
            "weightwatcher",
            base,
            tuned,
        ],
    }


PARTS = {
    part.__name__: part
    for part in (kernels, spectra, matrix, model, residual, adapters, fleet, reading, rounding, recovery)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--peers", action="store_true", help="measure beside other tools, too")
    chosen = parser.parse_args()
    compile_as_installed()
    print(f"{machine()}; torch {version('torch')}\n")
    for part in chosen.parts:
        print(f"\n### {PARTS[part].__doc__}\n", flush=True)
        PARTS[part](chosen.peers)
