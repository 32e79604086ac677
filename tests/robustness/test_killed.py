"""A run that is killed goes on with --resume, repeats at most the layers in flight, and ends in the
same bytes.
"""

import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lora_diag
from lora_diag.catalog import read_results
from tests.robustness.conftest import Commands, Ended


def words_of(name: str, model: Path) -> list[str]:
    """Return the words of a command, ``-o`` and its results aside."""
    base, tuned, lora, lora2 = (str(model / each) for each in ("base", "tuned", "lora", "lora2"))
    return {
        "spectrum": ["spectrum", base, tuned],
        "residual": ["residual", base, tuned, lora, lora2],
        "interference": ["interference", base, tuned, lora, lora2],
        "intruders": ["intruders", base, tuned],
        "overlap": ["overlap", base, tuned, str(model / "gradients")],
        "extract": ["extract", base, str(model / "fine"), "--params", "200"],
    }[name]


CALLS: dict[str, Callable[[Path], Callable[..., Any]]] = {
    "residual": lambda m: partial(
        lora_diag.residual, m / "base", m / "tuned", [m / "lora", m / "lora2"]
    ),
    "interference": lambda m: partial(
        lora_diag.interference, [m / "tuned", m / "lora", m / "lora2"], base=m / "base"
    ),
    "overlap": lambda m: partial(lora_diag.overlap, m / "base", m / "tuned", [m / "gradients"]),
    "gradients": lambda m: partial(lora_diag.spectrum, m / "base", gradients=[m / "gradients"]),
    "verify-merge": lambda m: partial(lora_diag.verify_merge, m / "base", m / "lora", m / "fine"),
    "fleet": lambda m: partial(lora_diag.fleet, [m / "lora", m / "base", m / "lora2"]),
}
LAST = "model.layers.3.self_attn.q_proj.weight"
COMMANDS = ["spectrum", "residual", "interference", "intruders", "overlap", "extract"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Case:
    """A command in a folder of its own, and what it leaves there undisturbed."""

    def __init__(self, name: str, command: Commands, model: Path, folder: Path) -> None:
        self.command, self.words = command, [*words_of(name, model), "-o", "out", "-q"]
        self.place = folder / "place"
        self.start_anew()
        self.undisturbed = self.run()
        assert self.undisturbed.code in {0, 3}, self.undisturbed
        self.whole = contents(self.place)
        self.start_anew()

    def run(self, *more: str, **how: object) -> Ended:
        return self.command(*self.words, *more, cwd=self.place, **how)

    def start_anew(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)

    def ends_as_undisturbed(self, *more: str, **how: object) -> Ended:
        """Run, and see that it ends as if nothing had been."""
        ended = self.run(*more, **how)
        assert (ended.code, "Traceback" in ended.err) == (self.undisturbed.code, False), ended
        assert contents(self.place) == self.whole
        return ended

    def goes_on(self) -> Ended:
        """Resume, and see that it ends as if nothing had been."""
        return self.ends_as_undisturbed("--resume")


@pytest.fixture(params=COMMANDS)
def case(request: pytest.FixtureRequest, command: Commands, model: Path, tmp_path: Path) -> Case:
    return Case(request.param, command, model, tmp_path)


def kept(folder: Path) -> int:
    """Return how many layers' records, or lines that follow them, a killed run left whole."""
    files = [
        path
        for path in (folder / "out", folder / "out.part" / "extraction.jsonl")
        if path.is_file()
    ]
    if not files or not files[0].stat().st_size:
        return 0
    results = read_results(files[0])
    return len({record.layer for record in results}) + len(results.left_out)


def moments(case: Case, most: int) -> list[int]:
    """Return the steps to be killed at: some of each kind, or all of them if LORADIAG_EVERY_STEP is
    set.
    """
    steps = case.undisturbed.steps
    if os.environ.get("LORADIAG_EVERY_STEP"):
        return list(range(1, len(steps) + 1))
    return sorted(random.Random(case.words[0]).sample(range(1, len(steps) + 1), most))


def test_killed_at_step(case: Case) -> None:
    writes = case.undisturbed.steps.count("written")
    for at in moments(case, 2):
        case.start_anew()
        assert case.run(at=at).code == -signal.SIGKILL
        done = kept(case.place)
        ended = case.goes_on()
        if case.words[0] != "extract":  # which counts its spectra, too
            # Besides the layer that was being written, and whose first records are dropped with its
            # last.
            assert ended.steps.count("written") <= writes - done + 2


def test_repeatedly_killed_run_completes(command: Commands, model: Path, tmp_path: Path) -> None:
    """Layers of 30 ms, the last of which never ends, and processes that are killed after 20 to 150
    ms.
    """
    case = Case("spectrum", command, model, tmp_path)
    rng = random.Random(0)
    for _ in range(8):
        ended = case.run("--resume", after=rng.uniform(0.02, 0.15), slow=LAST)
        assert ended.code == -signal.SIGKILL, ended
    case.goes_on()


@pytest.mark.parametrize("name", CALLS)
def test_loss_of_power_anywhere_in_file(name: str, model: Path, tmp_path: Path) -> None:
    """The file is cut at any byte, or its end is zeros, as some file systems leave what was not yet
    on the disk.
    """
    run = CALLS[name](model)
    run(output=tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    rng = random.Random(name)
    for _ in range(8):
        cut = rng.randrange(len(whole))
        tail = rng.choice([b"", b"\0" * rng.randrange(1, 5000), b"\0" * 100 + whole[cut + 100 :]])
        (tmp_path / "cut").write_bytes(whole[:cut] + tail)
        run(output=tmp_path / "cut", resume=True)
        assert (tmp_path / "cut").read_bytes() == whole
