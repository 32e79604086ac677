"""Bytes of local files: decoded without torch as torch does, and counted as the system does."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lora_diag
from lora_diag import deltas
from lora_diag.adapters import open_adapter
from lora_diag.diagnostics.verify_merge.faults import MergedLayer
from lora_diag.diagnostics.verify_merge.measure import verify
from lora_diag.storage import open_checkpoint
from lora_diag.storage.file_bytes import READING, decode
from lora_diag.storage.tensors import DECODED
from tests.adapters import making

SAMPLE = Path(__file__).parents[2] / "sample_checkpoints"


def test_bytes_are_counted_in_every_pass(tmp_path, monkeypatch):
    """``spectrum`` reads every number once; ``intruders`` reads the weights again for their
    directions.
    """
    tensors = {f"layers.{i}.up_proj.weight": torch.randn(40, 30) for i in range(3)}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file(
        {name: w + torch.randn(40, 30) / 9 for name, w in tensors.items()},
        tmp_path / "tuned.safetensors",
    )
    sides = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    arrived, read = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *words: arrived.append(read(*words)) or arrived[-1])
    for passes, command in ((1, lora_diag.spectrum), (2, lora_diag.intruders)):
        READING.clear()
        arrived.clear()
        command(*sides)
        assert READING.total() == (sum(arrived), 2, sum(side.stat().st_size for side in sides))
        assert sum(arrived) == passes * 2 * 3 * 40 * 30 * 4


def test_wrong_merge_is_read_once_if_it_fits(tmp_path, monkeypatch):
    """A layer that is no merge is compared with many updates; a memory limit makes each of them
    read it again.
    """
    monkeypatch.setattr(deltas, "BLOCK_ENTRIES", 6000)
    adapter = making.adapter(
        tmp_path,
        {
            f"w.lora_{name}.weight": making.normal(*shape)
            for name, shape in (("A", (2, 50)), ("B", (300, 2)))
        },
    )
    base, merged = (
        open_checkpoint(
            making.base(tmp_path / str(seed), {"w.weight": making.normal(300, 50, seed=seed)})
        )
        for seed in range(2)
    )
    (update,) = open_adapter(adapter).pair(base)[0].deltas
    layer = MergedLayer(
        "w", (300, 50), *(deltas.Side(side, "w.weight") for side in (base, merged)), (update,)
    )
    result = []
    for memory, low, high in ((None, 2, 2), (layer.needed, 3, 100)):
        READING.clear()
        result.append(verify(layer, memory))
        assert low <= (READING.total()[0] - 8 * (300 + 50)) / (4 * 300 * 50) <= high
    assert result[0] == result[1]
    assert result[0].status == "other base"


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
    tensors = {
        name: torch.full((40, 3), value).to(getattr(torch, dtype))
        for name, value in (("a", 1.0), ("b", 2.0))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    first, second = checkpoint.read_array("a"), checkpoint.read_array("b")
    assert (first == 1).all()
    assert (second == 2).all()
