"""Names of wrappers are left out, and what only looks like a checkpoint is refused by its names."""

import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from lora_diag.storage.quantized import PACKED
from tests.conftest import save_model, save_sharded, weights
from tests.messages import raises_naming

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "module.module."],
)
@pytest.mark.parametrize("save", [save_model, save_sharded])
def test_prefixes_of_wrappers_are_left_out_with_note(tmp_path, prefix, save):
    tensors = weights(1)
    checkpoint = open_checkpoint(
        save(tmp_path, {prefix + name: value for name, value in tensors.items()})
    )
    assert set(checkpoint) == set(tensors)
    assert all(checkpoint[name].name == name for name in checkpoint)
    assert torch.equal(
        checkpoint.read("lm_head.weight", 5, 9), tensors["lm_head.weight"].reshape(-1)[5:9]
    )
    assert prefix + "lm_head.weight" in " ".join(checkpoint.notes) or prefix in checkpoint.notes[0]


def test_wrappers_inside_name_are_removed(tmp_path):
    inside = "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.q.weight"
    names = ["embed.weight", inside, "layers.1._orig_mod.q.weight"]
    checkpoint = open_checkpoint(save_model(tmp_path, {name: torch.ones(2, 2) for name in names}))
    assert sorted(checkpoint) == ["embed.weight", "layers.0.q.weight", "layers.1.q.weight"]


@pytest.mark.parametrize(
    "names",
    [
        ["module.weight", "head.weight"],  # a model's own word
        ["my_orig_mod.a", "x_fsdp_wrapped_module.b"],  # not whole words
        ["_orig_mod.a", "a"],  # would meet
        [f"{Q}.lora_A.default.weight", "e.base_layer.weight"],
        [f"{Q}.lora_A.weight", f"{Q}.weight"],  # as in a saved adapter with ``modules_to_save``
        ["encoder_blocks", "a._data"],  # floats with names of packed ones
    ],
)
def test_valid_names_are_kept(tmp_path, names):
    checkpoint = open_checkpoint(save_model(tmp_path, {name: torch.ones(4, 4) for name in names}))
    assert (set(checkpoint), checkpoint.notes) == (set(names), ())


@pytest.mark.parametrize("own", [f"{Q}.base_layer.weight", f"{Q}.weight"])
def test_unmerged_peft_state_dict_is_refused(tmp_path, own):
    tensors = {own: torch.ones(4, 4), f"{Q}.lora_A.default.weight": torch.ones(2, 4)}
    with raises_naming(InputError, "unmerged", "PEFT"):
        open_checkpoint(
            save_model(
                tmp_path, {f"base_model.model.{name}": value for name, value in tensors.items()}
            )
        )


@pytest.mark.parametrize(("suffix", "method"), PACKED.items())
def test_packed_weights_are_refused_by_names_of_their_tensors(tmp_path, suffix, method):
    tensors = {f"{Q}{suffix}": torch.zeros(4, 4, dtype=torch.int32), "norm.weight": torch.ones(4)}
    with pytest.raises(InputError) as caught:
        open_checkpoint(save_model(tmp_path, tensors))
    assert method in str(caught.value)
    assert f"{Q}{suffix}" in str(caught.value)


@pytest.mark.parametrize(
    "method",
    ["hqq", "aqlm", "quanto", "torchao", "eetq", "bitnet", "vptq", "quark", "mxfp4", "gptq", "awq"],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_methods_are_refused_by_configuration(tmp_path, method, key):
    folder = save_model(tmp_path, weights(1), {key: {"quant_method": method}})
    with pytest.raises(InputError, match=method):
        open_checkpoint(folder)


def test_unexplained_integer_matrices_are_refused(tmp_path):
    with raises_naming(InputError, "a.weight", "uint8"):
        open_checkpoint(save_model(tmp_path, {"a.weight": torch.zeros(2, 2, dtype=torch.uint8)}))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"a"', "\xff"])
def test_invalid_configs_are_refused(tmp_path, text):
    folder = save_model(tmp_path, weights(1))
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json"):
        open_checkpoint(folder)


def test_huge_configuration_is_not_read(tmp_path):
    folder = save_model(tmp_path, weights(1))
    with (folder / "config.json").open("wb") as file:
        file.truncate(20_000_000)
    with pytest.raises(InputError, match="larger than 10,000,000 bytes"):
        open_checkpoint(folder)


def test_invalid_quantization_config_is_ignored(tmp_path):
    folder = save_model(tmp_path, weights(1))
    (folder / "config.json").write_text('{"quantization_config": null, "compression_config": 3}')
    assert len(open_checkpoint(folder)) == len(weights(1))
