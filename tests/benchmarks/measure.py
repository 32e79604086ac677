"""Whole processes: wall time, processor time and peak memory as the system accounts them; shapes to measure on."""

import os
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """The runs of one command, in the order in which they were made.

    Args:
        wall: Seconds of every run.
        cpu: Processor seconds of every run.
        peak_mib: Peak resident MiB of every run.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    peak_mib: tuple[float, ...]


def run(words: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[float, float, float]:
    """Run a command once: wall seconds, processor seconds, peak resident MiB of its largest process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **(env or {})}
    )
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{errors.decode()[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def in_turn(commands: Mapping[str, Sequence[str]], runs: int = 3) -> dict[str, Figure]:
    """Run the commands A B C A B C …, so that a machine that drifts drifts for all of them."""
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, words in commands.items():
            seen[name].append(run(words))
    return {name: Figure(*zip(*rows, strict=True)) for name, rows in seen.items()}


def processor() -> str:
    """Return the model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> str:
    """Return the machine in words, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def table(figures: Mapping[str, Figure], reference: str) -> str:
    """Return figures as a Markdown table: medians, and paired ratios of wall and processor time with their spread."""
    lines = [
        "| command | wall s | processor s | peak MiB | wall, as a multiple | processor, as a multiple |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, figure in figures.items():
        wall, cpu, peak = (statistics.median(values) for values in (figure.wall, figure.cpu, figure.peak_mib))
        ratios = [multiple(getattr(figure, of), getattr(figures[reference], of)) for of in ("wall", "cpu")]
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def multiple(own: Sequence[float], its: Sequence[float]) -> str:
    """Return the median of paired ratios, with the smallest and the largest unless all are one."""
    ratios = sorted(mine / other for mine, other in zip(own, its, strict=True))
    spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios[0] != ratios[-1] else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def llama_layer(hidden: int, inner: int, kv: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, out, in of the matrices of one block."""
    for name, out, width in (("q", hidden, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, hidden)):
        yield f"self_attn.{name}_proj.weight", out, width
    for name, out, width in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        yield f"mlp.{name}_proj.weight", out, width
