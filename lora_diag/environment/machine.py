"""Resources that the operating system grants this process: processor, cores, memory."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Return the cores that this process may use; a fraction if a container's quota is one.

    Args:
        limit: The control group's quota and period in microseconds, such as ``150000 100000`` for 1.5 cores.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit.read_text().split()
        return min(float(usable), int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no control group, or ``max``
        return float(usable)


def memory(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> tuple[int | None, int | None]:
    """Return the bytes of memory that are available to this process, and all that it may use; None if not known.

    Args:
        meminfo: Linux's list of the machine's memory, in KiB.
        group: Folder of the control group, whose ``memory.max`` and ``memory.current`` limit a container.
    """
    try:
        kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE))
        available, total = int(kib["MemAvailable"]) << 10, int(kib["MemTotal"]) << 10
    except (OSError, KeyError):
        return None, _read_physical_memory()
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or ``max``
        return available, total
    return min(available, max(0, limit - used)), min(total, limit)


def _read_physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
