"""Amounts in options: ``10M`` parameters, ``2GB`` of memory, ``2h`` of time, ``0.9`` of the energy,
learning rates.

For probes that train: the best rate of a grid of learning rates, and the next rate beyond the
grid's edge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterable
from decimal import Decimal
from typing import TypeVar

from lora_diag.errors import Given, UsageError

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECONDS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)\s*(d|h|min|m|s))", re.IGNORECASE)
_AMOUNT = re.compile(r"(\d+(?:_\d{3})*(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


def read_count(text: str, option: str) -> int:
    """Parse a number of parameters.

    >>> (
    ...     read_count("10M", "params"),
    ...     read_count("1.5B", "params"),
    ...     read_count("8_388_608", "params"),
    ... )
    (10000000, 1500000000, 8388608)
    """
    return _read_amount(text, option, _COUNTS, "a number of parameters, such as 10M or 8388608")


def read_bytes(text: str, option: str) -> int:
    """Parse a size in bytes; GB is a power of ten, GiB a power of two. A unit is required.

    >>> read_bytes("2GB", "memory"), read_bytes("1GiB", "memory")
    (2000000000, 1073741824)
    """
    return _read_amount(text, option, _BYTES, "a size with its unit, such as 2GB or 512MiB")


def read_time(text: str) -> float:
    """Parse a time limit; return it in seconds.

    >>> read_time("2h"), read_time("1h30min"), read_time("90 s"), read_time("0.5d")
    (7200.0, 5400.0, 90.0, 43200.0)

    Raises:
        UsageError: It is not a time, or not positive.
    """
    numbers_with_units = _TIME.findall(text)
    if not numbers_with_units or re.sub(r"\s", "", _TIME.sub("", text)):
        raise UsageError(
            Given("time", text), "give a time with its unit, such as 2h, 90min or 1h30min"
        )
    seconds = sum(float(number) * _SECONDS[unit.lower()] for number, unit in numbers_with_units)
    if seconds <= 0:
        raise UsageError(Given("time", text), "must be above 0")
    return seconds


def _read_amount(text: str, option: str, units: dict[str, int], expected: str) -> int:
    """Return the amount that a number with a unit states, rounded down.

    Args:
        text: The value of the option.
        option: Its name, for the error.
        units: Factor of each unit, in capitals.
        expected: What to give, for the error.

    Raises:
        UsageError: It is no such number, has another unit, or is below 1.
    """
    match = _AMOUNT.fullmatch(text.strip())
    amount = (
        int(Decimal(match[1].replace("_", "")) * units.get(match[2].upper(), 0)) if match else 0
    )
    if amount < 1:
        raise UsageError(Given(option, text), f"give {expected}")
    return amount


def read_share(value: float, option: str) -> float:
    """Return an energy fraction after checking it.

    >>> read_share(0.9, "energy")
    0.9

    Raises:
        UsageError: The value is not in (0, 1].
    """
    if not 0 < value <= 1:
        raise UsageError(
            Given(option, value), "must be a fraction above 0 and at most 1, such as 0.9"
        )
    return value


Key = TypeVar("Key", bound=Hashable)

# Upper limit of learning rates.
MAX_RATE = 10.0
# Largest factor between the edge and the next rate: from 1e-3 and 1e-2 that is 3.3e-2, a common
# grid step.
STEP = 10 / 3


def find_best_rates(runs: Iterable[tuple[Key, float | None, float | None]]) -> dict[Key, float]:
    """Return the learning rate with the lowest loss for each key; omit keys without a run that has
    both.

    Args:
        runs: Key (such as the rank), loss and learning rate of each run; of one seed, on the
            deciding evaluation set. A run without a loss (it diverged) or a rate is ignored.

    >>> find_best_rates([("r=4", 2.0, 1e-3), ("r=4", 1.5, 1e-2), ("r=8", None, 1e-2)])
    {'r=4': 0.01}
    """
    best: dict[Key, tuple[float, float]] = {}
    for key, loss, lr in runs:
        if loss is not None and lr is not None:
            best[key] = min(best.get(key, (math.inf, 0.0)), (loss, lr))
    return {key: lr for key, (_, lr) in best.items()}


def edge(tried: Collection[float], best: float) -> int:
    """Return −1 or 1 if the best rate is the lowest or highest of several, where a better one may
    be beyond; else 0.

    >>> edge([1e-3, 1e-2], 1e-2), edge([1e-3, 3e-3, 1e-2], 3e-3), edge([1e-2], 1e-2)
    (1, 0, 0)
    """
    if len(set(tried)) < 2:
        return 0
    return -1 if best == min(tried) else int(best == max(tried))


def next_rate(tried: Collection[float], best: float) -> float | None:
    """Return the rate to try next if the best is at the edge: one more grid step, by a factor of at
    most 10/3.

    It has two significant digits. None if the best rate is inside the grid, if there is only one
    rate, if the next is not between 0 and ``MAX_RATE``, or if its rounding is not beyond the best.

    >>> (
    ...     next_rate([1e-3, 2e-3, 4e-3], 4e-3),
    ...     next_rate([1e-3, 1e-2], 1e-3),
    ...     next_rate([1e-3, 3e-3, 1e-2], 3e-3),
    ... )
    (0.008, 0.0003, None)
    """
    direction = edge(tried, best)
    if direction == 0:
        return None
    neighbour = sorted(tried)[1 if direction < 0 else -2]
    further = float(
        f"{best * min(max(best, neighbour) / min(best, neighbour), STEP) ** direction:.2g}"
    )
    # Rounded to two digits, a rate may no longer be beyond the edge.
    return further if 0 < further < MAX_RATE and (further - best) * direction > 0 else None
