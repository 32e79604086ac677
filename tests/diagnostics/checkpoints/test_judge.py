"""Held-out losses of checkpoints and their combinations, compared with transformers, PEFT and NumPy
themselves.
"""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t

import lora_diag
from lora_diag.diagnostics.checkpoints.held_out import (
    choose_checkpoints,
    compare_combinations,
    held_out_grids,
    is_better,
)
from lora_diag.diagnostics.checkpoints.judge import CombinationRule, read_rules
from lora_diag.diagnostics.checkpoints.record import Combination
from lora_diag.diagnostics.checkpoints.show import suggest_next
from lora_diag.errors import UsageError
from lora_diag.metrics.statistics import degrees_of_freedom
from lora_diag.records import Probe
from tests import oracles
from tests.building import results
from tests.messages import assert_names
from tests.probes.making import gpt2, ids_of, opened, some_text, tensors, window_losses

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SCALES = {10: 0.3, 20: 0.6, 30: 1.0, 40: 3.0}
RULES = {"average": ["uniform", "ema:0.5", "last:2"], "extrapolate": ["linear:0.5", "rank1:0.25"]}


def lora_of(base, folder, text):
    """A LoRA adapter trained on a text for a few steps."""
    torch.manual_seed(1)
    names = ["c_attn", "c_proj"]
    model = get_peft_model(
        opened(base), LoraConfig(r=2, lora_alpha=4, target_modules=names, fan_in_fan_out=True)
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        model(input_ids=ids_of(text), labels=ids_of(text)).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def scaled(adapter, folder, scale):
    """The adapter with its update multiplied by a number."""
    shutil.copytree(adapter, folder)
    factors = load_file(adapter / "adapter_model.safetensors")
    changed = {
        name: value * scale if "lora_B" in name else value for name, value in factors.items()
    }
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})


def updates_of(folder) -> dict[str, np.ndarray]:
    """ΔW of every adapted weight as GPT-2 stores it, in float64 NumPy."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = tensors(folder)
    found = {}
    for name, a in factors.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            product = factors[name.replace("lora_A", "lora_B")] @ a
            found[weight] = product.T * config["lora_alpha"] / config["r"]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """BASE, a run of adapters whose updates are multiples of one, a text."""
    folder = tmp_path_factory.mktemp("judge")
    base, text = gpt2(folder / "base"), some_text(folder, windows=9)
    adapter = lora_of(base, folder / "adapter", text)
    for step, scale in SCALES.items():
        scaled(adapter, folder / "out" / f"checkpoint-{step}", scale)
    return base, folder / "out", text


def full_run(base, adapters, folder):
    """The run with its adapters merged into full checkpoints."""
    weights = tensors(base)
    for step in SCALES:
        target = folder / f"checkpoint-{step}"
        shutil.copytree(base, target)
        updates = {
            key.removeprefix("transformer."): value
            for key, value in updates_of(adapters / target.name).items()
        }
        changed = {
            k: v + next((u for n, u in updates.items() if k.endswith(n)), 0.0)
            for k, v in weights.items()
        }
        save_file(
            {k: torch.from_numpy(v).float() for k, v in changed.items()},
            target / "model.safetensors",
        )
    return folder


def judged(base, out, text, **options):
    return lora_diag.checkpoints(out, base=base, eval=[text], batch=4, **options)


def merged_losses(base, update, text):
    """Losses of windows with an update added to BASE."""
    weights = tensors(base)
    for key in weights:
        weights[key] = weights[key] + next(
            (u for n, u in update.items() if n.endswith(key) or key.endswith(n)), 0.0
        )
    return window_losses(base, weights, text, 32)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_losses_equal_those_of_transformers(run, tmp_path, full):
    base, out, text = run
    found = judged(base, full_run(base, out, tmp_path / "full") if full else out, text, **RULES)
    losses = {
        step: merged_losses(base, updates_of(out / f"checkpoint-{step}"), text) for step in SCALES
    }
    best = min(losses, key=lambda step: losses[step].mean())
    checkpoints = [record for record in found.whole if record.record == "checkpoint"]
    assert [record.step for record in checkpoints] == list(SCALES)
    for record in checkpoints:
        (loss,) = record.losses.values()
        excess = losses[record.step] - losses[best]
        assert loss.loss == pytest.approx(losses[record.step].mean(), abs=2e-5)
        assert loss.error == pytest.approx(oracles.error_of_mean(losses[record.step]), abs=2e-5)
        assert loss.excess == pytest.approx(excess.mean(), abs=2e-5)
        assert loss.excess_error == pytest.approx(oracles.error_of_mean(excess), abs=2e-5)
    (choice,) = (record for record in found.whole if record.record == "choice")
    assert choice.step == best == 30  # the planted one, neither the first nor the last
    limit = student_t.ppf(1 - 0.05 / 3, 3.0)  # nine sequences in blocks of three
    tied = [
        step
        for step in SCALES
        if (d := losses[step] - losses[best]).mean() <= limit * oracles.error_of_mean(d)
    ]
    assert (list(choice.tied), choice.earliest) == (tied, tied[0])

    each = [updates_of(out / f"checkpoint-{step}") for step in SCALES]
    expected = {
        "uniform": [0.25] * 4,
        "ema:0.5": [1 / 15, 2 / 15, 4 / 15, 8 / 15],
        "last:2": [0, 0, 0.5, 0.5],
        "linear:0.5": [0, 0, -0.5, 1.5],
    }
    slope, start = np.polyfit(list(SCALES), list(SCALES.values()), 1)
    scales = np.array(list(SCALES.values()))
    target = start + slope * (
        40 + 0.25 * 10
    )  # all updates are multiples of one, which is extrapolated exactly
    expected["rank1:0.25"] = (target * scales / (scales @ scales)).tolist()
    combinations = [record for record in found.whole if record.record == "combination"]
    assert [record.name for record in combinations] == list(expected)
    for record in combinations:
        weights = expected[record.name]
        update = {
            key: sum(w * u[key] for w, u in zip(weights, each, strict=True)) for key in each[0]
        }
        own = merged_losses(base, update, text)
        assert record.losses["held_out"].loss == pytest.approx(own.mean(), abs=2e-5)
        assert record.losses["held_out"].excess == pytest.approx(
            (own - losses[best]).mean(), abs=2e-5
        )
        assert record.weights == pytest.approx(weights, abs=1e-6)


@pytest.mark.slow
def test_equal_checkpoints_are_tied_and_nan_cannot_win(run, tmp_path):
    base, out, text = run
    copied = shutil.copytree(out, tmp_path / "out")
    shutil.copytree(out / "checkpoint-30", copied / "checkpoint-35")
    file = copied / "checkpoint-20" / "adapter_model.safetensors"
    factors = load_file(file)
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, file)
    found = judged(base, copied, text, average=["uniform"])
    (choice,) = (record for record in found.whole if record.record == "choice")
    assert choice.earliest <= 30
    assert {30, 35} <= set(choice.tied)
    assert 20 not in choice.tied
    losses = {record.step: record.losses for record in found.whole if record.record == "checkpoint"}
    assert losses[20] == {}
    assert losses[30] == losses[35] != {}
    (combination,) = (record for record in found.whole if record.record == "combination")
    assert combination.steps == (10, 30, 35, 40)


@pytest.mark.slow
def test_interrupted_evaluation_is_resumed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    base, out, text = run
    results = tmp_path / "run.jsonl"
    options = {
        "shifted": [some_text(tmp_path, "other", 3, source="shifted")],
        **RULES,
        "output": results,
    }
    judged(base, out, text, **options)
    whole = results.read_bytes()
    lines = whole.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if json.loads(line)["record"] == "probe")
    for kept in (first - 2, first + 1, first + 4, len(lines) - 3):
        results.write_bytes(b"".join(lines[:kept]))
        judged(base, out, text, resume=True, **options)
        assert results.read_bytes() == whole


def probes_of(losses, combined=()):
    """Records of BASE, checkpoints and combinations from their losses by sequence."""
    common = {"probe": "checkpoints", "set": "dev", "tokens": 10, "data": "0"}
    yield Probe(subject="base", loss=9.0, nll=(9.0,) * 10, predictions=(1,) * 10, **common)
    for subject, group in (("checkpoint", losses), ("combination", combined)):
        for name, values in dict(group).items():
            yield Probe(
                subject=subject, name=name, loss=float(np.mean(values)), nll=tuple(values), **common
            )


def test_combination_is_chosen_and_reported_on_different_halves():
    rng = np.random.default_rng(0)
    losses = {"1": rng.normal(2, 0.1, 10), "2": rng.normal(2, 0.1, 10)}
    combined = {"uniform": rng.normal(2, 0.1, 10), "last:2": rng.normal(2, 0.1, 10)}
    probes = list(probes_of(losses, combined))
    drafts = [Combination(name=name, steps=(1, 2), weights=(0.5, 0.5), by="") for name in combined]
    records = list(compare_combinations(probes, {"1": 1, "2": 2}, drafts))
    single = min(losses, key=lambda name: losses[name][:5].mean())
    chosen = min(combined, key=lambda name: combined[name][:5].mean())
    assert [(r.name, r.single, r.chosen) for r in records] == [
        (n, int(single), n == chosen) for n in combined
    ]
    for record in records:
        gains = losses[single][5:] - combined[record.name][5:]
        assert record.gain == pytest.approx(gains.mean())
        assert record.gain_error == pytest.approx(oracles.error_of_mean(gains))


@pytest.mark.parametrize(("count", "is_compared"), [(7, False), (8, True)])
def test_combinations_need_eight_sequences_to_be_compared(count, is_compared):
    values = np.linspace(2, 3, count)
    base = Probe(
        probe="checkpoints", set="dev", tokens=count, data="0", subject="base", loss=9.0,
        nll=(9.0,) * count, predictions=(1,) * count,
    )  # fmt: skip
    probes = [
        base,
        base.model_copy(update={"subject": "checkpoint", "name": "1", "nll": tuple(values)}),
        base.model_copy(update={"subject": "combination", "name": "uniform", "nll": tuple(values)}),
    ]
    draft = Combination(name="uniform", steps=(1, 2), weights=(0.5, 0.5), by="")
    (record,) = compare_combinations(probes, {"1": 1}, [draft])
    assert (record.gain is not None, record.chosen) == (is_compared, is_compared)


@pytest.mark.parametrize(("times", "tied"), [(0.999, True), (1.001, False)])
def test_limit_of_choice_is_corrected_for_comparisons(times, tied):
    noise = np.random.default_rng(1).normal(0, 0.1, 10)
    noise -= noise.mean()
    limit = oracles.error_of_mean(noise) * student_t.ppf(1 - 0.05 / 2, degrees_of_freedom(10))
    losses = {"1": np.full(10, 2.0), "2": 2 + noise + times * limit, "3": np.full(10, 9.0)}
    probes = list(probes_of(losses))
    (choice,) = choose_checkpoints(probes, {"1": 1, "2": 2, "3": 3})
    assert (choice.step, choice.tied) == (1, (1, 2) if tied else (1,))
    (grid,) = held_out_grids(results((), command="checkpoints", whole=probes))
    assert f"{times * limit:+.4f} ±{limit:#.2g}" in grid.columns[1].cells


def test_best_checkpoint_is_rarely_left_out():
    rng, left_out = np.random.default_rng(0), 0
    for _ in range(400):  # all are equally good: each is the best, and 0 stands for any
        shared = rng.normal(3, 1, 10)
        losses = {str(i): np.abs(shared + rng.normal(0, 0.1, 10)) for i in range(6)}
        (choice,) = choose_checkpoints(list(probes_of(losses)), {str(i): i for i in range(6)})
        left_out += 0 not in choice.tied
    assert left_out / 400 < 0.05


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.1, 4))
def test_rank1_extrapolates_projections_on_first_direction(seed, count, factor):
    rng = np.random.default_rng(seed)
    path, steps = (
        rng.normal(size=(count, 30)).cumsum(0),
        np.sort(rng.choice(np.arange(1, 100), count, replace=False)),
    )
    _, _, vh = np.linalg.svd(path, full_matrices=False)
    target = steps[-1] + factor * (steps[-1] - steps[-2])
    expected = np.polyval(np.polyfit(steps, path @ vh[0], 1), target) * vh[0]
    weights = CombinationRule("rank1", factor).weigh(steps.tolist(), path @ path.T)
    np.testing.assert_allclose(
        weights @ path, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *(
            ("average", text)
            for text in ("median", "uniform:2", "last", "last:9", "last:1.5", "ema:1", "ema:x", "")
        ),
        *(
            ("extrapolate", text)
            for text in ("uniform", "linear:-1", "linear:0", "rank1:inf", "rank1:1:2")
        ),
    ],
)
def test_invalid_rule_is_refused(option, text):
    with pytest.raises(UsageError) as error:
        read_rules({"average": [], "extrapolate": [], option: [text]}, 4)
    assert_names(str(error.value), f"--{option}", text)


def test_evaluation_without_base_is_refused(run):
    _, out, text = run
    with pytest.raises(UsageError) as error:
        lora_diag.checkpoints(out, eval=[text])
    assert_names(str(error.value), "eval", "BASE")
    with pytest.raises(UsageError) as error:
        lora_diag.checkpoints(out, average=["uniform"])
    assert_names(str(error.value), "average", "eval")


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_suggested_merge_writes_what_was_judged(run, tmp_path, monkeypatch, loradiag, full):
    base, out, text = run
    stored = full_run(base, out, tmp_path / "full") if full else out
    found = judged(base, stored, text, extrapolate=["linear:1"])
    (record,) = found.whole_of(Combination)
    monkeypatch.setattr("lora_diag.diagnostics.checkpoints.show.is_better", lambda record: True)
    options = {"alpha": None, "alpha_is_rank": False, "allow_unmatched": False}
    program, command, *words = shlex.split(suggest_next(found, options).partition("   (")[0])
    assert (program, command) == ("loradiag", "merge")
    assert loradiag(command, *words).code == 0
    folder = tmp_path / "linear-1"
    expected = {  # 2·3 − 1 times the update of scale 1
        key: value * 5.0 for key, value in updates_of(out / "checkpoint-30").items()
    }
    if full:
        written = window_losses(base, tensors(folder), text, 32)
    else:
        written = merged_losses(base, updates_of(folder), text)
    assert record.losses["held_out"].loss == pytest.approx(written.mean(), abs=2e-5)
    assert written == pytest.approx(merged_losses(base, expected, text), abs=1e-4)


def test_merge_is_suggested_only_if_significantly_better(run):
    base, out, text = run
    found = judged(base, out, text, average=["last:2"])
    (record,) = found.whole_of(Combination)
    for gain, error in ((0.1, 1.0), (-0.1, 1e-6), (None, None)):
        changed = record.model_copy(update={"gain": gain, "gain_error": error})
        assert not is_better(changed)
    assert is_better(record.model_copy(update={"gain": 0.1, "gain_error": 1e-6}))
