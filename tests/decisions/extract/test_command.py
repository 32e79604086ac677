"""``loradiag extract`` as a user runs it."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import DATA, ROOT, save_model
from tests.messages import assert_names, mentions
from tests.oracles import best_approximation

pytestmark = pytest.mark.slow


def change_of(before, after, name):
    return after[name].double().numpy() - before[name].double().numpy()


def test_adapter_table_and_card(run, pair_of_models, tmp_path):
    base, tuned, before, after = pair_of_models
    ran = run("extract", base, tuned, "--rank", "3", "-o", "adapter")
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "extraction.jsonl"
    ]  # fmt: skip
    assert not (tmp_path / "adapter.part").exists()
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    b, a = (
        factors[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "BA"
    )
    change = change_of(before, after, f"{name}.weight")
    assert np.linalg.norm(b @ a - best_approximation(change, 3)) < 1e-6 * np.linalg.norm(change)
    whole = [change_of(before, after, key) for key in before if before[key].ndim == 2]
    gap = sum(np.linalg.norm(change - best_approximation(change, 3)) ** 2 for change in whole)
    epsilon = np.sqrt(gap / sum(np.linalg.norm(change) ** 2 for change in whole))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert f"ε = {epsilon:.3g}" in card


def test_extract_then_spectrum_then_residual(run, pair_of_models, tmp_path):
    """The adapter's singular values are the r largest of the update, and its distance is the
    smallest possible.
    """
    base, tuned, *_ = pair_of_models
    assert run("extract", base, tuned, "--rank", "4", "-o", "adapter", "-q").code == 0
    full = {
        r["layer"]: r
        for r in run("spectrum", base, tuned, "--json").records
        if r["record"] == "spectrum"
    }
    kept = {
        r["layer"]: r
        for r in run("spectrum", base, "adapter", "--json").records
        if r["record"] == "spectrum"
    }
    assert kept.keys() == full.keys()
    for layer, record in kept.items():
        assert record["s"] == pytest.approx(full[layer]["s"][:4], rel=1e-5)
    residual = [
        r
        for r in run("residual", base, tuned, "adapter", "--json").records
        if r["record"] == "residual"
    ]
    matrices = [record for record in residual if record["layer"] in full]
    assert len(matrices) == len(full)
    for record in matrices:
        assert record["epsilon"] == pytest.approx(record["epsilon_min"], abs=1e-5)


def test_same_command_gives_same_bytes(run, pair_of_models, tmp_path):
    base, tuned, *_ = pair_of_models
    for name, workers in (("one", "1"), ("two", "2")):
        words = ("--energy", "0.8", "-o", name, "--workers", workers, "-q")
        assert run("extract", base, tuned, *words).code == 0
    for file in ("adapter_model.safetensors", "adapter_config.json", "extraction.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), (
            file
        )


def test_output_that_would_be_lost_is_kept(run, pair_of_models, tmp_path):
    base, tuned, *_ = pair_of_models
    words = ("extract", base, tuned, "--rank", "2", "-q")
    assert run(*words).code == 2
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("ten years")
    for output in ("notes", "."):  # files, links and other folders: test_outputs
        assert run(*words, "-o", output, "--overwrite").code == 2
    assert (tmp_path / "notes" / "thesis.tex").read_text() == "ten years"
    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (trained / name).write_text("a week on eight GPUs")
    assert "is not an extraction" in run(*words, "-o", "trained", "--overwrite").err
    assert (trained / "adapter_model.safetensors").read_text() == "a week on eight GPUs"
    assert run(*words, "-o", "adapter").code == 0
    assert "--overwrite" in run(*words, "-o", "adapter").err
    assert (
        "is an input"
        in run("extract", base, "adapter", "--rank", "1", "-o", "adapter", "--overwrite").err
    )
    assert (
        run("extract", base, tuned, "--rank", "5", "-q", "-o", "adapter", "--overwrite").code == 0
    )
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "base",
        "notes",
        "trained",
        "tuned",
    ]


def test_non_finite_layer_is_named_and_not_written(run, pair_of_models, tmp_path):
    base, _, _, after = pair_of_models
    name = "model.layers.0.mlp.up_proj.weight"
    after[name][2, 3] = float("nan")
    tuned = save_model(tmp_path / "broken", after)
    ran = run("extract", base, tuned, "--rank", "2", "-o", "adapter")
    assert ran.code == 3
    assert_names(ran.err, name, "TUNED", "[2, 3]")
    assert_names(ran.out, "‖Δ‖²", "measured layers")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(keys) == 18
    assert not any("layers.0.mlp.up_proj" in key for key in keys)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "up_proj" not in config["target_modules"]
    assert "model.layers.1.mlp.up_proj" in config["target_modules"]


def test_empty_extraction_is_an_error(run, pair_of_models, tmp_path):
    base, _, _, after = pair_of_models
    ran = run("extract", base, base, "--rank", "2", "-o", "adapter")
    assert ran.code == 4
    assert_names(ran.err, "update", "zero")
    for tensor in after.values():
        tensor.fill_(float("inf"))
    ran = run("extract", base, save_model(tmp_path / "inf", after), "--rank", "2", "-o", "adapter")
    assert ran.code == 3
    assert_names(ran.err, "TUNED", "inf")
    assert not list(tmp_path.glob("adapter*"))


def test_rounded_away_update_is_reported_without_signal_option(run, tmp_path):
    torch.manual_seed(0)
    before = {f"layer.{i}.weight": (torch.randn(48, 64) * 0.02).bfloat16() for i in range(2)}
    change = torch.randn(48, 2) @ torch.randn(2, 64) * 4e-6
    save_model(tmp_path / "base", before)
    save_model(
        tmp_path / "tuned", {name: (w.float() + change).bfloat16() for name, w in before.items()}
    )
    ran = run("extract", "base", "tuned", "--rank", "2", "-o", "adapter")
    assert ran.code == 0, ran.err
    assert_names(ran.out, "rounding noise")
    assert "--signal" not in ran.out
    ran = run("extract", "base", "tuned", "--signal", "-o", "other")
    assert (ran.code, (tmp_path / "other").exists()) == (4, False)


def test_resume_detects_missing_factors(pair_of_models, run, tmp_path):
    """A record without its factors is no adapter."""
    base, tuned, *_ = pair_of_models
    assert run("extract", base, tuned, "--rank", "3", "-q", "-o", "adapter").code == 0
    part = tmp_path / "adapter.part"
    (part / "factors").mkdir(parents=True)
    (part / "extraction.jsonl").write_bytes(
        (tmp_path / "adapter" / "extraction.jsonl").read_bytes()
    )
    again = ("extract", base, tuned, "-q", "-o", "adapter", "--resume", "--overwrite")
    assert run(*again, "--rank", "4").code == 2
    ran = run(*again, "--rank", "3")
    assert ran.code == 3
    assert "adapter.part/factors/000000.safetensors" in ran.err
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["notes.md", "factors/notes.md"])
def test_resume_refuses_folder_with_foreign_file(pair_of_models, run, tmp_path, name):
    """An extraction without factors deletes its folder, and a finished one the factors of its
    layers.
    """
    base, tuned, *_ = pair_of_models
    notes = tmp_path / "adapter.part" / name
    (tmp_path / "adapter.part" / "factors").mkdir(parents=True)
    notes.write_text("ten years")
    (tmp_path / "adapter.part" / ".README.md.1").write_text("left by a killed process")
    for update in (base, tuned):
        ran = run("extract", base, update, "--rank", "2", "-o", "adapter", "--resume")
        assert ran.code == 2
        assert_names(ran.err, name)
    assert notes.read_text() == "ten years"
    notes.unlink()
    assert run("extract", base, tuned, "--rank", "2", "-o", "adapter", "--resume").code == 0


def test_budget_is_not_exceeded(run, pair_of_models, tmp_path):
    base, tuned, *_ = pair_of_models
    ran = run("extract", base, tuned, "--params", "400", "-o", "adapter", "--json")
    assert ran.code == 0, ran.err
    spent = sum(record["params"] for record in ran.records if record["record"] == "extraction")
    assert 300 < spent <= 400
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == spent
    assert not list(tmp_path.glob("*.part"))


def test_portable_budget_pays_for_padding(run, pair_of_models, tmp_path):
    base, tuned, *_ = pair_of_models
    ran = run("extract", base, tuned, "--params", "400", "--portable", "-o", "adapter")
    assert ran.code == 0, ran.err
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    written = sum(tensor.numel() for tensor in tensors.values())
    assert 200 < written <= 400
    assert_names(ran.out, f"{written} parameters")
    ran = run("extract", base, tuned, "--energy", "0.6", "--portable", "-o", "padded")
    tensors = load_file(tmp_path / "padded" / "adapter_model.safetensors")
    assert_names(ran.out, f"{sum(tensor.numel() for tensor in tensors.values())} parameters")
    assert_names(ran.out, "padded from")


def test_ranks_of_another_model_are_refused(run, pair_of_models, tmp_path):
    base, tuned, *_ = pair_of_models
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ran = run("extract", base, tuned, "--allocation", "adapter_config.json", "-o", "adapter")
    assert ran.code == 3
    assert_names(ran.err, "target_modules")
    config |= {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ran = run(
        "extract", base, tuned, "--allocation", "adapter_config.json", "-o", "adapter", "--json"
    )
    ranks = {r["layer"]: r["rank"] for r in ran.records if r["record"] == "extraction"}
    assert ranks == {
        "model.layers.0.self_attn.q_proj.weight": 4, "model.layers.1.self_attn.q_proj.weight": 4,
        "model.layers.0.mlp.up_proj.weight": 4, "model.layers.1.mlp.up_proj.weight": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "case", ["full-ft", "moe-full-ft", "vocab-resized", "bitfit-like", "sharded-base"]
)
def test_extract_recovers_shared_cases(run, case, tmp_path):
    folder = DATA / "cases" / case
    tuned = next(
        folder / name for name in ("merged", "tuned", "adapter") if (folder / name).is_dir()
    )
    ran = run(
        "extract",
        folder / "base",
        tuned,
        "--rank",
        "100",
        "--unfactored",
        "save",
        "-o",
        "adapter",
        "--json",
    )
    if case == "bitfit-like":
        assert (ran.code, mentions(ran.err, "update", "zero")) == (4, True)
        return
    assert ran.code == 0, ran.err
    truth = json.loads((folder / "truth.json").read_text())
    for record in ran.records:
        if record["record"] == "extraction":
            assert record["epsilon"] < 1e-5
            assert record["fro"] == pytest.approx(truth[record["layer"]]["fro"], rel=1e-4)


def test_docs_show_what_is_printed(loradiag, tmp_path):
    """tools/refresh.py runs commands in the repository; this one writes, so it runs here."""
    page = (ROOT / "docs" / "reference" / "extract.md").read_text(encoding="utf-8")
    words, shown = re.search(r"<!-- shown: (.*?) -->\n(.*?)<!-- end -->", page, re.DOTALL).groups()
    (tmp_path / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")
    printed = loradiag(*words.split(), env={"COLUMNS": "80"}, brief=True).out.strip("\n")
    assert shown == f"```console\n$ loradiag {words}\n{printed}\n```\n"


def test_too_small_budget_keeps_spectra(run, pair_of_models, tmp_path):
    base, tuned, *_ = pair_of_models
    ran = run("extract", base, tuned, "--params", "3", "-o", "adapter")
    assert ran.code == 2
    assert_names(ran.err, "spectra", "kept")
    assert_names(ran.err, "--resume", "budget")
    again = ("extract", base, tuned, "-o", "adapter")
    assert run(*again, "--params", "400").code == 2
    assert run(*again, "--params", "400", "--exclude", "q_proj", "--resume").code == 2
    assert run("extract", base, tuned, "--params", "400", "-o", "adapter", "--resume").code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("adapter")] == [
        "adapter"
    ]
