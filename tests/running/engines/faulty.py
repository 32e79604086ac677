"""Measures as ``spectrum`` does, and fails on the way; importable by the workers of a cluster."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from lora_diag.cli import main
from lora_diag.diagnostics.spectrum import run as spectrum
from lora_diag.errors import InputError
from lora_diag.running import training_runs


def first_time(marker: Path) -> bool:
    """Return whether this is the first call on any worker."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def kills_its_worker(folder, times, layer, task, settings):
    """Kill the process that measures a layer, so many times."""
    if task.layer == layer and any(first_time(folder / f"killed{time}") for time in range(times)):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(task, settings)


def cannot_read(layer, task, settings):
    """Find a file broken in one layer."""
    if task.layer == layer:
        raise InputError(
            f"model.safetensors: the file ends inside {layer}; copy or download it again"
        )
    return real(task, settings)


def waits_on_the_second_node(marker, head, task, settings):
    """On another node than the head, say so and never end: the node has to die; on the head, begin
    only then.
    """
    import ray

    if ray.get_runtime_context().get_node_id() != head:
        marker.touch()
        time.sleep(600)
    while not marker.exists():
        time.sleep(0.05)
    return real(task, settings)


def kills_its_worker_then_waits(folder, deadly, endless, task, settings):
    """Kill the process that measures the one layer, once; wait for ever in the other."""
    if task.layer == endless:
        (folder / "pid").write_text(str(os.getpid()))
        (folder / "pid").rename(folder / "waiting")
        time.sleep(600)
    return kills_its_worker(folder, 1, deadly, task, settings)


def kills_its_worker_in_a_run(folder, times, label, site, train, training, task):
    """Kill the process that trains one run of a sweep, so many times."""
    if task.layer == label and any(first_time(folder / f"killed{time}") for time in range(times)):
        os.kill(os.getpid(), signal.SIGKILL)
    return trains(site, train, training, task)


def never_ends(marker, name, site, train, training, task):
    """Say that a run of a search began, and never end it."""
    if task.layer.startswith(name):
        marker.touch()
        time.sleep(600)
    return trains(site, train, training, task)


real, trains = spectrum._measure_layer, training_runs.train_on_worker

if __name__ == "__main__":  # the command line with such a fault
    folder, deadly, endless, *sys.argv[1:] = sys.argv[1:]
    from tests.running.engines import faulty  # as the workers import it

    spectrum._measure_layer = partial(
        faulty.kills_its_worker_then_waits, Path(folder), deadly, endless
    )
    main()
