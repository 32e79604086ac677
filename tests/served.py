"""Commands in processes of their own, without the seconds that Python and torch take to start.

``python -m tests.served`` imports once what commands import, and forks a child for each: with a memory, a folder, an
environment, an output and an exit code of its own, as a command that is started anew. What Python reads only when it
starts, it has read already; and a child ends without taking torch apart, which takes 0.7 s.
"""

import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Seconds that a command may take, on whatever machine; for one that hangs.
PATIENCE = 900

# What commands import only when they need it.
LATE = (
    *("jinja2", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.pyplot"),
    *("peft", "plotly.offline", "scipy.linalg", "scipy.stats", "transformers.models.llama.modeling_llama"),
)


class Server:
    """The process that forks, and what its children leave in files."""

    def __init__(self, notes: Path, module: str = "tests.served") -> None:
        self._files = {name: str(notes / name) for name in ("out", "err")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: Sequence[Any], cwd: Path, **job: Any) -> tuple[int, bytes, bytes]:
        """Return the exit code of a command, below zero the signal that it died of, and what it printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"words": [str(word) for word in words], "cwd": str(cwd), **self._files, **job}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline()
        assert code, "the server has ended"
        out, err = (Path(file).read_bytes() for file in self._files.values())
        return int(code), out, err

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()


def serve(prepare: Callable[[dict[str, Any]], None] = lambda job: None) -> None:
    """Answer jobs, one a line, until there are no more.

    Args:
        prepare: What a child does before it is the command.
    """
    import torch

    torch.set_num_threads(1)
    assert threading.active_count() == 1, "a child would not have the others"
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_the_command(job, prepare)
        if job.get("after") is not None:
            time.sleep(job["after"])
            os.kill(child, job["signal"])
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _be_the_command(job: dict[str, Any], prepare: Callable[[dict[str, Any]], None]) -> None:
    code = 1
    try:
        signal.alarm(PATIENCE)
        os.chdir(job["cwd"])
        if "environment" in job:
            os.environ.clear()
            os.environ.update(job["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it without
        for number, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = open(0)  # noqa: SIM115
        prepare(job)
        from lora_diag.__main__ import main

        sys.argv = ["loradiag", *job["words"]]
        main()
        code = 0
    except SystemExit as stop:  # with words, Python prints them and ends with 1
        if stop.code is not None and not isinstance(stop.code, int):
            sys.stderr.write(f"{stop.code}\n")
        else:
            code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        threading._shutdown()  # as Python does: it waits for what is still computed
        os._exit(code)


def import_all() -> None:
    """Import the package, and what it imports late."""
    import lora_diag

    for module in pkgutil.walk_packages(lora_diag.__path__, "lora_diag."):
        importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)


if __name__ == "__main__":
    import_all()
    serve()
