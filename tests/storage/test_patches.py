"""Sparse patches are read as the whole model over BASE."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_diag.errors import InputError
from lora_diag.running.inputs import compare
from lora_diag.storage import locate_files, open_checkpoint
from lora_diag.storage.patches import open_tuned
from tests.conftest import save_model, weights
from tests.messages import assert_names, raises_naming
from tests.storage.quantizing import eight_bit

NAME = "model.layers.0.self_attn.q_proj.weight"


def patch(path, changes, version=1, **metadata):
    """Write a patch: name -> (indices, values)."""
    tensors = {
        f"{name}.indices": torch.as_tensor(at, dtype=torch.int32)
        for name, (at, _) in changes.items()
    }
    tensors |= {f"{name}.values": values for name, (_, values) in changes.items()}
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {"sparse": "True", "model_version": str(version), **metadata})
    return path


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", weights(1, torch.bfloat16))


def test_changed_entries_are_replaced_in_any_range(tmp_path, base):
    before = open_checkpoint(base)
    numel = before[NAME].numel
    at = np.random.default_rng(0).permutation(numel)[: numel // 7]
    values = torch.randn(len(at)).bfloat16()
    path = patch(tmp_path / "p.safetensors", {NAME: (at, values)})
    after = open_tuned(locate_files(path), before)
    after = pickle.loads(pickle.dumps(after))
    expected = before.read(NAME).clone()
    expected[torch.from_numpy(at)] = values
    assert set(after) == set(before)
    assert after[NAME].dtype == "bfloat16"
    for start, stop in ((0, numel), (0, 0), (3, 4), (numel // 3, numel // 2)):
        assert torch.equal(after.read(NAME, start, stop), expected[start:stop])
    assert torch.equal(after.read("lm_head.weight"), before.read("lm_head.weight"))
    assert_names(after.notes[0], "1 tensors", "changed")


def test_wider_values_widen_the_tensor(tmp_path, base):
    path = patch(tmp_path / "p.safetensors", {NAME: ([5], torch.tensor([0.1]))})
    after = open_tuned(locate_files(path), open_checkpoint(base))
    assert after[NAME].dtype == "float32"
    assert after.read(NAME, 5, 6).tolist() == [float(np.float32(0.1))]


def test_patches_of_a_folder_follow_their_versions(tmp_path, base):
    for version, name in ((2, "a"), (10, "b"), (1, "c")):
        changes = {NAME: ([0, version], torch.full((2,), float(version)).bfloat16())}
        patch(tmp_path / "run" / f"{name}.safetensors", changes, version)
    result = compare(base, tmp_path / "run")
    (delta,) = [delta for delta in result.pairing.deltas if delta.layer == NAME]
    after = delta.tuned.read(0, 11)
    assert after[[0, 1, 2, 10]].tolist() == [10, 1, 2, 10]
    assert result.inputs[1].notes == ("3 sparse patches, applied in the order of model_version",)
    fingerprint = result.inputs[1].fingerprint
    patch(tmp_path / "run" / "c.safetensors", {NAME: ([0], torch.zeros(1).bfloat16())}, 1)
    assert compare(base, tmp_path / "run").inputs[1].fingerprint != fingerprint


def ones(count=1):
    return torch.ones(count).bfloat16()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"nope.weight": ([0], ones())}, r"changes nope\.weight, which BASE .* lacks"),
        ({NAME: ([-1], ones())}, "names entry -1 of"),
        ({NAME: ([0, 10**6], ones(2))}, "names entry 1000000 of"),
        ({NAME: ([3, 1, 3], ones(3))}, "names entry 3 twice"),
        ({NAME: ([0, 1], ones())}, r"is int32 \[2\], and .* \[1\]"),
        ({NAME: ([[0]], ones()[None])}, r"int32 \[1, 1\]"),
        ({NAME: ([0], torch.ones(1, dtype=torch.int32))}, "by int32 values"),
    ],
)
def test_inconsistent_patches_give_one_message(tmp_path, base, changes, problem):
    path = patch(tmp_path / "p.safetensors", changes)
    with pytest.raises(InputError, match=problem) as caught:
        open_tuned(locate_files(path), open_checkpoint(base)).read(NAME)
    assert str(path) in str(caught.value)


def test_patches_need_both_halves_and_a_plain_base(tmp_path, base):
    for name, problem in (
        (f"{NAME}.indices", "values is missing"),
        (f"{NAME}.values", "neither indices nor values"),
    ):
        save_file(
            {name: torch.zeros(1, dtype=torch.int32)},
            tmp_path / "p.safetensors",
            {"sparse": "True"},
        )
        with pytest.raises(InputError, match=problem):
            open_tuned(locate_files(tmp_path / "p.safetensors"), open_checkpoint(base))
    quantized = open_checkpoint(save_model(tmp_path / "q", eight_bit("a", (3, 4))[0]))
    path = patch(tmp_path / "p.safetensors", {"a.weight": ([0], ones())})
    with raises_naming(InputError, "BASE", "int8"):
        open_tuned(locate_files(path), quantized)
