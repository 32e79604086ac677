"""The counter of bytes read from local files, against the sizes of the tensors and the calls of the system."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

import lora_diag
from lora_diag.checkpoints.file_bytes import READING

SAMPLE = Path(__file__).parents[2] / "sample_checkpoints"


def test_bytes_are_counted_in_every_pass(tmp_path, monkeypatch):
    """``spectrum`` reads every number once; ``intruders`` reads the weights again for their directions."""
    tensors = {f"layers.{i}.up_proj.weight": torch.randn(40, 30) for i in range(3)}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({name: w + torch.randn(40, 30) / 9 for name, w in tensors.items()}, tmp_path / "tuned.safetensors")
    sides = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    arrived, read = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *words: arrived.append(read(*words)) or arrived[-1])
    for passes, command in ((1, lora_diag.spectrum), (2, lora_diag.intruders)):
        READING.clear()
        arrived.clear()
        command(*sides)
        assert READING.total() == (sum(arrived), 2, sum(side.stat().st_size for side in sides))
        assert sum(arrived) == passes * 2 * 3 * 40 * 30 * 4


def test_verbose_reports_reading(loradiag):
    words = ("spectrum", SAMPLE / "base", SAMPLE / "full_ft")
    assert loradiag(*words, "-v").err.endswith("from 4 local files, 1.00 times their size\n")
    assert "Read" not in loradiag(*words, brief=True).err + loradiag(*words, "-v", "-q").err
