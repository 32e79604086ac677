"""Losses at each strength against the model's own loss, a model of known optimum, and adapters loaded by PEFT."""

import json
import math
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.catalog import read_results
from lora_diag.errors import InputError, UsageError
from lora_diag.probes.strength.record import Strength, StrengthChoice
from tests import oracles
from tests.messages import assert_names, raises_naming
from tests.probes.making import SAMPLES, bert, gpt2, labelled, loss_of, moved, opened, some_text, tensors, window_losses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Return BASE, TUNED and a text."""
    folder = tmp_path_factory.mktemp("case")
    base = gpt2(folder / "base")
    return base, moved(base, folder / "tuned"), some_text(folder, windows=4)


def lora(base, folder, seed=0, **options):
    """Return the folder of an adapter that PEFT wrote, of two ranks and α, with random factors."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "rank_pattern": {"c_proj": 2}, "alpha_pattern": {"c_fc": 3}} | options
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, **options)
    model = peft.get_peft_model(opened(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(case, tmp_path_factory):
    """Return an adapter of BASE."""
    return lora(case[0], tmp_path_factory.mktemp("adapters") / "adapter")


def part_of(name):
    """The block of a tensor of GPT-2, or its type outside the blocks."""
    words = name.removeprefix("transformer.").split(".")
    return f"transformer.h.{words[1]}" if words[0] == "h" else name.removesuffix(".weight")


def test_losses_equal_independent_computation(case):
    base, tuned, text = case
    found = lora_diag.probe_strength(base, tuned, evaluate=[text], scales=(0.3, 1.4, -0.5))
    before, after = tensors(base), tensors(tuned)
    losses = {
        t: window_losses(base, {name: w + t * (after[name] - w) for name, w in before.items()}, text, 32)
        for t in (-0.5, 0.0, 0.3, 1.0, 1.4)
    }
    records = found.whole_of(Strength)
    assert {record.scale for record in records} == {*losses}
    for record in records:
        own = losses[record.scale]
        assert record.loss == pytest.approx(own.mean(), abs=1e-5)
        assert record.loss_error == pytest.approx(oracles.error_of_mean(own), abs=1e-5)
        for value, error, other in (
            (record.gap, record.gap_error, losses[1.0]),
            (record.change, record.change_error, losses[0.0]),
        ):
            assert value == pytest.approx((own - other).mean(), abs=1e-5)
            assert error == pytest.approx(oracles.error_of_mean(own - other), abs=1e-5)


def test_ends_equal_those_of_probe_outputs(case, adapter):
    base, tuned, text = case
    for update in (tuned, adapter):
        ours = lora_diag.probe_strength(base, update, evaluate=[text], scales=(0.5,)).whole_of(Strength)
        theirs = lora_diag.probe_outputs(base, None, [update], evaluate=[text]).whole
        for t, record in zip((0.0, 1.0), theirs, strict=True):
            (own,) = [each for each in ours if each.scale == t]
            assert own.loss == pytest.approx(record.loss, abs=1e-6)
            np.testing.assert_allclose(own.nll, record.nll, atol=2e-6)


def test_optimum_of_linear_classifier_has_its_closed_form(tmp_path):
    """Logits (t·s, 0, 0) of three classes: the loss is least where e^{ts}/(e^{ts} + 2) is the fraction of class 0."""
    base, slope, share = bert(tmp_path / "base"), 2.0, 0.6
    weights = load_file(base / "model.safetensors")
    weights |= {name: torch.zeros_like(weights[name]) for name in ("classifier.weight", "classifier.bias")}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    shutil.copytree(base, tmp_path / "tuned")
    save_file(
        weights | {"classifier.bias": torch.tensor([slope, 0.0, 0.0])},
        tmp_path / "tuned" / "model.safetensors",
        {"format": "pt"},
    )
    labels = np.random.default_rng(0).permutation([0, 1, 0, 2, 0] * 20).tolist()
    text = labelled(tmp_path / "held.jsonl", ["abc"] * len(labels), labels)
    found = lora_diag.probe_strength(base, tmp_path / "tuned", evaluate=[text], batch=50)
    for record in found.whole_of(Strength):
        exact = math.log(math.exp(record.scale * slope) + 2) - share * record.scale * slope
        assert record.loss == pytest.approx(exact, abs=1e-6)
    (choice,) = found.whole_of(StrengthChoice)
    optimum = math.log(2 * share / (1 - share)) / slope
    assert choice.fit == "quadratic"
    assert choice.optimum == pytest.approx(optimum, abs=0.02)
    assert choice.optimum_low < optimum < choice.optimum_high
    assert abs(choice.checked_gap) < 1e-3
    assert choice.checked in {record.scale for record in found.whole_of(Strength)}


@pytest.mark.parametrize("by", ["block", "type"])
def test_parts_are_restored_alone(case, by):
    base, tuned, text = case
    found = lora_diag.probe_strength(base, tuned, evaluate=[text], by=by, scales=(0, 0.5))
    before, after = tensors(base), tensors(tuned)
    alone = [record for record in found.whole_of(Strength) if record.part is not None]
    if by == "block":
        assert {record.part for record in alone} == set(map(part_of, before))
    assert len({(record.part, record.scale) for record in alone}) == len(alone) > 4
    for record in alone:
        chosen = [n for n in before if part_of(n) == record.part or n.endswith((record.part, f"{record.part}.weight"))]
        weights = {n: (w + record.scale * (after[n] - w)) if n in chosen else after[n] for n, w in before.items()}
        assert record.loss == pytest.approx(window_losses(base, weights, text, 32).mean(), abs=1e-5)
    assert not found.whole_of(StrengthChoice)


def test_effects_of_parts_add_up_where_loss_is_linear(case, tmp_path):
    base, _, text = case
    small = moved(base, tmp_path / "small", size=2e-4)
    for by in ("block", "type"):
        records = lora_diag.probe_strength(base, small, evaluate=[text], by=by).whole_of(Strength)
        whole = next(record.gap for record in records if record.part is None and record.scale == 0)
        assert abs(whole) > 1e-5
        assert sum(record.gap for record in records if record.part is not None) == pytest.approx(whole, rel=0.02)


def test_adapter_of_doubled_alpha_is_best_near_half(tmp_path):
    shutil.copytree(SAMPLES / "lora_r4", tmp_path / "doubled")
    config = tmp_path / "doubled" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"lora_alpha": 2 * values["lora_alpha"]}))
    text = some_text(tmp_path, windows=30, length=64)
    options = {"evaluate": [text], "length": 64}
    found = lora_diag.probe_strength(SAMPLES / "base", tmp_path / "doubled", **options)
    plain = lora_diag.probe_strength(SAMPLES / "base", SAMPLES / "lora_r4", scales=(1,), **options)
    (choice,) = found.whole_of(StrengthChoice)
    assert choice.low < 0.5 < choice.high
    assert choice.recommended == choice.best == pytest.approx(0.5, abs=0.1)
    (half,) = [record for record in found.whole_of(Strength) if record.scale == 0.5]
    assert half.loss == pytest.approx(plain.whole_of(Strength)[1].loss, abs=1e-6)


WRITTEN = {
    "alpha": ({}, {"scale": 0.7}),
    "rslora": ({"use_rslora": True}, {"scale": 1.3}),
    "parts": ({}, {"scale": 0.4, "by": "block", "part": ["transformer.h.1"]}),
    "types off": ({}, {"scale": 0.0, "by": "type", "part": ["attn.c_attn", "mlp.c_proj"]}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_adapter_has_promised_loss_in_peft(case, tmp_path, name):
    base, _, text = case
    made, options = WRITTEN[name]
    adapter, copy = lora(base, tmp_path / "adapter", **made), tmp_path / "copy"
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    found = lora_diag.probe_strength(base, adapter, evaluate=[text], write=copy, **options)
    promised = found.whole_of(Strength)[-1]
    assert (promised.scale, promised.part) == (options["scale"], " + ".join(options.get("part", [])) or None)
    assert promised.loss != pytest.approx(found.whole_of(Strength)[1].loss, abs=1e-4)
    assert promised.loss == pytest.approx(loss_of(opened(base, copy), text), abs=1e-5)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    if name == "alpha":
        config = json.loads((copy / "adapter_config.json").read_text())
        assert config["lora_alpha"] == pytest.approx(0.7 * 6)
        assert config["alpha_pattern"] == {"c_fc": pytest.approx(0.7 * 3)}
        theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, copy))
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("form", ["mlx", "gguf"])
def test_adapter_in_other_format_is_written_in_it(tmp_path, form):
    made, copy, text = tmp_path / "made", tmp_path / "copy", some_text(tmp_path, windows=2, length=64)
    lora_diag.make_portable(SAMPLES / "lora_r4", made, SAMPLES / "base", form=form)
    options = {"evaluate": [text], "length": 64}
    found = lora_diag.probe_strength(SAMPLES / "base", made, write=copy, scale=0.5, **options).whole_of(Strength)
    assert {path.name for path in copy.iterdir()} == {path.name for path in made.iterdir()}
    (_, again) = lora_diag.probe_outputs(SAMPLES / "base", None, [copy], **options).whole
    assert again.loss == pytest.approx(found[-1].loss, abs=1e-6)


REFUSED = [
    ({"scales": (11.0,)}, "11"),
    ({"scales": (math.nan,)}, "nan"),
    ({"by": "layer"}, "layer"),
    ({"scale": 0.5}, "write", "scale"),
    ({"part": ["x"]}, "write", "part"),
    ({"write": "new"}, "write", "scale"),
    ({"write": "new", "scale": 1.0}, "scale=1", "itself"),
    ({"write": "new", "scale": 0.0}, "scale=0", "itself"),
    ({"write": "new", "scale": 0.5, "by": "block"}, "write", "part"),
    ({"write": "new", "scale": 0.5, "by": "block", "part": ["h.9"]}, "h.9", "transformer.h.0"),
    ({"write": "there", "scale": 0.5}, "there", "exists"),
]


@pytest.mark.parametrize(("options", "facts"), [(change, facts) for change, *facts in REFUSED], ids=str)
def test_invalid_options_are_refused_before_any_work(case, adapter, tmp_path, monkeypatch, options, facts):
    base, _, text = case
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with raises_naming(UsageError, *facts):
        lora_diag.probe_strength(base, adapter, evaluate=[text], output="r.jsonl", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_nothing_is_left_of_adapter_that_cannot_be_written(case, adapter, tmp_path):
    base, tuned, text = case
    copy, options = tmp_path / "copy", {"evaluate": [text], "scale": 0.5, "write": tmp_path / "copy"}
    with raises_naming(UsageError, tuned.name, "checkpoint", "loradiag extract"):
        lora_diag.probe_strength(base, tuned, **options)
    dora = lora(base, tmp_path / "dora", use_dora=True)
    with raises_naming(InputError, "dora", "merge"):
        lora_diag.probe_strength(base, dora, **options)
    assert not copy.exists()
    assert [
        record.scale for record in lora_diag.probe_strength(base, dora, evaluate=[text], scales=(1,)).whole_of(Strength)
    ]
    spoiled = lora(base, tmp_path / "spoiled")
    weights = load_file(spoiled / "adapter_model.safetensors")
    weights[min(weights)][0] = math.nan
    save_file(weights, spoiled / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds nan"):
        lora_diag.probe_strength(base, spoiled, **options)

    def stop(record):
        if record.record == "strength" and record.scale == 0.5:
            raise KeyboardInterrupt

    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        lora_diag.probe_strength(base, adapter, output=cut, on_record=stop, **options)
    assert [path for path in tmp_path.iterdir() if "copy" in path.name] == []
    lora_diag.probe_strength(base, adapter, output=cut, resume=True, **options)
    assert loss_of(opened(base, copy), text) == pytest.approx(read_results(cut).whole_of(Strength)[-1].loss, abs=1e-5)


def test_command_is_shown_again_and_gated(case, adapter, loradiag, tmp_path):
    base, _, text = case
    other = some_text(tmp_path, "other", source="shifted")
    words = ("probe", "strength", base, adapter, "--eval", text, "--shifted", other)
    ran = loradiag(*words, "-o", "s.jsonl")
    assert ran.code == 0, ran.err
    assert_names(ran.err, "about", "losses")
    assert_names(loradiag("inspect", "s.jsonl").out, "Strength")
    for limit, code in ((-20, 0), (20, 1)):
        (tmp_path / "policy.toml").write_text(
            f'[[rule]]\nname = "t"\nrequire = "strength_choice.recommended >= {limit}"\n'
        )
        assert loradiag("gate", "policy.toml", "s.jsonl").code == code
    assert loradiag(*words, "--by", "block", "--scales", "0,0.5", "-o", "p.jsonl").code == 0
    assert_names(loradiag("inspect", "p.jsonl").out, "Strength", "part")
    assert loradiag("plot", "s.jsonl", "--figure", "strength", "-o", "strength.png").code == 0
