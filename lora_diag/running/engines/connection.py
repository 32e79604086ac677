"""The Ray cluster: finding its address, connecting to it or starting one on this machine, and leaving it.

Handles addresses, tokens and Ray's own output; independent of tasks.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from lora_diag.errors import InputError, UsageError, install_command

# Retries of a batch on other workers before its layers are retried one by one and then abandoned.
RETRIES = 3
# Bytes of the object store of a local Ray. Records are small: this is Ray's minimum, and a container's /dev/shm is
# often not larger.
STORE_BYTES = 80 * 2**20
# Seconds to wait for an answer at an address.
ANSWER_SECONDS = 30.0
# The start of HTTP/2, the protocol of Ray's head, with empty settings; the answer is a frame of settings.
GREETING, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), 4

# Set before Ray is imported. The last: by default, Ray kills a task whose matrix does not fit into memory and retries
# it forever.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": str(RETRIES),
}


@dataclass(frozen=True, slots=True)
class Ray:
    """A Ray cluster to measure on, instead of this machine only.

    Args:
        address: Address of a running cluster, such as ``10.0.0.1:6379`` or ``auto``; None for ``RAY_ADDRESS``, else a
            local Ray that ends with the run.
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
            raise UsageError(f"--gpus-per-task {gpus:g}: must be a fraction below 1, such as 0.5, or a whole number")
        origin, address = self.find_address()
        if address and "://" in address:
            raise UsageError(
                f"{origin}: unsupported form of address; run loradiag on a node of the cluster with HOST:PORT, such "
                "as 10.0.0.1:6379, or auto; from outside, submit it with ray job submit"
            )
        import_ray()

    def find_address(self) -> tuple[str, str | None]:
        """Return the origin of the address, for messages, and the address."""
        if self.address is not None:
            return f"--ray-address {self.address}", self.address
        address = os.environ.get("RAY_ADDRESS") or None
        return f"RAY_ADDRESS={address}", address


def import_ray() -> Any:
    """Import ``ray`` with its logging off.

    Raises:
        UsageError: Ray is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine ray: Ray is not installed; {install_command('ray')}") from error
    return ray


@contextmanager
def connect(ray: Any, engine: Ray, cores: int) -> Iterator[None]:
    """Connect to the cluster or start a local one; an existing connection of the caller is kept.

    Raises:
        InputError: The cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    origin, address = engine.find_address()
    own_token = ""
    if address in {None, "local"}:
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            # Otherwise Ray leaves a file in the home folder.
            os.environ["RAY_AUTH_TOKEN"] = own_token = secrets.token_hex(32)
        options = {
            "address": "local",
            "num_cpus": cores,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        options = {"address": address}
        _check_answers(origin, str(address))
    from ray._private import worker  # the only switch for what Ray prints to standard output when a worker dies

    worker._worker_logs_enabled = False
    try:
        with _suppress_stderr(), _allow_interrupts():
            ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # Ray raises many types
        problem = origin if address else "--engine ray: a local Ray could not be started"
        raise InputError(f"{problem}: {_explain_failure(ray, error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
        worker._worker_logs_enabled = True
        if own_token:
            os.environ.pop("RAY_AUTH_TOKEN", None)


@contextmanager
def keep_connection(engine: Ray, cores: int) -> Iterator[bool]:
    """Stay connected over several uses of a cluster, so that its workers keep what they opened.

    Args:
        engine: The cluster.
        cores: Cores of a local Ray.

    Yields:
        Whether a node has a GPU.

    Raises:
        UsageError: Ray is not installed.
        InputError: The cluster cannot be reached.
    """
    ray = import_ray()
    with connect(ray, engine, cores):
        yield ray.cluster_resources().get("GPU", 0) >= 1


@contextmanager
def _suppress_stderr() -> Iterator[None]:
    """Keep Ray's C++ layer from writing its waiting messages to standard error; its errors are raised anyway."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error has no file descriptor
        yield
        return
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(devnull)


@contextmanager
def _allow_interrupts() -> Iterator[None]:
    """Make Ctrl-C end the block reliably: an interrupt is lost while Ray's start calls Python from C."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
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
                "it requires a token: export RAY_AUTH_MODE=token, and copy ~/.ray/auth_token from the head node to "
                "this machine"
            )
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_answers(origin: str, address: str) -> None:
    """Refuse an address where no server of Ray's protocol listens; Ray would retry for minutes.

    Raises:
        UsageError: The address is malformed.
        InputError: No server listens at the address, or another one.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{origin}: not an address; give HOST:PORT of the head node, such as 10.0.0.1:6379, or auto")
    end = time.monotonic() + ANSWER_SECONDS
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as server:
            server.sendall(GREETING)
            frame = b""
            while len(frame) < 4 and "RAY_USE_TLS" not in os.environ:
                server.settimeout(max(0.01, end - time.monotonic()))
                frame += (part := server.recv(4 - len(frame)))
                if not part or (len(frame) == 4 and frame[3] != SETTINGS):
                    raise InputError(
                        f"{origin}: the server there is not a Ray cluster; give HOST:PORT of its head node"
                    )
    except TimeoutError as error:
        raise InputError(
            f"{origin}: no Ray cluster answered within {ANSWER_SECONDS:g} s; give HOST:PORT of its head node"
        ) from error
    except OSError as error:
        raise InputError(
            f"{origin}: no Ray cluster answers: {error.strerror or error}; start its head with ray start --head "
            f"--port {port}"
        ) from error
