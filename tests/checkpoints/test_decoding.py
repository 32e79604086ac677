"""Every code of every format that is decoded without torch, against torch."""

import numpy as np
import pytest
import torch

from lora_diag.checkpoints.decoding import decode
from lora_diag.checkpoints.tensors import DECODED


@pytest.mark.parametrize("dtype", sorted(DECODED))
def test_every_code_is_torch_s_number(dtype):
    kind = getattr(torch, dtype)
    if kind.itemsize == 1:
        codes = np.arange(256, dtype=np.uint8)
    elif kind.itemsize == 2:
        codes = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    else:
        codes = np.random.default_rng(0).integers(0, 256, 8 * 10**4, dtype=np.uint8)
    due = torch.from_numpy(codes.copy()).view(kind).to(torch.float64).numpy()
    found = decode(codes, dtype)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, due)
    assert (np.signbit(found) == np.signbit(due))[~np.isnan(due)].all()
