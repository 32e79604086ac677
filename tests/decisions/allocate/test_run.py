"""``lora_diag.allocate``: its inputs, budgets in words, weights, and what it writes."""

import json
from dataclasses import replace

import pytest

import lora_diag
from lora_diag.catalog import read_results_of
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.allocate.run import write_allocation
from lora_diag.errors import InputError, UsageError
from tests.conftest import DATA, ROOT
from tests.decisions.allocate.records import llama, results
from tests.messages import raises_naming

SPECTRA = results(*llama(3))


def test_file_and_results_in_memory_give_same(tmp_path):
    SPECTRA.write(tmp_path / "s.jsonl")
    by_file = lora_diag.allocate(tmp_path / "s.jsonl", params=2000)
    in_memory = lora_diag.allocate(SPECTRA, params=2000)
    assert (by_file.layers, by_file.whole) == (in_memory.layers, in_memory.whole)
    assert by_file.run.inputs[1:] == SPECTRA.run.inputs


def test_written_then_read_is_equal(tmp_path):
    result = lora_diag.allocate(SPECTRA, params="2k", allowed_ranks=[8, 2, 4])
    write_allocation(result, tmp_path / "a.jsonl")
    read = read_results_of(Allocation, tmp_path / "a.jsonl")
    assert replace(read, end=read.end.model_copy(update={"sha256": ""})) == result
    write_allocation(result, tmp_path / "a.jsonl")  # again, over itself
    assert not list(tmp_path.glob(".*"))


def test_budgets_as_text_and_numbers():
    by_words = lora_diag.allocate(SPECTRA, params="2k")
    assert by_words.layers == lora_diag.allocate(SPECTRA, params=2000).layers
    by_memory = lora_diag.allocate(SPECTRA, memory_budget="32kB")
    assert by_memory.layers == by_words.layers
    assert lora_diag.allocate(SPECTRA, memory_budget=32_000).layers == by_words.layers
    tight = lora_diag.allocate(
        SPECTRA, memory_budget="32kB", optimizer="sgd", adapter_dtype="bfloat16"
    )
    assert tight.layers == lora_diag.allocate(SPECTRA, params=8000).layers != by_words.layers


def test_written_parameter_count_equals_adapter():
    spectra = lora_diag.spectrum(
        ROOT / "sample_checkpoints/base", ROOT / "sample_checkpoints/full_ft", top=20
    )
    result = lora_diag.allocate(spectra, match=ROOT / "sample_checkpoints/lora_r4")
    assert result.whole[0].budget == 4 * sum(sum(layer.shape) for layer in result)
    assert result.whole[0].spent <= result.whole[0].budget
    assert result.whole[0].baselines[0].name == "uniform r=4"
    with pytest.raises(InputError, match="no such file"):
        lora_diag.allocate(spectra, match="nothing/here")


def test_adapter_without_factors_cannot_be_matched():
    with raises_naming(InputError, "known size"):
        lora_diag.allocate(SPECTRA, match=DATA / "cases/ia3/adapter")


@pytest.mark.parametrize(
    "budgets", [{}, {"params": 100, "energy": 0.9}, {"total_rank": 0}, {"energy": 2.0}]
)
def test_exactly_one_valid_budget_is_required(budgets):
    with pytest.raises(UsageError, match=r"exactly one of|total_rank=0|energy=2"):
        lora_diag.allocate(SPECTRA, **budgets)


def test_unfinished_run_needs_option(tmp_path):
    SPECTRA.write(tmp_path / "s.jsonl")
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    (tmp_path / "s.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(InputError, match=r"did not finish.*--resume"):
        lora_diag.allocate(tmp_path / "s.jsonl", params=2000)
    result = lora_diag.allocate(tmp_path / "s.jsonl", params=2000, allow_unfinished=True)
    assert "did not finish" in result.run.inputs[0].notes[0]
    (tmp_path / "s.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(InputError, match="hold no layer"):
        lora_diag.allocate(tmp_path / "s.jsonl", params=2000, allow_unfinished=True)


def test_weights_by_name_and_from_file(tmp_path):
    layers = [r.layer for r in SPECTRA]
    (tmp_path / "w.json").write_text(
        json.dumps({layers[0].removesuffix(".weight"): 1e6, "default": 1})
    )
    by_file = lora_diag.allocate(SPECTRA, params=2000, layer_weights=tmp_path / "w.json")
    assert (
        by_file.layers
        == lora_diag.allocate(
            SPECTRA, params=2000, layer_weights={layers[0]: 1e6, "default": 1.0}
        ).layers
    )
    assert [layer.weight for layer in by_file] == [1e6, *[1.0] * (len(layers) - 1)]
    assert by_file.layers[0].rank == by_file.layers[0].cap
    for wrong, message in (
        ({"nothing": 1.0}, "nothing is not a layer"),
        ({layers[0]: 1.0}, "have no weight"),
        ({layers[0]: -1.0}, "from 0 up"),
        ({layers[0]: float("inf"), "default": 1}, "from 0 up"),
    ):
        with pytest.raises(UsageError, match=message):
            lora_diag.allocate(SPECTRA, params=2000, layer_weights=wrong)
    (tmp_path / "w.json").write_text("[1]")
    with pytest.raises(InputError, match="not an object"):
        lora_diag.allocate(SPECTRA, params=2000, layer_weights=tmp_path / "w.json")


def test_overwrite_keeps_other_files(tmp_path):
    result = lora_diag.allocate(SPECTRA, params=2000)
    for name, content in (
        ("config.json", '{"model_type": "llama"}'),
        ("notes.jsonl", "{}\n"),
        ("x.json", "["),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="--overwrite"):
            write_allocation(result, tmp_path / name)
        assert (tmp_path / name).read_text() == content
    with pytest.raises(UsageError, match=r"use \.json"):
        write_allocation(result, tmp_path / "adapter")
    with pytest.raises(InputError, match="cannot be written"):
        write_allocation(result, tmp_path / "notes.jsonl" / "adapter_config.json")
    write_allocation(result, tmp_path / "adapter_config.json")
    write_allocation(result, tmp_path / "adapter_config.json", scaling=1.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
