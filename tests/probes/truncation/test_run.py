"""Losses of truncated updates against NumPy's SVD and the model's own loss."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.errors import InputError, UsageError
from lora_diag.models.opening import Weights
from lora_diag.probes.truncation.show import truncation_lines
from tests import oracles
from tests.messages import mentions, raises_naming
from tests.probes.making import (
    SAMPLES,
    bert,
    best,
    gpt2,
    labelled,
    moved,
    opened,
    some_text,
    tensors,
    window_losses,
)

TABLES = ("embed", "lm_head", "wte", "wpe")


@pytest.fixture(params=["llama", "gpt2"])
def pair(request, tmp_path):
    """Return BASE, TUNED and the tokens of a window."""
    if request.param == "llama":
        return SAMPLES / "base", SAMPLES / "full_ft", 64
    return gpt2(tmp_path / "base"), moved(tmp_path / "base", tmp_path / "tuned"), 32


@pytest.fixture
def case(tmp_path):
    """Return BASE, TUNED and a text."""
    base = gpt2(tmp_path / "base")
    return base, moved(base, tmp_path / "tuned"), some_text(tmp_path)


def is_truncated(name: str, value: np.ndarray) -> bool:
    return value.ndim == 2 and not any(word in name for word in TABLES)


def weights_at(base, tuned, rank, rest, only=None):
    """W_0 + ΔW_r by the definition; other tensors as in ``rest``."""
    result = {}
    for name, before in base.items():
        delta = tuned[name] - before
        if not is_truncated(name, before):
            result[name] = tuned[name] if rest == "tuned" else before
        elif only is None or name in only:
            result[name] = before + best(delta, rank)
        else:
            result[name] = tuned[name]
    return result


@pytest.mark.parametrize("rest", ["tuned", "base"])
def test_losses_equal_independent_computation(pair, tmp_path, rest):
    base, tuned, length = pair
    text = some_text(tmp_path, length=length)
    result = lora_diag.probe_truncation(
        base, tuned, eval=[text], ranks=(0, 3, 11), untruncated=rest, length=length, batch=2
    )
    before, after = tensors(base), tensors(tuned)
    ends = {
        "base": window_losses(base, before, text, length),
        "tuned": window_losses(base, after, text, length),
    }
    assert [record.rank for record in result.whole] == [None, None, 0, 3, 11]
    for record in result.whole:
        truth = ends.get(record.subject)
        if truth is None:
            truth = window_losses(base, weights_at(before, after, record.rank, rest), text, length)
        assert record.loss == pytest.approx(truth.mean(), abs=1e-4)
        difference = truth - ends["tuned"]
        assert record.gap == pytest.approx(difference.mean(), abs=1e-4)
        assert record.gap_error == pytest.approx(oracles.error_of_mean(difference), abs=1e-4)
        assert record.tokens == len(truth) * (length - 1)
        share = (ends["base"].mean() - truth.mean()) / (ends["base"].mean() - ends["tuned"].mean())
        assert record.kept == pytest.approx(share, abs=3e-3)
        if record.rank is not None:
            squares = [
                np.linalg.svd(after[name] - value, compute_uv=False) ** 2
                for name, value in before.items()
                if is_truncated(name, value)
            ]
            truth = sum(s[: record.rank].sum() for s in squares) / sum(s.sum() for s in squares)
            assert record.energy == pytest.approx(truth, abs=1e-6)


def test_lengthened_update_is_measured_with_truncated_one(case):
    base, tuned, text = case
    found = lora_diag.probe_truncation(base, tuned, eval=[text], ranks=(0, 2), match_norm=True)
    before, after = tensors(base), tensors(tuned)
    weights = {}
    for name, value in weights_at(before, after, 2, "tuned").items():
        factor = 1.0
        if is_truncated(name, value):
            factor = np.linalg.norm(after[name] - before[name]) / np.linalg.norm(
                value - before[name]
            )
        weights[name] = before[name] + factor * (value - before[name])
    by_length = {record.match_norm: record for record in found.whole if record.rank == 2}
    assert by_length[True].loss == pytest.approx(
        window_losses(base, weights, text, 32).mean(), abs=1e-4
    )
    plain = lora_diag.probe_truncation(base, tuned, eval=[text], ranks=(0, 2)).whole
    assert [(r.rank, r.loss) for r in found.whole if not r.match_norm] == [
        (r.rank, r.loss) for r in plain
    ]
    change = by_length[True].loss - by_length[False].loss
    assert (
        f"r=2 {change:+.4f}" in next(one for one in truncation_lines(found) if one.key == "on").text
    )


@pytest.mark.parametrize("per", ["layer", "type"])
def test_sensitivity_by_layer_or_type(case, per):
    base, tuned, text = case
    result = lora_diag.probe_truncation(base, tuned, eval=[text], ranks=(2,), by=per, layers="attn")
    before, after = tensors(base), tensors(tuned)
    alone = [record for record in result.whole if record.subject == "truncated"]
    assert len(alone) == (4 if per == "layer" else 2)
    for record in alone:
        mine = {
            name for name in before if name == record.layer or (record.module_type or "\0") in name
        }
        truth = window_losses(base, weights_at(before, after, 2, "tuned", mine), text, 32)
        assert record.loss == pytest.approx(truth.mean(), abs=1e-4)


def test_adapter_truncated_at_own_rank_is_complete(tmp_path):
    text = some_text(tmp_path, windows=2, length=64)
    result = lora_diag.probe_truncation(
        SAMPLES / "base", SAMPLES / "lora_r4", eval=[text], ranks=(1, 4), length=64
    )
    by_rank = {record.rank: record for record in result.whole}
    assert by_rank[4].gap == pytest.approx(0, abs=1e-5)
    assert by_rank[4].energy == pytest.approx(1)
    assert 0 < by_rank[1].energy < 1


def test_classifier_is_measured_on_labels_by_name_or_index(tmp_path):
    base = bert(tmp_path / "base")
    tuned = moved(base, tmp_path / "tuned")
    lines = [("hello", 0), ("buy now", "spam"), ("x" * 80, 2)]
    file = labelled(tmp_path / "mail.jsonl", *zip(*lines, strict=True))
    result = lora_diag.probe_truncation(base, tuned, eval=[file], ranks=(1,))
    for record, folder in zip(result.whole, (base, tuned), strict=False):
        model = opened(folder)
        losses = [
            model(
                input_ids=torch.tensor([list(text.encode()[:32])]),
                labels=torch.tensor([{"spam": 1}.get(label, label)]),
            ).loss.item()
            for text, label in lines
        ]
        assert record.loss == pytest.approx(np.mean(losses), abs=1e-4)
        assert record.tokens == 3
    assert any(mentions(note, 1, "3 lines") for given in result.run.inputs for note in given.notes)


def test_only_completion_is_predicted(case, tmp_path):
    base, tuned, _ = case
    file = tmp_path / "asked.jsonl"
    file.write_text(
        json.dumps({"prompt": "one two ", "completion": "three"})
        + "\n\n"
        + json.dumps({"text": "ab"})
    )
    result = lora_diag.probe_truncation(base, tuned, eval=[file], ranks=(1,))
    model = opened(base)
    ids = torch.tensor([list(b"one two three")])
    labels = ids.clone()
    labels[0, :8] = -100
    two = torch.tensor([list(b"ab")])
    sums = (
        model(input_ids=ids, labels=labels).loss.item() * 5
        + model(input_ids=two, labels=two).loss.item()
    )
    assert result.whole[0].tokens == 6
    assert result.whole[0].loss == pytest.approx(sums / 6, abs=1e-5)


def test_names_with_and_without_prefix_of_inner_model(tmp_path):
    weights = Weights(opened(gpt2(tmp_path / "base")))
    inner = weights.find("h.0.attn.c_attn.weight")
    assert inner is not None
    assert inner.data_ptr() == weights.find("transformer.h.0.attn.c_attn.weight").data_ptr()
    assert weights.find("h.9.attn.c_attn.weight") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"prompt": "x"}\n', "line 1 has neither text nor prompt"),
        ("", "has no token to predict"),
        ('{"text": "a"}\n', "has no token to predict"),
    ],
)
def test_lines_without_text_are_named(tmp_path, content, message):
    base = gpt2(tmp_path / "base")
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=rf"bad\.jsonl: {message}"):
        lora_diag.probe_truncation(base, base, eval=[file])


def test_model_without_head_is_refused(tmp_path):
    base = bert(tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    del stored["classifier.weight"]
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a", "label": 0}\n')
    with raises_naming(InputError, "classifier.weight"):
        lora_diag.probe_truncation(base, base, eval=[file])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"]},
            "is a T5ForConditionalGeneration; probe runs causal",
        ),
        ({"model_type": "nobody"}, "transformers cannot open"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "is quantized",
        ),
    ],
    ids=str,
)
def test_unsupported_models_are_named(tmp_path, config, message):
    base = gpt2(tmp_path / "base")
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(InputError, match=message):
        lora_diag.probe_truncation(base, base, eval=[some_text(tmp_path)])


def test_adapter_in_place_of_model_is_reported(tmp_path):
    adapter = SAMPLES / "lora_r4"
    with raises_naming(UsageError, "lora_r4", "adapter"):
        lora_diag.probe_sweep(adapter, data=some_text(tmp_path), eval=[some_text(tmp_path)])
