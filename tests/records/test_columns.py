"""Columns that records declare at their fields."""

from typing import Annotated, ClassVar, Literal

import pytest

from lora_diag.catalog import record_kinds
from lora_diag.records.base import LayerRecord, Share, Shown


class Declared(LayerRecord):
    """A record with columns.

    Args:
        layer: The weight's name.
        stable_rank: ‖ΔW‖² / ``top``²; null for a zero update. At least 1.
        kept: Fraction of the energy.
        top: The largest singular value.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (Shown("half", "half", "half of it"), "top")
    record: Literal["declared for columns"] = "declared for columns"
    layer: str = "a.weight"
    stable_rank: Annotated[float | None, Shown(main=True)] = None
    kept: Annotated[Share | None, Shown(title="C(r)", chance="random")] = None
    top: Annotated[float, Shown()] = 1.0


def test_column_follows_from_its_field():
    columns = {column.path: column for column in Declared.shown}
    assert columns["stable_rank"] == Shown(
        "stable_rank", "stable rank", "‖ΔW‖² / top²", main=True, share=False
    )
    assert columns["kept"].title == "C(r)"
    assert columns["kept"].share
    assert columns["kept"].about == "Fraction of the energy; in brackets: by chance"


def test_columns_follow_the_table_then_the_fields():
    assert [column.path for column in Declared.shown] == ["half", "top", "stable_rank", "kept"]


def test_table_names_fields_with_a_column_only():
    with pytest.raises(KeyError, match="layer"):

        class Wrong(LayerRecord):
            table: ClassVar[tuple[Shown | str, ...]] = ("layer",)
            layer: str = ""


def test_descriptions_begin_with_a_capital_or_a_symbol():
    shown = [column for kind in record_kinds().values() for column in kind.shown]
    words = [column.about.split()[0] for column in shown]
    assert not [word for word in words if word.isalpha() and word.islower() and len(word) > 1]
