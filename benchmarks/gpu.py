"""Benchmark of a GPU: every number compared with NumPy and the CPU, then kernels, transfers and a
whole pair.

    python -m benchmarks.gpu                print the tables as they grow, in less than eight minutes
    python -m benchmarks.gpu --write        put them into docs/benchmarks.md, with the name of the card
    make bench-gpu                                the same, in an environment that sees the torch of this machine

A row that fails says why, and the others are measured all the same. No row starts after
``--minutes``; slow work is done once. Exit code 1 if a row failed, or if a number is further from
the other than their bounds allow.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.measure import machine
from benchmarks.pairs import make_adapter, make_pair, weight
from benchmarks.scripts import read_pairs
from lora_diag import residual, spectrum
from lora_diag.linalg.devices import move, use_own_stream
from lora_diag.linalg.difference import Difference, difference
from lora_diag.linalg.exact import Factors, gram_matrix
from lora_diag.linalg.methods import decompose
from tests.standin import GPU, counted

PAGE = Path("docs/benchmarks.md")
MARKS = "<!-- GPU tables -->\n", "<!-- end of GPU tables -->\n"
CPU = torch.device("cpu")

# Hidden and inner width, key-value width and layers of the pairs: of the check, and of the timed
# run. Orders of single eigenvalue problems, for ``linalg.devices.CPU_SOLVER_UP_TO``.
FULL = {
    "matrices": ((4096, 4096), (4096, 11008)),
    "orders": (128, 256, 512, 1024),
    "check": (1024, 2816, 256, 2),
    "timed": (2048, 8192, 512, 16),
}
SMALL = {
    "matrices": ((160, 192),),
    "orders": (32,),
    "check": (128, 192, 64, 1),
    "timed": (128, 192, 64, 1),
}  # for the tests

# Singular values of the records have 9 significant digits.
DIGITS = 1e-9

# Largest relative difference between fields of records from two devices: sums of spacings are in
# float32. The limit on the spacing of unchanged entries is that of a piece of the matrix, and a GPU
# has larger pieces.
FIELDS, RESOLUTION = 1e-5, 1e-2

# Seconds after which work is not repeated, and calls after the first one, which compiles and
# allocates.
REPEATED, RUNS = 2.0, 5

FAILED, EXCEEDED, LATE = "FAILED", "EXCEEDED", "not measured: out of time"

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        label: Its first cells.
        work: Returns the other cells; may fail.
    """

    label: str
    work: Callable[[], str]


def table(head: str, rows: Iterable[Row], end: float) -> Iterator[str]:
    """Yield the lines of a table. ``head`` has its titles; no row starts after ``end``."""
    titles = head.split(" | ")
    yield from ("", f"| {head} |", "|" + "---|" * len(titles))
    for row in rows:
        if time.monotonic() > end:
            yield f"| {row.label} | {LATE} |"
            continue
        try:
            yield f"| {row.label} | {row.work()} |"
        except Exception as error:  # a table with a gap is worth more than none
            words = " ".join(str(error).split()).replace("|", "/")[:200]
            yield f"| {row.label} | {FAILED}: {type(error).__name__}: {words} |"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def compared(found: float, allowed: float) -> str:
    """Return a difference as a fraction of the allowed one."""
    return f"{found / allowed:.1e}{'' if found <= allowed else f' {EXCEEDED}'}"  # also if it is NaN


def waited(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result and the median seconds of a call, with everything that it started on the
    device.
    """
    seconds: list[float] = []
    while not seconds or (sum(seconds) < REPEATED and len(seconds) <= RUNS):
        start = time.perf_counter()
        with use_own_stream(device):  # and waits for it
            result = work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds[1:] or seconds)


def products(adapter: Path) -> dict[str, np.ndarray]:
    """Return s·B·A of every pair of factors by the name of the weight, float64; s = 2."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [
        name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")
    ]
    return {
        name.removeprefix("base_model.model.") + ".weight": 2
        * (
            tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
        ).numpy()
        for name in names
    }


def checks(device: torch.device, folder: Path, widths: tuple[int, ...]) -> Iterator[Row]:
    """Yield a row for each run on the device: its records against NumPy in float64, and against the
    CPU's.
    """

    @cache
    def files() -> tuple[Path, Path, Path]:
        return *make_pair(folder / "check", *widths), make_adapter(
            folder / "adapter", *widths, 16, 0
        )

    @cache
    def changes() -> dict[str, np.ndarray]:
        return {
            n: (after.double() - before.double()).numpy()
            for n, before, after in read_pairs(*files()[:2])
        }

    @cache
    def updates() -> dict[str, np.ndarray]:
        return products(files()[2])

    @cache
    def values(of: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.linalg.svd(each, compute_uv=False) for name, each in of().items()}

    def of_pair(**options: Any) -> str:
        return spectra(
            values(changes), lambda where: spectrum(*files()[:2], device=where, **options)
        )

    def of_adapter() -> str:
        # without a device an adapter is measured without torch
        return spectra(values(updates), lambda where: spectrum(files()[2], device=where))

    def spectra(true: dict[str, np.ndarray], measure: Callable[[str], Iterable[Any]]) -> str:
        """Compare σ.

        Sums of the r largest σ̂² may differ by ``energy_error``·‖ΔW‖_F² (Fan 1949), and so may
        each.
        """
        curve = fro = 0.0
        records = list(measure(str(device)))
        for record in records:
            s = next(each for name, each in true.items() if record.layer in name)
            total, result = float((s**2).sum()), np.array(record.s)
            gap = result**2 - s[: len(result)] ** 2
            largest = max(float(np.abs(gap).max()), float(np.abs(np.cumsum(gap)).max()))
            curve = max(curve, largest / (record.energy_error + 4 * DIGITS) / total)
            fro = max(fro, abs(record.fro / math.sqrt(total) - 1))
        assert records, "nothing was measured"
        return (
            f"{compared(curve, 1.0)} | {compared(fro, 1e-9)} | "
            f"{fields(records, list(measure('cpu')))}"
        )

    def of_residual() -> str:
        base, tuned, adapter = files()
        gap, runs = (
            0.0,
            [
                list(residual(base, tuned, [adapter], device=where))
                for where in (str(device), "cpu")
            ],
        )
        for record in runs[0]:
            change = changes().get(record.layer)
            if change is None or record.epsilon is None:  # a norm
                continue
            true = np.linalg.norm(change - updates().get(record.layer, 0.0)) / np.linalg.norm(
                change
            )
            gap = max(gap, abs(record.epsilon / true - 1))
        return f"{compared(gap, 1e-7)} | | {fields(*runs)}"

    yield Row("`spectrum` of a pair", of_pair)
    # one matrix: cuSOLVER's Jacobi iteration in float64 may take long
    yield Row(
        "`spectrum --svd exact`", partial(of_pair, svd="exact", layers=r"layers\.0\..*q_proj")
    )
    yield Row("`spectrum --top 16`", partial(of_pair, top=16))
    yield Row("`spectrum` of an adapter", of_adapter)
    yield Row("`residual`: ε", of_residual)


def fields(own: list[Any], other: list[Any]) -> str:
    """Compare all numbers of two runs but values and bounds, which are compared by their bounds.

    A number that depends on the energy of some values may differ by the bounds, too.
    """
    worst, name = 0.0, ""
    if len(own) != len(other):
        return f"{len(own)} and {len(other)} records {EXCEEDED}"
    for mine, its in zip(own, other, strict=True):
        slack = FIELDS + 10 * sum(
            getattr(each, "energy_error", None) or 0.0 for each in (mine, its)
        )
        left, right = (dict(numbers(each.model_dump())) for each in (mine, its))
        for field in left.keys() | right.keys():
            a, b = left.get(field, math.nan), right.get(field, math.nan)
            allowed = max(slack, RESOLUTION) if field.startswith("resolution.") else slack
            gap = abs(a - b) / max(abs(a), abs(b), 1e-300) / allowed if a != b else 0.0
            if gap > worst or math.isnan(gap):
                worst, name = math.inf if math.isnan(gap) else gap, field
    return f"{compared(worst, 1.0)}{f' ({name})' if worst > 1 else ''}"


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield all numbers of a nested value by their path, except lists of values, and bounds."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key != "s" and not str(key).endswith("_error"):
                yield from numbers(each, f"{name}.{key}".lstrip("."))
    elif isinstance(value, tuple | list):
        for at, each in enumerate(value):
            yield from numbers(each, f"{name}[{at}]")
    elif isinstance(value, int | float):
        yield name, float(value)


def disagreement(own: Any, other: Any, size: float) -> tuple[float, float]:
    """Return the difference between two results of the same work, and the allowed difference.

    Args:
        own: On the device.
        other: On the CPU.
        size: Allowed difference between tensors, relative to the largest entry.
    """
    if isinstance(own, Factors):
        gap = (own.s**2).cumsum(0) - (other.s**2).cumsum(0)
        return float(
            gap.abs().max()
        ) / own.fro**2, own.energy_error + other.energy_error + 4 * DIGITS
    if isinstance(own, Difference):
        assert torch.equal(own.matrix.cpu(), other.matrix), "the matrices differ"
        gaps = [
            abs(getattr(own, of) / getattr(other, of) - 1) / 1e-9
            for of in ("fro", "base_fro", "unchanged")
        ]
        gaps.append(abs(own.rounding.bound / other.rounding.bound - 1) / FIELDS)
        gaps.append(abs(own.rounding.fro / other.rounding.fro - 1) / RESOLUTION)
        return max(gaps), 1.0
    parts = zip(own, other, strict=True) if isinstance(own, tuple | list) else [(own, other)]
    return max(
        float((a.cpu().double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in parts
    ), size


def timed(device: torch.device, work: Callable[[torch.device], Any], size: float = 0.0) -> str:
    """Return the milliseconds of work on the device and on the CPU, their ratio, and the difference
    of the results.
    """
    (own, seconds), (other, cpu) = (waited(where, partial(work, where)) for where in (device, CPU))
    gap = compared(*disagreement(own, other, size))
    return f"{seconds * 1e3:.2f} | {cpu * 1e3:.2f} | {cpu / seconds:.1f} | {gap}"


def kernels(device: torch.device, rows: int, columns: int) -> Iterator[Row]:
    """Yield a row for each part of the work on a matrix."""

    @cache
    def sides() -> tuple[torch.Tensor, torch.Tensor]:
        return weight(rows, columns, torch.Generator().manual_seed(0))

    @cache
    def matrix(where: torch.device) -> torch.Tensor:
        base, tuned = sides()
        return (tuned.float() - base.float()).to(where)

    @cache
    def gram(where: torch.device) -> torch.Tensor:
        return product(where)

    def product(where: torch.device) -> torch.Tensor:
        return gram_matrix(matrix(where) if rows >= columns else matrix(where).T)

    def subtracted(where: torch.device) -> Difference:
        base, tuned = sides()
        return difference(
            zip(base.split(256), tuned.split(256), strict=True), (rows, columns), where
        )

    def factors(where: torch.device, top: int | None) -> Factors:
        return decompose(matrix(where), top=top, fro=fro())

    @cache
    def fro() -> float:
        return float(matrix(CPU).double().norm())

    def row(
        label: str, work: Callable[[torch.device], Any], size: float = 0.0, of: Any = matrix
    ) -> Row:
        def cells() -> str:
            fro(), of(device), of(CPU)  # made before the time counts
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return timed(device, work, size)

        return Row(f"{rows}×{columns} | {label}", cells)

    order = EPSILON * (rows + columns)
    yield row(
        "transfer of both sides, bf16",
        lambda where: [move(each, where) for each in sides()],
        1e-300,
    )
    yield row("transfer, subtraction, norms, rounding", subtracted)
    yield row("Gram matrix, float64", product, 2 * order)
    yield row(
        "its eigenvalues",
        lambda where: torch.linalg.eigvalsh(gram(where), UPLO="L"),
        4 * order,
        gram,
    )
    yield row("full spectrum", partial(factors, top=None))
    yield row("top 64", partial(factors, top=64))
    yield row(
        "torch.linalg.svdvals, float32", lambda where: torch.linalg.svdvals(matrix(where)), 1e-4
    )


def small_orders(device: torch.device, orders: tuple[int, ...]) -> Iterator[Row]:
    """Yield a row for the eigenvalues of one small matrix of each order, and of 64 in a batch."""

    def work(shape: tuple[int, ...], where: torch.device) -> torch.Tensor:
        return torch.linalg.eigvalsh(move(symmetric(shape), where)).cpu()

    @cache
    def symmetric(shape: tuple[int, ...]) -> torch.Tensor:
        a = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return a @ a.mT

    for n in orders:
        for count in (1, 64) if n <= 256 else (1,):
            shape = (count, n, n) if count > 1 else (n, n)
            label = (
                f"{n}×{n} | eigenvalues{f' of {count} in a batch' if count > 1 else ''}, with "
                "transfers"
            )
            yield Row(label, partial(timed, device, partial(work, shape), 64 * n * EPSILON))


def synchronisations(device: torch.device, shape: tuple[int, int], top: int | None) -> int:
    """Return how often the CPU waits for the GPU, or for a stand-in, while a layer is read and
    decomposed.
    """
    base, tuned = weight(*shape, torch.Generator().manual_seed(0))
    rows = max(1, shape[0] // 16)

    def measure(device: torch.device) -> None:
        result = difference(zip(base.split(rows), tuned.split(rows), strict=True), shape, device)
        decompose(result.matrix, fro=result.fro, top=top)

    if device.type != "cuda":
        with counted() as mode:
            measure(GPU)
        return mode.waits
    measure(device)  # libraries start, and wait, once
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            measure(device)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(each.message) for each in caught)


def whole(device: torch.device, folder: Path, widths: tuple[int, ...]) -> Iterator[Row]:
    """Yield a row for each run on the timed pair; files are in the page cache."""

    def work(**options: Any) -> str:
        base, tuned = make_pair(folder / "timed", *widths, device=str(device))
        runs, seconds = [], []
        for where in (str(device), "cpu"):
            start = time.perf_counter()
            runs.append(list(spectrum(base, tuned, device=where, **options)))
            seconds.append(time.perf_counter() - start)
        return (
            f"{seconds[0]:.2f} | {seconds[1]:.2f} | {seconds[1] / seconds[0]:.1f} | {fields(*runs)}"
        )

    yield Row("all values", work)
    yield Row("`--top 64`", partial(work, top=64))


def report(
    device: torch.device, sizes: dict[str, tuple], folder: Path, seconds: float
) -> Iterator[str]:
    """Yield the lines of the tables as they are measured, as Markdown."""
    start = time.monotonic()
    end = start + seconds
    card = "no GPU: a stand-in on the CPU"
    if device.type == "cuda":
        result = torch.cuda.get_device_properties(device)
        card = f"{result.name}, {result.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    yield f"{card}; {machine()}; torch {version('torch')}."
    yield ""
    yield (
        "Differences are fractions of what the bounds allow, or of the rounding of sums in "
        "float32; up to 1 is right."
    )
    head = "run | σ² and C(r), from NumPy | ‖ΔW‖_F or ε, from NumPy | other fields, from the CPU"
    yield from table(head, checks(device, folder, sizes["check"]), end)
    head = "matrix | work | ms | CPU, ms | CPU ÷ GPU | difference"
    rows = [row for shape in sizes["matrices"] for row in kernels(device, *shape)]
    yield from table(head, [*rows, *small_orders(device, sizes["orders"])], end)
    shape = sizes["matrices"][0]
    waits = [
        Row(
            f"{shape[0]}×{shape[1]}, {label}",
            lambda top=top: str(synchronisations(device, shape, top)),
        )
        for label, top in (("all values", None), ("top 64", 64))
    ]
    yield from table("layer | the CPU waits for the GPU", waits, end)
    head = "whole pair | s | CPU, s | CPU ÷ GPU | difference"
    yield from table(head, whole(device, folder, sizes["timed"]), end)
    yield ""
    yield f"Measured in {(time.monotonic() - start) / 60:.1f} minutes."


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu as a stand-in")
    parser.add_argument("--small", action="store_true", help="small matrices, to test the script")
    parser.add_argument(
        "--minutes", type=float, default=6.5, help="no row starts later; slow ones take a minute"
    )
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE}")
    chosen = parser.parse_args(words)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        fix = "nvidia-smi shows the GPU and the newest CUDA version that its driver supports"
        print(f"torch {version('torch')}, {built}, sees no GPU; {fix}", file=sys.stderr)
        return 2
    page = PAGE.read_text() if chosen.write else ""
    if chosen.write:
        insert(page, "")  # fails before anything is measured
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in report(
            device, SMALL if chosen.small else FULL, Path(folder), chosen.minutes * 60
        ):
            print(line, flush=True)
            lines.append(line)
    if chosen.write:
        PAGE.write_text(insert(page, "\n".join(lines) + "\n"))
    return 1 if any(word in line for line in lines for word in (FAILED, EXCEEDED)) else 0


if __name__ == "__main__":
    sys.exit(main())
