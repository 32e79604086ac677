"""Commands run in children of one process that has imported everything: real processes, some 20 ms
each.

A child has a limit on its memory and its processor time, and reports over a pipe which input it is
at, so that its parent knows the one at which it was killed or stood still.
"""

import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.cli.app import _run
from lora_diag.errors import LoradiagError
from tests.robustness.kinds import SECRET, prepare

# Beyond what the process takes when it starts; the inputs are a few KB, and take less than 2 s.
MEMORY = 1 << 30
SECONDS = 60.0
# No sign of life from a child for so long, whatever the machine is doing: it waits for something.
SILENCE = 300.0

CODES = {"gate": {0, 1, 2, 3, 4, 5}, "verify-merge": {0, 1, 2, 3, 4, 5}}


class TooLongError(BaseException):
    """A command took more processor time than it may."""


@dataclass(frozen=True)
class Finding:
    """An input that a command did not take as it should.

    Args:
        kind: What was damaged.
        number: Which one: with kind and seed it is made again.
        words: The command.
        problem: What went wrong.
    """

    kind: str
    number: int
    words: list[str]
    problem: str


def cli(words: list[str]) -> tuple[int, str, str]:
    """Run a command in this process; whatever is not meant for a user is raised."""
    sys.argv = ["loradiag", *words]
    sys.stdin = io.StringIO("")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = _run()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
    return code, out.getvalue(), err.getvalue()


def try_one(kind: str, number: int, seed: int, whole: Path) -> tuple[list[str], str]:
    """Make one input, run its command and hold what it does against the contract."""
    folder = Path(tempfile.mkdtemp())
    words: list[str] = []
    try:
        words = prepare(kind, number, seed, whole, folder / "at")
        before = set((folder / "at").rglob("*"))
        with warnings.catch_warnings(record=True) as message:
            warnings.simplefilter("always")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            code, out, err = cli(words)
            signal.setitimer(signal.ITIMER_PROF, 0)
        problem = judge(words, code, out, err) or _left(folder / "at", before, words, code)
        if not problem and message:
            problem = f"warning: {message[0].message} ({message[0].filename}:{message[0].lineno})"
        if not problem and (whole / "ran").exists():
            problem = "a pickle ran code"
    except TooLongError:
        problem = (
            f"took more than {SECONDS:g} s of the processor:\n{traceback.format_exc(limit=-8)}"
        )
    except MemoryError:
        problem = f"took more than {MEMORY >> 20} MiB:\n{traceback.format_exc(limit=-8)}"
    except BaseException:
        problem = traceback.format_exc(limit=-8)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    return words, problem


def judge(words: list[str], code: int, out: str, err: str) -> str:
    """Return the problem with the exit of a command; empty if there is none."""
    allowed = CODES.get(words[0] if words else "", {0, 2, 3, 4})
    if code not in allowed:
        return f"exit code {code}: {err[-300:]}"
    if SECRET in "".join((out + err).split()):
        return f"a secret is printed: {(out + err)[-1000:]}"
    if "Traceback" in err or "Traceback" in out:
        return f"a traceback: {err[-1000:]}"
    if (
        code in {2, 3, 4}
        and not err.strip()
        and words[:1] not in (["gate"], ["verify-merge"])
        and "--help" not in out
    ):
        return f"exit code {code} without a word"
    foreign = {
        character for character in out + err if ord(character) < 32 and character not in "\r\n\t"
    }
    return f"control characters {sorted(foreign)!r} reach the terminal" if foreign else ""


def _left(folder: Path, before: set[Path], words: list[str], code: int) -> str:
    """Return the problem with files left by a command: partial ones, or any but records after an
    error.
    """
    for path in sorted(set(folder.rglob("*")) - before):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith(("new.part/", "new/", "figures/")):
            continue
        if path.name.startswith("."):
            return f"left {name} behind"
        if code not in {0, 1, 5} and path.suffix != ".jsonl" and words[0] != "gate":
            return f"exit code {code}, and yet it wrote {name}"
        if path.suffix == ".jsonl":
            with contextlib.suppress(LoradiagError):
                read_results(path)
                continue
            return f"left {name}, which is no results file"
    return ""


def run_batch(kind: str, numbers: range, seed: int, whole: Path) -> tuple[int, list[Finding]]:
    """Try a batch in one child; return how many were tried, and the findings."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(kind, numbers, seed, whole, writing)
    os.close(writing)
    done, findings, at = 0, [], numbers.start
    for line in _lines(reading, child):
        message = json.loads(line)
        at = message["number"] + 1
        done += 1
        if message["problem"]:
            findings.append(Finding(kind, message["number"], message["words"], message["problem"]))
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if status != 0:
        ended = os.waitstatus_to_exitcode(status)
        name = signal.Signals(-ended).name if ended < 0 else f"exit {ended}"
        findings.append(Finding(kind, at, [], f"the process was ended: {name}"))
        done += 1
        if at + 1 < numbers.stop:
            more, rest = run_batch(kind, range(at + 1, numbers.stop), seed, whole)
            done, findings = done + more, findings + rest
    return done, findings


def _lines(reading: int, child: int) -> Iterator[bytes]:
    rest = b""
    while True:
        if not select.select([reading], [], [], SILENCE)[0]:
            os.kill(child, signal.SIGKILL)
            return
        if not (got := os.read(reading, 1 << 16)):
            return
        *lines, rest = (rest + got).split(b"\n")
        yield from lines


def _work(kind: str, numbers: range, seed: int, whole: Path, writing: int) -> None:
    """Try the inputs of a batch, and end this process."""
    code = 1
    try:
        limit_memory()

        def stop(*_: Any) -> None:
            raise TooLongError

        signal.signal(signal.SIGPROF, stop)
        for number in numbers:
            words, problem = try_one(kind, number, seed, whole)
            os.write(
                writing,
                json.dumps({"number": number, "words": words, "problem": problem}).encode() + b"\n",
            )
        code = 0
    finally:
        os._exit(code)


def limit_memory() -> None:
    """Let this process have so much memory more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def until(minutes: float) -> Iterator[int]:
    """Count up until the time is over."""
    end, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        yield number
        number += 1
