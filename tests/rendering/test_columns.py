"""Names of rows: short enough, and never two alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.rendering.columns import shortened

PARTS = st.sampled_from(["0", "1", "10", "layer", "attention", "output", "dense", "LayerNorm", "bias"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=7).map(".".join), min_size=1, max_size=20)


@given(NAMES, st.integers(8, 60))
def test_shortened_names_fit_and_differ_where_the_names_do(names, width):
    found = shortened(names, width)
    assert all(len(name) <= width for name in found)
    assert len(set(zip(names, found, strict=True))) == len(set(names)) == len(set(found))


@pytest.mark.parametrize("width", [12, 16, 24])
def test_shortened_names_of_an_encoder_keep_their_block_and_their_end(width):
    blocks = range(12)
    found = shortened([f"encoder.layer.{i}.attention.output.dense" for i in blocks], width)
    assert all(f"{i}." in name and name.endswith("dense") for i, name in zip(blocks, found, strict=True))
