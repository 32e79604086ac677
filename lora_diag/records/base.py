"""What all records have in common.

Fractions lie in [0, 1]. "Energy" means Σσ² and nothing else. A value that does not exist (the energy share of a zero
update, a rank beyond the values kept) is null, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from lora_diag.records.shown import Shown

SCHEMA = 1

# Every kind of record that is defined so far, by its name in a results file; ``catalog.load_records`` defines all.
KINDS: dict[str, type[Record]] = {}

# By how much rounding may carry a fraction out of [0, 1].
SLACK = 1e-6

# A fraction of a whole, in [0, 1]; marked so that a threshold outside can be refused, as a record with one is.
Share = Annotated[float, "share", Field(ge=-SLACK, le=1 + SLACK)]

# A norm: a record with a negative one is refused when it is read.
Norm = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """Frozen, strict about its fields' values, and silent about fields that a later version added.

    Attributes:
        key: The fields by which one record of a layer is told from another of its kind.
        long: Tables whose entries are layers: rows of their own in data frames, not columns.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    key: ClassVar[tuple[str, ...]] = ("layer",)
    long: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register a kind of record by its name.

        Raises:
            TypeError: Another class has that name.
        """
        kind = cls.model_fields["record"].default if "record" in cls.model_fields else None
        if isinstance(kind, str):
            known = KINDS.setdefault(kind, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"record kind {kind!r} is defined by {known.__module__} already")

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> str | None:
        """Return what the settings of a run need and lack before records of this kind can be read; None if nothing."""
        return None

    def check(self, settings: Mapping[str, Any]) -> str | None:
        """Return which field this record lacks that the settings of its run promise; None if none."""
        return None


class LayerRecord(Record):
    """What a diagnostic measured of one layer; in a fleet, of one adapter.

    Attributes:
        shown: How its values are shown, in the order of a table.
    """

    shown: ClassVar[tuple[Shown, ...]] = ()

    @classmethod
    def shown_of(cls, settings: Mapping[str, Any], records: Sequence[Any]) -> tuple[Shown, ...]:
        """Return how a run's records are shown, where that depends on what was asked for."""
        return cls.shown

    if TYPE_CHECKING:

        @property
        def record(self) -> str:
            """The kind of record, by its name in a results file."""

        @property
        def layer(self) -> str:
            """The layer's name."""


class WholeRecord(Record):
    """What is said of a run as a whole: a certificate, a verdict, a loss.

    Attributes:
        shown: How its values are shown in short, the one that says most first.
    """

    shown: ClassVar[tuple[Shown, ...]] = ()

    if TYPE_CHECKING:

        @property
        def record(self) -> str:
            """The kind of record, by its name in a results file."""


def least_epsilon(epsilon_min: float, energy_error: float | None) -> float:
    """Return √(max(0, ε_min² − energy_error)), which no update of rank r is nearer than.

    ε_min = √(1 − Ĉ(r)) alone is no lower bound: a truncated decomposition finds less energy than is there.

    Args:
        epsilon_min: √(1 − Ĉ(r)).
        energy_error: Bound on |Ĉ(r) − C(r)|; None where it is not known (results of older versions), counted as 0.

    Example:
        >>> round(least_epsilon(0.5, 0.09), 12), least_epsilon(0.01, 0.09)
        (0.4, 0.0)
    """
    return math.sqrt(max(0.0, epsilon_min**2 - (energy_error or 0.0)))
