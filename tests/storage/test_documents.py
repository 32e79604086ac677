"""JSON documents: no key is given twice, wherever a document is read."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from lora_diag.storage.documents import loads, read_object
from tests.messages import raises_naming


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 1}', '{"x": [{"b": {"a": 1, "c": 2, "a": 3}}]}', '{"a": 1, "\\u0061": 2}'],
)
def test_key_given_twice_is_refused(tmp_path, text):
    for content in (text, text.encode(), text.encode("utf-16")):
        with pytest.raises(ValueError, match="'a' appears twice"):
            loads(content)
    (tmp_path / "x.json").write_text(text)
    with raises_naming(InputError, "x.json", "'a' appears twice"):
        read_object(tmp_path / "x.json", "document", 1000)


def test_equal_keys_of_two_objects_are_read():
    assert loads('[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


@pytest.fixture
def model(tmp_path):
    save_file({"a.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_config_with_repeated_key_is_refused(model):
    (model / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 4, "hidden_size": 8}'
    )
    with raises_naming(InputError, "config.json", "hidden_size"):
        _ = open_checkpoint(model).config


def test_index_with_repeated_tensor_is_refused(model):
    (model / "model.safetensors").rename(model / "x.safetensors")
    text = '{"weight_map": {"a.weight": "y.safetensors", "a.weight": "x.safetensors"}}'
    (model / "model.safetensors.index.json").write_text(text)
    with raises_naming(InputError, "model.safetensors.index.json", "a.weight"):
        open_checkpoint(model)


def test_metadata_with_repeated_key_is_refused(tmp_path):
    """Settings of diffusers in the metadata of the weights."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{name}.lora_A.weight": np.ones((4, 8)), f"{name}.lora_B.weight": np.ones((8, 4))}
    settings = '{"unet.r": 4, "unet.lora_alpha": 4, "unet.lora_alpha": 400}'
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(
        {key: value.astype(np.float32) for key, value in factors.items()},
        path,
        {"lora_adapter_metadata": settings},
    )
    from lora_diag.adapters import locate, open_input

    with raises_naming(InputError, "lora_adapter_metadata", "unet.lora_alpha"):
        open_input(locate(tmp_path))
