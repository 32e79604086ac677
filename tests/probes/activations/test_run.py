"""Second moments against inputs caught on the way, and what residual makes of them."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lora_diag
from lora_diag.errors import NothingComparedError, UsageError
from tests.messages import raises_naming
from tests.probes.making import (
    SAMPLES,
    bert,
    gpt2,
    ids_of,
    labelled,
    moved,
    opened,
    some_text,
    tensors,
)


def caught(folder, sequences):
    """Return the inputs of every linear layer, one row a token, by running the model on one
    sequence at a time.
    """
    model, seen = opened(folder), {}
    for name, module in model.named_modules():
        if type(module).__name__ in {"Linear", "Conv1D"}:
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.setdefault(name + ".weight", []).append(
                    args[0]
                )
            )
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]))
    return {
        name: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double().numpy()
        for name, xs in seen.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_second_moments_and_residual_equal_direct_measurement(tmp_path, kind):
    base = SAMPLES / "base" if kind == "llama" else gpt2(tmp_path / "base")
    tuned = SAMPLES / "full_ft" if kind == "llama" else moved(base, tmp_path / "tuned")
    other = moved(base, tmp_path / "other", 0.01, seed=9)
    text = some_text(tmp_path, windows=4)
    recorded = lora_diag.probe_activations(
        base, text, tmp_path / "a.safetensors", length=32, batch=3
    )
    stored = load_file(tmp_path / "a.safetensors")
    inputs = caught(base, ids_of(text).tolist())
    inputs.pop("lm_head.weight") if kind == "gpt2" else None
    assert stored.keys() == inputs.keys() == {item.layer for item in recorded.layers}
    for item in recorded.layers:
        x = inputs[item.layer]
        c = x.T @ x / len(x)
        assert np.abs(stored[item.layer].numpy() - c).max() <= 1e-5 * np.abs(c).max()
        assert item.rows == len(x) == recorded.tokens == 4 * 32
        assert item.square == pytest.approx((x**2).sum(1).mean(), rel=1e-5)
        assert item.directions == pytest.approx(np.trace(c) ** 2 / (c**2).sum(), rel=1e-4)
    result = lora_diag.residual(
        base, tuned, reference=other, activations=tmp_path / "a.safetensors"
    )
    before, after, near = tensors(base), tensors(tuned), tensors(other)
    compared = [record for record in result if record.data is not None]
    assert len(compared) == len(stored)
    for record in compared:
        full, part = (
            after[record.layer] - before[record.layer],
            near[record.layer] - before[record.layer],
        )
        if kind == "gpt2":
            full, part = full.T, part.T  # Conv1D stores (in, out)
        x = inputs[record.layer].T
        truth = np.sqrt((((full - part) @ x) ** 2).sum(0).mean() / ((full @ x) ** 2).sum(0).mean())
        assert record.data.epsilon == pytest.approx(truth, rel=1e-4)


def test_layers_with_one_input_share_moments(tmp_path):
    recorded = lora_diag.probe_activations(
        SAMPLES / "base",
        some_text(tmp_path),
        tmp_path / "a.safetensors",
        length=32,
        layers=r"layers\.0\.",
    )
    assert {item.layer.split(".")[-2]: item.shares for item in recorded.layers if item.shares} == {
        "k_proj": "model.layers.0.self_attn.q_proj.weight",
        "v_proj": "model.layers.0.self_attn.q_proj.weight",
        "up_proj": "model.layers.0.mlp.gate_proj.weight",
    }
    assert set(recorded.left_out.values()) == {"not selected", "not a linear layer of its own"}


def test_moments_file_states_its_data(tmp_path):
    text = some_text(tmp_path)
    lora_diag.probe_activations(
        gpt2(tmp_path / "base"), text, tmp_path / "a.safetensors", max_sequences=2
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        message = file.metadata()
    assert (message["tokens"], message["sequences"], message["length"], message["set"]) == (
        "64",
        "2",
        "32",
        "held_out",
    )
    assert message["data"] == hashlib.sha256(text.read_bytes()).hexdigest()[:16]


def test_lines_of_different_lengths_are_not_padded(tmp_path):
    base = bert(tmp_path / "base")
    texts = ["short", "also5", "a much longer line of text", "mid one"]
    file = labelled(tmp_path / "x.jsonl", texts)
    lora_diag.probe_activations(base, file, tmp_path / "a.safetensors", batch=4)
    inputs = caught(base, [text.encode() for text in texts])
    for name, c in load_file(tmp_path / "a.safetensors").items():
        x = inputs[name]
        assert np.allclose(c.numpy(), x.T @ x / len(x), atol=1e-5 * np.abs(c.numpy()).max())


def test_unrecordable_input_is_refused_and_nothing_written(tmp_path):
    base, text, out = gpt2(tmp_path / "base"), some_text(tmp_path), tmp_path / "a.safetensors"
    with raises_naming(NothingComparedError, "linear layer"):
        lora_diag.probe_activations(base, text, out, layers="nothing")
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(UsageError, match="overwrite"):
        lora_diag.probe_activations(base, text, out)
    assert out.read_text() == "mine"
