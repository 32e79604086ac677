"""Base classes of records, the registry of their kinds, and the presentation of their values.

A value's presentation is declared once with its record, and used by every table and figure.

Fractions lie in [0, 1]. "Energy" always means Σσ². An undefined value (the energy fraction of a
zero update, a rank beyond the kept values) is null, never NaN.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import getdoc
from statistics import median
from types import MemberDescriptorType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

Value = float | int | str | None
Pool = Literal["sum", "max", "min", "range", "each", "ends"]


@dataclass(frozen=True, slots=True)
class Shown:
    """One column of tables, one quantity of axes.

    A field declares its column in its annotation: ``fro: Annotated[Norm, Shown(title="‖ΔW‖")]``.
    Path, description and, unless stated, title and ``share`` follow from the field.

    Args:
        path: The value's dotted name, such as ``resolution.signal_rank``: a property of the record,
            or a part of a field.
        title: Heading of a column; of a field, its name if empty.
        about: Description without a full stop, with a capital unless it begins with a symbol; of a
            field, the ``summary`` of its documentation.
        axis: Title of an axis; ``title`` if empty.
        share: Whether it is a fraction in [0, 1].
        main: Whether it is shown by default.
        pool: Pooled value of several layers: a name in ``POOLS``, or a function of their records;
            None for the median of numbers and the most frequent word. ``ends`` for the smallest and
            the largest of all numbers of a tuple, in a terminal.
        drop: Priority of dropping in a narrow terminal, the largest first; 0 for never.
        head: Heading in a terminal; ``title`` if empty.
        form: Format of a number: a name in ``FORMS`` (``rendering.text``) or a format such as
            ``.4f``; empty for two decimals of a fraction and three digits of other numbers.
        terminal: Whether a terminal shows it; None for the value of ``main``.
        detail: Whether a terminal shows it only with ``-v``.
        chance: Dotted name of the random baseline, shown in brackets; empty without one.
        error: Dotted name of the standard error, shown after ±; empty without one.
        style: Style of a value in a terminal with colours.
        mark: Mark after the value of several records in a terminal, explained by the summary.
    """

    path: str = ""
    title: str = ""
    about: str = ""
    axis: str = ""
    share: bool = False
    main: bool = False
    pool: Pool | Callable[[Sequence[Any]], Value] | None = None
    drop: int = 0
    head: str = ""
    form: str = ""
    terminal: bool | None = None
    detail: bool = False
    chance: str = ""
    error: str = ""
    style: Callable[[Any], str] | None = None
    mark: Callable[[Sequence[Any]], str] | None = None

    def value(self, record: Any) -> Value:
        """Return the value in a record, a shape as text; None if it is null, not a scalar, or does
        not exist.
        """
        value = value_at(record, self.path)
        if isinstance(value, tuple) and value and all(isinstance(size, int) for size in value):
            return "×".join(map(str, value))
        return value if isinstance(value, float | int | str) else None

    @property
    def in_terminal(self) -> bool:
        """Whether a terminal shows it."""
        return self.main if self.terminal is None else self.terminal

    def of_field(self, name: str, text: str, share: bool) -> Shown:
        """Return the column of a field, from its name, its documentation and whether it is a
        fraction.
        """
        title = self.title or name.replace("_", " ")
        chance = "; in brackets: by chance" if self.chance else ""
        about = self.about or f"{summary(text)}{chance}"
        return replace(self, path=name, title=title, about=about, share=self.share or share)


@dataclass(frozen=True, slots=True)
class Guard:
    """A value that later results must not worsen, for which ``gate init`` writes a comparison with
    a baseline.

    Args:
        path: The value's dotted name.
        worse: The direction that is worse.
        message: What a worse value means, and what to check.
        where: Fields and their values in the records that are compared; empty for all.
        tolerance: Allowed change for the worse, as a percentage of the earlier value of the same
            layer. Full fine-tunes of one model that differed in their seed had ranks at 90% within
            2 of each other, of 72 to 155.
        limit_by: A field. For each of its values, a rule limits the guarded value to the largest
            one, with the tolerance, in place of a comparison; empty for a comparison.
    """

    path: str
    worse: Literal["higher", "lower"]
    message: str
    where: tuple[tuple[str, str | bool], ...] = ()
    tolerance: str = "10%"
    limit_by: str = ""


# The shape of a layer, for tables.
SHAPE = Shown(
    "shape",
    "shape",
    "Rows × columns, out × in",
    pool=lambda records: (
        "×".join(map(str, records[0].shape)) if len({r.shape for r in records}) == 1 else "various"
    ),
    drop=6,
    terminal=True,
    detail=True,
)


def pooled_value(shown: Shown, records: Sequence[Any]) -> Value:
    """Return the pooled value of several records: as declared, else the median or the most frequent
    word.

    None if all values are null, unless a function pools the records.
    """
    if callable(shown.pool):
        return shown.pool(records)
    values: list[Any] = [value for record in records if (value := shown.value(record)) is not None]
    if not values:
        return None
    if shown.pool is not None:
        pooled: Value = POOLS[shown.pool](values)
        return pooled
    if any(isinstance(value, str) for value in values):
        return Counter[Value](values).most_common(1)[0][0]
    middle_value: float = median(values)
    return middle_value


def document_fields(kind: type[BaseModel]) -> dict[str, str]:
    """Return the documentation of fields of a class by name: ``Field(description=)``, or the entry
    in a docstring.

    >>> from lora_diag.records.run import Run
    >>> document_fields(Run)["schema"]
    'Version of the fields, 1.'
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc = (getdoc(base) or "") if "__doc__" in vars(base) else ""
        _, _, args = doc.partition("Args:\n")
        for name, text in re.findall(
            r"^    (\w+): (.*(?:\n(?:     .*|\s*$))*)", args, flags=re.MULTILINE
        ):
            found[name] = " ".join(text.split())
    described = {
        name: field.description for name, field in kind.model_fields.items() if field.description
    }
    return {**found, **described}


def summary(text: str) -> str:
    """Return what a column says of its field: the first sentence of the documentation, without a
    full stop, and without when it is null.

    >>> summary("Norm of ΔW; null without BASE. Measured in float64."), summary("C(r) by r.")
    ('Norm of ΔW', 'C(r) by r')
    """
    return re.split(r"; null|\.(?: |$)", text, maxsplit=1)[0].replace("``", "")


def is_share(annotation: Any) -> bool:
    """Return whether a type is ``Share``, with or without null.

    >>> is_share(Share), is_share(Share | None), is_share(dict[str, Share])
    (True, True, False)
    """
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return "share" in marks or is_share(inner)
    is_union = get_origin(annotation) in {Union, UnionType}
    return is_union and any(map(is_share, get_args(annotation)))


def count_texts(texts: Iterable[str]) -> str:
    """Return the common word, or each word with its number of occurrences.

    >>> count_texts(["rank", "rank"]), count_texts(["rank", "scale", "rank"])
    ('rank', 'rank 2, scale 1')
    """
    counts = Counter(texts)
    return (
        next(iter(counts))
        if len(counts) == 1
        else ", ".join(f"{word} {n}" for word, n in counts.most_common())
    )


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
            if key not in fields and not isinstance(
                getattr(kind, key, None), property | MemberDescriptorType
            ):
                return None
            value = getattr(value, key)
    return value


SCHEMA = 1

# Every kind of record defined so far, by its name in a results file; ``catalog.record_kinds``
# defines all.
KINDS: dict[str, type[Record]] = {}

# Tolerance for fractions outside [0, 1] due to rounding.
SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Unit:
    """Unit of a field's numbers, for the tables of fields on the site."""

    name: str


# A fraction; marked so that thresholds outside [0, 1] are rejected like records.
Share = Annotated[float, "share", Unit("fraction, 0–1"), Field(ge=-SLACK, le=1 + SLACK)]

# A norm in the unit of the weights, and a quotient of norms; negative values are rejected on
# reading.
Norm = Annotated[float, Unit("norm"), Field(ge=0)]
Ratio = Annotated[float, Unit("ratio"), Field(ge=0)]

Nats = Annotated[float, Unit("nats")]
Seconds = Annotated[float, Unit("s")]
Count = Annotated[int, Unit("count")]


class Record(BaseModel):
    """A frozen record, whose numbers are finite; unknown fields, such as those of later versions,
    are ignored.

    Attributes:
        key: The fields that distinguish records of one kind.
        table: The first columns in table order: names of fields that declare one, and the columns
            of what is no field. The other fields that declare one follow in their order.
        shown: Presentation of its values, in table order, from ``table`` and the fields.
        long: Tables whose entries are layers: separate rows in data frames instead of columns.
        guards: Values that ``gate init`` compares with a baseline.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    key: ClassVar[tuple[str, ...]] = ("layer",)
    table: ClassVar[tuple[Shown | str, ...]] = ()
    shown: ClassVar[tuple[Shown, ...]] = ()
    long: ClassVar[tuple[str, ...]] = ()
    guards: ClassVar[tuple[Guard, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Collect the columns of a kind of record, and register it by its name.

        Raises:
            TypeError: Another class has this name.
        """
        cls.shown = tuple(_list_columns(cls))
        kind = cls.model_fields["record"].default if "record" in cls.model_fields else None
        if isinstance(kind, str):
            registered = KINDS.setdefault(kind, cls)
            if (registered.__module__, registered.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise TypeError(
                    f"record kind {kind!r} is already defined by {registered.__module__}"
                )

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> str | None:
        """Return why the settings of a run do not suffice to read records of this kind; None if
        they do.
        """
        return None

    def check(self, settings: Mapping[str, Any]) -> str | None:
        """Return the name of a field that the run's settings require and that is missing here; None
        if complete.
        """
        return None


def _list_columns(kind: type[Record]) -> Iterator[Shown]:
    """Yield the columns of a kind of record in table order."""
    marks = {
        name: mark
        for name, field in kind.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Shown)
    }
    texts = document_fields(kind) if marks else {}
    columns = {
        name: mark.of_field(
            name, texts.get(name, ""), is_share(kind.model_fields[name].rebuild_annotation())
        )
        for name, mark in marks.items()
    }
    for column in kind.table:
        yield columns.pop(column) if isinstance(column, str) else column
    yield from columns.values()


class LayerRecord(Record):
    """The measurement of one layer by a diagnostic; in a fleet, of one adapter.

    Attributes:
        part_label: Format of a record's name among those of its layer; empty if there is one per
            layer.
    """

    part_label: ClassVar[str] = ""

    @classmethod
    def shown_of(cls, settings: Mapping[str, Any], records: Sequence[Any]) -> tuple[Shown, ...]:
        """Return the presentation of a run's records; ``shown`` where it depends on neither
        settings nor records.
        """
        return cls.shown

    @classmethod
    def check_together(cls, records: Sequence[Any]) -> str | None:
        """Return what is missing among the records of a finished run, with layer and field; None if
        complete.
        """
        return None

    if TYPE_CHECKING:

        @property
        def record(self) -> str:
            """The kind of record, by its name in a results file."""

        @property
        def layer(self) -> str:
            """The layer's name."""


class WholeRecord(Record):
    """A record about a run as a whole: a certificate, a verdict, a loss."""

    if TYPE_CHECKING:

        @property
        def record(self) -> str:
            """The kind of record, by its name in a results file."""


def least_epsilon(epsilon_min: float, energy_error: float | None) -> float:
    """Return √(max(0, ε_min² − energy_error)), a lower bound on ε for updates of rank r.

    ε_min = √(1 − Ĉ(r)) alone is not a lower bound: a truncated decomposition may miss energy.

    Args:
        epsilon_min: √(1 − Ĉ(r)).
        energy_error: Bound on |Ĉ(r) − C(r)|; None if unknown (results of older versions), which
            counts as 0.

    Example:
        >>> round(least_epsilon(0.5, 0.09), 12), least_epsilon(0.01, 0.09)
        (0.4, 0.0)
    """
    return math.sqrt(max(0.0, epsilon_min**2 - (energy_error or 0.0)))
