"""What all records have in common."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1

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
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    key: ClassVar[tuple[str, ...]] = ("layer",)


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
