"""Losses at each strength against the model's own loss, a model of known optimum, and adapters
loaded by PEFT.
"""

import json
import math
import re
import shlex
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
from lora_diag.probes.strength.show import suggest_next
from tests import oracles
from tests.messages import assert_names, raises_naming
from tests.plots.making import probed
from tests.probes.making import (
    SAMPLES,
    bert,
    gpt2,
    labelled,
    loss_of,
    moved,
    opened,
    some_text,
    tensors,
    window_losses,
)

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
    options = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"c_proj": 2},
        "alpha_pattern": {"c_fc": 3},
    } | options
    config = peft.LoraConfig(
        target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, **options
    )
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
    found = lora_diag.probe_strength(base, tuned, eval=[text], scales=(0.3, 1.4, -0.5))
    before, after = tensors(base), tensors(tuned)
    losses = {
        t: window_losses(
            base, {name: w + t * (after[name] - w) for name, w in before.items()}, text, 32
        )
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
        ours = lora_diag.probe_strength(base, update, eval=[text], scales=(0.5,)).whole_of(Strength)
        theirs = lora_diag.probe_outputs(base, None, [update], eval=[text]).whole
        for t, record in zip((0.0, 1.0), theirs, strict=True):
            (own,) = [each for each in ours if each.scale == t]
            assert own.loss == pytest.approx(record.loss, abs=1e-6)
            np.testing.assert_allclose(own.nll, record.nll, atol=2e-6)


def test_optimum_of_linear_classifier_has_its_closed_form(tmp_path):
    """Logits (t·s, 0, 0) of three classes: the loss is least where e^{ts}/(e^{ts} + 2) is the
    fraction of class 0.
    """
    base, slope, share = bert(tmp_path / "base"), 2.0, 0.6
    weights = load_file(base / "model.safetensors")
    weights |= {
        name: torch.zeros_like(weights[name]) for name in ("classifier.weight", "classifier.bias")
    }
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    shutil.copytree(base, tmp_path / "tuned")
    save_file(
        weights | {"classifier.bias": torch.tensor([slope, 0.0, 0.0])},
        tmp_path / "tuned" / "model.safetensors",
        {"format": "pt"},
    )
    labels = np.random.default_rng(0).permutation([0, 1, 0, 2, 0] * 20).tolist()
    text = labelled(tmp_path / "held.jsonl", ["abc"] * len(labels), labels)
    found = lora_diag.probe_strength(base, tmp_path / "tuned", eval=[text], batch=50)
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
    found = lora_diag.probe_strength(base, tuned, eval=[text], by=by, scales=(0, 0.5))
    before, after = tensors(base), tensors(tuned)
    alone = [record for record in found.whole_of(Strength) if record.part is not None]
    if by == "block":
        assert {record.part for record in alone} == set(map(part_of, before))
    assert len({(record.part, record.scale) for record in alone}) == len(alone) > 4
    for record in alone:
        chosen = [
            n
            for n in before
            if part_of(n) == record.part or n.endswith((record.part, f"{record.part}.weight"))
        ]
        weights = {
            n: (w + record.scale * (after[n] - w)) if n in chosen else after[n]
            for n, w in before.items()
        }
        assert record.loss == pytest.approx(window_losses(base, weights, text, 32).mean(), abs=1e-5)
    assert not found.whole_of(StrengthChoice)


def test_effects_of_parts_add_up_where_loss_is_linear(case, tmp_path):
    base, _, text = case
    small = moved(base, tmp_path / "small", size=2e-4)
    for by in ("block", "type"):
        records = lora_diag.probe_strength(base, small, eval=[text], by=by).whole_of(Strength)
        whole = next(record.gap for record in records if record.part is None and record.scale == 0)
        assert abs(whole) > 1e-5
        assert sum(record.gap for record in records if record.part is not None) == pytest.approx(
            whole, rel=0.02
        )


def test_adapter_of_doubled_alpha_is_best_near_half(tmp_path):
    shutil.copytree(SAMPLES / "lora_r4", tmp_path / "doubled")
    config = tmp_path / "doubled" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"lora_alpha": 2 * values["lora_alpha"]}))
    text = some_text(tmp_path, windows=30, length=64)
    options = {"eval": [text], "length": 64}
    found = lora_diag.probe_strength(SAMPLES / "base", tmp_path / "doubled", **options)
    plain = lora_diag.probe_strength(SAMPLES / "base", SAMPLES / "lora_r4", scales=(1,), **options)
    (choice,) = found.whole_of(StrengthChoice)
    assert choice.low < 0.5 < choice.high
    assert choice.recommended == choice.best == pytest.approx(0.5, abs=0.1)
    (half,) = [record for record in found.whole_of(Strength) if record.scale == 0.5]
    assert half.loss == pytest.approx(plain.whole_of(Strength)[1].loss, abs=1e-6)


SMALL = (
    "--scales",
    "-0.1,-0.02,0.02,0.1",
)  # one of these is better than both ends: random updates are long


def harmful(folder, **options):
    """Return the folder of an adapter of the sample model with random factors, which raise its
    loss.
    """
    torch.manual_seed(0)
    options = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    } | options
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], **options)
    model = peft.get_peft_model(opened(SAMPLES / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sample_text(tmp_path_factory):
    """Return a text for the sample model."""
    return some_text(tmp_path_factory.mktemp("text"), windows=30)


def measure_harmful(loradiag, text, tuned, *words):
    """Run the probe, and the command that it printed as the next step; return its words and the
    probe's results.
    """
    options = ("--eval", text, "--length", "32", "-o", "s.jsonl")
    ran = loradiag("probe", "strength", SAMPLES / "base", tuned, *options, *words)
    assert ran.code == 0, ran.err
    found = re.search(r"Next loradiag (merge .*?) \(writes it\)", " ".join(ran.out.split()))
    assert found, ran.out
    suggested = shlex.split(found[1])
    merged = loradiag(*suggested)
    assert merged.code == 0, merged.err
    return suggested, read_results("s.jsonl")


def find_recommended(results):
    """Return the record at the recommended strength."""
    (choice,) = results.whole_of(StrengthChoice)
    (promised,) = [
        record for record in results.whole_of(Strength) if record.scale == choice.recommended
    ]
    assert promised.scale not in {0, 1}
    return promised


SUGGESTED = {
    "lora": ({}, SMALL),
    "rslora": ({"use_rslora": True}, SMALL),
    "dora": ({"use_dora": True}, SMALL),
    "norms": ({"modules_to_save": ["norm"]}, SMALL),
    "block": ({}, ("--by", "block")),
    "type": ({}, ("--by", "type")),
}


@pytest.mark.parametrize("name", SUGGESTED)
def test_suggested_command_writes_what_was_measured(
    loradiag, sample_text, tmp_path, monkeypatch, name
):
    """The loss of what it writes, loaded by PEFT or transformers, is that of the probe."""
    monkeypatch.chdir(tmp_path)
    made, options = SUGGESTED[name]
    words, results = measure_harmful(
        loradiag, sample_text, harmful(tmp_path / "adapter", **made).name, *options
    )
    if "--by" in options:
        parts = [record for record in results.whole_of(Strength) if record.part is not None]
        promised = min(parts, key=lambda record: record.loss)
        assert promised.scale == 0
    else:
        promised = find_recommended(results)
        assert float(words[words.index("--scale") + 1]) == promised.scale
    folder = tmp_path / words[words.index("-o") + 1]
    assert ("--checkpoint" in words) == (name in {"dora", "norms"})
    written = opened(folder) if "--checkpoint" in words else opened(SAMPLES / "base", folder)
    assert loss_of(written, sample_text) == pytest.approx(promised.loss, abs=1e-4)
    assert promised.gap < -0.01


def test_suggested_command_writes_fine_tune_as_checkpoint(
    loradiag, sample_text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    far = opened(SAMPLES / "base")
    before, after = far.state_dict(), opened(SAMPLES / "full_ft").state_dict()
    far.load_state_dict(
        {name: weight + 3 * (after[name] - weight) for name, weight in before.items()}
    )
    far.save_pretrained(tmp_path / "far")
    words, results = measure_harmful(loradiag, sample_text, "far", *SMALL)
    assert "--checkpoint" in words
    written = opened(tmp_path / words[words.index("-o") + 1])
    assert loss_of(written, sample_text) == pytest.approx(find_recommended(results).loss, abs=1e-4)


def test_suggested_command_states_missing_alpha(loradiag, sample_text, tmp_path, monkeypatch):
    """α that the files of an adapter lack is given to ``merge``, too; braces in a name are no
    placeholder.
    """
    monkeypatch.chdir(tmp_path)
    config = harmful(tmp_path / "{tuned}", alpha_pattern={}) / "adapter_config.json"
    values = json.loads(config.read_text())
    del values["lora_alpha"]
    config.write_text(json.dumps(values))
    words, results = measure_harmful(loradiag, sample_text, "{tuned}", *SMALL, "--alpha", "6")
    assert words[words.index("--alpha") + 1] == "6.0"
    written = opened(SAMPLES / "base", tmp_path / words[words.index("-o") + 1])
    assert loss_of(written, sample_text) == pytest.approx(find_recommended(results).loss, abs=1e-4)


def part_results(parts, by):
    """Return results in which the first of some parts is better at 0."""
    values = {
        "set": "a",
        "scale": 0.0,
        "tokens": 9,
        "data": "0",
        "loss": 1.0,
        "loss_error": 0.1,
        "change": 0.0,
    }
    values |= {"change_error": 0.1, "kept": None, "gap_error": 0.01, "nll": (1.0,) * 9}
    records = [
        Strength(**values, part=part, gap=0.0 if n else -1.0) for n, part in enumerate(parts)
    ]
    return probed(records, command="probe strength", by=by, factored=True)


@pytest.mark.parametrize(
    ("by", "parts", "matched", "others"),
    [
        (
            "block",
            ["model.layers.1", "model.layers.11"],
            ["model.layers.1.q.weight"],
            ["model.layers.11.q.weight"],
        ),
        (
            "type",
            ["q_proj", "k_proj"],
            ["h.0.q_proj.weight", "h.1.q_proj[3]"],
            ["h.0.q_proj.bias", "h.0.xq_proj"],
        ),
        ("type", ["q_proj", "cross.q_proj"], [], []),
        ("type", ["experts.*.w1", "q_proj"], [], []),
        ("type", ["q_proj"], [], []),
        ("block", ["lm_head", "h.0"], [], []),
    ],
)
def test_part_is_excluded_by_a_pattern_of_its_layers_alone(by, parts, matched, others):
    hint = suggest_next(
        part_results(parts, by), {"tuned": "runs/a", "alpha": None, "alpha_is_rank": False}
    )
    if not matched:
        assert hint is None
        return
    words = shlex.split(hint.command)
    pattern = re.compile(words[words.index("--exclude") + 1])
    assert all(map(pattern.search, matched))
    assert not any(map(pattern.search, others))


REFUSED = [
    ({"scales": (11.0,)}, "11"),
    ({"scales": (math.nan,)}, "nan"),
    ({"by": "layer"}, "layer"),
]


@pytest.mark.parametrize(
    ("options", "facts"), [(change, facts) for change, *facts in REFUSED], ids=str
)
def test_invalid_options_are_refused_before_any_work(case, adapter, tmp_path, options, facts):
    base, _, text = case
    with raises_naming(UsageError, *facts):
        lora_diag.probe_strength(base, adapter, eval=[text], output=tmp_path / "r.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_update_that_is_not_finite_is_named_and_cut_run_resumes(case, adapter, tmp_path):
    base, _, text = case
    spoiled = lora(base, tmp_path / "spoiled")
    weights = load_file(spoiled / "adapter_model.safetensors")
    weights[min(weights)][0] = math.nan
    save_file(weights, spoiled / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds nan"):
        lora_diag.probe_strength(base, spoiled, eval=[text])

    def stop(record):
        if record.record == "strength" and record.scale == 0.5:
            raise KeyboardInterrupt

    options = {"eval": [text], "scales": (0.25, 0.5, 1.5)}
    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        lora_diag.probe_strength(base, adapter, output=cut, on_record=stop, **options)
    lora_diag.probe_strength(base, adapter, output=cut, resume=True, **options)
    whole = lora_diag.probe_strength(base, adapter, **options).whole_of(Strength)
    found = {record.scale: record.loss for record in read_results(cut).whole_of(Strength)}
    assert found == pytest.approx({record.scale: record.loss for record in whole}, abs=1e-6)


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
