"""Code that comes with a model is not run, and nothing named in a file is called."""

import json
from pathlib import Path

import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.models.opening import open_model
from lora_diag.models.peft_check import adapted_by_peft
from tests.conftest import save_model
from tests.messages import assert_names, raises_naming


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A model whose own code leaves a file behind, if it is ever run."""
    config = {
        "model_type": "hostile",
        "architectures": ["HostileForCausalLM"],
        "auto_map": {
            "AutoConfig": "code.HostileConfig",
            "AutoModelForCausalLM": "code.HostileForCausalLM",
        },
    }
    folder = save_model(tmp_path / "model", {"a.weight": torch.zeros(4, 4)}, config)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return folder


def test_model_repository_code_is_not_executed(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A prompt for permission would wait for an answer.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with raises_naming(InputError, "cannot open"):
        open_model(hostile, torch.device("cpu"))
    with pytest.raises(InputError, match="cannot build this model"):
        adapted_by_peft({"peft_type": "LORA", "r": 1, "target_modules": ["a"]}, hostile)
    assert not (hostile.parent / "ran").exists()


@pytest.mark.parametrize(
    "name", ["pipeline", "AutoModel", "set_seed", "is_torch_available", "__name__", 7]
)
def test_architecture_in_config_is_model_class_or_refused(tmp_path: Path, name: object) -> None:
    config = {
        "model_type": "llama",
        "architectures": [name],
        "hidden_size": 8,
        "intermediate_size": 8,
    }
    config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        adapted_by_peft({"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}, tmp_path)
    except InputError as error:
        assert_names(str(error), "architectures" if name == 7 else "cannot build this model")
