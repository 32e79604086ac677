"""Tables fit: names of rows are short enough and never two alike, and hidden columns are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.rendering.statements import limit_lines
from lora_diag.rendering.tables import Column, shorten_names, table_of

PARTS = st.sampled_from(
    ["0", "1", "10", "layer", "attention", "output", "dense", "LayerNorm", "bias"]
)
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=7).map(".".join), min_size=1, max_size=20)


@given(NAMES, st.integers(8, 60))
def test_shortened_names_fit_and_differ_where_names_do(names, width):
    result = shorten_names(names, width)
    assert all(len(name) <= width for name in result)
    assert len(set(zip(names, result, strict=True))) == len(set(names)) == len(set(result))


@pytest.mark.parametrize("brief", [True, False])
@pytest.mark.parametrize("width", [20, 40, 80])
def test_table_names_columns_without_room(width, brief):
    drops = {"two": 2, "four": 1}
    columns = [
        Column(name, ("0.12345",), drop=drops.get(name, 0), detail=name == "five")
        for name in ("one", "two", "three", "four", "five")
    ]
    with limit_lines(8 if brief else None):
        table = table_of("layer", ["model.layers.0.q_proj"], columns, width)
    shown = {column.header for column in table.columns}
    assert ("five" in shown) != brief
    hidden = [column.title for column in columns if column.title not in shown | {"five"}]
    assert table.caption == (
        f"not shown at {width} columns: {', '.join(hidden)}\n" if hidden else None
    )
