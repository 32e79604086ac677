"""What all records have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict

SCHEMA = 1

# A fraction of a whole, in [0, 1]; marked so that a threshold outside can be refused.
Share = Annotated[float, "share"]


class Record(BaseModel):
    """Frozen, strict about its fields' values, and silent about fields that a later version added.

    Attributes:
        key: The fields by which one record of a layer is told from another of its kind.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    key: ClassVar[tuple[str, ...]] = ("layer",)
