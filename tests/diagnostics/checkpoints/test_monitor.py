"""``LoraMonitor`` against the checkpoints of the same steps and dense NumPy, in a real Trainer and
in loops.
"""

import importlib
import json
import logging
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from torch import nn
from transformers import Trainer

import lora_diag
from lora_diag import LoraMonitor
from lora_diag.diagnostics.checkpoints.monitor import RULES
from lora_diag.diagnostics.checkpoints.record import RunCheckpoint
from lora_diag.errors import InputError, UsageError
from lora_diag.records import ResultsWriter
from tests.diagnostics.overlap.test_recorder import llama, trainer_of, with_lora
from tests.messages import assert_names, raises_naming

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
]


def fresh_lora(model, **settings):
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **settings)
    )


def dense_updates(run, steps, scale) -> dict[str, list[np.ndarray]]:
    """ΔW of every layer at every saved step, in float64."""
    updates: dict[str, list[np.ndarray]] = {}
    for step in steps:
        factors = load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")
        for key, b in factors.items():
            if "lora_B" in key:
                a = factors[key.replace("lora_B", "lora_A")].astype(np.float64)
                layer = key.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
                updates.setdefault(layer, []).append(scale * b.astype(np.float64) @ a)
    return updates


def cosine(x, y) -> float:
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def test_monitor_numbers_equal_those_of_saved_checkpoints(tmp_path):
    """Also with rsLoRA's scaling, which is no power of two, and more than one layer of a shape."""
    monitor = LoraMonitor(every=2)
    trainer = trainer_of(
        fresh_lora(llama(), use_rslora=True),
        tmp_path,
        [monitor],
        max_steps=7,
        save_strategy="steps",
        save_steps=2,
    )
    monitor.log_to(trainer)
    trainer.train()
    run, steps = tmp_path / "trainer", (2, 4, 6, 7)
    results = lora_diag.read_results(run / "monitor.jsonl")
    assert results.end is not None
    checkpoints = results.whole_of(RunCheckpoint)
    assert tuple(each.step for each in checkpoints) == steps
    records = {(record.layer, record.step): record for record in results}
    updates = dense_updates(run, steps, 5 / np.sqrt(3))
    assert set(records) == {(layer, step) for layer in updates for step in steps}
    for layer, weights in updates.items():
        changes = [weights[0], *(after - before for before, after in pairwise(weights))]
        for t, step in enumerate(steps):
            record = records[layer, step]
            s = np.linalg.svd(weights[t], compute_uv=False)[:3]
            p = s**2 / (s**2).sum()
            assert record.fro == pytest.approx(np.linalg.norm(weights[t]), rel=1e-9)
            assert record.sigma_1 == pytest.approx(s[0], rel=1e-7)
            assert record.spectral_share == pytest.approx(p[0], rel=1e-7)
            assert record.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
            assert record.increment == pytest.approx(np.linalg.norm(changes[t]), rel=1e-8)
            expected = (
                None if t == 0 else pytest.approx(cosine(changes[t], changes[t - 1]), abs=1e-8)
            )
            assert record.cosine == expected
    for step in steps:
        for spectrum in lora_diag.spectrum(run / f"checkpoint-{step}"):
            record = records[spectrum.layer, step]
            assert (record.fro, record.stable_rank) == pytest.approx(
                (spectrum.fro, spectrum.stable_rank), rel=1e-6
            )
    for measured, saved in zip(
        checkpoints, lora_diag.checkpoints(run).whole_of(RunCheckpoint), strict=True
    ):
        fields = ("fro", "increment", "cosine", "spectral_share", "effective_rank", "train_loss")
        for name in fields:
            value = getattr(saved, name)
            assert getattr(measured, name) == (
                None if value is None else pytest.approx(value, rel=1e-6)
            ), name
    logged = [entry for entry in trainer.state.log_history if "update/fro" in entry]
    assert [entry["step"] for entry in logged] == list(steps)
    assert logged[1]["update/cosine"] == checkpoints[1].cosine
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 7


def test_monitor_of_full_fine_tune_equals_its_checkpoints(tmp_path):
    """No matrix has more rows than are sampled, so nothing is estimated."""
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    monitor = LoraMonitor(tmp_path / "m.jsonl", every=2)
    trainer_of(model, tmp_path, [monitor], max_steps=6, save_strategy="steps", save_steps=2).train()
    saved = lora_diag.checkpoints(tmp_path / "trainer", base=tmp_path / "base")
    found = {
        (record.layer, record.step): record
        for record in lora_diag.read_results(tmp_path / "m.jsonl")
    }
    assert set(found) == {(record.layer, record.step) for record in saved}
    for record in saved:
        own = found[record.layer, record.step]
        for name in ("fro", "base_fro", "relative", "increment", "cosine"):
            value = getattr(record, name)
            assert getattr(own, name) == (
                None if value is None else pytest.approx(value, rel=1e-5)
            ), name
        assert (own.fro_error, own.increment_error, own.spectral_share) == (None, None, None)


def test_sampled_norms_are_within_their_errors(tmp_path):
    """Of 300 rows of very different energies; z-scores of 200 matrices have mean 0 and
    deviation 1.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({f"m{i}": nn.Linear(5, 300, bias=False) for i in range(200)})
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    with LoraMonitor(tmp_path / "m.jsonl", every=1).attach(model) as monitor:
        with torch.no_grad():
            for layer in model.values():
                layer.weight += torch.randn(300, 5) * torch.rand(300, 1)
        monitor.step()
    scores, errors = [], []
    for record in lora_diag.read_results(tmp_path / "m.jsonl"):
        name = record.layer.removesuffix(".weight")
        true = float((model[name].weight.detach() - before[name]).norm())
        assert record.increment == record.fro
        scores.append((record.fro - true) / record.fro_error)
        errors.append(record.fro_error / true)
    assert abs(np.mean(scores)) < 0.35
    assert 0.8 < np.std(scores) < 1.3
    assert 0.02 < np.median(errors) < 0.1


def planted(tmp_path, change, steps=8, **options):
    """Drift all factors of a LoRA, change them before each step, and return the model and what
    ``step`` returned.
    """
    model = with_lora(llama())
    factors = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    drift = {name: torch.randn_like(weight) for name, weight in factors.items()}
    stopped = []
    with (
        LoraMonitor(tmp_path / "m.jsonl", every=1, **options).attach(model) as monitor,
        torch.no_grad(),
    ):
        for t in range(1, steps + 1):
            for name, weight in factors.items():
                weight += 0.01 * drift[name]
            change(t, {name.split("layers.")[1]: weight for name, weight in factors.items()})
            stopped.append(monitor.step())
    return stopped


B0 = "0.self_attn.q_proj.lora_B.default.weight"
LAYER = "model.layers.0.self_attn.q_proj"


def kill(t, factors):
    factors[B0].mul_(0 if t >= 4 else 1)


def poison(t, factors):
    if t == 4:
        factors[B0][2, 1] = float("nan")


def spike(t, factors):
    if t == 6:
        factors[B0].add_(torch.randn(factors[B0].shape, generator=torch.Generator().manual_seed(5)))


def collapse(t, factors):
    if t >= 4:
        factors[B0].copy_(factors[B0][:, :1] * torch.tensor([1.0, 0.0, 0.0]))


def freeze():
    """Return a change that keeps the factors of the layer from step 4 on."""
    held = {}

    def change(t, factors):
        for name in (B0, B0.replace("lora_B", "lora_A")):
            if t == 4:
                held[name] = factors[name].clone()
            if t > 4:
                factors[name].copy_(held[name])

    return change


@pytest.mark.parametrize(
    ("rule", "change", "first"),
    [
        ("dead", kill, 4),
        ("non_finite", poison, 4),
        ("spiked", spike, 6),
        ("collapsed", collapse, 4),
        ("frozen", freeze(), 5),
    ],
)
def test_monitor_warns_once_and_stops_on_planted_problem(tmp_path, caplog, rule, change, first):
    stopped = planted(tmp_path, change, stop_on=rule)
    assert stopped.index(True) + 1 == first
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    about = [text for text in warnings if rule.replace("_", "-") in text]
    assert len(about) == 1
    assert_names(about[0], f"step {first}", LAYER)
    records = {
        r.step: r for r in lora_diag.read_results(tmp_path / "m.jsonl") if r.layer.startswith(LAYER)
    }
    if rule == "non_finite":
        assert_names(records[4].non_finite, "lora_B", "[2, 1]")
        assert records[4].fro is None
    assert records[first].dead == (rule == "dead")
    json.dumps([record.model_dump() for record in records.values()], allow_nan=False)


def test_monitor_measures_again_after_non_finite_step(tmp_path):
    def repair(t, factors):
        poison(t, factors)
        if t == 5:
            factors[B0].nan_to_num_()

    planted(tmp_path, repair)
    records = {
        r.step: r for r in lora_diag.read_results(tmp_path / "m.jsonl") if r.layer.startswith(LAYER)
    }
    assert [records[t].increment is None for t in (3, 4, 5, 6)] == [False, True, True, False]
    assert [records[t].cosine is None for t in (3, 5, 6, 7)] == [False, True, True, False]


def test_monitor_finds_nothing_in_healthy_run(tmp_path, caplog):
    assert not any(planted(tmp_path, lambda t, factors: None, stop_on=RULES))
    assert not caplog.records


def test_trainer_stops_on_dead_layers(tmp_path):
    monitor = LoraMonitor(every=2, stop_on="dead")
    model = fresh_lora(llama())
    for name, parameter in model.named_parameters():
        if "layers.1.self_attn.q_proj.lora_B" in name:
            parameter.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, [monitor], max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 2
    results = lora_diag.read_results(tmp_path / "trainer" / "monitor.jsonl")
    assert [record.layer for record in results if record.dead] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]
    assert results.end is not None


def test_resumed_training_continues_the_file(tmp_path):
    """The records of an interrupted run after the step to which it returns are dropped, but kept in
    another file.
    """

    def run(model, first, last, finished, path):
        with torch.no_grad():
            monitor = LoraMonitor(path, every=2).attach(model, first)
            for t in range(first + 1, last + 1):
                for name, weight in model.named_parameters():
                    if "lora_" in name:
                        weight += 0.02 * torch.randn(
                            weight.shape, generator=torch.Generator().manual_seed(t)
                        )
                if t == 4:
                    torch.save(
                        {k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "state"
                    )
                monitor.step()
            monitor.close(finished)

    run(with_lora(llama()), 0, 8, True, tmp_path / "whole.jsonl")
    model = with_lora(llama())
    run(model, 0, 7, False, tmp_path / "m.jsonl")
    model.load_state_dict(torch.load(tmp_path / "state"))
    run(model, 4, 8, True, tmp_path / "m.jsonl")
    whole, resumed = (
        lora_diag.read_results(tmp_path / name) for name in ("whole.jsonl", "m.jsonl")
    )
    dropped = lora_diag.read_results(tmp_path / "m.1.jsonl")
    assert [each.step for each in dropped.whole_of(RunCheckpoint)] == [2, 4, 6]
    assert resumed.end is not None
    assert len(whole) == len(resumed) > 0
    for one, other in zip(whole, resumed, strict=True):
        assert other.model_copy(update={"cosine": one.cosine}) == one
        assert other.cosine == (None if other.step == 6 else one.cosine)


def test_new_training_keeps_file_of_earlier_one(tmp_path):
    for _ in range(2):
        planted(tmp_path, lambda t, factors: None, steps=2)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["m.1.jsonl", "m.jsonl"]


def test_monitor_refuses_files_of_other_commands(tmp_path):
    lora_diag.spectrum("sample_checkpoints/lora_r4", output=tmp_path / "m.jsonl")
    before = (tmp_path / "m.jsonl").read_bytes()
    with raises_naming(UsageError, tmp_path / "m.jsonl", "spectrum"):
        LoraMonitor(tmp_path / "m.jsonl").attach(with_lora(llama()))
    (tmp_path / "notes.txt").write_text("mine")
    with raises_naming(UsageError, tmp_path / "notes.txt"):
        LoraMonitor(tmp_path / "notes.txt").attach(with_lora(llama()))
    assert (tmp_path / "m.jsonl").read_bytes() == before


def test_monitor_refuses_invalid_arguments(tmp_path):
    with raises_naming(UsageError, "every=0"):
        LoraMonitor(every=0)
    with raises_naming(UsageError, "stop_on='died'", "dead"):
        LoraMonitor(stop_on="died")
    with raises_naming(UsageError, "output"):
        LoraMonitor().attach(with_lora(llama()))
    with raises_naming(UsageError, "nothing to monitor"):
        LoraMonitor(tmp_path / "m.jsonl", layers="no such").attach(with_lora(llama()))


def test_monitor_of_sharded_model_only_says_so(tmp_path, caplog):
    model = with_lora(llama())
    parameter = next(weight for name, weight in model.named_parameters() if "lora_A" in name)
    parameter.ds_id = 1
    with LoraMonitor(tmp_path / "m.jsonl", every=1).attach(model) as monitor:
        assert [monitor.step(), monitor.step()] == [False, False]
    assert_names("\n".join(record.getMessage() for record in caplog.records), "lora_A", "sharded")
    assert len(caplog.records) == 1
    assert not list(tmp_path.iterdir())


def test_training_goes_on_if_records_cannot_be_written(tmp_path, caplog, monkeypatch):
    def fail(*records):
        raise InputError("m.jsonl: cannot be written: No space left on device")

    monkeypatch.setattr(ResultsWriter, "append", lambda self, *records: fail())
    trainer = trainer_of(
        fresh_lora(llama()), tmp_path, [LoraMonitor(tmp_path / "m.jsonl", every=1)], max_steps=3
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert_names(
        "\n".join(record.getMessage() for record in caplog.records), "step 1", "No space left"
    )


def test_log_bypasses_metrics_of_trainers_subclass(tmp_path):
    class Metrics(Trainer):
        def log(self, logs, *args):
            calls.append(logs)
            super().log(logs, *args)

    calls: list[dict] = []
    monitor = LoraMonitor(every=3)
    trainer = trainer_of(fresh_lora(llama()), tmp_path, [monitor])
    trainer.__class__ = Metrics
    monitor.log_to(trainer)
    trainer.train()
    assert any("update/fro" in entry for entry in trainer.state.log_history)
    assert not any("update/fro" in logs for logs in calls)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_monitor_measures_or_names_other_layers(tmp_path, caplog, settings):
    torch.manual_seed(1)
    config = {"target_modules": ["q_proj"], **settings}
    model = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=6, **config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if "use_dora" in settings:
        with raises_naming(UsageError, "nothing to monitor"):
            LoraMonitor(tmp_path / "m.jsonl").attach(model)
        assert "Dora" in caplog.text
        return
    with torch.no_grad(), LoraMonitor(tmp_path / "m.jsonl", every=1).attach(model) as monitor:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        monitor.step()
    model.save_pretrained(tmp_path / "adapter")
    expected = {record.layer: record.fro for record in lora_diag.spectrum(tmp_path / "adapter")}
    found = {record.layer: record.fro for record in lora_diag.read_results(tmp_path / "m.jsonl")}
    assert found == pytest.approx(expected, rel=1e-6)


def test_axolotl_plugin_adds_monitor_with_settings(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"register": lambda self, cfg: None})
    for name, module in {
        "axolotl": types,
        "axolotl.integrations": types,
        base.__name__: base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lora_diag.diagnostics.checkpoints.axolotl", raising=False)
    plugin = importlib.import_module("lora_diag.diagnostics.checkpoints.axolotl").AxolotlPlugin()
    monkeypatch.delitem(sys.modules, "lora_diag.diagnostics.checkpoints.axolotl")
    assert isinstance(plugin, base.BasePlugin)
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    for given, every in (({"every": 7, "stop_on": ["dead"]}, 7), (None, 50)):
        trainer = types.SimpleNamespace(log=print)
        (monitor,) = plugin.add_callbacks_post_trainer(arguments(lora_monitor=given), trainer)
        assert (monitor.every, monitor.log) == (every, print)
