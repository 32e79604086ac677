"""Common base of the tables of a policy: known keys, and types with a description of valid values."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)


class PlacedError(ValueError):
    """An invalid value.

    Args:
        text: The problem.
        place: Keys and indices that lead to it from the checked table.
    """

    def __init__(self, text: str, *place: str | int) -> None:
        super().__init__(text)
        self.place = place


class Table(BaseModel):
    """A table of a policy. Excluded fields are not read from the file."""

    model_config = ConfigDict(frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items() if not field.exclude]
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known keys are {', '.join(known)}"
                raise PlacedError(f"unknown key '{key}'; {hint}", key)
        return values


def is_a(description: str) -> WrapValidator:
    """Replace pydantic's message by a description of valid values."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"{info.field_name} is {description}, not {quote_text(value)}") from None

    return WrapValidator(check)


def quote_text(value: object) -> str:
    """Return a value for a message, with text in quotes."""
    return f'"{value}"' if isinstance(value, str) else str(value)


def _check_text(value: Any, info: ValidationInfo) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{info.field_name} is text in quotes, not {value}")
    return value


def _compile(text: str, info: ValidationInfo) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{info.field_name}: {quote_text(text)} is not a valid regular expression ({error}); correct it"
        ) from error


# Applied before the validator that reads the text, as in ``Pattern``.
QUOTED = BeforeValidator(_check_text)
Text = Annotated[str, QUOTED]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), is_a("a number from 0 to 1")]
Pattern = Annotated[re.Pattern[str], BeforeValidator(_compile), QUOTED]
