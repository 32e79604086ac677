"""``loradiag residual`` as a user runs it."""

import json
import re

import pytest
import torch

from tests.conftest import ROOT, save_model
from tests.messages import assert_names

pytestmark = pytest.mark.slow

BASE, TUNED, R4, R16 = (ROOT / "sample_checkpoints" / name for name in ("base", "full_ft", "lora_r4", "lora_r16"))


def test_table_adapter_and_summary(loradiag, tmp_path):
    ran = loradiag("residual", BASE, TUNED, R4, R16, "-o", "r.jsonl")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    layers = [record for record in records if record["record"] == "residual"]
    assert {record["adapter"] for record in layers} == {str(R4), str(R16)}
    text = " ".join(ran.out.split())
    for name in ("lora_r4", "lora_r16"):
        mine = [record for record in layers if record["adapter"].endswith(name)]
        fro = sum(record["fro"] ** 2 for record in mine)
        epsilon = (sum((record["epsilon"] * record["fro"]) ** 2 for record in mine) / fro) ** 0.5
        assert_names(text, name, f"{epsilon:.3g}")
        still = sum(record["fro"] ** 2 for record in mine if record["limited_by"] == "not adapted") / fro
        assert_names(text, name, 28, "28 tensors", "11 tensors", f"{still:.0%}", "‖ΔW‖²")
    assert "not quality" in text


def test_inspect_shows_residual_and_json_has_records(loradiag, tmp_path):
    words = "residual", BASE, TUNED, R4, "--layers", r"layers\.0"
    shown = loradiag(*words, "-o", "r.jsonl").out
    repeated = loradiag("inspect", "r.jsonl").out
    assert repeated == shown[: shown.index("\nNext ")] + "\n"
    assert loradiag(*words, "--json").out == (tmp_path / "r.jsonl").read_text()
    assert "layers.0.mlp.up_proj " in loradiag("inspect", "r.jsonl", "--per", "layer", env={"COLUMNS": "140"}).out


def test_adapter_in_place_of_fine_tune_is_reported(loradiag):
    message = " ".join(loradiag("residual", BASE, R4, TUNED, "--layers", r"layers\.0\..*q_proj").out.split())
    assert_names(message, "lora_r4", "TUNED")
    assert_names(message, "BASE TUNED ADAPTER")
    assert "The order" not in loradiag("residual", BASE, TUNED, R4, "--layers", r"layers\.0\..*q_proj").out


def test_rows_are_ordered_by_limit(loradiag):
    out = loradiag("residual", BASE, TUNED, R4).out
    limits = [line.split()[-1] for line in out.splitlines() if re.match(r" (\S+|not adapted) +\d+ ", line)]
    assert limits == ["direction"] * 7 + ["adapted"]


@pytest.fixture
def encoder(tmp_path):
    """An encoder, a full fine-tune of it, and a LoRA adapter of rank 2 on its queries and values."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    base, factors = {"embeddings.word_embeddings.weight": normal(20, 8)}, {}
    for block in (f"encoder.layer.{i}" for i in range(12)):
        for module in ("attention.self.query", "attention.self.value", "attention.output.dense", "output.dense"):
            base |= {f"{block}.{module}.weight": normal(8, 8), f"{block}.{module}.bias": normal(8)}
        base |= {f"{block}.{name}.LayerNorm.weight": normal(8) for name in ("attention.output", "output")}
        for module in ("query", "value"):
            name = f"base_model.model.{block}.attention.self.{module}"
            factors |= {f"{name}.lora_A.weight": normal(2, 8), f"{name}.lora_B.weight": 0.01 * normal(8, 2)}
    tuned = {name: tensor + 0.01 * normal(*tensor.shape) for name, tensor in base.items()}
    adapter = save_model(tmp_path / "adapter", factors)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query", "value"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return save_model(tmp_path / "base", base), save_model(tmp_path / "tuned", tuned), adapter


@pytest.mark.parametrize("width", ["80", "140"])
@pytest.mark.parametrize("per", ["type", "layer"])
def test_encoder_table_has_adapted_matrices(loradiag, encoder, tmp_path, width, per):
    loradiag("residual", *encoder, "-o", "r.jsonl", "-q")
    out = loradiag("inspect", "r.jsonl", "--per", per, env={"COLUMNS": width}).out
    *rows, rest = [re.split(r" {1,}[0-9-]", line.strip())[0].strip() for line in out.split("\n\n")[1].splitlines()[2:]]
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    still = [one for one in records if one["record"] == "residual" and one["limited_by"] == "not adapted"]
    assert len(still) == 97
    assert rest == ("not adapted" if per == "type" else "not adapted:")
    assert len(set(rows)) == len(rows) == (2 if per == "type" else 24)
    assert max(map(len, out.splitlines())) <= int(width)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((BASE, TUNED), 2, "at least one ADAPTER"),
        ((BASE, TUNED, TUNED), 2, "TUNED itself"),
        ((BASE, TUNED, R4, "--layers", "("), 2, "not a valid regular expression"),
        ((BASE, TUNED, R4, "--layers", "lm_head"), 4, "no weight of the adapter can be measured"),
        ((BASE, TUNED, "nowhere"), 3, "nowhere"),
        ((R4, TUNED, R16), 2, "give BASE first"),
    ],
)
def test_error_is_one_message_with_exit_code(loradiag, tmp_path, words, code, message):
    ran = loradiag("residual", *words, "-o", "r.jsonl")
    assert ran.code == code
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_file(loradiag):
    ran = loradiag("residual", BASE, TUNED, R4, "--resume")
    assert ran.code == 2
    assert "-o" in ran.err
