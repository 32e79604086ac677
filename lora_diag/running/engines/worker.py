"""The worker of a cluster: takes indices of tasks and returns records.

A worker gets the list of all tasks once; a batch refers to tasks by index. Tasks are descriptors
(paths, names, offsets), so a worker reads its inputs from its own mounts, after checking that the
files are those that the submitting program opened.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError, LoradiagError, damaged
from lora_diag.version import __version__


@dataclass(frozen=True)
class Job:
    """The data that all workers get.

    Args:
        version: Version of loradiag where the run was started.
        folder: Working directory of the run; relative paths start there.
        files: Input files and their sizes in bytes.
        work: ``(measure, tasks)``, pickled; unpickled after the files have been checked.
    """

    version: str
    folder: str
    files: tuple[tuple[str, int], ...]
    work: bytes


Work = tuple[Callable[[Any], Any], Sequence[Any]]

# The current job, unpickled once per worker.
_current_job: tuple[str, Work] | None = None


def measure_batch(
    name: str, job: Callable[[], Job], start: int, stop: int, threads: int
) -> list[Any | LoradiagError]:
    """Return the outcomes of the tasks ``start:stop``, up to the error of the first that fails,
    which comes last.

    Only an error is returned if the job cannot be opened.

    Args:
        name: Name of the job.
        job: Returns the job.
        start: The first task.
        stop: One past the last.
        threads: Cores to use.
    """
    outcomes: list[Any | LoradiagError] = []
    try:
        measure, tasks = _load_job(name, job)
        import torch

        torch.set_num_threads(threads)
        outcomes.extend(map(measure, tasks[start:stop]))  # keep the outcomes before an error
    except LoradiagError as error:
        outcomes.append(error)
    return outcomes


def _load_job(name: str, job: Callable[[], Job]) -> Work:
    """Return the work of a job, unpickled once and kept until another job comes."""
    global _current_job
    if _current_job is None or _current_job[0] != name:
        _current_job = (name, open_job(job()))
    return _current_job[1]


def open_job(job: Job) -> Work:
    """Check the version and the files of a job, in the folder of the run if it exists here; return
    the unpickled work.

    Raises:
        InputError: The worker has another version of loradiag or other files.
    """
    worker = f"the worker on {platform.node()}"
    if job.version != __version__:
        problem = f"{worker} has loradiag {__version__}, but the run was started with {job.version}"
        raise InputError(f"{problem}; install the same version everywhere")
    with suppress(OSError):  # if the folder does not exist here, absolute paths may still be valid
        os.chdir(job.folder)
    for file, size in job.files:
        try:
            actual = Path(file).stat().st_size
        except OSError as error:
            problem = f"not visible to {worker}: {error.strerror}"
            raise damaged(
                file, problem, "put inputs on storage that all nodes share, under the same path"
            ) from error
        if actual != size:
            raise InputError(
                f"{file}: has {actual:,} bytes on {worker} instead of {size:,}; put inputs on "
                "storage that all nodes share, or copy the same file to every node"
            )
    from ray import cloudpickle

    work: Work = cloudpickle.loads(job.work)
    return work
