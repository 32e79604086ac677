"""One search on a tiny model: what it writes, that its losses are those of a plain loop, and that it resumes."""

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

import lora_diag
from lora_diag.catalog import read_results
from lora_diag.decisions.tune.record import Tune, TuneDecision, TunePlan, TuneTrial
from lora_diag.decisions.tune.search import Tuner
from lora_diag.errors import UsageError
from tests.probes.making import gpt2, ids_of, some_text, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

OPTIONS = {"params": 4500, "ranks": (2, 8), "rates": (1e-2, 3e-2), "steps": 6, "repeats": 2, "batch": 4, "widen": 0}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """BASE, texts, a finished search, and its folder."""
    folder = tmp_path_factory.mktemp("tune")
    torch.manual_seed(0)
    base = gpt2(folder / "base")
    texts = {
        "data": some_text(folder, "train", windows=9),
        "evaluate": [some_text(folder, "held_out", windows=4, source="shifted")],
        "shifted": [some_text(folder, "other", windows=3, source="shifted")],
    }
    notes = []
    found = lora_diag.tune(base, folder / "run", on_note=notes.append, **texts, **OPTIONS)
    return base, texts, found, folder / "run", notes


def test_every_decision_is_on_record_and_told(case):
    _, _, found, folder, notes = case
    assert read_results(folder / "tune.jsonl") == found
    decisions = found.whole_of(TuneDecision)
    assert {"budget", "ranks", "redistribution", "stability"} <= {one.stage for one in decisions}
    assert len(notes) == len(decisions)
    (choice,) = found.whole_of(Tune)
    assert choice.rank in {2, 4, 8}
    assert choice.params <= choice.budget == 4500
    assert {one.variant for one in found.whole_of(TuneTrial)} >= {"base", "full", "uniform-r2", "uniform-r8"}


def test_losses_are_those_of_a_plain_loop(case):
    base, texts, found, _, _ = case
    held = texts["evaluate"][0]
    of_held = [one for one in found.whole_of(TuneTrial) if one.set == "held_out" and one.lr is not None]
    for one in of_held:
        if one.variant in {"uniform-r2", "uniform-r8", "full"}:
            what = "full" if one.variant == "full" else int(one.variant.removeprefix("uniform-r"))
            truth = trained(base, texts["data"], held, what, one.lr, one.seed, 6, 4, 0)
            assert one.loss == pytest.approx(truth, abs=1e-4)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    with torch.no_grad():
        truth = model(input_ids=ids_of(held), labels=ids_of(held)).loss.item()
    (choice,) = found.whole_of(Tune)
    assert choice.base_loss == pytest.approx(truth, abs=1e-5)
    mine = [o.loss for o in of_held if (o.variant, o.lr) == (choice.variant, choice.lr)]
    assert choice.gain == pytest.approx(choice.base_loss - sum(mine) / len(mine))


def test_the_folder_holds_an_adapter_that_peft_loads(case):
    """Its loss is that of the first seed, and its ranks are those of the config."""
    base, texts, found, folder, _ = case
    (choice,) = found.whole_of(Tune)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == json.loads((folder / "adapter" / "adapter_config.json").read_text())
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    ids = ids_of(texts["evaluate"][0])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    trials = [o for o in found.whole_of(TuneTrial) if (o.variant, o.lr) == (choice.variant, choice.lr)]
    assert loss == pytest.approx(next(o.loss for o in trials if o.set == "held_out" and o.seed == 0), abs=1e-5)
    weights = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    assert weights == choice.params
    assert all(rank == choice.rank for rank in choice.ranks.values()) or choice.variant != f"uniform-r{choice.rank}"
    names = {"report.html", "gate.toml", "commands.sh", "config.axolotl.yaml", "config.llamafactory.yaml"}
    assert names <= {path.name for path in folder.iterdir()}
    assert lora_diag.gate(folder / "gate.toml", folder / "spectrum.jsonl").whole
    compile((folder / "config.trl.py").read_text(), "config.trl.py", "exec")


def test_non_uniform_ranks_have_the_same_budget_and_seeds(case):
    _, _, found, _, _ = case
    (choice,) = found.whole_of(Tune)
    trials = found.whole_of(TuneTrial)
    uniform = next(one.params for one in trials if one.variant == f"uniform-r{choice.rank}")
    others = [one for one in trials if one.variant in {"prior", "marginal"}]
    assert others
    assert all(one.params <= uniform for one in others)
    shared = {one.seed for one in trials if one.variant == f"uniform-r{choice.rank}"}
    assert {one.seed for one in others} <= shared


def test_an_interrupted_search_goes_on_and_comes_to_the_same(case, tmp_path):
    base, texts, found, folder, _ = case
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    lines = (run / "tune.jsonl").read_text().splitlines(keepends=True)
    decided = next(i for i, line in enumerate(lines) if '"stage":"redistribution"' in line.replace(" ", ""))
    (run / "tune.jsonl").write_text("".join(lines[:decided]))
    with pytest.raises(UsageError, match="--resume"):
        lora_diag.tune(base, run, **texts, **OPTIONS)
    labels = []
    again = lora_diag.tune(
        base, run, resume=True, on_progress=lambda event: labels.append(event.label), **texts, **OPTIONS
    )
    assert again == found
    assert not [label for label in labels if label.startswith("r=")]  # the sweep is not trained again


def test_nothing_is_written_before_the_plan_is_confirmed(case, tmp_path):
    base, texts, *_ = case
    seen = []
    for options in ({"on_plan": lambda plan: bool(seen.append(plan))}, {"dry_run": True}):
        found = lora_diag.tune(base, tmp_path / "run", **texts, **OPTIONS, **options)
        assert found.end is None
        assert [type(one) for one in found.whole] == [TunePlan]
        assert not (tmp_path / "run").exists()
    assert seen[0].largest == 4500 // seen[0].per_rank
    per_rank = 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    assert seen[0].per_rank == per_rank
    with pytest.raises(UsageError, match="not even r=1"):
        lora_diag.tune(base, tmp_path / "run", **texts, **OPTIONS | {"params": per_rank - 1})
    with pytest.raises(UsageError, match="even the smallest search"):
        lora_diag.tune(base, tmp_path / "run", time="0.01s", **texts, **OPTIONS)


def test_the_command_needs_a_confirmation(loradiag, case):
    base, texts, *_ = case
    words = ["tune", base, "--data", texts["data"], "--eval", texts["evaluate"][0], "--params", "4k", "-o", "run"]
    refused = loradiag(*words)
    assert refused.code == 2
    assert "--yes" in refused.err


def test_a_time_limit_ends_the_search_and_an_adapter_is_written(case, tmp_path, monkeypatch):
    """Time is up when the pilot of non-uniform ranks begins: what is left is named, and uniform ranks are written."""
    base, texts, *_ = case
    began = []
    original = Tuner.left.fget
    monkeypatch.setattr(Tuner, "left", property(lambda self: -1.0 if began else original(self)))
    found = lora_diag.tune(
        base, tmp_path / "run", time="1h", on_progress=lambda e: began.extend([1] * e.label.startswith("pilot")),
        **texts, **OPTIONS | {"ranks": (2, 4), "repeats": 1, "no_full": True},
    )  # fmt: skip
    (choice,) = found.whole_of(Tune)
    outcomes = {one.name: one.outcome for one in found.whole_of(TuneDecision)}
    assert outcomes["non-uniform ranks"] == "not tried"
    assert "kept" not in outcomes.values()
    assert choice.variant.startswith("uniform")
    assert not choice.significant
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_ranks_are_not_redistributed_where_none_gains():
    """By hand: two matrices and no gain, two and a gain, one matrix."""

    def reason(matrices, word):
        tuner = SimpleNamespace(target=SimpleNamespace(shapes=dict.fromkeys(range(matrices))))
        swept = SimpleNamespace(verdict=SimpleNamespace(word=word))
        return Tuner._no_redistribution(tuner, SimpleNamespace(name="uniform-r2"), swept)

    assert "no rank lowers the loss" in reason(2, "no gain")
    assert reason(2, "fast saturation") == ""
    assert "one matrix" in reason(1, "fast saturation")
