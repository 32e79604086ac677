"""A sweep against a training loop written without the package, and what interrupting one leaves."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import lora_diag
import lora_diag.models.training
import lora_diag.running.probing
from lora_diag.catalog import read_results, table
from lora_diag.errors import InputError, UsageError
from lora_diag.models.opening import keep_open
from lora_diag.models.training import train_in_place
from lora_diag.probes.sweep.measure import round_weights, to_int8, to_nf4
from lora_diag.probes.sweep.verdict import best_rates
from tests.messages import assert_names, raises_naming
from tests.probes.making import bert, diverge_at, lettered, loss_of, opened, trained, training_case

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def case(tmp_path):
    return training_case(tmp_path)


def test_sweep_runs_equal_plain_training_loop(case):
    base, train, held, shifted = case
    options = {
        "data": train,
        "eval": [held],
        "shifted": [shifted],
        "ranks": (1, 3),
        "lr": (1e-3, 3e-2),
    }
    result = lora_diag.probe_sweep(base, widen=1, steps=6, batch=2, seed=5, **options)
    by_cell = {(r.rank, r.lr, r.seed, r.set): r.loss for r in result.whole}
    runs = {key[:3] for key in by_cell if key[0] is not None}
    assert len(runs) == 2 * (2 + 1 + 1)
    assert table(result, 200)
    assert {seed for _, _, seed in runs} == {5, 6}
    for rank, lr, seed in runs:
        for text in (held, shifted):
            truth = trained(base, train, text, rank, lr, seed, 6, 2, 5)
            assert by_cell[rank, lr, seed, text.stem] == pytest.approx(truth, abs=1e-4)
    for rank in (1, 3):
        of_grid = min((1e-3, 3e-2), key=lambda lr: by_cell[rank, lr, 5, "held_out"])
        tried = {1e-3, 3e-2, 3e-4 if of_grid == 1e-3 else 0.1}
        assert {lr for r, lr, seed in runs if (r, seed) == (rank, 5)} == tried
        best = min(tried, key=lambda lr: by_cell[rank, lr, 5, "held_out"])
        assert (rank, best, 6) in runs
    assert result.whole[0].subject == "base"
    assert result.whole[0].loss == pytest.approx(loss_of(opened(base), held), abs=1e-5)


def test_finished_sweep_accepts_seeds_ranks_and_rates(case, tmp_path):
    base, train, held, _ = case
    options = {
        "data": train,
        "eval": [held],
        "steps": 3,
        "widen": 1,
        "output": tmp_path / "s.jsonl",
    }
    first = lora_diag.probe_sweep(base, ranks=(1,), lr=(1e-2, 3e-2), repeats=1, **options)
    labels, more = [], {"ranks": (2,), "lr": (3e-3,), "repeats": 2, "resume": True}

    def stop(event):
        if event.label.startswith("r=2 lr=0.01"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # what was there stays until the longer run is whole
        lora_diag.probe_sweep(base, on_progress=stop, **more, **options)
    assert read_results(tmp_path / "s.jsonl").whole == first.whole
    grown = lora_diag.probe_sweep(
        base, on_progress=lambda event: labels.append(event.label), **more, **options
    )
    wanted = {"ranks": [1, 2], "lr": [3e-3, 1e-2, 3e-2], "repeats": 2}
    assert {key: grown.run.settings[key] for key in wanted} == wanted
    assert grown.whole[: len(first.whole)] == first.whole
    assert read_results(tmp_path / "s.jsonl") == grown
    assert not (tmp_path / "s.jsonl.part").exists()
    rates = best_rates(grown.whole, "held_out", 0)
    ran = {(r.rank, r.lr, r.seed) for r in grown.whole if r.subject == "lora"}
    assert {(rank, lr, seed) for rank, lr in rates.items() for seed in (0, 1)} <= ran
    assert {(rank, lr, 0) for rank in (1, 2) for lr in wanted["lr"]} <= ran
    assert len(ran) == len([r for r in grown.whole if r.subject == "lora"])
    at_once = lora_diag.probe_sweep(base, **{**options, **wanted, "output": None})
    key = {(r.rank, r.lr, r.seed): r.loss for r in grown.whole}
    for record in at_once.whole:  # beyond the edge of the smaller grid there may be more
        assert key[record.rank, record.lr, record.seed] == record.loss
    labels.clear()  # less than there is asks for nothing
    repeated = lora_diag.probe_sweep(
        base,
        ranks=(1,),
        lr=(1e-2,),
        resume=True,
        on_progress=lambda event: labels.append(event.label),
        **options,
    )
    assert (labels, repeated) == ([], grown)
    with pytest.raises(UsageError, match=r"other settings \(.*steps"):
        lora_diag.probe_sweep(base, **{**options, **more, "steps": 4})


def test_finished_sweep_accepts_full_and_further_rates(case, tmp_path):
    base, train, held, _ = case
    options = {
        "data": train,
        "eval": [held],
        "ranks": (1,),
        "lr": (1e-2,),
        "steps": 2,
        "repeats": 1,
    }
    first = lora_diag.probe_sweep(base, widen=0, output=tmp_path / "s.jsonl", **options)
    more = {"widen": 1, "full": True, "full_lr": (1e-3,)}
    grown = lora_diag.probe_sweep(base, resume=True, output=tmp_path / "s.jsonl", **options, **more)
    at_once = lora_diag.probe_sweep(base, **options, **more)
    assert grown.whole[: len(first.whole)] == first.whole
    assert {(r.subject, r.lr): r.loss for r in grown.whole} == {
        (r.subject, r.lr): r.loss for r in at_once.whole
    }
    assert grown.run.settings == at_once.run.settings
    assert any(r.subject == "full" for r in grown.whole)


def test_diverged_run_is_reported_and_others_continue(case, monkeypatch):
    base, train, held, _ = case
    diverge_at(monkeypatch, 0.5)
    options = {"ranks": (1, 2), "lr": (1e-2, 0.5), "widen": 0, "steps": 3}
    result = lora_diag.probe_sweep(base, data=train, eval=[held], **options)
    assert {r.lr for r in result.whole if r.subject == "lora" and r.loss is None} == {0.5}
    assert {r.lr for r in result.whole if r.seed == 1} == {1e-2}
    shown = table(result, 80)
    assert "diverged" in shown
    assert_names(shown, "2 losses")


def test_classifier_can_be_swept(tmp_path):
    base = bert(tmp_path / "base")
    result = lora_diag.probe_sweep(
        base,
        data=lettered(tmp_path, "train", 6),
        eval=[lettered(tmp_path, "held", 6, 1)],
        ranks=(1, 2),
        lr=(1e-2,),
        steps=20,
        target_modules=("query", "value"),
    )
    assert all(r.loss < result.whole[0].loss for r in result.whole[1:])
    assert result.run.settings["target_modules"] == ["query", "value"]


def state_of(model):
    content = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def test_reference_lines_equal_plain_loop_and_restore_base(case, monkeypatch):
    base, train, held, _ = case
    models, real = [], lora_diag.running.probing.open_model
    monkeypatch.setattr(
        lora_diag.running.probing, "open_model", lambda *a: models.append(real(*a)) or models[0]
    )
    result = lora_diag.probe_sweep(
        base,
        data=train,
        eval=[held],
        ranks=(2,),
        lr=(1e-2,),
        full=True,
        full_lr=(1e-3, 1e-2),
        widen=0,
        bitfit=True,
        quantized="int8",
        steps=5,
        batch=2,
        seed=3,
    )
    lines = [record for record in result.whole if record.subject in {"full", "bitfit"}]
    assert sorted((r.subject, r.lr, r.seed) for r in lines)[:2] == [
        ("bitfit", 1e-2, 3),
        ("bitfit", 1e-2, 4),
    ]
    assert len(lines) == 2 + 3
    for record in lines:
        truth = trained(base, train, held, record.subject, record.lr, record.seed, 5, 2, 3)
        assert record.loss == pytest.approx(truth, abs=1e-4)
        assert record.rank is None
    module = models[0].module
    assert state_of(module) == state_of(transformers.GPT2LMHeadModel.from_pretrained(base))
    assert not any(parameter.requires_grad for parameter in module.parameters())
    shown = table(result, 100)
    assert "To full" in shown
    assert "BASE int8" in shown


NF4 = json.loads(
    "[-1.0,-0.6961928009986877,-0.5250730514526367,-0.39491748809814453,-0.28444138169288635,-0.18477343022823334,"
    "-0.09105003625154495,0.0,0.07958029955625534,0.16093020141124725,0.24611230194568634,0.33791524171829224,"
    "0.44070982933044434,0.5626170039176941,0.7229568362236023,1.0]"
)


def rounded_nf4(weight):
    """Nearest level, entry by entry."""
    flat = weight.double().numpy().reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        levels = np.array(NF4) * largest
        out[start : start + 64] = [levels[np.abs(levels - value).argmin()] for value in block]
    return torch.from_numpy(out.reshape(weight.shape)).float()


def rounded_int8(weight):
    """Round half to even of 127·w over the largest magnitude of its row."""
    rows = weight.double().numpy()
    largest = np.abs(rows).max(1, keepdims=True)
    return torch.from_numpy(np.round(127 * rows / largest) * largest / 127).float()


@pytest.mark.parametrize(("grid", "oracle"), [("nf4", rounded_nf4), ("int8", rounded_int8)])
def test_rounded_weights_are_nearest_grid_values(grid, oracle):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(37, 11), torch.nn.Linear(64, 3)]
    before = [layer.weight.detach().clone() for layer in layers]
    with round_weights(layers, grid):
        for layer, weight in zip(layers, before, strict=True):
            torch.testing.assert_close(layer.weight.detach(), oracle(weight), rtol=1e-6, atol=0)
    assert all(
        torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True)
    )


def test_row_of_zeros_rounds_to_zeros():
    for to_grid in (to_nf4, to_int8):
        assert torch.equal(to_grid(torch.zeros(2, 64)), torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("options", "of_peft"),
    [
        ({"dora": True}, {"use_dora": True}),
        ({"rslora": True}, {"use_rslora": True, "lora_alpha": 16}),
        ({"quantized": "nf4"}, {}),
    ],
    ids=str,
)
def test_lora_variants_equal_peft(case, options, of_peft):
    base, train, held, _ = case
    result = lora_diag.probe_sweep(
        base,
        data=train,
        eval=[held],
        ranks=(2,),
        lr=(1e-2,),
        steps=4,
        batch=2,
        repeats=1,
        **options,
    )

    def change(model):
        for module in model.modules() if options.get("quantized") else ():
            if type(module).__name__ == "Conv1D":
                module.weight.data = rounded_nf4(module.weight.data.T.contiguous()).T.contiguous()

    truth = trained(base, train, held, 2, 1e-2, 0, 4, 2, 0, change, **of_peft)
    record = result.whole[-1]
    assert record.loss == pytest.approx(truth, abs=1e-4)
    plain = trained(base, train, held, 2, 1e-2, 0, 4, 2, 0)
    assert abs(plain - truth) > 1e-3 or options.get("quantized") or options.get("dora")
    if "quantized" in options:
        model = opened(base)
        change(model)
        assert result.whole[1].loss == pytest.approx(loss_of(model, held), abs=1e-5)
        assert (result.whole[1].subject, result.whole[1].name) == ("base", "nf4")


def test_gradient_checkpointing_runs_blocks_twice_per_step(case, tmp_path, monkeypatch):
    """In the same model, with dropout: losses are the same, and a later run is not checkpointed."""
    base, train, held, _ = case
    options = {
        "data": train,
        "eval": [held],
        "ranks": (2,),
        "lr": (1e-2,),
        "full": True,
        "full_lr": (1e-3,),
    }
    options |= {
        "steps": 3,
        "batch": 2,
        "repeats": 1,
        "widen": 0,
        "output": tmp_path / "s.jsonl",
        "overwrite": True,
    }
    block, calls = transformers.models.gpt2.modeling_gpt2.GPT2MLP, []
    forward = block.forward
    monkeypatch.setattr(
        block,
        "forward",
        lambda self, *given: (calls.append(self.training), forward(self, *given))[1],
    )
    result, counts = {}, {}
    with keep_open():
        for on in (True, False):
            result[on] = lora_diag.probe_sweep(base, gradient_checkpointing=on, **options)
            counts[on] = sum(calls)
            calls.clear()
    assert counts == {
        True: 2 * counts[False],
        False: 2 * (2 + 3) * 2,
    }  # blocks x (timed + trained) x (LoRA, full)
    assert [r.loss for r in result[True].whole] == pytest.approx(
        [r.loss for r in result[False].whole], abs=1e-6
    )
    assert len({r.loss for r in result[True].whole}) == 3
    assert [result[on].run.settings.get("gradient_checkpointing") for on in (True, False)] == [
        True,
        None,
    ]
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "supports_gradient_checkpointing", False)
    with raises_naming(UsageError, "GPT2LMHeadModel"):
        lora_diag.probe_sweep(
            base, gradient_checkpointing=True, **options | {"output": tmp_path / "other.jsonl"}
        )
    assert not (tmp_path / "other.jsonl").exists()


def test_missing_vectors_are_no_fault_of_an_option():
    """``tune`` trains biases and norms, too, and has no --bitfit."""
    model = SimpleNamespace(module=torch.nn.Linear(2, 2, bias=False))
    with (
        raises_naming(InputError, "no biases or norms") as caught,
        train_in_place(model, only_vectors=True),
    ):
        pass
    assert "--" not in str(caught.value)


def test_resume_requires_same_trained_parameters(case, tmp_path):
    base, train, held, _ = case
    options = {
        "data": train,
        "eval": [held],
        "ranks": (1,),
        "lr": (1e-2,),
        "steps": 2,
        "full": True,
    }
    options |= {"full_lr": (1e-3,), "output": tmp_path / "s.jsonl"}

    def stop(event):
        if event.label.startswith("full"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_diag.probe_sweep(base, on_progress=stop, **options)
    for change in (
        {"dora": True},
        {"rslora": True},
        {"quantized": "nf4"},
        {"bitfit": True},
        {"full": False},
    ):
        with raises_naming(UsageError, "started", "settings"):
            lora_diag.probe_sweep(base, resume=True, **(options | change))
    labels = []
    lora_diag.probe_sweep(
        base, resume=True, on_progress=lambda event: labels.append(event.label), **options
    )
    assert {label.split()[0] for label in labels} == {"full"}
    whole = lora_diag.probe_sweep(base, **(options | {"output": None}))
    assert read_results(tmp_path / "s.jsonl").whole == whole.whole
