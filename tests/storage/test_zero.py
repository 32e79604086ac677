"""DeepSpeed's ZeRO checkpoints: master weights of all ranks, cut and padded as each stage does."""

import pickle

import numpy as np
import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from tests.messages import assert_names, raises_naming
from tests.storage.sharding import assert_same

SHAPES = [{"a.weight": (5, 3), "b.bias": (7,)}, {"c.weight": (4, 4)}]


def numbers():
    rng = np.random.default_rng(0)
    return {
        name: torch.tensor(rng.standard_normal(shape)).float()
        for group in SHAPES
        for name, shape in group.items()
    }


def padded(flat, multiple):
    return torch.cat([flat, torch.full((-len(flat) % multiple,), torch.nan)])


def save_zero(folder, stage, world=2, **changed):
    """Write a checkpoint as DeepSpeed does; ``changed`` replaces values of the
    optimizer's state.
    """
    step = folder / "global_step5"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step5\n")
    tensors = numbers()
    shards = [[] for _ in range(world)]
    for group in SHAPES:
        flats = [tensors[name].reshape(-1) for name in group]
        if stage < 3:
            parts = padded(torch.cat(flats), 2 * world).chunk(world)
        else:
            parts = [
                torch.cat(part)
                for part in zip(*(padded(flat, world).chunk(world) for flat in flats), strict=True)
            ]
        for rank, part in enumerate(parts):
            shards[rank].append(part.clone())
    key = "single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in SHAPES]
    for rank in range(world):
        state = {
            key: shards[rank],
            "zero_stage": stage,
            "partition_count": [world] * 2 if stage < 3 else world,
        }
        path = step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state | changed}, path)
        frozen = torch.arange(6.0).chunk(world)[rank] if stage == 3 else torch.arange(6.0)
        model = {
            "module": {"buffer": torch.ones(2), "a.weight": torch.zeros(5, 3).bfloat16()},
            "buffer_names": ["buffer"],
            "param_shapes": shapes,
            "shared_params": {"tied.weight": "c.weight"},
            "frozen_param_shapes": {"frozen": torch.Size([2, 3])},
            "frozen_param_fragments": {"frozen": frozen.clone()},
        }
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            torch.save(model, step / f"{name}_model_states.pt")
    return folder


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 3), (3, 2), (3, 3)])
def test_zero_parameters_of_every_stage_are_joined(tmp_path, stage, world):
    folder = save_zero(tmp_path / "d", stage, world)
    expected = numbers()
    expected |= {
        "tied.weight": expected["c.weight"],
        "buffer": torch.ones(2),
        "frozen": torch.arange(6.0).view(2, 3),
    }
    for path in (folder, folder / "global_step5"):
        checkpoint = pickle.loads(pickle.dumps(open_checkpoint(path)))
        assert_same(checkpoint, expected)
    assert checkpoint.notes == (f"global_step5: master weights of {world} ranks",)


def test_model_file_alone_gives_its_16_bit_weights(tmp_path):
    folder = save_zero(tmp_path / "d", 2)
    for path in (folder / "global_step5").glob("*_optim_states.pt"):
        path.unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint["a.weight"].dtype == "bfloat16"
    assert_names(checkpoint.notes[0], "optimizer files")


@pytest.mark.parametrize(
    ("stage", "changed", "problem"),
    [
        (2, {"partition_count": [4, 4]}, "optimizer files of 2 ranks of 4; copy the files"),
        (2, {"zero_stage": 7}, "is not an optimizer file of ZeRO"),
        (2, {"single_partition_of_fp32_groups": []}, "holds no flat master weights"),
        (2, {"single_partition_of_fp32_groups": [torch.ones(9)]}, "lacks some of the 2 groups"),
        (
            2,
            {"single_partition_of_fp32_groups": [torch.ones(9), torch.ones(8)]},
            "lies up to entry 22, but 18",
        ),
        (
            2,
            {"single_partition_of_fp32_groups": [torch.ones(99), torch.ones(8)]},
            "has 22 entries, but 198",
        ),
        (
            3,
            {"fp32_flat_groups": [torch.ones(12), torch.ones(9)]},
            "has 20 parameters, but 21 are stored",
        ),
        (2, {"param_alignment_paddings": [[0, 3], [0]]}, "aligns parameters one by one"),
    ],
)
def test_inconsistent_zero_states_give_one_message(tmp_path, stage, changed, problem):
    folder = save_zero(tmp_path / "d", stage, **changed)
    with pytest.raises(InputError, match=problem) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_missing_ranks_and_steps_are_named(tmp_path):
    folder = save_zero(tmp_path / "d", 3, 3)
    (folder / "global_step5" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with raises_naming(InputError, "optimizer", "rank 1"):
        open_checkpoint(folder)
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(InputError, match=r"latest: names '../elsewhere'"):
        open_checkpoint(folder)
    (folder / "latest").unlink()
    (folder / "global_step6").mkdir()
    with raises_naming(InputError, "2 steps", "DeepSpeed"):
        open_checkpoint(folder)
