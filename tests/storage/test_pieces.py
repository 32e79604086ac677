"""torch.distributed.checkpoint in safetensors: the pieces of every rank, put together."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from tests.storage.sharding import assert_same

WHOLE = {
    "a.weight": torch.arange(40.0).view(10, 4),
    "norm.weight": torch.arange(7.0),
    "b.weight": torch.arange(10.0).view(2, 5),
    "experts": torch.arange(36.0).view(3, 4, 3),
    "scale": torch.tensor(3.0),
}


def cut(folder, ranks=3, change=lambda offsets: None):
    """Write the files that ``HuggingFaceStorageWriter(save_distributed=True)`` writes for FSDP over
    some ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        tensors, offsets = {}, {}
        for name, value in WHOLE.items():
            if value.ndim == 0:
                if rank == ranks - 1:
                    tensors[name], offsets[name] = value, {"saved_offsets": []}
                continue
            size = -(-len(value) // ranks)
            first = min(rank * size, len(value))
            tensors[name] = value[first : first + size].clone()
            offsets[name] = {"saved_offsets": [first] + [0] * (value.ndim - 1)}
        change(offsets)
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        save_file(
            tensors, folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata
        )
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_range_across_pieces(tmp_path, ranks):
    assert_same(pickle.loads(pickle.dumps(open_checkpoint(cut(tmp_path, ranks)))), WHOLE)


def test_missing_file_is_reported(tmp_path):
    cut(tmp_path)
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"the parts of \S+ hold \d+ entries of \d+; a file is missing"
    ):
        open_checkpoint(tmp_path)


def test_one_of_files_is_not_checkpoint(tmp_path):
    cut(tmp_path)
    with pytest.raises(InputError, match="give the folder"):
        open_checkpoint(tmp_path / "shard-00001-model-00001-of-00001.safetensors")


def test_pieces_of_columns_are_assembled(tmp_path):
    """As tensor parallelism cuts."""
    whole = torch.arange(40.0).view(8, 5)
    for number, (first, last) in enumerate([(0, 3), (3, 5)]):
        metadata = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [0, first]}})}
        piece = {"a": whole[:, first:last].contiguous()}
        save_file(
            piece, tmp_path / f"shard-{number + 1:05d}-model-00001-of-00001.safetensors", metadata
        )
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a", 7, 33), whole.reshape(-1)[7:33])


@pytest.mark.parametrize("offsets", [[0], [-1, 0], ["0", 0], None, 3])
def test_pieces_without_offset_are_refused(tmp_path, offsets):
    cut(tmp_path, change=lambda info: info.update({"a.weight": {"saved_offsets": offsets}}))
    with pytest.raises(InputError, match=r"the start .* of the piece of a\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {"DCP_SHARDING_INFO": "{"}, {"DCP_SHARDING_INFO": "[]"}]
)
def test_files_without_piece_metadata_are_refused(tmp_path, metadata):
    save_file(
        {"a": torch.ones(2)}, tmp_path / "shard-00001-model-00001-of-00001.safetensors", metadata
    )
    with pytest.raises(InputError, match=r"DCP_SHARDING_INFO|starts at None"):
        open_checkpoint(tmp_path)
