"""torch.distributed checkpoints and files of single ranks: read as data, whole, and in
any range.
"""

import inspect
import json
import pickle

import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.running.fingerprint import fingerprint
from lora_diag.storage import open_checkpoint
from lora_diag.storage.inert import PickledObject, load
from tests.conftest import weights
from tests.messages import mentions, raises_naming
from tests.storage.sharding import Canary, assert_same, save_dcp, save_ranks
from tests.storage.test_fuzz import assert_mutants_are_read_or_refused


def numbers(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


TENSORS = {
    "rows": numbers(7, 5),
    "columns": numbers(4, 9, dtype=torch.bfloat16),
    "grid": numbers(6, 8, dtype=torch.float64),
    "experts": numbers(4, 6, 5),
    "inner": numbers(3, 4, 6),
    "whole": numbers(3, 5),
    "vector": numbers(5),
    "scalar": torch.tensor(2.0),
    "ids": numbers(6, dtype=torch.int64),
}
CUTS = {
    "rows": [[3, 3, 1], [5]],
    "columns": [[4], [5, 4]],
    "grid": [[2, 4], [3, 3, 2]],
    "experts": [[1, 3], [4, 2], [5]],
    "inner": [[2, 1], [4], [1, 5]],
    "vector": [[3, 2]],
}


def test_parts_cut_along_any_dimension_are_assembled(tmp_path):
    checkpoint = open_checkpoint(save_dcp(tmp_path / "d", TENSORS, CUTS))
    assert_same(checkpoint, TENSORS)
    assert_same(pickle.loads(pickle.dumps(checkpoint)), TENSORS)


def test_torch_s_own_writer_is_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    if "no_dist" not in inspect.signature(dcp.save).parameters:
        pytest.skip("this torch writes only from a process group")
    tensors = weights(3, torch.bfloat16)
    state = {
        "app": {
            "model": tensors,
            "optim": {"state": {"a.weight": {"exp_avg": torch.ones(2, 2)}}, "step": 3},
        }
    }
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "d", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "d")
    assert_same(checkpoint, tensors)
    assert any("app.model." in note for note in checkpoint.notes)
    assert any(mentions(note, "1 tensors") for note in checkpoint.notes)


def test_accelerate_folder_inside_step_is_found(tmp_path):
    save_dcp(tmp_path / "step" / "pytorch_model_fsdp_0", {"model.a.weight": numbers(2, 2)}, {})
    assert list(open_checkpoint(tmp_path / "step")) == ["model.a.weight"]


@pytest.mark.parametrize(
    ("keys", "planned", "names"),
    [
        (
            {"layers.0.wq": 4, "optimizer.state.layers.0.wq.exp_avg": 4, "optim.step": 1},
            None,
            {"layers.0.wq"},
        ),
        (
            {"model.a": 4, "model.b": 4},
            {"model.a": ("model", "a"), "model.b": ("model", "b")},
            {"a", "b"},
        ),
        (
            {"model.a": 4, "optim.model.a": 4},
            {"optim.model.a": ("optim", "model", "a")},
            {"model.a"},
        ),
        ({"x.a": 4, "x.exp_avg": 4}, {"x.a": ("x", 0, "state_dict", "a")}, {"a"}),
    ],
)
def test_weights_are_separated_from_training_state(tmp_path, keys, planned, names):
    tensors = {key: torch.ones(size) for key, size in keys.items()}
    assert (
        set(open_checkpoint(save_dcp(tmp_path / "d", tensors, {}, planned, extra=["step"])))
        == names
    )


def test_two_models_in_one_state_are_refused(tmp_path):
    planned = {key: tuple(key.split(".", 2)) for key in ("actor.model.a", "critic.model.a")}
    folder = save_dcp(tmp_path / "d", dict.fromkeys(planned, torch.ones(2)), {}, planned)
    with pytest.raises(InputError, match=r"2 models \(actor\.model, critic\.model\)"):
        open_checkpoint(folder)


def edited(folder, change):
    """Write the index of a folder anew."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def place(index, number=0, **values):
    for name, value in values.items():
        object.__setattr__(list(index.storage_data.values())[number], name, value)


def first_of(mapping):
    return next(iter(mapping.values()))


def drop_chunk(index):
    index.state_dict_metadata["rows"].chunks.pop()


def overlap(index):
    chunks = index.state_dict_metadata["columns"].chunks
    chunks[1].offsets, chunks[1].sizes = torch.Size([0, 4]), torch.Size([4, 4])
    chunks[0].offsets, chunks[0].sizes = torch.Size([0, 0]), torch.Size([4, 5])
    index.state_dict_metadata["columns"].chunks = chunks
    for key in list(index.storage_data):
        if key.fqn == "columns" and key.offset == torch.Size([0, 5]):
            index.storage_data[type(key)("columns", torch.Size([0, 4]), 1)] = (
                index.storage_data.pop(key)
            )


def enlarge(index):
    """Give a tensor and its only part 10^18 entries."""
    stored = index.state_dict_metadata["whole"]
    stored.size = stored.chunks[0].sizes = torch.Size([10**9, 10**9])


BAD = {
    "a part less": (drop_chunk, "hold 30 entries of 35"),
    "another shape": (
        lambda i: setattr(i.state_dict_metadata["rows"], "size", torch.Size([8, 5])),
        "35 entries of 40",
    ),
    "a huge shape": (
        lambda i: setattr(i.state_dict_metadata["rows"], "size", torch.Size([2**40, 2**40])),
        "of 1,2",
    ),
    "a part larger than its bytes": (enlarge, "of whole takes 4,000,000,000,000,000,000 bytes"),
    "parts that overlap": (overlap, r"hold 36 entries of 36 and overlap|lies outside|hold"),
    "a file elsewhere": (lambda i: place(i, relative_path="../x.distcp"), "plain file name"),
    "a file that is missing": (lambda i: place(i, relative_path="__9_0.distcp"), "is missing"),
    "a length beyond the file": (lambda i: place(i, length=2**50), "lies up to byte"),
    "a negative position": (lambda i: place(i, offset=-1), "position"),
    "no place": (lambda i: i.storage_data.clear(), "does not say where"),
    "no tensors": (lambda i: i.state_dict_metadata.clear(), "no weights"),
    "compressed": (lambda i: place(i, transform_descriptors=[1]), "compressed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_contradictory_index_gives_one_message(tmp_path, kind):
    change, words = BAD[kind]
    folder = edited(save_dcp(tmp_path / "d", TENSORS, CUTS), change)
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_part_that_contradicts_index_is_named(tmp_path):
    folder = edited(
        save_dcp(tmp_path / "d", TENSORS, CUTS),
        lambda i: place(i, 3, **vars(first_of(i.storage_data))),
    )
    with raises_naming(InputError, "float32 [3, 5]", "bfloat16 [4, 5]"):
        open_checkpoint(folder).read("columns")


# The pickle machine.


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_in_index_or_shard_is_not_executed(tmp_path, protocol):
    canary = Canary(tmp_path / "sang")
    folder = edited(
        save_dcp(tmp_path / "d", TENSORS, CUTS), lambda i: setattr(i, "storage_meta", canary)
    )
    assert_same(open_checkpoint(folder), TENSORS)
    result = load(pickle.dumps([canary, {"a": canary}], protocol), tmp_path, "it")
    assert isinstance(result[0], PickledObject)
    assert result[0].name in {"touch", "getattr", "Path.touch"}
    torch.save({"w": torch.ones(2), "c": canary}, tmp_path / "model_world_size_1_rank_0.pt")
    assert list(open_checkpoint(tmp_path)) == ["w"]
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_frozenset_is_a_tuple(tmp_path, protocol):
    assert load(pickle.dumps(frozenset({7}), protocol), tmp_path, "it") == (7,)


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_plain_data_is_read(tmp_path, protocol):
    nested: list = [1]
    nested.append(nested)
    raw = b"\0\xff" if protocol > 2 else 0  # before, bytes were a call of a codec
    value = [
        None,
        True,
        2**70,
        -1.5,
        "é",
        raw,
        (),
        (1,),
        (1, 2, 3, 4),
        {"a": [1, {2: 3}]},
        {1: (2, 3)},
    ]
    assert load(pickle.dumps(value, protocol), tmp_path, "it") == value
    repeated = load(pickle.dumps(nested, protocol), tmp_path, "it")
    assert repeated[1] is repeated


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x04", b".", b"(.", b"N", b"0.", b"h\5.", b"\x8a\xff.", b"\x80\x04K\1K\2R.",
     b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", b"X\xff\xff\xff\x7fa.", b"\x95" + b"\xff" * 8 + b".",
     b"}]]s.", b"\x82\1.",
     b"})" + b"\x85" * 20_000 + b"Ns."],
)  # fmt: skip
def test_invalid_pickles_give_one_message(tmp_path, content):
    with raises_naming(InputError, "readable pickle"):
        load(content, tmp_path, "it")


# One file per rank.


def test_tensors_of_every_placement_are_assembled(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = {name: numbers(7, 6) for name in ("rows", "columns", "both", "twice", "copies")}
    placements = {
        "rows": [Replicate(), Shard(0)],
        "columns": [Shard(1), Replicate()],
        "both": [Shard(0), Shard(1)],
    }
    placements |= {"twice": [Shard(0), Shard(0)], "copies": [Replicate(), Replicate()]}

    def cut(value, places, rank):
        for placement, at in zip(places, (rank // 2, rank % 2), strict=True):
            if isinstance(placement, Shard):
                value = value.chunk(2, placement.dim)[at]
        return value.clone(memory_format=torch.contiguous_format)

    def make(rank, mesh):
        state = {
            name: DTensor.from_local(cut(value, placements[name], rank), mesh, placements[name], run_check=False,
                                     shape=value.shape, stride=value.stride())
            for name, value in whole.items()
        }  # fmt: skip
        return state | {"buffer": torch.ones(3), "_extra_state": None}

    folder = save_ranks(tmp_path / "actor", make, (2, 2), ("ddp", "fsdp"))
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["model_type"] == "llama"
    assert_same(checkpoint, whole | {"buffer": torch.ones(3)})
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 4}))
    assert_same(open_checkpoint(folder), whole | {"buffer": torch.ones(3)})
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 8}))
    with raises_naming(InputError, "fsdp_config.json", 8, 4):
        open_checkpoint(folder)
    (folder / "fsdp_config.json").unlink()
    (folder / "model_world_size_4_rank_3.pt").unlink()
    with raises_naming(InputError, "rank 3", 4, "missing"):
        open_checkpoint(folder)


def test_plain_rows_of_ranks_are_joined(tmp_path):
    whole = {"a.weight": numbers(5, 3), "b.bias": numbers(4)}
    for rank in range(2):
        state = {name: value.chunk(2)[rank].clone() for name, value in whole.items()}
        torch.save(state, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, whole)
    assert "FSDP1" in checkpoint.notes[1]
    with pytest.raises(InputError, match="give the folder"):
        open_checkpoint(tmp_path / "model_world_size_2_rank_0.pt")


def test_sharded_tensors_of_fsdp1_are_joined_by_their_offsets(tmp_path):
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
    from torch.distributed._shard.sharded_tensor.metadata import (
        ShardedTensorMetadata,
        TensorProperties,
    )

    whole = numbers(7, 3)
    places = [
        ShardMetadata([0, 0], [4, 3], "rank:0/cpu"),
        ShardMetadata([4, 0], [3, 3], "rank:1/cpu"),
    ]

    def make(rank, mesh):
        about = ShardedTensorMetadata(places, whole.size(), TensorProperties(dtype=whole.dtype))
        shard = Shard(whole.split([4, 3])[rank].clone(), places[rank])
        sharded = ShardedTensor._init_from_local_shards_and_global_metadata([shard], about)
        return {"w": sharded, "copy": torch.ones(2)}

    assert_same(open_checkpoint(save_ranks(tmp_path, make)), {"w": whole, "copy": torch.ones(2)})


@pytest.mark.parametrize("kind", ["partial", "strided"])
def test_unsupported_placements_state_fix(tmp_path, kind):
    from torch.distributed.tensor import DTensor, Partial
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = [Partial() if kind == "partial" else _StridedShard(0, split_factor=2)]
    whole = torch.ones(2, 2)
    folder = save_ranks(
        tmp_path,
        lambda _, mesh: {"w": DTensor.from_local(whole, mesh, placements, run_check=False)},
    )
    with pytest.raises(
        InputError, match=r"w is placed as \w+, which is not supported.*verl\.model_merger"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.slow
def test_mutated_distributed_checkpoints(tmp_path, name):
    tensors, cuts = (
        {"a": numbers(4, 3), "b": numbers(3, 4)},
        {"a": [[2, 2], [3]], "b": [[3], [2, 2]]},
    )
    folder = save_dcp(tmp_path / "d", tensors, cuts)
    assert_mutants_are_read_or_refused(folder / name, folder, rounds=300)


def test_parts_are_read_by_ranges_from_a_web_server(tmp_path, web_here):
    save_dcp(tmp_path / "d", TENSORS, CUTS)
    checkpoint = open_checkpoint(f"{web_here.url}/d")
    assert_same(checkpoint, TENSORS)
    whole = fingerprint(checkpoint)
    save_dcp(
        tmp_path / "d", {**TENSORS, "grid": TENSORS["grid"] + 1}, CUTS | {"rows": [[7], [2, 3]]}
    )
    assert fingerprint(open_checkpoint(f"{web_here.url}/d")) != whole
