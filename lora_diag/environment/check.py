"""``doctor``: checks of this installation and this machine; a gap has the command that
closes it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from lora_diag.errors import DONE, UNREADABLE, LoradiagError, install_command
from lora_diag.rendering.statements import Level, Statement, limit_lines, make_statement, summary_of
from lora_diag.rendering.text import byte_count, to_text
from lora_diag.version import __version__

if TYPE_CHECKING:
    from lora_diag.cli.options import OutputChoice

# What each extra adds; one that is not listed serves the development of loradiag and is not
# checked.
ADDS = {
    "train": "probes, tune, the gradient recorder",
    "report": "HTML reports",
    "ray": "clusters: --engine ray",
    "remote": "s3://, gs://, https://",
    "hub": "models of the Hugging Face Hub by id",
    "pandas": "data frames: Results.to_pandas()",
    "arrow": "Parquet and Arrow tables",
    "wandb": "report --to wandb",
    "mlflow": "report --to mlflow",
    "trackio": "report --to trackio",
    "tensorboard": "report --to tensorboard",
}

# Free bytes below which a disk gets a warning: an adapter of rank 64 of a 7B model takes 0.64 GB in
# float32.
LITTLE_SPACE = 1 << 30

_TIMEOUT_SECONDS = 3


def run_doctor(shown: OutputChoice, inputs: Sequence[str]) -> int:
    """Print the findings of all checks; return the exit code: ``UNREADABLE`` if a check failed."""
    findings = run_checks(inputs)
    if shown.json:
        for finding in findings:
            shown.print_line(
                dumps(
                    {"key": finding.key, "level": finding.level, "lines": finding.lines},
                    ensure_ascii=False,
                )
            )
    else:
        with limit_lines(None):
            shown.print(to_text(summary_of(findings), *shown.terminal))
    return UNREADABLE if any(finding.level == "failure" for finding in findings) else DONE


def run_checks(addresses: Sequence[str] = ()) -> list[Statement]:
    """Check this installation, this machine and inputs; return the findings in the order of
    display.

    Args:
        addresses: Checkpoints or adapters, local or remote, to open; their headers are read, and
            those factors of an adapter that are initialized to zero.
    """
    return [
        make_statement(
            "versions",
            "Versions",
            f"loradiag {__version__}, Python {platform.python_version()}, {platform.system()} "
            f"{platform.release()}, {platform.machine()}",
            priority=0,
        ),
        *_check_packages(),
        _check_command(),
        *_check_devices(),
        _check_memory(),
        *_check_folders(),
        *_check_ray(),
        *map(_check_address, addresses),
    ]


def _read_requirements() -> dict[str, list[Requirement]]:
    """Return the installed package's requirements by extra; those that are always needed under
    ``""``.
    """
    by_extra: dict[str, list[Requirement]] = {"": []}
    for line in requires("loradiag") or ():
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        environment = {"extra": extra[1] if extra else ""}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            by_extra.setdefault(environment["extra"], []).append(requirement)
    return by_extra


def _find_gaps(requirements: Iterable[Requirement]) -> tuple[list[str], list[str]]:
    """Return the installed packages with their versions, and a description of each missing or
    unsuitable one.
    """
    present, gaps = [], []
    for requirement in requirements:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            gaps.append(f"{requirement.name} is missing")
            continue
        present.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            gaps.append(f"{requirement.name} {installed} does not satisfy {requirement.specifier}")
    return present, gaps


def _check_packages() -> Iterator[Statement]:
    """Check the packages that are always needed, then those of each extra in ``ADDS``."""
    try:
        requirements = _read_requirements()
    except PackageNotFoundError:
        lead = f"loradiag is not installed, only imported; {install_command()}"
        yield make_statement("packages", "Packages", lead, level="warning")
        return
    present, gaps = _find_gaps(requirements[""])
    if gaps:
        yield make_statement(
            "packages", "Packages", *gaps, install_command(), level="failure", priority=0
        )
    else:
        yield make_statement("packages", "Packages", ", ".join(present), level="ok", priority=0)
    for extra, adds in ADDS.items():
        packages = [each for each in requirements.get(extra, ()) if each.name != "loradiag"]
        present, gaps = _find_gaps(packages)
        lines = [f"{adds}: {', '.join(present)}"]
        level: Level = "ok"
        if gaps:
            lines = [f"not available ({adds}): {', '.join(gaps)}", install_command(extra)]
            level = "warning"
        yield make_statement(f"extra_{extra}", f"[{extra}]", *lines, level=level, scoped=True)


def _check_command() -> Statement:
    executable = shutil.which("loradiag")
    if executable is None:
        fix = (
            f"add {_shorten_home(str(Path(sys.executable).parent))} to PATH, or use python -m "
            "lora_diag"
        )
        return make_statement(
            "command", "Command", f"loradiag is not on PATH; {fix}", level="warning"
        )
    command, interpreter = Path(executable), Path(sys.executable)
    in_prefix = command.parent.parent.resolve() == Path(sys.prefix).resolve()
    if command.resolve().parent != interpreter.resolve().parent and not in_prefix:
        problem = (
            f"loradiag on PATH is {_shorten_home(executable)}, in another environment than this "
            f"one ({_shorten_home(sys.prefix)})"
        )
        return make_statement("command", "Command", problem, level="warning")
    return make_statement("command", "Command", _shorten_home(executable), level="ok")


def _check_devices() -> Iterator[Statement]:
    import torch  # deferred: takes a second

    usable = cores()
    variables = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    threads = f"{_find_blas()}, {torch.get_num_threads()} thread(s)"
    if variables:
        settings = ", ".join(f"{name}={os.environ[name]}" for name in variables)
        threads += f" ({settings})"
    usable_cores = f"{usable:g} usable core{'s' * (usable != 1)}"
    yield make_statement("processor", "Processor", f"{processor()}, {usable_cores}", threads)
    if torch.cuda.is_available():
        lines = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index} {device.name}, {byte_count(device.total_memory)}")
        lines.append(f"CUDA {torch.version.cuda}; --device auto uses cuda:0")
        yield make_statement("gpu", "GPU", *lines, level="ok")
    elif shutil.which("nvidia-smi"):
        lead = f"an NVIDIA driver is installed, but torch {torch.__version__} finds no device"
        fix = "check nvidia-smi"
        if not torch.version.cuda:
            fix = "install torch for CUDA: pip install --force-reinstall torch"
        yield make_statement("gpu", "GPU", lead, fix, level="warning")
    else:
        yield make_statement("gpu", "GPU", "none: --device auto computes on the CPU")


def _find_blas() -> str:
    """Describe the library of matrix products and eigenvalues that torch was built with."""
    import torch

    match = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return f"torch with {match[1].upper()}" if match else "torch with an unknown BLAS"


def _check_memory() -> Statement:
    available, total = memory()
    if total is None:
        return make_statement("memory", "Memory", "unknown on this system")
    lead = byte_count(total)
    if available is not None:
        lead = f"{byte_count(available)} available of {lead}"
    return make_statement("memory", "Memory", f"{lead}; --memory limits what loradiag uses")


def _check_folders() -> Iterator[Statement]:
    """Check that this folder, the temporary one and the Hub's cache are writable, and state their
    free space.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = (
        os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    )
    for key, label, folder, fix in (
        ("folder", "This folder", Path.cwd(), "make room, or work in another one"),
        (
            "temporary",
            "Temporary",
            Path(tempfile.gettempdir()),
            "make room, or set TMPDIR to another one",
        ),
        (
            "cache",
            "Hub cache",
            Path(cache).expanduser(),
            "export HF_HOME=FOLDER with a folder of yours",
        ),
    ):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        name, free = _shorten_home(str(folder)), shutil.disk_usage(existing).free
        if not os.access(existing, os.W_OK):
            yield make_statement(key, label, f"{name} is not writable; {fix}", level="warning")
        elif free < LITTLE_SPACE:
            yield make_statement(
                key, label, f"only {byte_count(free)} free in {name}; {fix}", level="warning"
            )
        else:
            space = f"{byte_count(free)} free"
            if key == "cache":  # an issue needs no name of a user's folder
                space = f"{name}, {space}"
            yield make_statement(key, label, space, level="ok")


def _check_ray() -> Iterator[Statement]:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        yield make_statement(
            "ray", "Ray cluster", f"RAY_ADDRESS={address}: not HOST:PORT, so it was not tried"
        )
        return
    try:
        socket.create_connection((host, int(port)), _TIMEOUT_SECONDS).close()
    except (OSError, OverflowError) as error:
        fix = "start its head, or unset RAY_ADDRESS"
        yield make_statement(
            "ray",
            "Ray cluster",
            f"RAY_ADDRESS={address} does not answer ({error}); {fix}",
            level="warning",
        )
    else:
        yield make_statement("ray", "Ray cluster", f"RAY_ADDRESS={address} answers", level="ok")


def _check_address(address: str) -> Statement:
    """Check that a checkpoint or an adapter can be opened, and state its kind."""
    from lora_diag.inspection.run import inspect
    from lora_diag.running.fingerprint import legible

    label = legible(address)
    try:
        inventory = inspect(address)
    except LoradiagError as error:
        return make_statement("address", "Input", str(error), level="failure", priority=0)
    return make_statement("address", "Input", f"{label}: {inventory.kind}", level="ok", priority=0)


def _shorten_home(path: str) -> str:
    """Return a path with the home folder as ``~``, so that the output can be pasted
    into an issue.
    """
    home = str(Path.home())
    is_inside = path == home or path.startswith(home + os.sep)
    return "~" + path[len(home) :] if home != "/" and is_inside else path


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor; its architecture if the name is not known.

    Args:
        cpuinfo: Linux's description of the processors.
    """
    with suppress(OSError):
        text = cpuinfo.read_text(errors="replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if match is not None:
            return match[1].strip()
    return platform.processor() or platform.machine()


def cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Return the cores that this process may use; a fraction if a container's quota is one.

    Args:
        limit: The control group's quota and period in microseconds, such as ``150000 100000`` for
            1.5 cores.
    """
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = limit.read_text().split()
        return min(float(usable), int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no control group, or ``max``
        return float(usable)


def memory(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> tuple[int | None, int | None]:
    """Return the bytes of memory available on this machine, and all of it, within a container; None
    if not known.

    Limits by ``ulimit``, control groups of version 1, and nested groups are not read.

    Args:
        meminfo: Linux's list of the machine's memory, in KiB.
        group: Folder of the control group, whose ``memory.max`` and ``memory.current`` limit a
            container.
    """
    try:
        kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE))
        available, total = int(kib["MemAvailable"]) << 10, int(kib["MemTotal"]) << 10
    except (OSError, KeyError):
        return None, _read_physical_memory()
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or ``max``
        return available, total
    return min(available, max(0, limit - used)), min(total, limit)


def _read_physical_memory() -> int | None:
    """Return the bytes of memory of the machine; None if not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
