"""Five commands on real checkpoints, each with reading alone and other tools for the same question,
as Markdown.

    python -m benchmarks.real                                  a made pair of 1 B parameters and an adapter
    python -m benchmarks.real BASE FULL ADAPTER TEXT --peers   a real model, with other tools
    python -m benchmarks.real --small                          small inputs, to test the script

Whole processes in turn, start-up included: wall and processor seconds, and peak memory of the
largest process. A command is divided by reading the same files alone, and another tool by the
command. `probe outputs` needs the model's tokenizer and TEXT; its reading is a plain loop over the
same number of tokens of the same models.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks.__main__ import (
    FOLDER,
    LORADIAG,
    RANK,
    SCRIPT,
    WIDTHS,
    adapter,
    compile_as_installed,
    pair,
    peer,
    peer_commands,
)
from benchmarks.measure import commands_in_turn, machine, multiple, print_table

# Every byte once, by NumPy: what no tool can do without.
READ = (
    "import sys, numpy; print([numpy.fromfile(path, numpy.uint8).sum() for path in sys.argv[1:]])"
)
# Of ``probe outputs``: sequences, and tokens of each.
SEQUENCES, LENGTH = 8, 256


class Task(NamedTuple):
    """A command, the name of reading alone, and other tools that answer the same question."""

    words: Sequence[object]
    reading: str
    peers: Mapping[str, Sequence[object]]


def list_weights(*folders: Path) -> list[Path]:
    """Return the files with weights."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def link_steps(name: str, folder: Path, count: int) -> list[Path]:
    """Return ``count`` checkpoints of a run, all of them links to one folder."""
    home = (FOLDER / "steps" / name).resolve()
    home.mkdir(parents=True, exist_ok=True)
    links = [home / f"step_{number + 1}" for number in range(count)]
    for link in links:
        link.unlink(missing_ok=True)
        link.symlink_to(folder.resolve(), target_is_directory=True)
    return links


BOTH, FACTORS, FIVE, LOOP = (
    "both sides read, subtracted, norm",
    "adapter read",
    "five adapters read",
    "loop of losses",
)


def list_readings(
    base: Path, full: Path, lora: Path, text: Path | None
) -> dict[str, Sequence[object]]:
    """Return what no command can do without."""
    weights = list_weights(lora)
    readings: dict[str, Sequence[object]] = {
        BOTH: [*SCRIPT, "floor", base, full],
        FACTORS: [sys.executable, "-c", READ, *weights],
        FIVE: [sys.executable, "-c", READ, *weights * 5],
    }
    return readings | ({LOOP: [*SCRIPT, "losses", base, full, lora, text]} if text else {})


def list_tasks(
    base: Path, full: Path, lora: Path, text: Path | None, peers: bool
) -> dict[str, Task]:
    """Return the commands with what they are compared with."""
    out = FOLDER.resolve() / "extracted-own"
    extract = ["extract", base, full, "--rank", "8", "-o", out, "--overwrite", "-q"]
    others = dict(peer_commands(base, full)) if peers else {}
    extractors = {name: others.pop(name) for name in list(others) if "extract" in name}
    audit = ["audit", "--peft-dir", lora, "--json", "--layers", "--no-udr"]
    audits = {"gradience audit": [peer("gradience") / "gradience", *audit]} if peers else {}
    steps = ["checkpoints", *link_steps("full", full, 2), "--base", base, "-q"]
    tasks = {
        "spectrum": Task([*LORADIAG, "spectrum", base, full, "-q"], BOTH, others),
        "spectrum --top 64": Task(
            [*LORADIAG, "spectrum", base, full, "--top", "64", "-q"], BOTH, others
        ),
        "residual, 1 adapter": Task([*LORADIAG, "residual", base, full, lora, "-q"], BOTH, {}),
        "extract --rank 8": Task([*LORADIAG, *extract], BOTH, extractors),
        "checkpoints, 2 full": Task([*LORADIAG, *steps], BOTH, {}),
        "spectrum ADAPTER": Task([*LORADIAG, "spectrum", lora, "-q"], FACTORS, audits),
        "checkpoints, 5 adapters": Task(
            [*LORADIAG, "checkpoints", *link_steps("adapter", lora, 5), "-q"], FIVE, {}
        ),
    }
    if text:
        options = ["--eval", text, "--max-sequences", str(SEQUENCES), "--length", str(LENGTH), "-q"]
        tasks["probe outputs"] = Task(
            [*LORADIAG, "probe", "outputs", base, full, lora, *options], LOOP, {}
        )
    return tasks


def print_tasks(
    readings: Mapping[str, Sequence[object]], tasks: Mapping[str, Task], runs: int
) -> None:
    """Run everything in turn, and print one table."""
    commands = dict(readings)
    for name, task in tasks.items():
        commands |= {name: task.words, **task.peers}
    figures = commands_in_turn(commands, runs)

    def row(name: str, other: str = "") -> tuple[str, ...]:
        one = figures[name]
        values = [
            f"{one.median('wall'):.2f}",
            f"{one.median('cpu'):.2f}",
            f"{one.median('peak_mib'):.0f}",
        ]
        return (
            name,
            *values,
            *(multiple(one.of(what), figures[other or name].of(what)) for what in ("wall", "cpu")),
            other,
        )

    rows = [row(name) for name in readings]
    for name, task in tasks.items():
        rows += [row(name, task.reading), *(row(each, name) for each in task.peers)]
    print_table(
        "command | wall s | processor s | peak MiB | wall ÷ | processor ÷ | divided by", rows
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="*", type=Path, metavar="BASE FULL ADAPTER TEXT")
    parser.add_argument("--peers", action="store_true", help="measure other tools, too")
    parser.add_argument("--small", action="store_true", help="small inputs, to test the script")
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    if len(chosen.inputs) not in {0, 3, 4}:
        parser.error("give BASE FULL ADAPTER, with TEXT for probe outputs, or nothing")
    compile_as_installed()
    made = (
        ()
        if chosen.inputs
        else (*pair(chosen.small, "1B"), adapter(chosen.small, "real", WIDTHS["1B"], 0, RANK, 32))
    )
    base, full, lora, *texts = chosen.inputs or made
    inputs = base, full, lora, texts[0] if texts else None
    print(f"{machine()}; torch {version('torch')}; runs in turn: {chosen.runs}")
    print_tasks(list_readings(*inputs), list_tasks(*inputs, chosen.peers), chosen.runs)
