"""How a value of a record is shown: declared once, beside the record's fields, and read by every table and figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """One column of tables, one quantity of axes.

    Args:
        path: The value's dotted name, such as ``resolution.signal_rank``; a field or a property of the record.
        title: Heading of a column.
        about: What it is, in one sentence.
        axis: What it is called on an axis; ``title`` if empty.
        share: Whether it is a fraction in [0, 1].
        main: Whether it is shown before a reader asks for all columns.
        pool: Value of several layers taken together, from their records; None for the median of numbers and the most
            frequent word.
        drop: Which columns a narrow terminal leaves out first, the largest number first; 0 for never.
    """

    path: str
    title: str
    about: str
    axis: str = ""
    share: bool = False
    main: bool = False
    pool: Callable[[Sequence[Any]], Value] | None = None
    drop: int = 0

    def value(self, record: Any) -> Value:
        """Return the value of a record; None where it is null or does not exist."""
        found = value_at(record, self.path)
        return found if isinstance(found, float | int | str) else None


def pooled_value(shown: Shown, records: Sequence[Any]) -> Value:
    """Return the value of several records taken together: as declared, the median, or the most frequent word."""
    if shown.pool is not None:
        return shown.pool(records)
    known = [value for record in records if (value := shown.value(record)) is not None]
    if not known:
        return None
    if any(isinstance(value, str) for value in known):
        return Counter(known).most_common(1)[0][0]
    return median(value for value in known if not isinstance(value, str))


def value_at(record: Any, path: str) -> Any:
    """Return what a dotted name leads to in a record; None where that does not exist.

    Args:
        record: A record, or a table (``dict``) in one.
        path: Names of fields, properties and keys of tables; a key may hold dots: ``rank_at.0.9``.
    """
    found = record
    while path:
        if isinstance(found, dict):
            if path in found:
                return found[path]
            key, _, path = path.partition(".")
            found = found.get(key)
        else:
            key, _, path = path.partition(".")
            kind = type(found)
            fields = getattr(kind, "model_fields", {})
            if key not in fields and not isinstance(getattr(kind, key, None), property):
                return None
            found = getattr(found, key)
    return found
