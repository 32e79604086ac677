"""Speed, memory and accuracy compared with the alternatives, in one run, as Markdown.

    python -m benchmarks                    everything but the peers
    python -m benchmarks matrix --peers     one part; with other tools, installed in environments of their own
    python -m benchmarks matrix --small     on small inputs, to test the scripts

Files are made in ``.bench/`` and kept for the next run. Timings mean something on an otherwise idle
machine only.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    Used,
    call,
    commands_in_turn,
    in_turn,
    llama_layer,
    machine,
    multiple,
    print_figures,
    print_table,
    run,
)

FOLDER = Path(".bench")
LORADIAG = [sys.executable, "-m", "lora_diag"]
SPECTRUM = [*LORADIAG, "spectrum", "-q"]
SCRIPT = [sys.executable, "-m", "benchmarks.scripts"]
BARE = Path(__file__).with_name("grams.py")

# Hidden and inner width, width of keys and values, and layers: of a layer, a 1 B-parameter model, a
# fourth of it, a 7B model; with --small, others. Of the adapters of the 7B model, the rank.
WIDTHS = {"layer": (2048, 5632, 256, 1), "1B": (2048, 8192, 512, 16), "1B/4": (2048, 8192, 512, 4)}
SEVEN, RANK, FLEET = (4096, 11008, 4096, 32), 16, 40
SMALL = (128, 192, 64, 2)


def compile_as_installed() -> None:
    """Compile the package into ``.bench``, for all commands: ``pip`` does so when it installs, also
    the other tools.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(FOLDER.resolve() / "bytecode")
    package = find_spec("lora_diag")
    assert package is not None
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", *(package.submodule_search_locations or [])],
        check=True,
    )


def made(what: str, *arguments: Any) -> Any:
    """Make files in a process of its own: the system counts this process's memory to the commands
    that it starts.
    """
    subprocess.run(
        [sys.executable, "-m", "benchmarks.pairs", what, *map(str, arguments)], check=True
    )
    folder = arguments[0]
    return (folder / "base", folder / "tuned") if what == "make_pair" else folder


def pair(small: bool, name: str) -> tuple[Path, Path]:
    """Make a pair of checkpoints of a size."""
    sizes = SMALL if small else WIDTHS[name]
    base, tuned = made("make_pair", FOLDER / "-".join(map(str, sizes)), *sizes)
    return base, tuned


def adapter(
    small: bool, name: str, sizes: Sequence[int], seed: int, rank: int = RANK, bits: int = 16
) -> Path:
    """Make an adapter on all matrices of a model."""
    sizes = SMALL if small else sizes
    path: Path = made(
        "make_adapter", FOLDER / "adapters" / f"{sizes[0]}-{name}", *sizes, rank, seed, bits
    )
    return path


def kernels(small: bool, peers: bool) -> None:
    """Methods on one matrix in memory, compared with torch.linalg.svdvals."""
    head = "matrix | work | s | svdvals ÷ this | largest error of C(r) against float64 | certified"
    print_table(head, kernel_rows(((256, 256),) if small else ((4096, 4096), (4096, 11008))))


def kernel_rows(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each way to the values of a matrix."""
    import numpy as np
    import torch

    from benchmarks.pairs import update, weight
    from lora_diag.linalg.exact import gram_matrix
    from lora_diag.linalg.methods import decompose

    def seconds(work: Any, runs: int = 3) -> float:
        return in_turn({"": partial(call, work)}, runs)[""].median("wall")

    for rows, columns in shapes:
        base, tuned = weight(rows, columns, torch.Generator().manual_seed(0))
        matrix = tuned.float() - base.float()
        tall = matrix if rows >= columns else matrix.T
        plain = seconds(partial(torch.linalg.svdvals, matrix), 1)
        gram = gram_matrix(tall)
        own = seconds(partial(gram_matrix, tall)) + seconds(partial(torch.linalg.eigvalsh, gram))
        clean = update(rows, columns, torch.Generator().manual_seed(0))
        size = f"{rows}×{columns}"
        yield size, "torch.linalg.svdvals, float32", f"{plain:.2f}", "1.0", "", ""
        yield size, "product and eigenvalues alone", f"{own:.2f}", f"{plain / own:.1f}", "", ""
        cases = (
            ("full spectrum", matrix, None),
            ("top 64, bf16 pair", matrix, 64),
            ("top 64, not rounded", clean, 64),
        )
        for name, a, top in cases:
            fro = float(torch.linalg.vector_norm(a, dtype=torch.float64))
            work = partial(decompose, a, fro=fro, top=top)
            result, spent = work(), seconds(work)
            true = (
                np.cumsum(torch.linalg.svdvals(a.double()).numpy()[: len(result.s)] ** 2) / fro**2
            )
            error = np.abs(np.cumsum(result.s.numpy() ** 2) / fro**2 - true).max()
            ratio = f"{plain / spent:.1f}"
            yield (
                size,
                f"{name} ({result.method})",
                f"{spent:.2f}",
                ratio,
                f"{error:.1e}",
                f"{result.energy_error:.1e}",
            )


def spectra(small: bool, peers: bool) -> None:
    """The 64 largest values against all of them, over spectra: time, method and certified bound."""
    from benchmarks.spectra import spectra_table

    spectra_table(((256, 256),) if small else ((2048, 2048), (5632, 2048), (4096, 4096)))


def spectrum_commands(base: Path, tuned: Path) -> dict[str, Sequence[object]]:
    """Return the commands that every pair is measured with."""
    return {
        "floor: read both, subtract, norm": [*SCRIPT, "floor", base, tuned],
        "loradiag spectrum": [*SPECTRUM, base, tuned],
        "loradiag spectrum --top 64": [*SPECTRUM, base, tuned, "--top", "64"],
    }


def matrix(small: bool, peers: bool) -> None:
    """Time one bf16 layer in whole processes, and other tools on the same layer."""
    sides = pair(small, "layer")
    commands = spectrum_commands(*sides) | {
        "torch.linalg.svdvals loop": [*SCRIPT, "svdvals", *sides]
    }
    if peers:
        commands |= peer_commands(*sides)
    print_figures(commands_in_turn(commands, 1 if small else 5), "loradiag spectrum")


def files(small: bool, peers: bool) -> None:
    """Files of one bf16 matrix in whole processes, over reading, subtracting and the norm."""
    for rows, columns in (
        ((192, 256),) if small else ((2048, 5632), (2048, 8192), (4096, 4096), (4096, 11008))
    ):
        folder = made("make_file_pair", FOLDER / f"file-{rows}x{columns}", rows, columns)
        sides = folder / "base", folder / "tuned"
        commands = spectrum_commands(*sides) | {
            "torch.linalg.svdvals loop": [*SCRIPT, "svdvals", *sides]
        }
        print(f"\n{rows}×{columns}")
        print_figures(
            commands_in_turn(commands, 1 if small else 3), "floor: read both, subtract, norm"
        )


def model(small: bool, peers: bool) -> None:
    """A 1 B-parameter sharded bf16 pair, whole processes; other tools on a quarter of
    its layers.
    """
    for name in ("1B", "1B/4") if peers else ("1B",):
        sides = pair(small, name)
        commands = spectrum_commands(*sides)
        if name == "1B/4":
            commands["modeldelta"] = peer_commands(*sides)["modeldelta"]
        print_figures(commands_in_turn(commands, 1), "loradiag spectrum")


def residual(small: bool, peers: bool) -> None:
    """Residuals of three adapters for a 1 B-parameter full fine-tune, and the spectrum alone.

    Whole processes are timed.
    """
    sides = pair(small, "1B")
    three = [adapter(small, f"r{r}", WIDTHS["1B"], r, r, 32) for r in (8, 16, 64)]
    commands: dict[str, Sequence[object]] = {
        "loradiag spectrum": [*SPECTRUM, *sides],
        "loradiag residual, 3 adapters": [*LORADIAG, "residual", *sides, *three, "-q"],
    }
    print_figures(commands_in_turn(commands, 1), "loradiag spectrum")


def adapters(small: bool, peers: bool) -> None:
    """A rank-16 adapter on all 224 matrices of a 7B model, whole processes."""
    for bits, dtype in ((16, "bf16"), (32, "float32")):
        path = adapter(small, dtype, SEVEN, 0, RANK, bits)
        commands: dict[str, Sequence[object]] = {
            "loradiag --version (start-up)": [*LORADIAG, "--version"],
            "import torch": [sys.executable, "-c", "import torch"],
            "loradiag spectrum ADAPTER": [*SPECTRUM, path],
        }
        if peers:
            audit = ["audit", "--peft-dir", path, "--json", "--layers"]
            commands["gradience audit"] = [peer("gradience") / "gradience", *audit]
        print(f"\n{dtype}")
        print_figures(commands_in_turn(commands, 1 if small else 5), "loradiag spectrum ADAPTER")


def fleet(small: bool, peers: bool) -> None:
    """40 different rank-16 adapters of a 7B model in bf16 (3.2 GB, in the page cache), one process
    a tool.
    """
    count = 4 if small else FLEET
    paths = [adapter(small, f"fleet{seed}", SEVEN, seed) for seed in range(count)]
    commands: dict[str, Sequence[object]] = {
        "2": [*LORADIAG, "fleet", *paths[:2], "-q"],
        f"loradiag fleet, {count} adapters": [*LORADIAG, "fleet", *paths, "-q"],
        "bare NumPy loop: read, decode, Gram matrices": [sys.executable, BARE, *paths],
        "lora_diag.spectrum in a loop": [*SCRIPT, "loradiag_each", *paths],
    }
    if peers:
        script = Path(__file__).with_name("scripts.py")
        commands["gradience, audit_lora_peft_dir"] = [
            peer("gradience") / "python",
            script,
            "gradience_each",
            *paths,
        ]
    figures = commands_in_turn(commands, 1 if small else 3)
    few, many = figures.pop("2"), figures[f"loradiag fleet, {count} adapters"]
    print_figures(figures, f"loradiag fleet, {count} adapters")
    for name in ("wall", "cpu"):
        print(f"\n{name}: {(many.median(name) - few.median(name)) / (count - 2):.3f} s an adapter")
    thousand = FOLDER / "fleet1000"
    thousand.mkdir(exist_ok=True)
    for number in range(10 if small else 1000):
        (thousand / str(number)).unlink(missing_ok=True)
        (thousand / str(number)).symlink_to(paths[number % count].resolve())
    used = run([*LORADIAG, "fleet", thousand / "*", "-q"])
    print(
        f"\n1,000 adapters, each file 25 times: wall {used.wall:.0f} s, processor {used.cpu:.0f} s",
        end="",
    )
    print(f", peak {used.peak_mib:.0f} MiB")
    sizes = SMALL if small else SEVEN
    start = time.perf_counter()
    singular_values_by_definition(sizes)
    seconds = (time.perf_counter() - start) * sizes[3]
    print(
        f"\ntorch.linalg.svdvals(B @ A), from one of {sizes[3]} layers: {seconds:.0f} s for one "
        "adapter"
    )


def singular_values_by_definition(sizes: Sequence[int]) -> None:
    """Form B·A of every matrix of one layer of the 7B model and compute its singular values."""
    import torch

    for _, rows, columns in llama_layer(*sizes[:3]):
        torch.linalg.svdvals(torch.randn(rows, RANK) @ torch.randn(RANK, columns))


def evict(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def reading(small: bool, peers: bool) -> None:
    """A 1 B-parameter pair that is not in the page cache, compared with `cat` and with the same run
    when it is.
    """
    base, tuned = pair(small, "1B")
    files = sorted([*base.glob("*.safetensors"), *tuned.glob("*.safetensors")])
    size = sum(file.stat().st_size for file in files)
    cat, spectrum = ["cat", *files], [*SPECTRUM, base, tuned, "--top", "64"]

    def cold(words: Sequence[object]) -> Used:
        evict(files)
        return run(words)

    def warm(words: Sequence[object]) -> Used:
        run(cat)
        return run(words)

    works = {
        "cat, not in the cache": partial(cold, cat),
        "spectrum --top 64, not in the cache": partial(cold, spectrum),
        "spectrum --top 64, in the cache": partial(warm, spectrum),
    }
    figures = in_turn(works, 1 if small else 5)
    rows = (
        (name, f"{one.median('wall'):.2f}", f"{min(one.of('wall')):.2f} to "
                                            f"{max(one.of('wall')):.2f}",
         f"{one.median('read') / size:.2f}") for name, one in figures.items()
    )  # fmt: skip
    print_table(
        "command | s | smallest to largest | read from storage, as a multiple of the files", rows
    )
    plain, first, again = (one.of("wall") for one in figures.values())
    both = [one + other for one, other in zip(plain, again, strict=True)]
    print(f"\nNot in the cache ÷ (cat + in the cache): {multiple(first, both)}.")


def rounding(small: bool, peers: bool) -> None:
    """The rounding floor on planted updates."""
    from benchmarks.noise import floor

    floor()


def peer(name: str) -> Path:
    """Install another tool in an environment of its own, once, and say where its commands are."""
    home = FOLDER.resolve() / "peers" / name
    if not (home / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [home / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, name, "torch", "safetensors"], check=True)
        (home / "done").touch()
    return home / "bin"


def peer_commands(base: Path, tuned: Path) -> dict[str, Sequence[object]]:
    """Say how the tools are run that compare checkpoints."""
    extract = [
        "--model",
        tuned,
        "--base-model",
        base,
        "--out-path",
        FOLDER.resolve() / "extracted",
        "--max-rank",
        "8",
    ]
    script = Path(__file__).with_name("scripts.py")
    return {
        "modeldelta": [
            peer("modeldelta") / "python",
            "-m",
            "modeldelta",
            base,
            tuned,
            "-q",
            "-o",
            FOLDER / "m.json",
        ],
        "mergekit-extract-lora, r=8": [peer("mergekit") / "mergekit-extract-lora", *extract],
        "WeightWatcher, deltas": [
            peer("weightwatcher") / "python",
            script,
            "weightwatcher",
            base,
            tuned,
        ],
    }


MEASURED = (kernels, spectra, matrix, files, model, residual, adapters, fleet, reading, rounding)
PARTS = {part.__name__: part for part in MEASURED}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--peers", action="store_true", help="measure other tools, too")
    parser.add_argument("--small", action="store_true", help="small inputs, to test the scripts")
    chosen = parser.parse_args()
    compile_as_installed()
    print(f"{machine()}; torch {version('torch')}\n")
    for part in chosen.parts:
        print(f"\n### {PARTS[part].__doc__}", flush=True)
        PARTS[part](chosen.small, chosen.peers)
