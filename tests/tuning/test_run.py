"""One search on a tiny model: what it writes, that its losses are those of a plain loop, and that
it resumes.
"""

import io
import json
import math
import os
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import scipy.stats
import torch
import transformers
import yaml
from scipy.special import log_softmax

import lora_diag
from lora_diag.catalog import read_results
from lora_diag.cli.app import commands
from lora_diag.decisions.allocate.peft_config import make_config
from lora_diag.errors import InconclusiveError, UsageError
from lora_diag.records import Probe
from lora_diag.rendering.statements import find
from lora_diag.reports.html import images_of
from lora_diag.running import probing
from lora_diag.running.training_runs import StepCost
from lora_diag.tuning import planning
from lora_diag.tuning import run as run_module
from lora_diag.tuning.record import Tune, TuneDecision, TunePlan, TuneTrial
from lora_diag.tuning.run import configs
from lora_diag.tuning.search import Tuner
from lora_diag.tuning.show import plan_text, tune_lines
from lora_diag.tuning.trials import Measured, Variant
from tests.building import build, results
from tests.messages import assert_names, raises_naming
from tests.probes.making import bert, gpt2, ids_of, loss_of, opened, some_text, trained
from tests.served import show_all

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("undrawn"),  # the report of ``case`` is drawn
]

OPTIONS = {
    "params": 4500,
    "ranks": (2, 8),
    "lr": (1e-2, 3e-2),
    "steps": 6,
    "repeats": 2,
    "batch": 4,
    "widen": 0,
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """BASE, texts, a finished search, and its folder."""
    folder = tmp_path_factory.mktemp("tune")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as in every test: sums of several threads differ in the last bits
    base = gpt2(folder / "base")
    texts = {
        "data": some_text(folder, "train", windows=9),
        "eval": [some_text(folder, "held_out", windows=4, source="shifted")],
        "shifted": [some_text(folder, "other", windows=3, source="shifted")],
    }
    notes = []
    result = lora_diag.tune(base, folder / "run", on_note=notes.append, **texts, **OPTIONS)
    return base, texts, result, folder / "run", notes


def test_tune_records_and_prints_every_decision(case):
    _, _, result, folder, notes = case
    assert read_results(folder / "tune.jsonl") == result
    decisions = result.whole_of(TuneDecision)
    assert {"budget", "ranks", "redistribution", "stability"} <= {one.stage for one in decisions}
    assert len(notes) == len(decisions)
    (choice,) = result.whole_of(Tune)
    assert choice.rank in {2, 4, 8}
    assert choice.params <= choice.budget == 4500
    assert {one.variant for one in result.whole_of(TuneTrial)} >= {
        "base",
        "full",
        "uniform-r2",
        "uniform-r8",
    }


def test_losses_equal_plain_loop(case):
    base, texts, result, _, _ = case
    held = texts["eval"][0]
    of_held = [
        one for one in result.whole_of(TuneTrial) if one.set == "held_out" and one.lr is not None
    ]
    for one in of_held:
        if one.variant in {"uniform-r2", "uniform-r8", "full"}:
            what = "full" if one.variant == "full" else int(one.variant.removeprefix("uniform-r"))
            truth = trained(base, texts["data"], held, what, one.lr, one.seed, 6, 4, 0)
            assert one.loss == pytest.approx(truth, abs=1e-4)
    (choice,) = result.whole_of(Tune)
    assert choice.base_loss == pytest.approx(loss_of(opened(base), held), abs=1e-5)
    mine = [o.loss for o in of_held if (o.variant, o.lr) == (choice.variant, choice.lr)]
    assert choice.gain == pytest.approx(choice.base_loss - sum(mine) / len(mine))


def test_tune_writes_adapter_that_peft_loads(case):
    """Its loss is that of the first seed, and its ranks are those of the config."""
    base, texts, result, folder, _ = case
    (choice,) = result.whole_of(Tune)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == json.loads((folder / "adapter" / "adapter_config.json").read_text())
    model = opened(base, folder / "adapter")
    loss = loss_of(model, texts["eval"][0])
    trials = [
        o for o in result.whole_of(TuneTrial) if (o.variant, o.lr) == (choice.variant, choice.lr)
    ]
    assert loss == pytest.approx(
        next(o.loss for o in trials if o.set == "held_out" and o.seed == 0), abs=1e-5
    )
    weights = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    assert weights == choice.params
    assert (
        all(rank == choice.rank for rank in choice.ranks.values())
        or choice.variant != f"uniform-r{choice.rank}"
    )
    names = {"report.html", "gate.toml", "config.axolotl.yaml", "config.llamafactory.yaml"}
    assert names <= {path.name for path in folder.iterdir()}
    assert lora_diag.gate(folder / "gate.toml", folder / "spectrum.jsonl").whole
    arguments = {
        key: config[key] for key in config.keys() - {"peft_type", "base_model_name_or_path"}
    }
    arguments["inference_mode"] = False
    assert _lora_of((folder / "config.trl.py").read_text()) == peft.LoraConfig(**arguments)


def test_choice_is_compared_with_base_on_every_set(case):
    base, texts, result, folder, _ = case
    (choice,) = result.whole_of(Tune)
    records = {
        record.set: record for record in result.whole_of(Probe) if record.subject == "adapter"
    }
    assert {record.name for record in records.values()} == {choice.variant}
    before, after = opened(base), opened(base, folder / "adapter")
    for file in (*texts["eval"], *texts["shifted"]):
        z, z0 = (
            torch.cat([m(input_ids=w[None]).logits[0, :-1] for w in ids_of(file)])
            for m in (after, before)
        )
        p, p0 = (log_softmax(each.detach().double().numpy(), 1) for each in (z, z0))
        record = records[file.stem]
        assert record.kl_base == pytest.approx((np.exp(p0) * (p0 - p)).sum(1).mean(), rel=1e-3)
        assert record.change == pytest.approx(
            loss_of(after, file) - loss_of(before, file), abs=1e-5
        )
    assert find(tune_lines(result), "forgotten").lead.startswith("on other")


def _lora_of(script):
    """Return the ``LoraConfig`` that a script for TRL passes to its trainer.

    No other file of the output is read.
    """
    given = {}
    trainer = SimpleNamespace(train=lambda: None, save_model=lambda: None)
    stand_ins = {
        "datasets": {"load_dataset": lambda kind, data_files: data_files},
        "trl": {
            "SFTConfig": dict,
            "SFTTrainer": lambda **arguments: given.update(arguments) or trainer,
        },
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, content in stand_ins.items():
            patched.setitem(sys.modules, name, SimpleNamespace(**content))
        exec(script, {})
    return given["peft_config"]


def test_non_uniform_ranks_have_the_same_budget_and_seeds(case):
    _, _, result, _, _ = case
    (choice,) = result.whole_of(Tune)
    trials = result.whole_of(TuneTrial)
    uniform = next(one.params for one in trials if one.variant == f"uniform-r{choice.rank}")
    others = [one for one in trials if one.variant == "marginal"]
    assert others
    assert all(one.params <= uniform for one in others)
    shared = {one.seed for one in trials if one.variant == f"uniform-r{choice.rank}"}
    assert {one.seed for one in others} <= shared


def test_tune_resumed_search_gives_same_result(case, tmp_path):
    base, texts, result, folder, _ = case
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    lines = (run / "tune.jsonl").read_text().splitlines(keepends=True)
    decided = next(
        i for i, line in enumerate(lines) if '"stage":"redistribution"' in line.replace(" ", "")
    )
    (run / "tune.jsonl").write_text("".join(lines[:decided]))
    with pytest.raises(UsageError, match="resume"):
        lora_diag.tune(base, run, **texts, **OPTIONS)
    labels = []
    repeated = lora_diag.tune(
        base,
        run,
        resume=True,
        on_progress=lambda event: labels.append(event.label),
        **texts,
        **OPTIONS,
    )
    assert repeated == result
    assert not [
        label for label in labels if label.startswith("r=")
    ]  # the sweep is not trained again


def test_tune_writes_nothing_before_confirmation(case, tmp_path):
    base, texts, *_ = case
    seen = []
    for options in ({"on_plan": lambda plan: bool(seen.append(plan))}, {"dry_run": True}):
        result = lora_diag.tune(base, tmp_path / "run", **texts, **OPTIONS, **options)
        assert result.end is None
        assert [type(one) for one in result.whole] == [TunePlan]
        assert not (tmp_path / "run").exists()
    assert seen[0].largest == 4500 // seen[0].per_rank
    per_rank = 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    assert seen[0].per_rank == per_rank
    with pytest.raises(UsageError, match="not even r=1"):
        lora_diag.tune(base, tmp_path / "run", **texts, **OPTIONS | {"params": per_rank - 1})
    with raises_naming(UsageError, "smallest search"):
        lora_diag.tune(base, tmp_path / "run", time="0.01s", **texts, **OPTIONS)


def test_tune_asks_for_confirmation_after_the_budget(loradiag, case):
    base, texts, *_ = case
    words = [
        "tune",
        base,
        "--data",
        texts["data"],
        "--eval",
        texts["eval"][0],
        "-o",
        "run",
        "--params",
    ]
    refused, impossible = loradiag(*words, "4k"), loradiag(*words, "10")
    assert (refused.code, impossible.code) == (2, 2)
    assert "--yes" in refused.err
    assert "Budget" in refused.out  # the plan, which would have been confirmed
    assert "--yes" not in impossible.err


@pytest.mark.parametrize(("dry_run", "seconds"), [(True, "2000h"), (False, "10h")])
def test_short_steps_decide_before_any_full_step(case, tmp_path, monkeypatch, dry_run, seconds):
    """A plan is printed from them; a search that they exclude beyond their error ends there."""
    base, texts, *_ = case
    monkeypatch.setattr(planning, "extrapolate_steps", lambda *_: StepCost(1e4, 100.0, 0.25, 10**9))
    monkeypatch.setattr(planning, "time_steps", lambda *_: pytest.fail("a step of full length"))
    options = {**OPTIONS, "time": seconds, "dry_run": dry_run}
    with nullcontext() if dry_run else raises_naming(UsageError, "smallest search"):
        (plan,) = lora_diag.tune(base, tmp_path / "run", **texts, **options).whole
        assert (plan.error, plan.step_seconds) == (0.25, 1e4)
        assert "±25%" in plan_text(plan)


def test_real_start_is_planned_from_measured_steps(case, tmp_path, monkeypatch):
    """Full fine-tuning is timed only where the limit may allow it."""
    base, texts, *_ = case
    timed = []
    monkeypatch.setattr(planning, "extrapolate_steps", lambda *_: StepCost(10.0, 1.0, 0.25))

    def time_full_length(train, *_):
        timed.append(train.args[1].subject)
        return StepCost(20.0, 1.0)

    monkeypatch.setattr(planning, "time_steps", time_full_length)
    for time, subjects in (("50h", ["lora", "full"]), ("25min", ["lora"])):
        seen = []
        options = {**OPTIONS, "time": time, "on_plan": lambda plan, seen=seen: seen.append(plan)}
        lora_diag.tune(base, tmp_path / "run", **texts, **options)
        assert [plan.step_seconds for plan in seen] == [20.0]
        assert seen[0].error == 0
        assert timed == subjects
        timed.clear()
    with raises_naming(UsageError, "smallest search"):
        lora_diag.tune(base, tmp_path / "run", **texts, **options | {"time": "8min"})
    assert timed == ["lora"]


def test_tune_refusal_names_options_that_fit(loradiag, case):
    base, texts, *_ = case
    words = ["tune", base, "--data", texts["data"], "--eval", texts["eval"][0]]
    refused = loradiag(*words, "--params", "4k", "--time", "0.01s", "-o", "run", "--dry-run")
    assert (refused.code, refused.out) == (2, "")
    assert re.search(r"give --time \d+min", refused.err)


class Terminal(io.StringIO):
    """Standard input with a user who answers."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("answer", "trains"), [("n\n", False), ("y\n", True), ("\n", True)])
def test_tune_prompt_decides_in_terminal(case, tmp_path, monkeypatch, capsys, answer, trains):
    """Answering no stops with exit code 0 before anything is written; yes, the default, starts
    training.
    """
    base, texts, *_ = case
    started = []

    def run(self):
        started.append(self.plan)
        raise InconclusiveError("stopped by the test")

    monkeypatch.setattr(Tuner, "run", run)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    words = [
        "tune",
        base,
        "--data",
        texts["data"],
        "--eval",
        texts["eval"][0],
        "--params",
        "4k",
        "-o",
        "run",
    ]
    monkeypatch.chdir(tmp_path)
    with nullcontext() if not trains else pytest.raises(InconclusiveError):
        commands()([str(word) for word in words], standalone_mode=False)
    assert bool(started) == trains
    assert (tmp_path / "run").exists() == trains
    printed = capsys.readouterr()
    assert "Budget" in printed.out
    assert "Start?" in printed.err
    assert ("nothing was written" in printed.err) == (not trains)


def test_tune_replaces_run_only_after_confirmation(case, tmp_path):
    base, texts, _, folder, _ = case
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    stale = run / "trials" / "stale"
    stale.mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = OPTIONS | {"ranks": (2,), "lr": (1e-2,), "repeats": 1, "no_full": True}
    options |= {"dora": True, "rslora": True, "gradient_checkpointing": True}
    with pytest.raises(UsageError, match="overwrite"):
        lora_diag.tune(base, run, **texts, **options)
    plans = []
    lora_diag.tune(
        base, run, overwrite=True, on_plan=lambda plan: bool(plans.append(plan)), **texts, **options
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    result = lora_diag.tune(base, run, overwrite=True, **texts, **options)
    assert not stale.exists()
    assert read_results(run / "tune.jsonl") == result
    assert result.run.settings["ranks"] == [2]
    assert {
        one.rank for one in read_results(run / "sweep.jsonl").whole if one.subject == "lora"
    } == {2}
    for settings in (result.run.settings, read_results(run / "sweep.jsonl").run.settings):
        assert (settings["kind"], settings["gradient_checkpointing"]) == (
            "DoRA with rsLoRA's scaling, alpha = 16",
            True,
        )
    _check_dora_and_rslora(base, texts, result, run, plans[0])


def _check_dora_and_rslora(base, texts, found, run, plan):
    """Every run and every file is of DoRA with rsLoRA's scaling."""
    outputs = 2 * (48 + 16 + 64 + 16)
    assert (plan.magnitudes, plan.largest) == (outputs, (4500 - outputs) // plan.per_rank)
    trials = [one for one in found.whole_of(TuneTrial) if one.variant != "base"]
    kinds = {"lora_alpha": 16, "use_rslora": True, "use_dora": True}
    for one in trials:
        if one.variant == "uniform-r2":
            assert one.params == 2 * plan.per_rank + outputs
            held = (
                texts["eval"][0].with_stem(one.set)
                if one.set == "held_out"
                else texts["shifted"][0]
            )
            truth = trained(base, texts["data"], held, 2, one.lr, one.seed, 6, 4, 0, **kinds)
            assert one.loss == pytest.approx(truth, abs=1e-4)
    configs_ = {
        path.parent.name: json.loads(path.read_text())
        for path in run.glob("trials/*/adapter_config.json")
    }
    configs_["written"] = json.loads((run / "adapter_config.json").read_text())
    assert {"uniform-r2", "pilot-r4", "written"} <= configs_.keys()
    assert "marginal" in configs_
    for name, config in configs_.items():
        alpha = kinds["lora_alpha"] / (2 if name.endswith("half-alpha") else 1)
        assert (config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (
            alpha,
            True,
            True,
        )
        assert not config["alpha_pattern"]
    (choice,) = found.whole_of(Tune)
    assert (choice.alpha, choice.dora) == (configs_["written"]["lora_alpha"], True)
    axolotl = yaml.safe_load((run / "config.axolotl.yaml").read_text())
    assert (axolotl["peft_use_rslora"], axolotl["peft_use_dora"]) == (True, True)
    factory = yaml.safe_load((run / "config.llamafactory.yaml").read_text())
    assert (factory["use_rslora"], factory["use_dora"]) == (True, True)


@pytest.mark.parametrize("slowness", [2.0, 4.0])
def test_tune_keeps_time_on_busy_machine(case, tmp_path, monkeypatch, slowness):
    """On a fake clock: every step takes ``slowness`` times as long as the one that was timed for
    the plan.
    """
    base, texts, *_ = case
    clock, seen = [1000.0], [0]
    for module in (planning, run_module):
        monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    monkeypatch.setattr(planning, "time_steps", lambda *_: StepCost(1.0, 1.0))

    def advance(event):
        clock[0] += slowness * (event.done - seen[0])
        seen[0] = event.done

    def wait(plan):
        clock[0] += 9999.0  # the user thinks about the plan
        return True

    options = OPTIONS | {"lr": (3e-3, 1e-2, 3e-2)}
    (whole,) = lora_diag.tune(base, tmp_path / "run", dry_run=True, **texts, **options).whole
    limit = math.ceil(whole.seconds)
    began = clock[0]
    result = lora_diag.tune(
        base,
        tmp_path / "run",
        time=f"{limit}s",
        on_plan=wait,
        on_progress=advance,
        **texts,
        **options,
    )
    assert result.whole_of(TunePlan)[0].left_out == ()  # the plan would keep the limit
    assert clock[0] - began - 9999 <= limit
    assert result.whole_of(Tune)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    omitted = [
        one
        for one in result.whole_of(TuneDecision)
        if (one.stage, one.outcome) == ("budget", "not tried")
    ]
    assert omitted
    assert all(f"{slowness:g} times" in one.why and one.seconds > 0 for one in omitted)
    lines = {one.key: one for one in tune_lines(result)}
    assert all(lines["left_out"].text.count(f"{one.name} (") == 1 for one in omitted)
    again = lora_diag.tune(base, tmp_path / "run", resume=True, **texts, **options)
    assert again == result


def test_resumed_search_with_full_fine_tuning_refuses_no_full(case):
    base, texts, _, run, _ = case
    with raises_naming(UsageError, "no_full"):
        lora_diag.tune(base, run, resume=True, no_full=True, **texts, **OPTIONS)


def test_tune_extends_search_out_of_time(case, tmp_path, monkeypatch):
    """Time is up when the pilot of non-uniform ranks begins; with a larger limit, all comes out as
    without one.
    """
    base, texts, whole, *_ = case
    began, run, original = [], tmp_path / "run", Tuner.left.fget
    monkeypatch.setattr(Tuner, "left", property(lambda self: -1.0 if began else original(self)))
    result = lora_diag.tune(
        base, run, time="1h", on_progress=lambda e: began.extend([1] * e.label.startswith("pilot")),
        **texts, **OPTIONS,
    )  # fmt: skip
    (choice,) = result.whole_of(Tune)
    outcomes = {one.name: one.outcome for one in result.whole_of(TuneDecision)}
    assert outcomes["non-uniform ranks"] == "not tried"
    assert "kept" not in outcomes.values()
    assert choice.variant.startswith("uniform")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="planned for 60 min"):
        lora_diag.tune(base, run, resume=True, time="30min", **texts, **OPTIONS)
    assert lora_diag.tune(base, run, resume=True, time="1h", **texts, **OPTIONS) == result
    lines = (run / "tune.jsonl").read_text().splitlines(keepends=True)
    decided = next(i for i, line in enumerate(lines) if '"name":"non-uniform ranks"' in line)
    (run / "tune.jsonl").write_text("".join(lines[: decided + 1]))
    resumed = lora_diag.tune(base, run, resume=True, time="1h", **texts, **OPTIONS)
    assert not {one.variant for one in resumed.whole_of(TuneTrial)} & {
        "marginal"
    }  # the decision stands
    labels = []
    more = lora_diag.tune(
        base,
        run,
        resume=True,
        time="2h",
        on_progress=lambda e: labels.append(e.label),
        **texts,
        **OPTIONS,
    )
    assert more.whole_of(Tune) == whole.whole_of(Tune)
    assert more.whole_of(TuneDecision) == whole.whole_of(TuneDecision)
    assert not [
        label for label in labels if label.startswith("r=")
    ]  # the sweep is not trained again
    assert more.whole_of(TunePlan)[0].limit == 7200
    assert read_results(run / "tune.jsonl") == more


def test_trainers_get_expressible_ranks():
    """LLaMA-Factory has one rank for all layers, and gets the uniform one; TRL has patterns."""
    shared = make_config(["q", "v"], 4, 8, task="CAUSAL_LM")
    mixed = {
        **shared,
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"0.q": 8},
        "alpha_pattern": {"0.q": 16},
    }
    variant, settings = Variant("marginal", mixed, 1e-3, 9), {"batch": 8, "length": 64}
    result = configs("base", ("a.jsonl", "b.jsonl"), variant, shared, settings)
    axolotl, factory = (
        yaml.safe_load(result[f"config.{name}.yaml"]) for name in ("axolotl", "llamafactory")
    )
    assert (axolotl["lora_rank_pattern"], axolotl["learning_rate"]) == ({"0.q": 8}, 1e-3)
    assert (factory["lora_rank"], factory["lora_alpha"], factory["lora_target"]) == (4, 8, "q,v")
    assert "uniform rank 4" in result["config.llamafactory.yaml"]
    mine = _lora_of(result["config.trl.py"])
    assert (mine.rank_pattern, mine.alpha_pattern, mine.target_modules) == (
        {"0.q": 8},
        {"0.q": 16},
        {"q", "v"},
    )


def test_allocate_ranks_pooler_like_other_layers(tmp_path):
    """It has an adapter in the pilot; ``allocate`` by itself trains it in full, beyond
    the budget.
    """
    base = bert(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "pilot")
    lora_diag.spectrum(base, tmp_path / "pilot", output=tmp_path / "pilot.jsonl")
    result = Tuner._allocate_from_pilot(SimpleNamespace(folder=tmp_path), 200, 1)
    assert {record.rank > 0 for record in result if "pooler" in record.layer} == {True}


@pytest.mark.parametrize(("gap", "goes_on"), [(0.01, False), (-0.004, False), (-0.006, True)])
def test_challenger_wins_only_beyond_tolerance(gap, goes_on):
    """By hand: uniform has a loss of 1, the tolerance is 0.005; otherwise no further seed is
    trained.
    """
    incumbent, other = (
        Variant(name, make_config(["q"], 4, 8), 1e-3, 9) for name in ("uniform", "marginal")
    )
    losses, trained_seeds, outcomes = {"uniform": 1.0, "marginal": 1.0 + gap}, set(), {}
    tuner = object.__new__(Tuner)
    tuner.own, tuner.shifted, tuner.first_seed, tuner.folder = "dev", [], 0, Path("run")
    tuner.swept = SimpleNamespace(verdict=SimpleNamespace(tolerance=0.005))
    tuner.plan = SimpleNamespace(repeats=3)
    tuner.trials = SimpleNamespace(
        train=lambda *runs: trained_seeds.update(run.seed for run in runs),
        runs=lambda variant, *_: {
            "dev": {seed: Measured(losses[variant.name]) for seed in (0, *trained_seeds)}
        },
        predictions={},
    )
    tuner._make_candidate = lambda: other
    tuner.decide = lambda stage, name, outcome, *_, **__: outcomes.update({name: outcome})
    tuner._count_params = lambda variant: 1
    best = tuner._choose_best(incumbent)
    assert trained_seeds == ({0, 1, 2} if goes_on else {0})
    assert best.name == ("marginal" if goes_on else "uniform")
    assert outcomes == dict.fromkeys(
        ("non-uniform ranks", "marginal"), "kept" if goes_on else "rejected"
    )


def test_diverged_challenger_never_leads():
    losses = {"incumbent": {}, "fine": {0: 1.0}, "diverged": {}}
    tuner = SimpleNamespace(own="dev", first_seed=0, _get_losses=lambda name, _: losses[name])
    gaps = [
        Tuner._gap_at_first_seed(tuner, "incumbent", name).value for name in ("diverged", "fine")
    ]
    assert gaps == [math.inf, -math.inf]


def test_summary_names_what_is_not_significant():
    def summarize(**fields):
        choice = build(Tune, budget=1, seeds=3, gain=0.1, **fields)
        return next(
            one.text for one in tune_lines(results((), whole=(choice,))) if one.key == "choice"
        )

    assert_names(
        summarize(significant=False, gain_error=0.001),
        "NOT shown to be enough",
        "smallest by mean losses",
    )
    of_gain = summarize(significant=False, gain_error=0.1)
    assert_names(of_gain, "NOT shown to lower the loss")
    assert "enough" not in of_gain
    assert "smallest" not in of_gain
    assert "NOT" not in summarize(significant=True, gain_error=0.001)


@pytest.mark.parametrize("times", [0.99, 1.01])
def test_printed_interval_of_gain_decides(times):
    """Two standard errors by their confidence, and Student's t with the freedom of three seeds."""
    half = 0.02 * scipy.stats.t.ppf(scipy.stats.norm.cdf(2), 2)
    choice = build(Tune, budget=1, seeds=3, gain=times * half, gain_error=0.02)
    assert choice.has_significant_gain == (times > 1)
    lines = tune_lines(results((), whole=(choice,)))
    (text,) = [one.text for one in lines if one.key == "gain"]
    assert f"±{half:#.2g}" in text


def fix_step_times(job=None):
    """Fix the only numbers of a search that are measured times; show whole summaries."""
    show_all(job)
    planning.time_steps = lambda *_: StepCost(0.01, 0.01)


@pytest.mark.slow
def test_files_of_search_do_not_depend_on_hash_seed_or_time(tmp_path, monkeypatch, run, server):
    """Under SOURCE_DATE_EPOCH, every file has the same bytes, given the seconds of a step."""
    held = some_text(tmp_path, "held_out", windows=2, source="shifted")
    words = [
        "tune",
        gpt2(tmp_path / "base"),
        "--data",
        some_text(tmp_path, "train", windows=5),
        "--eval",
        held,
    ]
    words += [
        "--params",
        "4500",
        "--ranks",
        "2",
        "--lr",
        "1e-2",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--batch",
        "4",
    ]
    words += ["--widen", "0", "--no-full", "--yes", "--quiet", "-o", "run"]
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    code, _, err = server.run(
        words, there, environment={**os.environ}, prepare="tests.tuning.test_run:fix_step_times"
    )
    assert code == 5, err  # of one seed, no choice is significant
    here.mkdir()
    monkeypatch.setattr("lora_diag.reports.html.images_of", images_of)
    monkeypatch.setattr(planning, "time_steps", planning.time_steps)
    fix_step_times()
    monkeypatch.chdir(here)
    assert run(*words).code == 5
    found = [
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (here, there)
    ]
    assert {
        "run/report.html",
        "run/tune.jsonl",
        "run/trials/uniform-r2/adapter_config.json",
    } <= set(found[0])
    assert b"made 2023-11-14 22:13 UTC" in found[0]["run/report.html"]
    assert found[0].keys() == found[1].keys()
    assert [name for name, content in found[0].items() if found[1][name] != content] == []


def test_time_limit_reduces_evaluation_sets(case, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "CPU_WORK", 1)
    base, texts, *_ = case
    texts = texts | {"eval": [some_text(tmp_path, "held", windows=12, source="shifted")]}
    for limit, is_reduced in ((None, False), ("9h", True)):
        notes: list[str] = []
        options = {**OPTIONS, "time": limit, "dry_run": True, "on_note": notes.append}
        lora_diag.tune(base, tmp_path / "run", **texts, **options)
        assert any("--max-sequences 8 (of 12)" in note for note in notes) == is_reduced
