"""The results file: what is written is what is read, and a crash loses one line."""

import json

import pytest

import lora_diag
from lora_diag.errors import InputError, UsageError
from lora_diag.results import read_results


@pytest.fixture
def written(pair_of_models, tmp_path):
    base, tuned, *_ = pair_of_models
    path = tmp_path / "r.jsonl"
    return lora_diag.spectrum(base, tuned, output=path), path


def test_written_and_read_are_equal(written, tmp_path):
    results, path = written
    assert read_results(path) == results
    results.write(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    assert list(tmp_path.glob(".*")) == []


def test_the_lines_are_the_documented_ones(written):
    _, path = written
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["record"] for line in lines] == ["run"] + ["spectrum"] * 10 + ["left_out"] * 2 + ["end"]
    assert lines[0]["schema"] == 1
    assert {"command", "version", "inputs", "settings"} <= set(lines[0])
    fields = "layer shape fro base_fro s complete method energy_error energy rank_at tail stable_rank effective_rank"
    assert set(fields.split()) <= set(lines[1])
    assert set(lines[1]["energy"]) == {"4", "8", "16", "32", "64"}
    assert set(lines[1]["rank_at"]) == {"0.9", "0.95", "0.99"}


def test_filter_and_look_up(written):
    results, _ = written
    assert len(results.filter("q_proj")) == 2
    assert results["lm_head.weight"].layer == "lm_head.weight"
    with pytest.raises(KeyError):
        results["nope"]


def test_pandas(written):
    results, _ = written
    frame = results.to_pandas()
    assert len(frame) == len(results)
    assert frame["energy.8"].tolist() == [record.energy["8"] for record in results]


@pytest.mark.parametrize("cut", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("torn", [b"", b'{"record":"spec', b'{"record": "left_out"'])
def test_resume_ends_in_the_same_file(written, pair_of_models, cut, torn):
    _, path = written
    base, tuned, *_ = pair_of_models
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]) + torn)
    assert read_results(path).end is None
    with pytest.raises(UsageError, match="--resume"):
        lora_diag.spectrum(base, tuned, output=path)
    told = []
    lora_diag.spectrum(base, tuned, output=path, resume=True, on_record=told.append)
    assert path.read_bytes() == whole
    assert tuple(told) == tuple(read_results(path).records())


def test_resume_measures_only_what_is_missing(written, pair_of_models, monkeypatch):
    _, path = written
    base, tuned, *_ = pair_of_models
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:9]))
    events = []
    lora_diag.spectrum(base, tuned, output=path, resume=True, on_progress=events.append)
    assert events[0].layers == 2


def test_resume_of_a_finished_or_absent_run(written, pair_of_models, tmp_path):
    results, path = written
    base, tuned, *_ = pair_of_models
    assert lora_diag.spectrum(base, tuned, output=path, resume=True) == results
    assert lora_diag.spectrum(base, tuned, output=tmp_path / "new.jsonl", resume=True) == results


def test_resume_refuses_other_settings_and_inputs(written, pair_of_models):
    _, path = written
    base, tuned, *_ = pair_of_models
    with pytest.raises(UsageError, match=r"settings\.top"):
        lora_diag.spectrum(base, tuned, output=path, resume=True, top=3)
    with pytest.raises(UsageError, match="inputs"):
        lora_diag.spectrum(base, base, output=path, resume=True)


def test_a_finished_run_is_replaced_and_anything_else_is_left(written, pair_of_models, tmp_path):
    _, path = written
    base, tuned, *_ = pair_of_models
    lora_diag.spectrum(base, tuned, output=path, top=2)
    assert len(read_results(path).layers[0].s) == 2
    other = tmp_path / "thesis.txt"
    other.write_text("precious")
    with pytest.raises(UsageError, match="not a results file"):
        lora_diag.spectrum(base, tuned, output=other)
    with pytest.raises(UsageError, match="not a file"):
        lora_diag.spectrum(base, tuned, output=tmp_path)
    assert other.read_text() == "precious"


def test_nothing_is_created_by_a_run_that_fails_at_its_inputs(pair_of_models, tmp_path):
    base, *_ = pair_of_models
    with pytest.raises(InputError):
        lora_diag.spectrum(base, tmp_path / "nowhere", output=tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: ["hello", *lines], "line 1 is not JSON"),
        (lambda lines: lines[1:], "first line"),
        (lambda lines: [], "first line"),
        (lambda lines: [lines[0].replace('"schema":1', '"schema":2'), *lines[1:]], "schema 2"),
        (lambda lines: [*lines[:3], '{"record":"magic"}', *lines[3:]], "line 4"),
        (lambda lines: [*lines[:3], lines[3].replace('"fro":', '"fro":"x","was":'), *lines[4:]], "line 4.*fro"),
        (lambda lines: [*lines[:3], "[" * 100_000, *lines[3:]], "line 4"),
        (lambda lines: [*lines[:3], lines[3].replace('"fro":', '"fro":NaN,"was":'), *lines[4:]], "line 4"),
    ],
)
def test_damaged_results_files(written, change, words):
    _, path = written
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(InputError, match=words):
        read_results(path)


def test_fields_of_a_later_version_are_ignored(written):
    results, path = written
    path.write_text(path.read_text().replace('"record":"spectrum"', '"record":"spectrum","later":[1]'))
    assert read_results(path) == results
