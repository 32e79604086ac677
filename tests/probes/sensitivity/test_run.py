"""Layers adapted alone, against a training loop written without the package; gradients against
autograd in float64.
"""

import math
import re

import numpy as np
import pytest
import torch

import lora_diag
import lora_diag.models.training
from lora_diag.catalog import table
from lora_diag.errors import InputError
from lora_diag.models.activations import linear_layers
from lora_diag.models.data import read_texts
from lora_diag.models.opening import open_model
from lora_diag.probes.sensitivity import measure as sensitivity
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.running import probing
from tests import oracles
from tests.messages import assert_names
from tests.probes.making import (
    bert,
    diverge_at,
    gpt2,
    ids_of,
    lettered,
    opened,
    some_text,
    trained,
    training_case,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

RATES, STEPS, SEED = (1e-3, 3e-2), 4, 5


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return training_case(tmp_path_factory.mktemp("sensitivity"))


@pytest.fixture(scope="module")
def measured(case, tmp_path_factory):
    """Two layers at two ranks, with another seed at the best rate of each; and the file."""
    path = tmp_path_factory.mktemp("measured") / "s.jsonl"
    return lora_diag.probe_sensitivity(case[0], output=path, **options_of(case)), path


def options_of(case):
    """The options of ``measured``."""
    options = {
        "data": case[1],
        "eval": [case[2]],
        "shifted": [case[3]],
        "rank": 2,
        "delta": 1,
        "lr": RATES,
    }
    more = {
        "widen": 0,
        "steps": STEPS,
        "batch": 2,
        "repeats": 2,
        "seed": SEED,
        "layers": r"h\.1\.(attn|mlp)\.c_proj",
    }
    return options | more


def runs_of(found):
    return [record for record in found.whole if isinstance(record, Sensitivity)]


def losses_of(model, text):
    """Summed negative log-likelihood of each window."""
    with torch.no_grad():
        return np.array(
            [31 * model(one[None], labels=one[None]).loss.item() for one in ids_of(text)]
        )


def test_layer_runs_equal_plain_loop(case, measured):
    base, train, held, shifted = case
    runs = [record for record in runs_of(measured[0]) if record.unit]
    assert len(runs) == 2 * 2 * 2 * (2 + 1)
    before = {text.stem: losses_of(opened(base), text) for text in (held, shifted)}
    for record in runs:
        target = f".*{record.unit.removesuffix('.weight')}"
        text = held if record.set == "held_out" else shifted
        truth = trained(
            base,
            train,
            text,
            record.rank,
            record.lr,
            record.seed,
            STEPS,
            2,
            SEED,
            target_modules=target,
        )
        assert record.loss == pytest.approx(truth, abs=1e-4)
        assert record.gain == pytest.approx(
            before[record.set].sum() / (31 * len(before[record.set])) - truth, abs=1e-4
        )
        difference = before[record.set] - np.array(record.nll)
        error = oracles.error_of_mean(difference) / 31
        assert record.gain_error == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert record.params == record.rank * {"attn": 32, "mlp": 80}[record.unit.split(".")[-3]]


def test_best_rate_of_unit_and_rank_is_repeated(measured):
    runs = [record for record in runs_of(measured[0]) if record.unit and record.set == "held_out"]
    for unit in {record.unit for record in runs}:
        for rank in (2, 3):
            mine = [record for record in runs if (record.unit, record.rank) == (unit, rank)]
            best = min((r for r in mine if r.seed == SEED), key=lambda r: r.loss)
            assert [r.lr for r in mine if r.seed == SEED + 1] == [best.lr]


def in_float64(base, train):
    """The gradient of the mean loss over all windows, ``(out, in)``."""
    model, windows = opened(base).double(), ids_of(train)
    model(windows, labels=windows).loss.backward()
    return {
        name: p.grad.T.numpy()
        for name, p in model.named_parameters()
        if ".c_" in name and p.ndim == 2
    }


def test_first_order_scores_equal_float64_gradient(case, tmp_path):
    base, train, held, _ = case
    result = lora_diag.probe_sensitivity(
        base,
        data=train,
        eval=[held],
        rank=3,
        lr=(1e-2,),
        steps=4,
        batch=2,
        by="block",
        seed=SEED,
    )
    scores = {record.layer: record for record in result.whole if isinstance(record, FirstOrder)}
    truth = in_float64(base, train)
    assert set(scores) == set(truth)
    assert {r.unit for r in runs_of(result)} == {"", "transformer.h.0", "transformer.h.1"}
    rng = torch.Generator().manual_seed(0)
    for name, gradient in truth.items():
        record, (out, inputs) = scores[name], gradient.shape
        values = np.linalg.svd(gradient, compute_uv=False)
        assert record.shape == (out, inputs)
        assert record.sequences == 7
        assert record.gradient_fro == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        assert record.top == pytest.approx((values[:3] ** 2).sum(), rel=1e-4)
        # fresh factors as PEFT draws them: kaiming_uniform_(A, a=√5), B = 0
        reached, fallen = [], []
        for _ in range(400):
            a = (
                2 * torch.rand(3, inputs, generator=rng, dtype=torch.float64).numpy() - 1
            ) / math.sqrt(inputs)
            rows = np.linalg.qr(a.T)[0]
            reached.append(np.linalg.norm(gradient @ rows) ** 2)
            fallen.append(
                np.abs(2 * gradient @ a.T).sum()
            )  # scaling 2; Adam's first step is the sign of this
        assert record.fresh == pytest.approx(np.mean(reached), rel=0.08)
        assert record.adam == pytest.approx(np.mean(fallen), rel=0.08)


def test_gradients_leave_base_frozen_and_are_finite_or_error(case):
    model = open_model(case[0], torch.device("cpu"))
    texts = read_texts(case[1], model, 2)
    layers = {
        name: layer for name, layer in linear_layers(model.module).items() if "c_attn" in name
    }
    sensitivity.compute_gradients(model, layers, texts, 2, lambda: None)
    assert all(
        not weight.requires_grad and weight.grad is None for weight in model.module.parameters()
    )
    next(iter(layers.values())).weight.fill_(float("inf"))
    with pytest.raises(InputError, match="the gradient is not finite"):
        sensitivity.compute_gradients(model, layers, texts, 2, lambda: None)


def test_diverged_run_is_kept_without_loss_and_base_restored(case, monkeypatch):
    base, train, held, _ = case
    diverge_at(monkeypatch, 0.5)
    options = {"data": train, "eval": [held], "widen": 0, "steps": 3, "layers": r"h\.0\.attn"}
    result = lora_diag.probe_sensitivity(base, lr=(0.5, 1e-2), **options)
    lost = [record for record in runs_of(result) if record.unit and record.loss is None]
    assert {(r.lr, r.gain, r.nll) for r in lost} == {(0.5, None, ())}
    assert_names(table(result, 80), "2 losses")
    alone = lora_diag.probe_sensitivity(base, lr=(1e-2,), **options)
    fine = {record.unit: record.loss for record in runs_of(result) if record.lr == 1e-2}
    assert fine == {record.unit: record.loss for record in runs_of(alone) if record.unit}
    nothing = lora_diag.probe_sensitivity(base, lr=(0.5,), **options)
    assert "no run is finished" in table(nothing, 80)


def test_classifier_head_is_not_adapted(tmp_path):
    base = bert(tmp_path / "base")
    result = lora_diag.probe_sensitivity(
        base,
        data=lettered(tmp_path, "train", 6),
        eval=[lettered(tmp_path, "held", 6, 1)],
        lr=(1e-2,),
        steps=8,
        exclude="attention",
    )
    assert all(record.gain > 0 for record in runs_of(result) if record.unit)
    assert {item.layer: item.detail for item in result.left_out}[
        "classifier.weight"
    ] == "the head is not adapted"
    assert "bert.pooler.dense.weight" in {record.unit for record in runs_of(result)}


def test_reduced_run_divides_block_with_largest_gain(tmp_path, monkeypatch):
    """Blocks, with the options that the run states, and then the parts of the best one; by a plain
    loop.
    """
    monkeypatch.setattr(probing, "CPU_WORK", 1)
    base = gpt2(tmp_path / "base")
    train, held = some_text(tmp_path, "train", windows=9), some_text(tmp_path, windows=20)
    options = {"data": train, "eval": [held], "rank": 2, "batch": 4, "seed": SEED}
    found = lora_diag.probe_sensitivity(base, **options, output=tmp_path / "s.jsonl")
    smaller = {"by": "block", "steps": 3, "lr": (1e-2,), "widen": 0, "max_sequences": 8}
    explicit = runs_of(lora_diag.probe_sensitivity(base, **options, **smaller))
    runs = {record.unit: record for record in runs_of(found)}
    assert [*runs.values()][: len(explicit)] == explicit
    blocks, best = (
        [f"transformer.h.{depth}" for depth in range(2)],
        max(explicit[1:], key=lambda run: run.gain),
    )
    parts = [f"{best.unit}.attn", f"{best.unit}.mlp"]
    assert [*runs] == ["", *blocks, *parts]
    assert sorted(layer for part in parts for layer in runs[part].layers) == sorted(best.layers)
    assert len(found.run.settings["reduced"]) == len(smaller)
    windows = ids_of(held)[[i * 20 // 8 for i in range(8)]]
    spaced = tmp_path / "spaced.txt"
    spaced.write_bytes(bytes(windows.flatten().tolist()))
    for part in parts:
        target = rf"{re.escape(part)}\..*c_\w+"
        truth = trained(base, train, spaced, 2, 1e-2, SEED, 3, 4, SEED, target_modules=target)
        assert runs[part].loss == pytest.approx(truth, abs=1e-4)
    again = lora_diag.probe_sensitivity(base, **options, output=tmp_path / "s.jsonl", resume=True)
    assert again.whole == found.whole
    assert_names(table(found, 200), "--by block (of layer)", "parts of 1 block")
