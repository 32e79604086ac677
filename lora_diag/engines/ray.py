"""The engine on many machines: batches of layers as tasks of Ray, retried where a worker or a node dies.

Knows Ray, and is the only file that does besides the worker's. Tasks go out as numbers into a list that each worker
gets once, records come back; no array passes through the object store.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lora_diag.checkpoints import FORMATS
from lora_diag.engines.local import Layout
from lora_diag.engines.schedule import REACH, Batch, Room, Sized, batches, in_order
from lora_diag.engines.worker import Job, measure_batch
from lora_diag.errors import InputError, LoradiagError, UsageError
from lora_diag.version import __version__

Task = TypeVar("Task", bound=Sized)
Record = TypeVar("Record")

# How often a batch is tried again on another worker before its layers are tried one by one, and then given up.
RETRIES = 3
# Records are small: this is the least that Ray takes, and a container's /dev/shm is often not larger.
STORE_BYTES = 80 * 2**20
# Seconds: to answer at an address; between two looks at the cluster; without a node that could go on.
ANSWER, LOOK, PATIENCE = 10.0, 2.0, 60.0

# Set before Ray is imported. The last: a task of a matrix that does not fit into memory is killed and, by itself, tried
# again for ever.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": str(RETRIES),
}


@dataclass(frozen=True, slots=True)
class Ray:
    """A Ray cluster to measure on, instead of this machine alone.

    Args:
        address: Of a running cluster, such as ``10.0.0.1:6379`` or ``auto``; None for that in ``RAY_ADDRESS``, else a
            Ray of this machine's own that ends with the run.
        gpus_per_task: GPUs that each layer gets, or a share of one; 0 to compute on processors.
    """

    address: str | None = None
    gpus_per_task: float = 0.0

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: It does not, or Ray is not installed.
        """
        gpus = self.gpus_per_task
        if not gpus >= 0 or (gpus > 1 and gpus != int(gpus)):
            raise UsageError(f"--gpus-per-task {gpus:g}: must be a share such as 0.5, or a whole number of GPUs")
        named, address = self.named()
        if address and "://" in address:
            raise UsageError(
                f"{named}: loradiag runs on a node of the cluster and takes its address as HOST:PORT, such as "
                "10.0.0.1:6379, or auto; from outside, send the command with ray job submit"
            )
        _import_ray()

    def named(self) -> tuple[str, str | None]:
        """Return where the address comes from, for messages, and the address."""
        if self.address is not None:
            return f"--ray-address {self.address}", self.address
        address = os.environ.get("RAY_ADDRESS") or None
        return f"RAY_ADDRESS={address}", address


def _import_ray() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray: Ray is not installed; pip install 'loradiag[ray]'") from error
    return ray


def run_ray(
    measure: Callable[[Task], Record],
    tasks: Iterable[Task],
    layout: Layout,
    footprint: Callable[[Task], int],
    on: Ray,
) -> Iterator[Record]:
    """Yield the record of every task, in the order of the tasks.

    Args:
        measure: A diagnostic with its settings bound.
        tasks: What to measure, one layer each.
        layout: How a machine is shared; of a cluster, that many cores are counted as its largest node has.
        footprint: Bytes that a task takes while it runs.
        on: The cluster.

    Raises:
        LoradiagError: What the diagnostic raised, for the first task that did; the cluster cannot be reached, does not
            see the inputs, or loses a layer again and again.
    """
    listed = list(tasks)
    if not listed:
        return
    ray = _import_ray()
    with _connected(ray, on, layout.cores):
        cluster = _Cluster(ray, on.gpus_per_task)
        plan = batches(listed, footprint, cluster.threads(layout), cluster.slots)
        run = _Run(ray, cluster, ray.put(_job(ray, measure, listed)), listed)
        try:
            yield from in_order(
                plan, REACH * cluster.slots, lambda: cluster.room(layout.workers), run.send, run.fetch, run.lost
            )
        finally:
            run.stop()


class _Cluster:
    """The nodes that can take a task.

    Raises:
        InputError: There is none, and none comes.
    """

    def __init__(self, ray: Any, gpus: float) -> None:
        self._ray, self.gpus = ray, gpus
        self._looked = self._last_seen = time.monotonic()
        self._nodes = self._fitting(1)
        while not self._nodes:
            self._wait_for_a_node(1)
        # A matrix may ask for all of a node. What is asked does not change when nodes come and go: nor do the bytes.
        self.largest = int(max(node["CPU"] for node in self._nodes))

    def _fitting(self, cores: int) -> list[dict[str, float]]:
        """Return what the living nodes have that have enough."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [node for node in nodes if node.get("CPU", 0) >= cores and node.get("GPU", 0) >= self.gpus]

    def _wait_for_a_node(self, cores: int) -> None:
        if time.monotonic() - self._last_seen > PATIENCE:
            wanted = f"{cores} CPU{'s' if cores > 1 else ''}" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
            raise InputError(
                f"--engine ray: for {PATIENCE:g} s no node of the cluster had {wanted}, as a layer needs; start one "
                "that has; with -o, --resume goes on from here"
            )
        time.sleep(LOOK)
        self._nodes = self._fitting(cores)

    @property
    def slots(self) -> int:
        """Layers that can be measured at once, if each takes the least."""
        if self.gpus:
            return max(1, int(sum(node["GPU"] // self.gpus for node in self._nodes)))
        return int(sum(node["CPU"] for node in self._nodes))

    def threads(self, layout: Layout) -> Callable[[int], int]:
        """Return how many cores a layer gets, by the bytes that it takes; beside a GPU, that GPU's share of them."""
        if self.gpus:
            share = int(min(node["CPU"] * self.gpus / node["GPU"] for node in self._nodes))
            return lambda footprint: max(1, share)
        return replace(layout, cores=self.largest).threads

    def room(self, workers: int | None) -> Room:
        """Return how much may be under way on the nodes that are there now."""
        return Room(int(sum(node["CPU"] for node in self._nodes)), workers or (2 * self.slots if self.gpus else None))

    def look(self, cores: int) -> None:
        """Look which nodes are there; called again and again while nothing is finished.

        Raises:
            InputError: For long there was none that could take what waits.
        """
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        if found := self._fitting(1):
            self._nodes = found
        if self._fitting(cores):
            self._last_seen = self._looked
        else:
            self._wait_for_a_node(cores)


class _Run:
    """The tasks of Ray of one run."""

    def __init__(self, ray: Any, cluster: _Cluster, job: Any, tasks: Sequence[Sized]) -> None:
        self._ray, self._cluster, self._tasks = ray, cluster, tasks
        self._name, self._fetch_job = job.hex(), partial(ray.get, job)
        self._remote = ray.remote(measure_batch)
        self._under_way: dict[Any, Batch] = {}

    def send(self, batch: Batch) -> Any:
        """Begin a batch."""
        remote = self._remote.options(
            num_cpus=batch.threads,
            num_gpus=self._cluster.gpus,
            max_retries=RETRIES,
            name=self._tasks[batch.start].layer,
        )
        ticket = remote.remote(self._name, self._fetch_job, batch.start, batch.stop, batch.threads)
        self._under_way[ticket] = batch
        return ticket

    def fetch(self, tickets: Sequence[Any]) -> Iterator[tuple[Any, Sequence[Any] | None]]:
        """Wait a while; yield the outcomes of what is done, None where its workers died."""
        done, _ = self._ray.wait(tickets, num_returns=1, timeout=LOOK)
        for ticket in done:
            del self._under_way[ticket]
            yield ticket, self._outcomes(ticket)
        self._cluster.look(max((batch.threads for batch in self._under_way.values()), default=1))

    def _outcomes(self, ticket: Any) -> Sequence[Any] | None:
        try:
            outcomes: Sequence[Any] = self._ray.get(ticket)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error  # a bug: its traceback is shown
        except self._ray.exceptions.RayError:
            return None
        return outcomes

    def lost(self, batch: Batch) -> LoradiagError:
        """Return what to say of a layer whose workers died, every one."""
        return InputError(
            f"{self._tasks[batch.start].layer}: {RETRIES + 1} workers died while they measured it, perhaps for want of "
            "memory; give it a node with more, or leave it out with --exclude; with -o, --resume goes on from here"
        )

    def stop(self) -> None:
        """Stop what is under way."""
        for ticket in self._under_way:
            with suppress(Exception):  # that the cluster is gone is what we came for
                self._ray.cancel(ticket, force=True)


def _job(ray: Any, measure: Callable[[Any], Any], tasks: Sequence[Any]) -> Job:
    """Put into one parcel what every worker needs: with all tasks, whose checkpoints are then in it once."""
    files: dict[str, int] = {}

    class Pickler(ray.cloudpickle.CloudPickler):  # type: ignore[misc]
        def persistent_id(self, item: Any) -> None:
            """Note the files that are seen on the way; everything is pickled as usual."""
            if isinstance(item, FORMATS) and isinstance(item.path, Path):  # not an address, which is one everywhere
                with suppress(OSError):  # gone since it was opened: reading it will say so
                    files[str(item.path)] = item.path.stat().st_size

    parcel = io.BytesIO()
    Pickler(parcel).dump((measure, tasks))
    return Job(__version__, str(Path.cwd()), tuple(files.items()), parcel.getvalue())


@contextmanager
def _connected(ray: Any, on: Ray, cores: int) -> Iterator[None]:
    """Connect to the cluster, or start one here; what the caller is connected to already stays as it is.

    Raises:
        InputError: The cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    named, address = on.named()
    if address in {None, "local"}:
        where = {"address": "local", "num_cpus": cores, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    else:
        where = {"address": address}
        _check_answers(named, str(address))
    from ray._private import worker  # the only switch for what Ray prints to standard output when a worker dies

    worker._worker_logs_enabled = False
    try:
        with _hushed():
            ray.init(**where, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # Ray raises many kinds
        told = named if address else "--engine ray: no Ray could be started here"
        raise InputError(f"{told}: {_reason(ray, error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
        worker._worker_logs_enabled = True


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep Ray's C++ from standard error, where it tells of every second that it waits; what it says is raised, too."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _reason(ray: Any, error: BaseException) -> str:
    """Return why Ray could not be reached, in one line."""
    deepest: BaseException | None = error
    while deepest is not None:
        if isinstance(deepest, ray.exceptions.AuthenticationError) or "AuthToken" in str(deepest):
            return (
                "it asks for a token: export RAY_AUTH_MODE=token here, and copy ~/.ray/auth_token of its head to this "
                "machine"
            )
        deepest = deepest.__cause__ or deepest.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_answers(named: str, address: str) -> None:
    """Refuse an address at which nobody listens: Ray would try for minutes.

    Raises:
        UsageError: It is no address.
        InputError: Nobody does.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{named}: give HOST:PORT of the head node, such as 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
    except OSError as error:
        raise InputError(
            f"{named}: no Ray cluster answers there: {error.strerror or error}; start its head with "
            f"ray start --head --port {port}"
        ) from error
