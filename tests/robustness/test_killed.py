"""A run that is killed goes on with --resume, repeats at most the layers in flight, and ends in the same bytes."""

import shutil
import signal
from pathlib import Path

import pytest

from lora_diag.results import read_results
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


COMMANDS = ["spectrum", "residual", "interference", "intruders", "overlap", "extract"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Case:
    """A command in a folder of its own, and what it leaves there undisturbed."""

    def __init__(self, name: str, command: Commands, model: Path, folder: Path) -> None:
        self.command, self.words, self.folder = command, [*words_of(name, model), "-o", "out", "-q"], folder
        (folder / "whole").mkdir()
        self.undisturbed = self.run("whole")
        assert self.undisturbed.code in {0, 3}, self.undisturbed
        self.whole = contents(folder / "whole")

    def run(self, place: str, *more: str, **how: object) -> Ended:
        return self.command(*self.words, *more, cwd=self.folder / place, **how)

    def fresh(self) -> str:
        shutil.rmtree(self.folder / "again", ignore_errors=True)
        (self.folder / "again").mkdir()
        return "again"

    def goes_on(self, place: str) -> Ended:
        """Resume, and see that it ends as if nothing had been."""
        ended = self.run(place, "--resume")
        assert (ended.code, "Traceback" in ended.err) == (self.undisturbed.code, False), ended
        assert contents(self.folder / place) == self.whole
        return ended


@pytest.fixture(params=COMMANDS)
def case(request: pytest.FixtureRequest, command: Commands, model: Path, tmp_path: Path) -> Case:
    return Case(request.param, command, model, tmp_path)


def kept(folder: Path) -> int:
    """Return how many layers' records, or lines that follow them, a killed run left whole."""
    files = [path for path in (folder / "out", folder / "out.part" / "extraction.jsonl") if path.is_file()]
    if not files or not files[0].stat().st_size:
        return 0
    results = read_results(files[0])
    return len({record.layer for record in results}) + len(results.left_out)


def test_killed_at_every_step(case: Case) -> None:
    steps = len(case.undisturbed.steps)
    writes = case.undisturbed.steps.count("written")
    # Every step of spectrum and extract, which has most kinds of them; every third elsewhere.
    for at in range(1, steps + 1, 1 if case.words[0] == "spectrum" else 3):
        place = case.fresh()
        assert case.run(place, at=at).code == -signal.SIGKILL
        done = kept(case.folder / place)
        ended = case.goes_on(place)
        if case.words[0] != "extract":  # it measures the spectra first
            assert ended.steps.count("written") <= writes - done + 2
