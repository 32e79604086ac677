"""Presentation of a record's value: declared once with the record, used by every table and figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MemberDescriptorType
from typing import Any, Literal

Value = float | int | str | None
Pool = Literal["sum", "max", "min", "range", "each", "ends"]


@dataclass(frozen=True, slots=True)
class Shown:
    """One column of tables, one quantity of axes.

    Args:
        path: The value's dotted name, such as ``resolution.signal_rank``; a field or a property of the record.
        title: Heading of a column.
        about: One-sentence description.
        axis: Title of an axis; ``title`` if empty.
        share: Whether it is a fraction in [0, 1].
        main: Whether it is shown by default.
        pool: Pooled value of several layers: a name in ``POOLS``, or a function of their records; None for the median
            of numbers and the most frequent word. ``ends`` for the smallest and the largest of all numbers of a tuple,
            in a terminal.
        drop: Priority of dropping in a narrow terminal, the largest first; 0 for never.
        head: Heading in a terminal; ``title`` if empty.
        form: Format of a number: a name in ``FORMS`` (``rendering.text``) or a format such as ``.4f``; empty for two
            decimals of a fraction and three digits of other numbers.
        terminal: Whether a terminal shows it; None for the value of ``main``.
        wide: Whether only a wide terminal shows it.
        chance: Dotted name of the random baseline, shown in brackets; empty without one.
        error: Dotted name of the standard error, shown after ±; empty without one.
        style: Style of a value in a terminal with colours.
        mark: Mark after the value of several records in a terminal, explained by the summary.
    """

    path: str
    title: str
    about: str
    axis: str = ""
    share: bool = False
    main: bool = False
    pool: Pool | Callable[[Sequence[Any]], Value] | None = None
    drop: int = 0
    head: str = ""
    form: str = ""
    terminal: bool | None = None
    wide: bool = False
    chance: str = ""
    error: str = ""
    style: Callable[[Any], str] | None = None
    mark: Callable[[Sequence[Any]], str] | None = None

    def value(self, record: Any) -> Value:
        """Return the value in a record, a shape as text; None if it is null or does not exist."""
        value = value_at(record, self.path)
        if isinstance(value, tuple) and value and all(isinstance(size, int) for size in value):
            return "×".join(map(str, value))
        return value if isinstance(value, float | int | str) else None

    @property
    def in_terminal(self) -> bool:
        """Whether a terminal shows it."""
        return self.main if self.terminal is None else self.terminal


# The shape of a layer, for tables.
SHAPE = Shown(
    "shape",
    "shape",
    "rows × columns, out × in",
    pool=lambda records: "×".join(map(str, records[0].shape)) if len({r.shape for r in records}) == 1 else "various",
    drop=6,
    terminal=True,
    wide=True,
)


def pooled_value(shown: Shown, records: Sequence[Any]) -> Value:
    """Return the pooled value of several records: as declared, the median, or the most frequent word."""
    if callable(shown.pool):
        return shown.pool(records)
    known: list[Any] = [value for record in records if (value := shown.value(record)) is not None]
    if not known:
        return None
    if shown.pool is not None:
        pooled: Value = POOLS[shown.pool](known)
        return pooled
    if any(isinstance(value, str) for value in known):
        return Counter[Value](known).most_common(1)[0][0]
    middle: float = median(known)
    return middle


def count_texts(texts: Iterable[str]) -> str:
    """Return the common word, or each word with its number of occurrences.

    >>> count_texts(["rank", "rank"]), count_texts(["rank", "scale", "rank"])
    ('rank', 'rank 2, scale 1')
    """
    counts = Counter(texts)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{word} {n}" for word, n in counts.most_common())


POOLS: Mapping[str, Callable[[list[Any]], Value]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "range": lambda values: "-".join(map(str, sorted({min(values), max(values)}))),
    "each": lambda values: "/".join(map(str, sorted(set(values)))),
}


def value_at(record: Any, path: str) -> Any:
    """Return the value at a dotted name in a record; None if it does not exist.

    Args:
        record: A record, a dataclass with slots, or a table (``dict``).
        path: Names of fields, properties and keys of tables; a key may hold dots: ``rank_at.0.9``.
    """
    value = record
    while path:
        if isinstance(value, dict):
            if path in value:
                return value[path]
            key, _, path = path.partition(".")
            value = value.get(key)
        else:
            key, _, path = path.partition(".")
            kind = type(value)
            fields = getattr(kind, "model_fields", {})
            if key not in fields and not isinstance(getattr(kind, key, None), property | MemberDescriptorType):
                return None
            value = getattr(value, key)
    return value
