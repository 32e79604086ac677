"""Commands in processes of their own, without the seconds that Python and torch take to start.

One server for all workers of a test run imports once what commands import, and forks a child for
each command: a process with a memory, a folder, an environment and open files of its own, as a
command that is started anew. What Python reads only when it starts, it has read already; a child
ends without taking torch apart, which takes 0.7 s.

``Server`` runs commands for a test; ``PROGRAM`` is the same for a shell: a program that hands its
arguments, folder, environment and open files to the server, and ends as the command ends.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Seconds that a command may take, on whatever machine; for one that hangs.
PATIENCE = 900

# The environment variable with the path of the server's socket.
SOCKET = "LORADIAG_TEST_SERVER"

# The environment variable with the ``prepare`` of the commands of a shell, if any.
PREPARE = "LORADIAG_TEST_PREPARE"

# ``-S -E``: start in 0.02 s. The words of a command follow.
PROGRAM = [sys.executable, "-S", "-E", str(Path(__file__).resolve())]

# What commands import only when they need it.
LATE = (
    *(
        "jinja2",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "matplotlib.pyplot",
    ),
    *(
        "peft",
        "plotly.offline",
        "scipy.linalg",
        "scipy.stats",
        "transformers.models.llama.modeling_llama",
    ),
)


class Server:
    """A connection to the server, which is started if none is running, and ends with its last
    connection.
    """

    def __init__(self, folder: Path) -> None:
        self._printed = [folder / "out", folder / "err"]
        self._socket = _connected(os.environ[SOCKET])
        self._answers = self._socket.makefile()

    def run(
        self, words, cwd: Path, after: float | None = None, with_signal: int = 0, **job
    ) -> tuple[int, bytes, bytes]:
        """Return the exit code of a command, below zero the signal that it died of, and what it
        printed.

        Args:
            words: The arguments of the command.
            cwd: Its folder.
            after: Seconds after which the command gets the signal ``with_signal``.
            with_signal: That signal.
            **job: ``environment``; ``prepare``, "module:function", which the child calls with all
                of these first; ``patience``, seconds after which the system ends it.
        """
        with contextlib.ExitStack() as files:
            taken = files.enter_context(open(os.devnull))  # noqa: PTH123
            printed = [files.enter_context(path.open("wb")) for path in self._printed]
            job |= {"words": [str(word) for word in words], "cwd": str(cwd), "files": [0, 1, 2]}
            _send(self._socket, job, [taken.fileno(), *(file.fileno() for file in printed)])
        child = int(self._answers.readline())
        if after is not None:
            time.sleep(after)
            os.kill(child, with_signal)
        code = int(self._answers.readline())
        out, err = (path.read_bytes() for path in self._printed)
        return code, out, err

    def close(self) -> None:
        """End the connection."""
        self._answers.close()
        self._socket.close()


def show_all(job: dict) -> None:
    """Let a command show every line of its summary."""
    from lora_diag.cli import options

    options.LINES = None


def draw_nothing(job: dict) -> None:
    """Leave the static figures out of HTML reports, of which they are nearly all time;
    ``tests/reports`` has them.
    """
    from lora_diag.reports import html

    html.images_of = lambda evidence: []


def peak(anew: bool = False) -> int:
    """Return the peak of the resident memory of this process in bytes; ``anew`` from now on,
    without what is freed.

    Not of ``getrusage``, which begins with what the parent took.
    """
    import ctypes
    import re

    if anew:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _connected(path: str) -> socket.socket:
    import fcntl

    with open(path + ".lock", "w") as lock:  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = socket.socket(socket.AF_UNIX)
        started = None
        while True:
            try:
                connection.connect(path)
            except OSError:
                if started is None:
                    started = _start(path)
                assert os.waitpid(started, os.WNOHANG) == (0, 0), "the server has ended"
                time.sleep(0.05)
            else:
                return connection


def _start(path: str) -> int:
    # Strings have other hashes in commands than in tests, so that what depends on them differs.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "1",
    }
    nothing = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "tests.served", path],
        environment,
        file_actions=nothing,
    )


def _send(connection: socket.socket, job: dict, files: list[int]) -> None:
    line = json.dumps(job).encode() + b"\n"
    sent = socket.send_fds(connection, [line], files)
    connection.sendall(line[sent:])


def _receive(connection: socket.socket) -> tuple[dict | None, list[int]]:
    """Return the next job of a connection and its open files, or None at its end."""
    line, files, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while line and not line.endswith(b"\n"):
        line += connection.recv(1 << 16)
    return json.loads(line) if line else None, files


def serve(path: str) -> None:
    """Run the jobs of all connections until the last is closed."""
    import fcntl
    import gc

    import torch

    torch.set_num_threads(1)
    assert threading.active_count() == 1, "a child would not have the others"
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    ended, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: set[socket.socket] = set()
    running: dict[int, socket.socket] = {}
    while True:
        for ready in select.select([listener, ended, *clients], [], [])[0]:
            if ready is listener:
                clients.add(listener.accept()[0])
            elif ready is ended:
                ended.recv(1 << 10)
                _report_ends(running)
            else:
                job, files = _receive(ready)
                if job is None:
                    clients.remove(ready)
                    ready.close()
                    continue
                child = os.fork()
                if child == 0:
                    for inherited in (listener, ended, wakeup, *clients):
                        inherited.close()
                    _be_the_command(job, files)
                for file in files:
                    os.close(file)
                running[child] = ready
                ready.sendall(f"{child}\n".encode())
        if not clients:
            with open(path + ".lock", "w") as lock:  # noqa: PTH123
                fcntl.flock(lock, fcntl.LOCK_EX)  # whoever connects holds it
                if not select.select([listener], [], [], 0)[0]:
                    os.unlink(path)  # noqa: PTH108
                    return


def _report_ends(running: dict[int, socket.socket]) -> None:
    """Tell the caller of a command that it has ended, and how."""
    for child in list(running):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError):  # who asked has ended as well
                running.pop(child).sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _be_the_command(job: dict, files: list[int]) -> None:
    import importlib
    import traceback

    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell starts what runs behind it without
        signal.alarm(job.get("patience", PATIENCE))
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["environment"])
        _take(dict(zip(job["files"], files, strict=True)))
        if job.get("prepare"):
            module, function = job["prepare"].split(":")
            getattr(importlib.import_module(module), function)(job)
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
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # as Python does
            traceback.print_exc()
            code = 120
        threading._shutdown()  # as Python does: it waits for what is still computed
        os._exit(code)


def _take(files: dict[int, int]) -> None:
    """Make these the standard files, as Python does when it starts; one that is missing
    is closed.
    """
    for number in range(3):
        if number in files:
            os.dup2(files[number], number)
        else:
            os.close(number)
    for file in files.values():
        os.close(file)
    modes = {
        0: ("stdin", "r", None),
        1: ("stdout", "w", "strict"),
        2: ("stderr", "w", "backslashreplace"),
    }
    for number, (name, mode, errors) in modes.items():
        file = None
        if number in files:
            file = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
            file.reconfigure(line_buffering=name == "stderr" or file.isatty())
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def _pass_on() -> int:
    """Be, for a shell, the command that these words are: the server runs it on the open files of
    this process.
    """
    files = []
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            files.append(number)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SOCKET])
    job = {
        "words": sys.argv[1:],
        "cwd": os.getcwd(),  # noqa: PTH109
        "environment": dict(os.environ),
        "files": files,
    }
    job["prepare"] = os.environ.get(PREPARE)
    _send(connection, job, files)
    answers = connection.makefile()
    child = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def import_all() -> None:
    """Import the package, and what it imports late."""
    import importlib
    import pkgutil

    import lora_diag

    for module in pkgutil.walk_packages(lora_diag.__path__, "lora_diag."):
        importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    importlib.import_module("lora_diag.cli.app").commands()


if __name__ == "__main__":
    if __package__:
        import_all()
        serve(sys.argv[1])
    else:
        sys.exit(_pass_on())
