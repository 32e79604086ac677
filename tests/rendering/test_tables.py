"""Tables from the declarations of records: values, formats, marks, and the order in which columns
are dropped.
"""

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag import catalog
from lora_diag.diagnostics.interference.record import Interference, pooled_cosine
from lora_diag.records.base import POOLS, LayerRecord, Shown
from lora_diag.rendering.tables import Column, columns_of, table_of
from lora_diag.rendering.text import FORMS, written
from tests.building import build


class Made(LayerRecord):
    """A record with one value of each kind."""

    record: Literal["made for tables"] = "made for tables"
    layer: str = "a.weight"
    shape: tuple[int, int] = (3, 2)
    value: float | None = 0.5
    error: float | None = None
    random: float | None = None
    word: str | None = None


def cells(shown, *rows):
    """Return the cells of a column of rows of records; None where there is no column."""
    result = columns_of([shown], [(str(place), row) for place, row in enumerate(rows)])
    return [str(cell) for cell in result[0].cells] if result else None


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (None, "0.5"),
        ("sum", "1.75"),
        ("max", "1"),
        ("min", "0.25"),
        ("range", "0.25-1.0"),
        (len, "3"),
    ],
)
def test_cell_has_pooled_value(pool, expected):
    row = [Made(value=value) for value in (1.0, 0.25, 0.5)]
    assert cells(Shown("value", "v", "", main=True, pool=pool), row) == [expected]


def test_missing_value_is_a_dash_in_a_main_column():
    rows = [Made(value=None)], [Made(value=None), Made(value=2.0)]
    assert cells(Shown("value", "v", "", main=True), *rows) == ["-", "2"]
    assert cells(Shown("value", "v", "", terminal=True), rows[0]) is None


def test_errors_and_baseline_are_shown_with_value():
    one = Made(value=0.5, error=0.0123, random=0.04)
    shown = Shown("value", "v", "", share=True, main=True, error="error", chance="random")
    assert cells(shown, [one], [Made()]) == ["0.50 ±0.012 (0.04)", "0.50"]
    assert cells(shown, [Made(value=0.5, random=0.1), Made(value=None, random=0.9)]) == [
        "0.50 (0.10)"
    ]


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(20, 119),
)
def test_columns_have_declared_order(made, width):
    columns = [
        Column(f"{place}".rjust(size), ("1",), drop=drop) for place, (size, drop) in enumerate(made)
    ]
    shown = {column.header for column in table_of("layer", ["a" * 40], columns, width).columns}
    hidden = [column for column in columns if column.title not in shown]
    kept = [column for column in columns if column.title in shown]
    assert all(column.drop for column in hidden)
    assert max([column.drop for column in kept if column.drop], default=0) <= min(
        [c.drop for c in hidden], default=99
    )
    if any(column.drop for column in kept):
        assert sum(column.width + 1 for column in kept) + 2 + 12 <= width


def declared():
    """Return what every kind of record declares."""
    kinds = catalog.record_kinds().values()
    return [(kind, one) for kind in kinds for one in getattr(kind, "shown", ())]


def test_every_declared_form_and_pool_is_known():
    assert len(declared()) > 50
    for kind, one in declared():
        assert one.pool is None or callable(one.pool) or one.pool in POOLS, kind
        assert one.form in FORMS or written(0.25, one.form)


def test_every_declared_path_begins_with_field_or_property():
    for kind, one in declared():
        for path in filter(None, (one.path, one.chance, one.error)):
            head = path.partition(".")[0]
            assert head in kind.model_fields or isinstance(getattr(kind, head, None), property), (
                kind,
                path,
            )


def test_pooled_cosine_is_that_of_block_diagonal_matrices():
    """⟨·,·⟩ = 1·2·0.5 − 3·2·0.25, norms √10 and √8."""
    values = ((1.0, 0.5), (3.0, -0.25))
    records = [
        build(Interference, first_fro=first, second_fro=2.0, cosine=cosine)
        for first, cosine in values
    ]
    assert pooled_cosine(records) == pytest.approx(-0.5 / math.sqrt(80))
