"""Experiment trackers and model cards that a report can be sent to: one module each.

A module has ``send(payload, project) -> str``, which returns where the report is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError, UsageError, install_command
from lora_diag.feature import load
from lora_diag.records import Results

TRACKERS = ("wandb", "mlflow", "trackio", "tensorboard", "hub")


def track(results: Sequence[Results[Any] | Path | str], to: str, project: str | None = None) -> str:
    """Send tables, figures and scalars of results to an experiment tracker.

    Args:
        results: Results files, or results in memory.
        to: ``wandb``, ``mlflow``, ``trackio``, ``tensorboard`` or ``hub``.
        project: Project (wandb, trackio), experiment (mlflow), log folder (tensorboard), or model id or folder (hub).

    Returns:
        Where the report is.

    Raises:
        UsageError: There is no such tracker, or no project where one is needed.
        InputError: The tracker's library is not installed, or a results file cannot be read.
    """
    if to not in TRACKERS:
        raise UsageError(f"--to {to}: choose {', '.join(TRACKERS)}")
    from lora_diag.reports.trackers.payload import payload_of

    send: Callable[..., str] = load(f"lora_diag.reports.trackers.{to}:send")
    try:
        return send(payload_of(results), project)
    except ModuleNotFoundError as error:
        raise InputError(f"--to {to}: needs {error.name}; {install_command(to)}") from error
