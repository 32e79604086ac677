"""Whole processes: wall time and peak memory as the system accounts them, in turn, as medians."""

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """Medians over the runs of one command."""

    wall: float
    cpu: float
    peak_mib: float
    runs: int


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
    return {
        name: Figure(*(statistics.median(column) for column in zip(*rows, strict=True)), runs)
        for name, rows in seen.items()
    }


def processor() -> str:
    """Return the model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> str:
    """Return the machine in words, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def table(figures: Mapping[str, Figure], reference: str) -> str:
    """Return figures as a Markdown table, wall time also as a ratio to one of them."""
    lines = ["| command | wall s | processor s | peak MiB | wall, as a multiple |", "|---|---:|---:|---:|---:|"]
    for name, figure in figures.items():
        ratio = figure.wall / figures[reference].wall
        lines.append(f"| {name} | {figure.wall:.2f} | {figure.cpu:.2f} | {figure.peak_mib:.0f} | {ratio:.2f} |")
    return "\n".join(lines)
