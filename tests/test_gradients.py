"""Snapshots: their steps, their files, their names."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diag.errors import InputError
from lora_diag.gradients import histories, open_steps
from lora_diag.storage import open_checkpoint
from tests.conftest import save_model, save_sharded, weights
from tests.messages import raises_naming


def save_step(path, tensors, step=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, None if step is None else {"step": str(step)})
    return path


def small(seed=0):
    return {"a.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))}


def test_step_is_in_metadata_or_else_last_number_of_name(tmp_path):
    save_step(tmp_path / "g" / "run2_step000040.safetensors", small())
    save_step(tmp_path / "g" / "last.safetensors", small(), 400)
    save_step(tmp_path / "g" / "step9.safetensors", small(), 7)
    assert [step.step for step in open_steps([tmp_path / "g"])] == [7, 40, 400]


def test_sharded_steps_are_folders_or_indices(tmp_path):
    save_sharded(tmp_path / "g" / "step_5", weights(1))
    save_sharded(tmp_path / "g" / "step_12", weights(2))
    save_model(tmp_path / "g" / "checkpoint-3", weights(3))
    steps = open_steps([tmp_path / "g"])
    assert [step.step for step in steps] == [3, 5, 12]
    assert all(len(step.checkpoint) == 12 for step in steps)
    assert [step.step for step in open_steps([tmp_path / "g" / "step_5"])] == [5]
    save_step(tmp_path / "h" / "one.safetensors", {"a.weight": torch.ones(2, 2)})
    save_step(tmp_path / "h" / "two.safetensors", {"b.weight": torch.ones(2, 2)})
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    (tmp_path / "h" / "grad_8.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    assert [(step.step, len(step.checkpoint)) for step in open_steps([tmp_path / "h"])] == [(8, 2)]


def test_two_files_of_one_step_are_refused_by_both_names(tmp_path):
    one, two = (
        save_step(tmp_path / "a.safetensors", small(), 3),
        save_step(tmp_path / "b3.safetensors", small()),
    )
    with raises_naming(InputError, two, "step 3", one):
        open_steps([one, two])


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("gradients.safetensors", None, "no training step is known"),
        ("g1.safetensors", "soon", "the step in its metadata is 'soon'"),
        ("g1.safetensors", "-4", "the step in its metadata is '-4'"),
        ("g1.safetensors", "1e3", "the step in its metadata is '1e3'"),
    ],
)
def test_file_without_step_is_refused(tmp_path, name, step, message):
    with pytest.raises(InputError, match=message):
        open_steps([save_step(tmp_path / name, small(), step)])


def test_shards_of_different_steps_are_refused(tmp_path):
    save_step(tmp_path / "g" / "one.safetensors", {"a": torch.ones(2, 2)}, 1)
    save_step(tmp_path / "g" / "two.safetensors", {"b": torch.ones(2, 2)}, 2)
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "g" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    with pytest.raises(InputError, match="different steps: 1, 2"):
        open_steps([tmp_path / "g"])


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no gradients"):
        open_steps([tmp_path])


def test_gradients_are_matched_to_base_entries(tmp_path):
    """A wrapper's prefix, and a fused stack of experts that BASE stores one by one."""
    base = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": torch.zeros(3, 5) for e in range(2)}
    base["model.norm.weight"] = torch.zeros(4)
    base = open_checkpoint(save_model(tmp_path / "base", base))
    fused = torch.arange(30.0).view(2, 3, 5)
    taken = {
        "module.layers.0.mlp.experts.down_proj": fused,
        "module.norm.weight": torch.ones(4),
        "module.other.weight": torch.ones(2, 2),
    }
    steps = open_steps([save_step(tmp_path / "g1.safetensors", taken)])
    followed, rest = histories(steps, base)
    assert [history.layer for history in followed] == list(base)[:2]
    for expert, history in enumerate(followed):
        assert torch.equal(torch.cat(list(history.snapshots[0].blocks((3, 5)))), fused[expert])
    assert [(item.layer, item.reason) for item in rest] == [
        ("norm.weight", "vector"),
        ("other.weight", "not_in_base"),
    ]


def test_names_without_base_equal_gradients(tmp_path):
    steps = open_steps([save_step(tmp_path / f"g{i}.safetensors", small(i)) for i in (3, 1)])
    followed, rest = histories(steps, None)
    assert rest == ()
    assert [(h.layer, h.shape, [s.step for s in h.snapshots]) for h in followed] == [
        ("a.weight", (4, 3), [1, 3])
    ]


def test_one_weight_has_one_gradient_step_and_one_shape(tmp_path):
    base = open_checkpoint(save_model(tmp_path / "base", {"model.a.weight": torch.zeros(4, 3)}))
    twice = {"a.weight": torch.ones(4, 3), "module.a.weight": torch.ones(4, 3)}
    with raises_naming(InputError, "model.a.weight"):
        histories(open_steps([save_step(tmp_path / "g1.safetensors", twice)]), base)
    other = save_step(tmp_path / "g2.safetensors", {"a.weight": torch.ones(4, 2)})
    steps = open_steps([save_step(tmp_path / "g1.safetensors", small()), other])
    with pytest.raises(InputError, match="gradients of one model"):
        histories(steps, None)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_more_steps_than_open_file_limit(tmp_path, prefix):
    for i in range(40):
        save_step(
            tmp_path / "g" / f"{i}.safetensors",
            {prefix + name: value for name, value in small(i).items()},
        )
    followed, _ = histories(open_steps([tmp_path / "g"]), None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 4, hard)
        )
        read = [torch.cat(list(snapshot.blocks((4, 3)))) for snapshot in followed[0].snapshots]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(read[39], small(39)["a.weight"])
