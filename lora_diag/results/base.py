"""What all records have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SCHEMA = 1


class Record(BaseModel):
    """Frozen, strict about its fields' values, and silent about fields that a later version added."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
