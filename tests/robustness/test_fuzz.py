"""Damaged inputs of every kind: a result or one message, in bounded time and memory, and nothing
half-written.

The same inputs each time; ``make fuzz`` tries others for as long as it is told.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.messages import assert_names
from tests.robustness import children
from tests.robustness.__main__ import main
from tests.robustness.children import judge
from tests.robustness.kinds import KINDS
from tests.served import Server


def fuzz(job: dict) -> None:
    sys.argv = ["", *job["words"]]
    raise SystemExit(main())


def test_damaged_inputs_of_every_kind(server: Server) -> None:
    words, prepare = ["--inputs", "8", "--seed", "2026"], "tests.robustness.test_fuzz:fuzz"
    code, out, err = server.run(words, ROOT, environment={**os.environ}, prepare=prepare)
    assert code == 0, out[-6000:] + err[-3000:]
    message = json.loads(out.splitlines()[-1])
    assert set(message["tried"]) == set(KINDS)
    assert message["findings"] == 0
    assert message["all"] > 85


# --- the judge itself, which must be able to fail
# --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "out", "err", "problem"),
    [
        (["inspect"], 1, "", "error: x", "exit code 1"),
        (["inspect"], 3, "", "Traceback (most recent call last)", "a traceback"),
        (["inspect"], 3, "", "", "without a word"),
        (["inspect"], 0, "a\x1b[31mb", "", "control characters"),
        (["inspect"], 3, "", "error: http://me:Qz\n7@host", "a secret"),
        (["inspect"], 3, "", "error: x\n", ""),
        (["gate"], 1, "FAILED\n", "", ""),
    ],
)
def test_judge_reports_each_fault(
    words: list[str], code: int, out: str, err: str, problem: str
) -> None:
    result = judge(words, code, out, err)
    assert (problem in result) if problem else not result


def try_broken(job: dict) -> None:
    def prepare(kind: str, number: int, seed: int, whole: Path, at: Path) -> list[str]:
        at.mkdir()
        os.chdir(at)
        return ["inspect", str(number)]

    def cli(words: list[str]) -> tuple[int, str, str]:
        match int(words[1]):
            case 0:
                return 0, "fine", ""
            case 1:
                raise ValueError("a bug")
            case 2:
                bytearray(1 << 31)
            case 3:
                os.abort()
            case 4:
                while True:
                    pass
            case 5:
                Path(".half").write_text("x")
                return 3, "", "error: x"
        return 0, "", ""

    children.prepare, children.cli, children.SECONDS, children.MEMORY = prepare, cli, 0.5, 1 << 29
    os.close(2)
    done, found = children.run_batch("any", range(7), 0, Path(job["cwd"]))
    sys.stdout.write(json.dumps([done, [[one.number, one.problem] for one in found]]))
    raise SystemExit


def test_faults_of_child_are_found(server: Server, tmp_path: Path) -> None:
    """A bug, too much memory, an abort, an endless loop, a half-written file; and what comes after
    them is tried.
    """
    environment = {**os.environ}
    _, out, _ = server.run(
        (), tmp_path, environment=environment, prepare="tests.robustness.test_fuzz:try_broken"
    )
    done, result = json.loads(out)
    assert done == 7
    message = dict(result)
    assert sorted(message) == [1, 2, 3, 4, 5]
    assert_names(message[1], "ValueError")
    assert_names(message[2], "took", "512 MiB")
    assert "SIGABRT" in message[3]
    assert_names(message[4], "took", "0.5 s")
    assert_names(message[5], "left .half")
