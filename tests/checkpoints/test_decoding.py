"""Every code of every format that is decoded without torch, against torch."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_diag.checkpoints import open_checkpoint
from lora_diag.checkpoints.file_bytes import decode
from lora_diag.checkpoints.tensors import DECODED


@pytest.mark.parametrize("dtype", sorted(DECODED))
def test_every_code_equals_torch_value(dtype):
    kind = getattr(torch, dtype)
    if kind.itemsize == 1:
        codes = np.arange(256, dtype=np.uint8)
    elif kind.itemsize == 2:
        codes = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    else:
        codes = np.random.default_rng(0).integers(0, 256, 8 * 10**4, dtype=np.uint8)
    due = torch.from_numpy(codes.copy()).view(kind).to(torch.float64).numpy()
    result = decode(codes, dtype)
    assert result.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_array_equal(result, due)
    assert (np.signbit(result) == np.signbit(due))[~np.isnan(due)].all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float8_e5m2"])
def test_read_array_does_not_share_memory(tmp_path, dtype):
    """Bytes are read into memory that is used again; numbers must not lie in it."""
    tensors = {name: torch.full((40, 3), value).to(getattr(torch, dtype)) for name, value in (("a", 1.0), ("b", 2.0))}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    first, second = checkpoint.read_array("a"), checkpoint.read_array("b")
    assert (first == 1).all()
    assert (second == 2).all()
