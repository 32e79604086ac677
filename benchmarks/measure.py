"""Time and memory of functions in turn and of whole processes, tables in Markdown, and shapes to
measure on.

``python -m benchmarks.measure FILE COMMAND...`` runs a command and writes what it took to a file as
JSON. The system counts the memory of the process that starts a command to the command; this process
is small.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Used(NamedTuple):
    """What one run of a process took.

    Args:
        wall: Seconds.
        cpu: Processor seconds.
        peak_mib: Resident MiB, at most, of its largest process.
        read: Bytes that the system read from storage.
    """

    wall: float
    cpu: float
    peak_mib: float = 0.0
    read: float = 0.0


@dataclass(frozen=True)
class Figure:
    """The runs of one command or function, in the order in which they were made."""

    runs: tuple[Used, ...]

    def of(self, name: str) -> tuple[float, ...]:
        """Return one number of every run."""
        return tuple(getattr(run, name) for run in self.runs)

    def median(self, name: str) -> float:
        """Return the median of one number."""
        return statistics.median(self.of(name))


def run(words: Sequence[object]) -> Used:
    """Run a command once."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read() if process.stderr else b""
    code, used = finish(process, start)
    if code:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{errors.decode()[-2000:]}")
    return used


def finish(process: subprocess.Popen[bytes], start: float) -> tuple[int, Used]:
    """Wait for a process that began at ``start``, and return its exit code and what it took."""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    used = Used(
        wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, usage.ru_inblock * 512
    )
    return os.waitstatus_to_exitcode(status), used


def call(work: Callable[[], object]) -> Used:
    """Call a function once, in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Used(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(works: Mapping[str, Callable[[], Used]], runs: int = 3) -> dict[str, Figure]:
    """Run works A B C A B C …, so that a machine that drifts drifts for all of them."""
    rounds = [{name: work() for name, work in works.items()} for _ in range(runs)]
    return {name: Figure(tuple(each[name] for each in rounds)) for name in works}


def commands_in_turn(commands: Mapping[str, Sequence[object]], runs: int = 3) -> dict[str, Figure]:
    """Run commands in turn."""
    return in_turn({name: lambda words=words: run(words) for name, words in commands.items()}, runs)


def print_table(head: str, rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table, every row as soon as it is there. ``head`` has its titles."""
    print(f"\n| {head} |\n|{'---|' * len(head.split(' | '))}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_figures(figures: Mapping[str, Figure], reference: str) -> None:
    """Print medians, and paired ratios of wall and processor time to those of a reference, with
    their spread.
    """
    ratios = {
        name: [multiple(figure.of(what), figures[reference].of(what)) for what in ("wall", "cpu")]
        for name, figure in figures.items()
    }
    print_table(
        "command | wall s | processor s | peak MiB | wall, as a multiple | processor, as a "
        "multiple",
        (
            (
                name,
                f"{one.median('wall'):.2f}",
                f"{one.median('cpu'):.2f}",
                f"{one.median('peak_mib'):.0f}",
                *ratios[name],
            )
            for name, one in figures.items()
        ),
    )


def multiple(own: Sequence[float], its: Sequence[float]) -> str:
    """Return the median of paired ratios, with the smallest and the largest unless all are one."""
    ratios = sorted(mine / other for mine, other in zip(own, its, strict=True))
    spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios[0] != ratios[-1] else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def processor() -> str:
    """Return the model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )


def machine() -> str:
    """Return the machine in words, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def llama_layer(hidden: int, inner: int, kv: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, out, in of the matrices of one block."""
    for name, out, width in (
        ("q", hidden, hidden),
        ("k", kv, hidden),
        ("v", kv, hidden),
        ("o", hidden, hidden),
    ):
        yield f"self_attn.{name}_proj.weight", out, width
    for name, out, width in (
        ("gate", inner, hidden),
        ("up", inner, hidden),
        ("down", hidden, inner),
    ):
        yield f"mlp.{name}_proj.weight", out, width


if __name__ == "__main__":
    began = time.perf_counter()
    code, used = finish(subprocess.Popen(sys.argv[2:]), began)
    Path(sys.argv[1]).write_text(json.dumps(used))
    sys.exit(code)
