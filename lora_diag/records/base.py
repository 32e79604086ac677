"""Base classes of all records.

Fractions lie in [0, 1]. "Energy" always means Σσ². An undefined value (the energy fraction of a zero update, a rank
beyond the kept values) is null, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from lora_diag.records.shown import Shown

SCHEMA = 1

# Every kind of record defined so far, by its name in a results file; ``catalog.record_kinds`` defines all.
KINDS: dict[str, type[Record]] = {}

# Tolerance for fractions outside [0, 1] due to rounding.
SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Unit:
    """Unit of a field's numbers, for the tables of fields on the site."""

    name: str


# A fraction; marked so that thresholds outside [0, 1] are rejected like records.
Share = Annotated[float, "share", Unit("fraction, 0–1"), Field(ge=-SLACK, le=1 + SLACK)]

# A norm in the unit of the weights, and a quotient of norms; negative values are rejected on reading.
Norm = Annotated[float, Unit("norm"), Field(ge=0)]
Ratio = Annotated[float, Unit("ratio"), Field(ge=0)]

Nats = Annotated[float, Unit("nats")]
Seconds = Annotated[float, Unit("s")]
Count = Annotated[int, Unit("count")]


class Record(BaseModel):
    """A frozen record with strict validation; unknown fields of later versions are ignored.

    Attributes:
        key: The fields that distinguish records of one kind and layer.
        long: Tables whose entries are layers: separate rows in data frames instead of columns.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    key: ClassVar[tuple[str, ...]] = ("layer",)
    long: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register a kind of record by its name.

        Raises:
            TypeError: Another class has this name.
        """
        kind = cls.model_fields["record"].default if "record" in cls.model_fields else None
        if isinstance(kind, str):
            known = KINDS.setdefault(kind, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"record kind {kind!r} is already defined by {known.__module__}")

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> str | None:
        """Return why the settings of a run do not suffice to read records of this kind; None if they do."""
        return None

    def check(self, settings: Mapping[str, Any]) -> str | None:
        """Return the name of a field that the run's settings require and that is missing here; None if complete."""
        return None


class LayerRecord(Record):
    """The measurement of one layer by a diagnostic; in a fleet, of one adapter.

    Attributes:
        shown: Presentation of its values, in table order.
    """

    shown: ClassVar[tuple[Shown, ...]] = ()

    @classmethod
    def shown_of(cls, settings: Mapping[str, Any], records: Sequence[Any]) -> tuple[Shown, ...]:
        """Return the presentation of a run's records, if it depends on the settings."""
        return cls.shown

    if TYPE_CHECKING:

        @property
        def record(self) -> str:
            """The kind of record, by its name in a results file."""

        @property
        def layer(self) -> str:
            """The layer's name."""


class WholeRecord(Record):
    """A record about a run as a whole: a certificate, a verdict, a loss.

    Attributes:
        shown: Presentation of its values in short, the most important first.
    """

    shown: ClassVar[tuple[Shown, ...]] = ()

    if TYPE_CHECKING:

        @property
        def record(self) -> str:
            """The kind of record, by its name in a results file."""


def least_epsilon(epsilon_min: float, energy_error: float | None) -> float:
    """Return √(max(0, ε_min² − energy_error)), a lower bound on ε for updates of rank r.

    ε_min = √(1 − Ĉ(r)) alone is not a lower bound: a truncated decomposition may miss energy.

    Args:
        epsilon_min: √(1 − Ĉ(r)).
        energy_error: Bound on |Ĉ(r) − C(r)|; None if unknown (results of older versions), which counts as 0.

    Example:
        >>> round(least_epsilon(0.5, 0.09), 12), least_epsilon(0.01, 0.09)
        (0.4, 0.0)
    """
    return math.sqrt(max(0.0, epsilon_min**2 - (energy_error or 0.0)))
