"""What a child of the server of ``tests.served`` does before it is the command, so that it meets a
fault.

It dies of SIGKILL or Ctrl-C at a step or after a time, meets a disk that is full or a file that
cannot be read. Steps are what a process does to files below its folder: every opening for writing,
renaming, removing, creating, truncating and locking, and every write to a results file, before it,
in its middle and after it.
"""

import errno
import fcntl
import os
import resource
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import lora_diag.decisions.extract.run
import lora_diag.diagnostics.interference.measure
import lora_diag.diagnostics.overlap.measure
import lora_diag.diagnostics.residual.measure
import lora_diag.records.file
import lora_diag.running.engines.local

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock"}


def prepare(job: dict[str, Any]) -> None:
    """Arm the requested fault."""
    Steps(job)
    for fault, value in job["faults"].items():
        FAULTS[fault](value)


class Steps:
    """Counts operations on files, and sends a signal at the requested step."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.log = os.open(job["steps"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.at, self.signal, self.seen = job.get("at"), job["signal"], 0
        self.below = str(Path.cwd())
        sys.addaudithook(self.audit)
        whole = lora_diag.records.file._write

        def write(file: Any, content: bytes) -> None:
            self.step("write")
            if self.at == self.seen + 1:
                file.write(content[: len(content) // 2])
            self.step("half")
            whole(file, content)
            self.step("written")

        lora_diag.records.file._write = write

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take part in what Python tells of itself."""
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (
                writes
                and isinstance(path, str | bytes | os.PathLike)
                and self._ours(os.fsdecode(path))
            ):
                self.step("open")
        elif event in EVENTS and (event == "fcntl.flock" or self._ours(os.fsdecode(arguments[0]))):
            self.step(event)

    def _ours(self, path: str) -> bool:
        return os.path.abspath(path).startswith(self.below)  # noqa: PTH100

    def step(self, name: str) -> None:
        """Record a step, and die there if requested."""
        self.seen += 1
        os.write(self.log, f"{name}\n".encode())
        if self.seen == self.at:
            if (
                self.signal == signal.SIGINT
                and threading.current_thread() is threading.main_thread()
            ):
                signal.raise_signal(signal.SIGINT)
            else:
                os.kill(os.getpid(), self.signal)


def _unreadable(call: int) -> None:
    """Every read from the one of this number on fails, as on a broken disk."""
    _at_read(
        call,
        lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))),
        lasting=True,
    )


def _shrinking(call: int) -> None:
    """The file is cut when it is read for this time."""

    def cut(descriptor: int, *rest: Any) -> int:
        os.truncate(Path(f"/proc/self/fd/{descriptor}").readlink(), 100)
        return preadv(descriptor, *rest)

    _at_read(call, cut)


def _short(most: int) -> None:
    """No read gives more than so many bytes."""
    os.preadv = lambda descriptor, buffers, offset: preadv(descriptor, [buffers[0][:most]], offset)


preadv = os.preadv


def _at_read(call: int, what: Any, lasting: bool = False) -> None:
    seen = 0

    def read(*arguments: Any) -> int:
        nonlocal seen
        seen += 1
        return what(*arguments) if seen == call or (lasting and seen > call) else preadv(*arguments)

    os.preadv = read


def _full(size: int) -> None:
    """No file of this process may become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _failing(module: Any, function: str, number: int) -> None:
    """The file system has no locks; or it cannot wait for its disk, which may have
    failed by then.
    """

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    setattr(module, function, fail)


def _slow(endless: str) -> None:
    """Every layer takes 30 ms, and the one of this name for ever."""
    measure = lora_diag.running.engines.local._run_on_threads

    def slowly(threads: int, one: Any, task: Any) -> Any:
        time.sleep(1e6 if task.layer == endless else 0.03)
        return measure(threads, one, task)

    lora_diag.running.engines.local._run_on_threads = slowly


def _backwards(step: float) -> None:
    """All clocks run backwards."""
    now = [time.time()]

    def clock() -> float:
        now[0] -= step
        return now[0]

    time.time = time.monotonic = clock


FAULTS = {
    "unreadable": _unreadable,
    "shrinking": _shrinking,
    "short": _short,
    "full": _full,
    "no_locks": partial(_failing, fcntl, "flock"),
    "no_sync": partial(_failing, os, "fsync"),
    "slow": _slow,
    "backwards": _backwards,
}
