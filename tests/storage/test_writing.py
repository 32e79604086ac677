"""Safetensors files that are written here, read by the library and by our own reader."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_diag.errors import InputError
from lora_diag.storage import TensorInfo, open_checkpoint
from lora_diag.storage.safetensors import write_safetensors
from tests.messages import raises_naming

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "ä": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "a": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
}


def infos(tensors):
    return {
        name: TensorInfo(name, tuple(x.shape), str(x.dtype).split(".")[1])
        for name, x in tensors.items()
    }


def test_library_reads_what_was_written(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, infos(TENSORS), TENSORS.__getitem__, {"format": "pt"})
    result = load_file(path)
    assert set(result) == set(TENSORS)
    assert all(
        torch.equal(result[name], tensor) and result[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )
    ours = open_checkpoint(path)
    assert np.array_equal(ours.read("b").numpy(), np.arange(6, dtype=np.float32))
    assert ours.files[0].metadata == {"format": "pt"}


def test_written_bytes_are_independent_of_order(tmp_path):
    for name, order in (("x", list(TENSORS)), ("y", sorted(TENSORS, reverse=True))):
        write_safetensors(
            tmp_path / f"{name}.safetensors",
            infos({key: TENSORS[key] for key in order}),
            TENSORS.__getitem__,
            {},
        )
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content == (tmp_path / "y.safetensors").read_bytes()
    assert (
        int.from_bytes(content[:8], "little") % 8 == 0
    )  # so that float64 lie where they can be mapped


def test_failed_write_keeps_old_file_only(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, infos({"b": TENSORS["b"]}), TENSORS.__getitem__, {})
    before = path.read_bytes()

    def fails(name):
        raise InputError("the disk is gone")

    with raises_naming(InputError, "disk", "gone"):
        write_safetensors(path, infos({"b": TENSORS["b"]}), fails, {})
    with pytest.raises(ValueError, match="declared"):
        write_safetensors(path, infos({"b": TENSORS["b"]}), lambda name: TENSORS["a"], {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_file_as_folder_gives_one_message(tmp_path):
    (tmp_path / "no").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_safetensors(
            tmp_path / "no" / "x.safetensors", infos(TENSORS), TENSORS.__getitem__, {}
        )
