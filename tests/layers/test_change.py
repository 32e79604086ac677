"""Row blocks of an update in any form."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.layers.change import Change
from lora_diag.linalg.streamed import Streamed


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 5),
    parts=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_blocks_have_equal_rows_in_every_form(rows, columns, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
    shape, matrix = (rows, columns), (b.double() @ a.double())
    forms = [
        Change(None, None, matrix=matrix),
        Change(None, None, factors=(b, a)),
        Change(None, None, streamed=Streamed(lambda: iter([matrix]), shape, torch.float64)),
    ]
    blocks = [list(form.blocks(shape, parts)) for form in forms]
    assert len({tuple(map(len, each)) for each in blocks}) == 1
    for each in blocks:
        assert torch.allclose(torch.cat(each), matrix, rtol=1e-12, atol=1e-12)
