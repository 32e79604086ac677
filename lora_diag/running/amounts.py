"""Parsing of amounts: ``10M`` parameters, ``2GB`` of memory, ``2h`` of time, ``0.9`` of the energy."""

from __future__ import annotations

import re
from decimal import Decimal

from lora_diag.errors import UsageError

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SECONDS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)\s*(d|h|min|m|s))", re.IGNORECASE)
_AMOUNT = re.compile(r"(\d+(?:_\d{3})*(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


def read_count(words: str, option: str) -> int:
    """Parse a number of parameters.

    >>> read_count("10M", "--params"), read_count("1.5B", "--params"), read_count("8_388_608", "--params")
    (10000000, 1500000000, 8388608)

    Raises:
        UsageError: The value is invalid or not positive.
    """
    return _read(words, option, _COUNTS, "a number of parameters, such as 10M or 8388608")


def read_bytes(words: str, option: str) -> int:
    """Parse a size in bytes; GB is a power of ten, GiB a power of two. A unit is required.

    >>> read_bytes("2GB", "--memory"), read_bytes("1GiB", "--memory")
    (2000000000, 1073741824)

    Raises:
        UsageError: The value is invalid or not positive.
    """
    return _read(words, option, _BYTES, "a size with its unit, such as 2GB or 512MiB")


def read_time(words: str) -> float:
    """Return a time limit in seconds.

    >>> read_time("2h"), read_time("1h30min"), read_time("90 s"), read_time("0.5d")
    (7200.0, 5400.0, 90.0, 43200.0)

    Raises:
        UsageError: It is not a time.
    """
    text = words.strip()
    parts = _TIME.findall(text)
    if not parts or re.sub(r"\s", "", _TIME.sub("", text)):
        raise UsageError(f"--time {words}: give a time with its unit, such as 2h, 90min or 1h30min")
    seconds = sum(float(number) * _SECONDS[unit.lower()] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"--time {words}: must be above 0")
    return seconds


def _read(words: str, option: str, units: dict[str, int], expected: str) -> int:
    match = _AMOUNT.fullmatch(words.strip())
    factor = units.get(match[2].upper()) if match else None
    amount = int(Decimal(match[1].replace("_", "")) * factor) if match and factor else 0
    if amount < 1:
        raise UsageError(f"{option} {words}: give {expected}")
    return amount


def read_share(value: float, option: str) -> float:
    """Check an energy fraction.

    >>> read_share(0.9, "--energy")
    0.9

    Raises:
        UsageError: The value is not in (0, 1].
    """
    if not 0 < value <= 1:
        raise UsageError(f"{option} {value:g}: must be a fraction above 0 and at most 1, such as 0.9")
    return value
