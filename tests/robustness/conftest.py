"""A command with an injected fault."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import save_model
from tests.robustness.material import adapters
from tests.served import Server


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: Its exit code; below zero, the signal that it died of.
        out: Its standard output.
        err: Its standard error.
        steps: What it did to files.
    """

    code: int
    out: str
    err: str
    steps: list[str]

    def told(self, code: int) -> str:
        """Return the one message of a command that ended with this code and nothing else to say."""
        assert (self.code, "Traceback" in self.err) == (code, False), self
        assert self.err.count("\n") == 1, self.err
        return self.err


class Commands:
    """Runs commands in children of a process that has imported everything."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        self._server = Server(notes)
        self._environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}

    def __call__(
        self,
        *words: Any,
        cwd: Path,
        at: int | None = None,
        after: float | None = None,
        signal: int = signal.SIGKILL,
        prepare: str = "tests.robustness.fault_injection:prepare",
        **faults: Any,
    ) -> Ended:
        """Run a command to its end, to the step ``at`` or for ``after`` seconds, with ``faults``
        for ``prepare``.
        """
        steps = self.notes / "steps"
        steps.write_text("")
        job = {
            "at": at,
            "signal": signal,
            "steps": str(steps),
            "faults": faults,
            "prepare": prepare,
        }
        job["environment"] = self._environment
        code, out, err = self._server.run(words, cwd, after=after, with_signal=signal, **job)
        return Ended(code, out.decode(), err.decode(), steps.read_text().splitlines())

    def close(self) -> None:
        """Let the process end."""
        self._server.close()


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("notes"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, tuned, two adapters and gradients, where some numbers are not finite."""
    folder = tmp_path_factory.mktemp("model")
    rng = torch.Generator().manual_seed(0)
    names = {f"model.layers.{index}.self_attn.q_proj.weight": (10, 8) for index in range(3)}
    names |= {"model.norm.weight": (8,), "model.layers.3.self_attn.q_proj.weight": (10, 8)}
    before = {name: torch.randn(shape, generator=rng) for name, shape in names.items()}
    after = {
        name: value + 0.1 * torch.randn(value.shape, generator=rng)
        for name, value in before.items()
    }
    save_model(folder / "base", before)
    save_model(folder / "fine", after)
    after["model.layers.3.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_model(folder / "tuned", after)
    adapters(folder, before)
    for step in (1, 2):
        gradients = {
            name: torch.randn(shape, generator=rng)
            for name, shape in names.items()
            if len(shape) == 2
        }
        if step == 2:
            gradients["model.layers.1.self_attn.q_proj.weight"][2, 2] = float("inf")
        saved = save_model(folder / "gradients", gradients) / "model.safetensors"
        saved.rename(folder / "gradients" / f"grad_step{step}.safetensors")
    return folder
