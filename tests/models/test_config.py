"""What a model's folder names: no repository is asked, and a damaged value is one message with file
and field.
"""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import modeling_utils
from transformers.integrations import hub_kernels
from transformers.utils import import_utils

from lora_diag.errors import InputError
from lora_diag.models.opening import open_model
from lora_diag.models.peft_check import adapted_by_peft
from tests.conftest import ROOT
from tests.messages import raises_naming

CPU = torch.device("cpu")
BASE = ROOT / "sample_checkpoints" / "base"
LORA = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}

KERNELS = [
    {"attn_implementation": "owner/kernel"},
    {"_attn_implementation": "owner/kernel:f"},
    {"_attn_implementation": "owner/kernel@v1"},
    {"_attn_implementation_internal": "owner/kernel"},
    {"attn_implementation": {"": "owner/kernel"}},
    {"attn_implementation": "kernels-community/flash-attn2"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "paged|flash_attention_3"},
    {"use_kernels": True, "kernel_config": {"RMSNorm": "owner/kernel:RMSNorm"}},
    {"experts_implementation": "sonicmoe"},
]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The repositories that the package ``kernels`` is asked for, as if it were installed, and
    connections.
    """
    asked: list[str] = []

    def get_kernel(name: str, **options: object) -> None:
        asked.append(name)
        raise RuntimeError("its code would be imported here")

    def connect(self: socket.socket, address: object) -> None:
        asked.append(str(address))
        raise OSError("not connected")

    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    for module in (hub_kernels, modeling_utils, import_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return asked


def changed(folder: Path, values: dict[str, Any]) -> Path:
    """Copy the sample model with other values in its config.json."""
    shutil.copytree(BASE, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize("values", KERNELS, ids=str)
def test_config_names_no_kernel_to_ask_for(
    tmp_path: Path, requests: list[str], values: dict[str, Any]
) -> None:
    folder = changed(tmp_path / "base", values)
    model = open_model(folder, CPU)
    model.module(torch.tensor([[1, 2, 3]]))
    assert adapted_by_peft(LORA, folder)
    assert not requests


@pytest.mark.parametrize("name", ["sonicmoe", "deepgemm"])
def test_experts_name_no_kernel(tmp_path: Path, requests: list[str], name: str) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = transformers.MixtralConfig(
        vocab_size=256, num_hidden_layers=1, num_local_experts=2, **sizes
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experts_implementation": name}))
    open_model(tmp_path, CPU).module(torch.tensor([[1, 2, 3]]))
    assert not requests


def test_stub_sees_kernel_that_transformers_asks_for(tmp_path: Path, requests: list[str]) -> None:
    folder = changed(tmp_path / "base", KERNELS[0])
    with pytest.raises(ValueError, match="would be imported"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert requests == ["owner/kernel"]


def composite(**values: Any) -> dict[str, Any]:
    """Return the configuration of a tiny model with a text model and a vision model."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", "vocab_size": 8, **sizes, **values},
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": 8,
            "patch_size": 4,
            **sizes,
        },
    }


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ({"attn_implementation": "owner/kernel"}, {}),
        ({"_attn_implementation": "owner/kernel"}, {}),
        ({}, {"attn_implementation": {"vision_config": "owner/kernel"}}),
        ({}, {"_attn_implementation": {"text_config": "owner/kernel"}}),
    ],
)
def test_part_of_model_names_no_kernel(
    tmp_path: Path, requests: list[str], inner: dict[str, Any], outer: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(composite(**inner) | outer))
    assert adapted_by_peft(LORA, tmp_path)
    assert not requests


def test_quantized_part_of_model_is_refused(tmp_path: Path, requests: list[str]) -> None:
    config = composite(quantization_config={"quant_method": "fbgemm_fp8"}) | {
        "architectures": ["LlavaForCausalLM"]
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises_naming(InputError, str(tmp_path), "is quantized"):
        open_model(tmp_path, CPU)
    assert not requests


def test_model_outside_the_folder_is_refused(tmp_path: Path, requests: list[str]) -> None:
    config = composite()
    config["vision_config"] = {"model_type": "timm_wrapper", "architecture": "hf_hub:owner/model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises_naming(InputError, "config.json", "architecture", "hf_hub:owner/model"):
        adapted_by_peft(LORA, tmp_path)
    assert not requests


def test_adapter_in_model_folder_is_refused(tmp_path: Path, requests: list[str]) -> None:
    folder = changed(tmp_path / "base", {})
    for file in (ROOT / "sample_checkpoints" / "lora_r4").glob("adapter_*"):
        shutil.copy(file, folder)
    with raises_naming(InputError, str(folder), "adapter_config.json"):
        open_model(folder, CPU)
    assert not requests


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", [5]),
        ("architectures", "LlamaForCausalLM"),
        ("num_attention_heads", 0),
        ("num_attention_heads", True),
        ("max_position_embeddings", "512"),
        ("max_position_embeddings", -5),
        ("vocab_size", "256"),
        ("vocab_size", 2.5),
        ("torch_dtype", "__import__('os').system('touch ran')"),
        ("dtype", "nn"),
        ("num_hidden_layers", 10**6),
    ],
)
def test_damaged_value_names_file_and_field(tmp_path: Path, key: str, value: object) -> None:
    values = {key: value} if key != "torch_dtype" else {key: value, "dtype": None}
    folder = changed(tmp_path / "base", values)
    for use in (lambda: open_model(folder, CPU), lambda: adapted_by_peft(LORA, folder)):
        with raises_naming(InputError, str(folder / "config.json"), key):
            use()


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": 5},
        {"hidden_act": "no"},
        {"head_dim": []},
        {"rope_parameters": {"rope_type": [1]}},
    ],
)
def test_value_that_transformers_refuses_names_folder(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = changed(tmp_path / "base", values)
    with raises_naming(InputError, str(folder)):
        open_model(folder, CPU)
