"""Processes on this machine that measure one task at a time, for tasks of many short calls.

Threads of one Python process hold each other up where a task is many short calls of NumPy: two
threads took 1.5 times the processor time of one, and were hardly faster.

A process runs ``serve`` and talks by pickles over pipes. ``multiprocessing`` would start the main
program again, which a script that calls ``lora_diag`` may not expect, or fork, which is unsafe with
threads of BLAS.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from lora_diag.errors import InputError

Task = TypeVar("Task")
Record = TypeVar("Record")


class Processes(Generic[Task, Record]):
    """Processes that each measure one task at a time.

    A call, from any thread, waits for a free one; leaving ends them.

    Args:
        measure: A diagnostic with its settings bound.
        count: Number of processes.
    """

    def __init__(self, measure: Callable[[Task], Record], count: int) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-P",
            "-c",
            f"import gc; gc.disable(); from {__name__} import serve; serve()",
        ]
        self._started = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            for _ in range(count)
        ]
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._pickled_measure = pickle.dumps(measure)
        self._prepared: set[int] = set()
        for process in self._started:
            self._free.put(process)

    def __enter__(self) -> Processes[Task, Record]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._started:
            process.kill()
        for process in self._started:
            with (
                suppress(OSError),
                process,
            ):  # closes the pipes and waits; a task may be left in one
                pass

    def __call__(self, task: Task) -> Record:
        """Measure a task in a free process; return its record.

        Raises:
            Exception: As raised by ``measure``.
            InputError: The process ended.
        """
        process = self._free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.pid not in self._prepared:
                self._prepared.add(process.pid)
                process.stdin.write(self._pickled_measure)
            process.stdin.write(pickle.dumps(task))
            process.stdin.flush()
            outcome, error = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as problem:
            self._free.put(process)  # calls that wait for a free one must end, too
            ended = f"the process that measured it ended with code {process.wait()}"
            raise InputError(
                getattr(task, "layer", task), ended, "run again with $workers 1"
            ) from problem
        self._free.put(process)
        if error is not None:
            raise error
        result: Record = outcome
        return result


def serve() -> None:
    """Read a diagnostic, then tasks from standard input until it ends; write each outcome to
    standard output.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is sent to all; the program that started this one ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output is not an answer
    measure: Callable[[Any], Any] = pickle.load(sys.stdin.buffer)
    gc.freeze()  # of what was imported, nothing is garbage
    gc.enable()
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = pickle.dumps((measure(task), None))
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = pickle.dumps((None, error))
        answers.write(answer)
        answers.flush()
