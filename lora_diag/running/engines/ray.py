"""The engine on a Ray cluster: connecting to it, and batches of layers as Ray tasks, retried if a
worker or node dies.

A cluster is found by its address, or started on this machine for the run. Tasks are sent as indices
into a list that each worker gets once, and records are returned; no array passes through the object
store.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lora_diag.errors import (
    Given,
    InputError,
    LoradiagError,
    UsageError,
    damaged,
    install_command,
    require,
)
from lora_diag.running.engines.local import MachineLayout
from lora_diag.running.engines.schedule import REACH, Batch, Capacity, Sized, batches, in_order
from lora_diag.running.engines.worker import Job, measure_batch
from lora_diag.storage import FORMATS
from lora_diag.version import __version__

# Retries of a batch on other workers before its layers are retried one by one and then abandoned.
RETRIES = 3
# Bytes of the object store of a local Ray. Records are small: this is Ray's minimum, and a
# container's /dev/shm is often not larger.
STORE_BYTES = 80 * 2**20
# Seconds to wait for an answer at an address.
ANSWER_SECONDS = 30.0
# Connects to a cluster in a process of its own: ``ray.init`` has no time limit, and retries for
# minutes where no cluster answers.
CONNECT = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)"

# Set before Ray is imported. The last: by default, Ray kills a task whose matrix does not fit into
# memory and retries it forever.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": str(RETRIES),
}


@dataclass(frozen=True, slots=True)
class Ray:
    """A Ray cluster to measure on, instead of this machine only.

    Args:
        address: Address of a running cluster, such as ``10.0.0.1:6379`` or ``auto``; None for
            ``RAY_ADDRESS``, else a local Ray that ends with the run.
        gpus_per_task: GPUs per layer, or a fraction of one; 0 to compute on CPUs.
    """

    address: str | None = None
    gpus_per_task: float = 0.0

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: An option is invalid, or Ray is not installed.
        """
        gpus = self.gpus_per_task
        if not gpus >= 0 or (gpus > 1 and gpus % 1 != 0):
            raise UsageError(
                Given("gpus_per_task", gpus),
                "must be a fraction below 1, such as 0.5, or a whole number",
            )
        origin, address = self.find_address()
        if address and "://" in address:
            raise UsageError(
                origin,
                "unsupported form of address",
                "run loradiag on a node of the cluster with HOST:PORT, such as 10.0.0.1:6379, or "
                "auto; from outside, submit it with ray job submit",
            )
        import_ray()

    def find_address(self) -> tuple[Given | str, str | None]:
        """Return the origin of the address, for messages, and the address; None or ``local`` for a
        local Ray.
        """
        if self.address is not None:
            return Given("ray_address", self.address), self.address
        address = os.environ.get("RAY_ADDRESS") or None
        return f"RAY_ADDRESS={address}", address


def import_ray() -> Any:
    """Return the module ``ray``, imported after its environment variables are set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with require(Given("engine", "ray"), "ray"):
        import ray
    return ray


@contextmanager
def connect(engine: Ray, cores: int) -> Iterator[Any]:
    """Stay connected to the cluster or to a local one that is started; keep an existing connection
    of the caller.

    While a connection lasts, the workers keep what they opened.

    Args:
        engine: The cluster.
        cores: Cores of a local Ray.

    Yields:
        The module ``ray``.

    Raises:
        InputError: The cluster cannot be reached, or a local Ray cannot be started.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    origin, address = engine.find_address()
    own_token = ""
    options: dict[str, Any] = {}
    if address in {None, "local"}:
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            # Otherwise Ray leaves a file in the home folder.
            os.environ["RAY_AUTH_TOKEN"] = own_token = secrets.token_hex(32)
        options = {
            "num_cpus": cores,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        _check_answers(origin, str(address))
    # The only switch for what Ray prints to standard output when a worker dies.
    from ray._private import worker

    worker._worker_logs_enabled = False
    try:
        with _allow_interrupts():
            ray.init(
                address or "local", **options, log_to_driver=False, logging_level=logging.CRITICAL
            )
    except Exception as error:  # Ray raises many types
        if address:
            raise InputError(origin, _explain_failure(ray, error)) from error
        problem = f"a local Ray could not be started: {_explain_failure(ray, error)}"
        raise InputError(Given("engine", "ray"), problem) from error
    try:
        yield ray
    finally:
        ray.shutdown()
        worker._worker_logs_enabled = True
        if own_token:
            os.environ.pop("RAY_AUTH_TOKEN", None)


@contextmanager
def _allow_interrupts() -> Iterator[None]:
    """Make Ctrl-C end the block; otherwise an interrupt is lost while Ray's start calls Python from
    C.
    """
    handler = signal.getsignal(signal.SIGINT)
    if (
        handler is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signals: list[int] = []

    def record_and_raise(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, record_and_raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if signals:
        raise KeyboardInterrupt


def _explain_failure(ray: Any, error: BaseException) -> str:
    """Return why Ray could not be reached, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ray.exceptions.AuthenticationError) or "AuthToken" in str(cause):
            return (
                "it requires a token: export RAY_AUTH_MODE=token, and copy ~/.ray/auth_token from "
                "the head node to this machine"
            )
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_answers(origin: Given | str, address: str) -> None:
    """Refuse an address where no cluster answers in time; Ray would retry for minutes.

    Raises:
        UsageError: The address is malformed.
        InputError: No cluster answers at the address.
    """
    advice = "give HOST:PORT of its head node"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise UsageError(
                origin,
                "not an address",
                "give HOST:PORT of the head node, such as 10.0.0.1:6379, or auto",
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except OSError as error:
            problem = f"no Ray cluster answers: {error.strerror or error}"
            advice = f"start its head with ray start --head --port {port}"
            raise damaged(origin, problem, advice) from error
    try:
        # Another failure, such as a missing token, is explained when this process connects.
        subprocess.run(
            [sys.executable, "-c", CONNECT, address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        problem = f"no Ray cluster answered within {ANSWER_SECONDS:g} s"
        raise damaged(origin, problem, advice) from error


Task = TypeVar("Task", bound=Sized)
Record = TypeVar("Record")

# Seconds between two queries of the cluster; seconds without a suitable node before the run stops.
QUERY_SECONDS, MAX_WAIT_SECONDS = 2.0, 60.0
# Seconds without an answer of the head or of this machine's node. Ray ends the process, with exit
# code 1 and its own log, 14 s after it lost the node and 60 s after it lost the head.
LOST_SECONDS = 6.0

# Start of Ray's message when a worker cannot import the function; Ray has no exception type for it.
IMPORT_FAILED = "The remote function failed to import on the worker"


def run_ray(
    measure: Callable[[Task], Record],
    tasks: Iterable[Task],
    layout: MachineLayout,
    footprint: Callable[[Task], int],
    engine: Ray,
    poll: Callable[[], None] = lambda: None,
    advice: str = "add a node with more, or exclude the layer with $exclude",
) -> Iterator[Record]:
    """Yield the record of every task, in the order of the tasks.

    Args:
        measure: A diagnostic with its settings bound.
        tasks: The tasks, one per layer.
        layout: Allocation of a machine; a cluster counts the cores of its largest node.
        footprint: Returns the memory of a running task in bytes.
        engine: The cluster.
        poll: Called every few seconds once a node was found; may raise to cancel all tasks.
        advice: What to do about a task whose workers all died.

    Raises:
        LoradiagError: The error of the first failing task; or Ray is not installed, the cluster
            cannot be reached or is lost, has no suitable node or no access to the inputs, or
            repeatedly loses a layer.
    """
    task_list = list(tasks)
    if not task_list:
        return
    with connect(engine, layout.cores) as ray:
        cluster = _Cluster(ray, engine.gpus_per_task, _find_servers(ray))
        plan = batches(task_list, footprint, cluster.threads(layout), cluster.slots)
        run = _Run(
            ray, cluster, ray.put(_pack_job(ray, measure, task_list)), task_list, poll, advice
        )
        try:
            yield from in_order(
                plan,
                REACH * cluster.slots,
                lambda: cluster.capacity(layout.workers),
                run.send,
                run.fetch,
                run.lost_error,
            )
        finally:
            run.stop()


def capacity_of(engine: Ray, layout: MachineLayout, footprint: int) -> tuple[int, int]:
    """Return how many tasks of one size the cluster can run concurrently at present, and the cores
    of each.

    Args:
        engine: The cluster.
        layout: Allocation of a machine.
        footprint: Memory of a running task in bytes.
    """
    with connect(engine, layout.cores) as ray:
        cluster = _Cluster(ray, engine.gpus_per_task)
        cores = cluster.threads(layout)(footprint)
        return cluster.slots if engine.gpus_per_task else cluster.count_fitting(cores), cores


class _Cluster:
    """The nodes that can run a task.

    Args:
        ray: Ray.
        gpus: GPUs per task.
        servers: Addresses of the servers without which the run is lost, by their names in messages.

    Raises:
        InputError: No node can run a task within the waiting time.
    """

    def __init__(
        self, ray: Any, gpus: float, servers: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        self._ray, self.gpus = ray, gpus
        self._queried_at = self._last_seen = time.monotonic()
        self._servers, self._silent_since = servers or {}, dict[str, float]()
        self._nodes = self._find_fitting_nodes(1)
        while not self._nodes:
            self._wait_for_a_node(1)
        # A matrix may request a whole node. Requests are independent of nodes that join or leave,
        # and so are the bytes.
        self.largest = int(max(node["CPU"] for node in self._nodes))

    def _find_fitting_nodes(self, cores: int) -> list[dict[str, float]]:
        """Return the resources of living nodes that have this number of cores, and the GPUs of a
        task.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [
            node
            for node in nodes
            if node.get("CPU", 0) >= cores and node.get("GPU", 0) >= self.gpus
        ]

    def _wait_for_a_node(self, cores: int) -> None:
        """Wait until the next query, and make it.

        Raises:
            InputError: The cluster had no suitable node for the whole waiting time.
        """
        if time.monotonic() - self._last_seen > MAX_WAIT_SECONDS:
            resources = f"{cores} CPU{'s' if cores > 1 else ''}" + (
                f" and {self.gpus:g} GPUs" if self.gpus else ""
            )
            raise InputError(
                Given("engine", "ray"),
                f"no node had {resources}, which a task needs, for {MAX_WAIT_SECONDS:g} "
                "s; add such a node",
                "a run with $output continues with $resume",
            )
        time.sleep(QUERY_SECONDS)
        self._nodes = self._find_fitting_nodes(cores)

    @property
    def slots(self) -> int:
        """Maximum number of concurrent layers with the smallest request."""
        if self.gpus:
            return max(1, int(sum(node["GPU"] // self.gpus for node in self._nodes)))
        return int(sum(node["CPU"] for node in self._nodes))

    def count_fitting(self, cores: int) -> int:
        """Return the number of concurrent tasks that request this number of cores, at least 1."""
        return max(1, int(sum(node["CPU"] // cores for node in self._nodes)))

    def threads(self, layout: MachineLayout) -> Callable[[int], int]:
        """Return a function from the memory of a layer to its cores; with GPUs, their fraction of a
        node's cores.
        """
        if self.gpus:
            share = int(min(node["CPU"] * self.gpus / node["GPU"] for node in self._nodes))
            return lambda footprint: max(1, share)
        return replace(layout, cores=self.largest).threads

    def capacity(self, workers: int | None) -> Capacity:
        """Return the capacity of the suitable nodes at the last query, of at most ``workers``
        batches if given.
        """
        return Capacity(
            int(sum(node["CPU"] for node in self._nodes)),
            workers or (2 * self.slots if self.gpus else None),
        )

    def poll(self, cores: int) -> None:
        """Look up the living nodes, at most every ``QUERY_SECONDS``; called after every wait for
        tasks.
        """
        if time.monotonic() - self._queried_at < QUERY_SECONDS:
            return
        self._queried_at = time.monotonic()
        if not self._is_connected():
            return
        if nodes := self._find_fitting_nodes(1):
            self._nodes = nodes
        if self._find_fitting_nodes(cores):
            self._last_seen = self._queried_at
        else:
            self._wait_for_a_node(cores)

    def _is_connected(self) -> bool:
        """Return whether the head and this machine's node answer; without, a query would block.

        Raises:
            InputError: One of them has not answered for some time.
        """
        for name, address in self._servers.items():
            try:
                socket.create_connection(address, QUERY_SECONDS).close()
            except OSError as error:
                since = self._silent_since.setdefault(name, time.monotonic())
                if time.monotonic() - since > LOST_SECONDS:
                    raise InputError(
                        Given("engine", "ray"),
                        f"{name} at {address[0]}:{address[1]} is lost",
                        "start the cluster again; a run with $output continues with $resume",
                    ) from error
            else:
                self._silent_since.pop(name, None)
        return not self._silent_since


def _find_servers(ray: Any) -> dict[str, tuple[str, int]]:
    """Return the addresses of the head and of the node of this machine, by their names
    in messages.
    """
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    own_node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return {
        "the head of the cluster": (host.strip("[]"), int(port)),
        "this machine's node of the cluster": (
            own_node["NodeManagerAddress"],
            own_node["NodeManagerPort"],
        ),
    }


class _Run:
    """The Ray tasks of one run."""

    def __init__(
        self,
        ray: Any,
        cluster: _Cluster,
        job: Any,
        tasks: Sequence[Sized],
        poll: Callable[[], None],
        advice: str,
    ) -> None:
        self._ray, self._cluster, self._tasks, self._poll, self._advice = (
            ray,
            cluster,
            tasks,
            poll,
            advice,
        )
        self._name, self._fetch_job = job.hex(), partial(ray.get, job)
        self._remote = ray.remote(measure_batch)
        self._under_way: dict[Any, Batch] = {}

    def send(self, batch: Batch) -> Any:
        """Submit a batch; return its ticket."""
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
        """Wait a while; yield tickets of finished batches with their outcomes, None if their
        workers died; poll.
        """
        done, _ = self._ray.wait(tickets, num_returns=1, timeout=QUERY_SECONDS)
        if done:  # others may have finished, too: a wait costs as much as there are tickets
            done, _ = self._ray.wait(tickets, num_returns=len(tickets), timeout=0)
        for ticket in done:
            del self._under_way[ticket]
            yield ticket, self._fetch_outcomes(ticket)
        self._poll()
        self._cluster.poll(max((batch.threads for batch in self._under_way.values()), default=1))

    def _fetch_outcomes(self, ticket: Any) -> Sequence[Any] | None:
        """Return the outcomes of a finished batch; None if its workers died.

        Raises:
            InputError: A worker cannot import loradiag.
            Exception: A worker raised it: a bug.
        """
        try:
            outcomes: Sequence[Any] = self._ray.get(ticket)
        except self._ray.exceptions.RayTaskError as error:
            lines = str(error.cause).strip().splitlines()
            if lines and lines[0].startswith(IMPORT_FAILED):
                raise InputError(
                    Given("engine", "ray"),
                    f"a worker cannot import loradiag: {lines[-1]}",
                    f"install the same version on every node: {install_command('ray')}",
                ) from error
            raise error.cause from error  # a bug: show its traceback
        except self._ray.exceptions.RayError:
            return None
        return outcomes

    def lost_error(self, batch: Batch) -> LoradiagError:
        """Return the error for a layer whose workers all died."""
        cause = f"{RETRIES + 1} workers died while they" if RETRIES else "a worker died while it"
        return InputError(
            self._tasks[batch.start].layer,
            f"{cause} measured it, possibly for lack of memory; {self._advice}",
            "a run with $output continues with $resume",
        )

    def stop(self) -> None:
        """Cancel the running tasks."""
        for ticket in self._under_way:
            with suppress(Exception):  # a lost cluster needs no cancelling
                self._ray.cancel(ticket, force=True)


def _pack_job(ray: Any, measure: Callable[[Any], Any], tasks: Sequence[Any]) -> Job:
    """Pack what every worker needs into one object; with all tasks, so that shared checkpoints are
    stored once.
    """
    files: dict[str, int] = {}

    class Pickler(ray.cloudpickle.CloudPickler):  # type: ignore[misc]
        def persistent_id(self, item: Any) -> None:
            """Collect the files that are referenced; pickling is unchanged."""
            if isinstance(item, FORMATS) and isinstance(
                item.path, Path
            ):  # an address is the same on every node
                with suppress(OSError):  # deleted since it was opened; reading it will report that
                    files[str(item.path)] = item.path.stat().st_size

    buffer = io.BytesIO()
    Pickler(buffer).dump((measure, tasks))
    return Job(__version__, str(Path.cwd()), tuple(files.items()), buffer.getvalue())
