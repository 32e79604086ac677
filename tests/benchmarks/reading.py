"""Reading a pair that is not in the page cache, compared with `cat` and with the same run when it is."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RUNS = 5


def evict(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run(words: Sequence[object]) -> tuple[float, float]:
    """Run a command; return seconds, and bytes that the system read from storage for it."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words} failed")
    return time.perf_counter() - start, usage.ru_inblock * 512


def reading_table(base: Path, tuned: Path) -> str:
    """Return the table; runs of the commands alternate."""
    files = sorted([*base.glob("*.safetensors"), *tuned.glob("*.safetensors")])
    size = sum(file.stat().st_size for file in files)
    spectrum = [sys.executable, "-m", "lora_diag", "spectrum", base, tuned, "-q", "--top", "64"]
    commands: dict[str, Sequence[object]] = {
        "cat, not in the cache": ["cat", *files],
        "spectrum --top 64, not in the cache": spectrum,
        "spectrum --top 64, in the cache": spectrum,
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    read = dict.fromkeys(commands, 0.0)
    for _ in range(RUNS):
        for name, words in commands.items():
            if "not in" in name:
                evict(files)
            else:
                run(commands["cat, not in the cache"])
            took, read[name] = run(words)
            seconds[name].append(took)
    lines = ["| command | s (smallest to largest) | read from storage, as a multiple of the files |", "|---|---:|---:|"]
    for name, each in seconds.items():
        spread = f"{min(each):.2f} to {max(each):.2f}"
        lines.append(f"| {name} | {statistics.median(each):.2f} ({spread}) | {read[name] / size:.2f} |")
    cat, cold, warm = seconds.values()
    ratios = [c / (a + w) for a, c, w in zip(cat, cold, warm, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return (
        "\n".join(lines) + f"\n\nNot in the cache ÷ (cat + in the cache): {statistics.median(ratios):.2f} ({spread})."
    )
