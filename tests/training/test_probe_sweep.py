"""A sweep against a training loop written without the package, and what interrupting one leaves."""

import json
import math

import peft
import pytest
import torch
import transformers

import lora_diag
import lora_diag.training.sweep
from lora_diag.errors import InputError, UsageError
from lora_diag.reports.tables import table
from lora_diag.results import read_results
from tests.training.making import bert, gpt2, some_text

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def case(tmp_path):
    """BASE, a text to train on, one held out, one shifted."""
    return (
        gpt2(tmp_path / "base"),
        some_text(tmp_path, "train", windows=7),
        some_text(tmp_path, "held_out", windows=2, source="shifted"),
        some_text(tmp_path, "other", windows=3, source="shifted"),
    )


def ids_of(text, length=32):
    ids = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].view(-1, length)


def trained(base, train, held, rank, lr, seed, steps, batch, order):
    """The loss after training, by a plain loop."""
    windows = ids_of(train)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", fan_in_fan_out=True
    )
    model = peft.get_peft_model(model, config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    generator, pool = torch.Generator().manual_seed(order), []
    warmup = max(1, round(0.05 * steps))
    model.train()
    for step in range(steps):
        while len(pool) < batch:
            pool += torch.randperm(len(windows), generator=generator).tolist()
        chosen, pool = pool[:batch], pool[batch:]
        rise, fall = (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps - warmup)))
        optimizer.param_groups[0]["lr"] = lr * (rise if step < warmup else fall)
        optimizer.zero_grad()
        model(input_ids=windows[chosen], labels=windows[chosen]).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids_of(held), labels=ids_of(held)).loss.item()


def test_every_run_has_the_loss_of_a_plain_training_loop(case):
    base, train, held, shifted = case
    found = lora_diag.probe_sweep(
        base, data=train, evaluate=[held], shifted=[shifted], ranks=(1, 3), rates=(1e-3, 3e-2), steps=6, batch=2, seed=5
    )
    by_cell = {(r.rank, r.lr, r.seed, r.set): r.loss for r in found.whole}
    runs = {key[:3] for key in by_cell if key[0] is not None}
    assert len(runs) == 2 * 2 + 2
    assert {seed for _, _, seed in runs} == {5, 6}
    for rank, lr, seed in runs:
        for text in (held, shifted):
            truth = trained(base, train, text, rank, lr, seed, 6, 2, 5)
            assert by_cell[rank, lr, seed, text.stem] == pytest.approx(truth, abs=1e-4)
    for rank in (1, 3):
        best = min((1e-3, 3e-2), key=lambda lr: by_cell[rank, lr, 5, "held_out"])
        assert (rank, best, 6) in runs
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    with torch.no_grad():
        truth = model(input_ids=ids_of(held), labels=ids_of(held)).loss.item()
    assert found.whole[0].subject == "base"
    assert found.whole[0].loss == pytest.approx(truth, abs=1e-5)


def test_ctrl_c_leaves_a_file_that_goes_on_without_running_anything_twice(case, tmp_path):
    base, train, held, _ = case
    options = {"data": train, "evaluate": [held], "ranks": (1, 2), "rates": (1e-2, 3e-2), "steps": 3}
    lora_diag.probe_sweep(base, output=tmp_path / "whole.jsonl", **options)

    def stop_in_the_third_run(label, done, total):
        if label.startswith("r=2 lr=0.01") and done > 2:
            raise KeyboardInterrupt

    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        lora_diag.probe_sweep(base, output=cut, on_progress=stop_in_the_third_run, **options)
    assert [r.rank for r in read_results(cut).whole] == [None, 1, 1]
    labels, said = [], []
    lora_diag.probe_sweep(
        base,
        output=cut,
        resume=True,
        on_progress=lambda label, done, total: labels.append((label, done, total)),
        on_note=said.append,
        **options,
    )
    assert {label for label, *_ in labels if label.startswith("r=1")} <= {
        f"r=1 lr={lr} seed 1" for lr in ("0.01", "0.03")
    }
    assert said[0].startswith("about ")
    assert "4 runs of 3 steps" in said[0]
    assert cut.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_the_whole_bill_is_known_before_the_first_step(case):
    base, train, held, _ = case
    last = []
    lora_diag.probe_sweep(
        base,
        data=train,
        evaluate=[held],
        ranks=(1, 2),
        rates=(1e-2,),
        steps=3,
        on_progress=lambda label, done, total: last.append((done, total)),
    )
    assert last[-1][0] == last[-1][1] == len(last)


def test_a_run_that_diverges_is_told_and_the_rest_goes_on(case, monkeypatch):
    base, train, held, _ = case
    real = lora_diag.training.sweep.rate_at

    def rate_at(step, steps, peak):
        return math.nan if peak == 0.5 else real(step, steps, peak)

    monkeypatch.setattr(lora_diag.training.sweep, "rate_at", rate_at)
    found = lora_diag.probe_sweep(base, data=train, evaluate=[held], ranks=(1, 2), rates=(1e-2, 0.5), steps=3)
    assert {r.lr for r in found.whole if r.subject == "lora" and r.loss is None} == {0.5}
    assert {r.lr for r in found.whole if r.seed == 1} == {1e-2}
    shown = table(found, 80)
    assert "diverged" in shown
    assert "2 losses are not finite" in shown


def test_a_classifier_can_be_swept(tmp_path):
    base = bert(tmp_path / "base")
    for name, shift in (("train", 0), ("held", 1)):
        lines = ({"text": chr(97 + i % 3) * (4 + i + shift), "label": i % 3} for i in range(6))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = lora_diag.probe_sweep(
        base,
        data=tmp_path / "train.jsonl",
        evaluate=[tmp_path / "held.jsonl"],
        ranks=(1, 2),
        rates=(1e-2,),
        steps=20,
        targets=("query", "value"),
    )
    assert all(r.loss < found.whole[0].loss for r in found.whole[1:])
    assert found.run.settings["targets"] == ["query", "value"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": (0,)}, UsageError, "--ranks 0"),
        ({"rates": (0.0,)}, UsageError, "--lr 0"),
        ({"rates": (math.nan,)}, UsageError, "--lr nan"),
        ({"steps": 0}, UsageError, "--steps 0"),
        ({"seeds": 0}, UsageError, "--seeds 0"),
        ({"tolerance": 1.0}, UsageError, "--tolerance 1"),
        ({"targets": ("nobody",)}, InputError, "--target: PEFT cannot adapt"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(case, tmp_path, change, error, message):
    base, train, held, _ = case
    with pytest.raises(error, match=message):
        lora_diag.probe_sweep(base, data=train, evaluate=[held], output=tmp_path / "s.jsonl", **change)
    assert not (tmp_path / "s.jsonl").exists()


def test_evaluating_what_was_trained_on_is_refused(case):
    base, train, *_ = case
    with pytest.raises(UsageError, match="is the text that is trained on"):
        lora_diag.probe_sweep(base, data=train, evaluate=[train])
