"""What runs on a worker of a cluster: it takes numbers of tasks and returns records.

A worker is given the list of all tasks once; a batch names its tasks by their place in it. Tasks are descriptors
(paths, names, offsets), so a worker reads from its own mounts what it measures; before it does, it makes sure that the
files there are those that the program which asks has seen.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_diag.errors import InputError, LoradiagError
from lora_diag.version import __version__


@dataclass(frozen=True)
class Job:
    """What all workers are given.

    Args:
        version: Of this package, where the run was started.
        folder: Where it was started; relative paths are meant from there.
        files: The files that are read, and their sizes in bytes.
        work: ``(measure, tasks)``, pickled: it is only opened once the files are there.
    """

    version: str
    folder: str
    files: tuple[tuple[str, int], ...]
    work: bytes


Work = tuple[Callable[[Any], Any], Sequence[Any]]

# The job at hand, so that only the first batch on a worker has to open it.
_at_hand: tuple[str, Work] | None = None


def measure_batch(name: str, job: Callable[[], Job], start: int, stop: int, threads: int) -> list[Any | LoradiagError]:
    """Return what was measured of the tasks ``start:stop``; it ends with the first that cannot be measured.

    Args:
        name: Of the job.
        job: Fetches it.
        start: The first task.
        stop: One past the last.
        threads: Cores to use.
    """
    outcomes: list[Any | LoradiagError] = []
    try:
        measure, tasks = _work(name, job)
        torch.set_num_threads(threads)
        outcomes.extend(map(measure, tasks[start:stop]))  # keeps those before an error
    except LoradiagError as error:
        outcomes.append(error)
    return outcomes


def _work(name: str, job: Callable[[], Job]) -> Work:
    global _at_hand
    if _at_hand is None or _at_hand[0] != name:
        _at_hand = (name, open_job(job()))
    return _at_hand[1]


def open_job(job: Job) -> Work:
    """Return what to do with what.

    Raises:
        InputError: This worker cannot do it as it was meant: another version, or other files.
    """
    where = f"the worker on {platform.node()}"
    if job.version != __version__:
        raise InputError(f"{where} has loradiag {__version__}, this is {job.version}; install one version everywhere")
    with suppress(OSError):  # where there is no such folder, paths that start at / may still be right
        os.chdir(job.folder)
    for file, size in job.files:
        try:
            found = Path(file).stat().st_size
        except OSError as error:
            raise InputError(
                f"{file}: {where} cannot see it: {error.strerror}; inputs must be on storage that all nodes share, "
                "under the same path"
            ) from error
        if found != size:
            raise InputError(
                f"{file}: {where} sees another file there, of {found:,} bytes instead of {size:,}; inputs must be on "
                "storage that all nodes share, or be the same everywhere"
            )
    from ray import cloudpickle

    work: Work = cloudpickle.loads(job.work)
    return work
