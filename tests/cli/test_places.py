"""Where output goes is looked at before any work, by one rule for all commands; missing folders
are made when it is written.
"""

import os
from operator import attrgetter

import pytest

import lora_diag
from lora_diag.errors import InputError
from lora_diag.records.file import check_results_file
from tests.conftest import ROOT

SAMPLES = ROOT / "sample_checkpoints"
PAIR = [str(SAMPLES / "base"), str(SAMPLES / "lora_r4")]
WRITERS = [
    ["spectrum", *PAIR, "-o", "{}.jsonl"],
    ["interference", PAIR[1], str(SAMPLES / "lora_r16"), "--spectrum", "{}.jsonl"],
    ["extract", *PAIR, "--rank", "2", "-o", "{}"],
    ["allocate", "r.jsonl", "--energy", "0.9", "-o", "{}.json"],
    ["gate", "--policy", "adapter-basic", "r.jsonl", "-o", "{}.jsonl"],
    [
        "gate",
        "--policy",
        "adapter-basic",
        "--base",
        PAIR[0],
        "--adapter",
        PAIR[1],
        "--junit",
        "{}.xml",
    ],
    ["gate", "--policy", "adapter-basic", "r.jsonl", "--model-card", "{}.md"],
    ["gate", "init", "r.jsonl", "-o", "{}.toml"],
    ["report", "r.jsonl", "-o", "{}.html"],
    ["plot", "r.jsonl", "-o", "{}.png"],
    ["plot", "r.jsonl", "-o", "{}"],
    [
        "probe",
        "activations",
        PAIR[0],
        "--data",
        str(SAMPLES / "eval" / "in_domain.txt"),
        "-o",
        "{}.safetensors",
    ],
    [
        "probe",
        "truncation",
        *PAIR,
        "--eval",
        str(SAMPLES / "eval" / "in_domain.txt"),
        "-o",
        "{}.jsonl",
    ],
]


@pytest.fixture
def told(run):
    """Run a command in this process, next to results; return its exit code and output."""
    lora_diag.spectrum(*PAIR, layers="o_proj", output="r.jsonl")
    return lambda *words: attrgetter("code", "err")(run(*words))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", WRITERS, ids=lambda words: " ".join(words[:2] + words[-2:]).replace(str(SAMPLES), "")
)
def test_missing_folders_are_made(told, tmp_path, words):
    place = tmp_path / words[-1].format("new/deeper/x")
    code, err = told(*words[:-1], str(place))
    assert code in {0, 1, 5}, err
    assert place.exists()


@pytest.mark.parametrize(
    "words", [["spectrum", "nowhere", PAIR[1]], ["report", "nowhere.jsonl"], ["gate", "init", "no"]]
)
def test_refused_command_makes_no_folder(told, tmp_path, words):
    assert told(*words, "-o", "new/deeper/x.jsonl")[0] in {2, 3}
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    "words", [["report", "r.jsonl", "--format", "html"], ["gate", "init", "r.jsonl"]]
)
def test_output_does_not_replace_device(told, tmp_path, words):
    """As root, renaming onto /dev/null would take it from the whole machine; here a pipe replaces
    it.

    No test names the real one: where the refusal failed, a test that did took it from the machine
    that ran it.
    """
    os.mkfifo(tmp_path / "device")
    (tmp_path / "null").symlink_to("device")
    code, err = told(*words, "-o", "null")
    assert code == 2
    assert "null: is" in err
    assert (tmp_path / "null").is_symlink()
    assert (tmp_path / "device").is_fifo()


@pytest.mark.parametrize(
    "words",
    [
        ["allocate", "r.jsonl", "--energy", "0.9", "-o", "./r.jsonl"],
        ["allocate", "r.jsonl", "--energy", "0.9", "--layer-weights", "w.jsonl", "-o", "w.jsonl"],
        ["interference", PAIR[1], PAIR[1], "-o", "new.jsonl", "--spectrum", "./new.jsonl"],
        ["gate", "--policy", "adapter-basic", "r.jsonl", "-o", "r.jsonl"],
        [
            "gate",
            "--policy",
            "adapter-basic",
            "r.jsonl",
            "--junit",
            "new.md",
            "--model-card",
            "./new.md",
        ],
        ["report", "r.jsonl", "--format", "html", "-o", "r.jsonl"],
    ],
)
def test_outputs_do_not_overwrite_inputs_or_each_other(told, tmp_path, words):
    """Results of hours are not replaced by files made from them."""
    (tmp_path / "w.jsonl").write_bytes((tmp_path / "r.jsonl").read_bytes())
    before = (tmp_path / "r.jsonl").read_bytes()
    code, err = told(*words)
    assert code == 2
    assert "another name" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "r.jsonl": before,
        "w.jsonl": before,
    }


@pytest.mark.parametrize(
    "words",
    [["report", "e.jsonl"], ["allocate", "e.jsonl", "--energy", "1"], ["inspect", "e.jsonl"]],
)
def test_empty_file_is_reported(told, tmp_path, words):
    (tmp_path / "e.jsonl").write_bytes(b"")
    code, err = told(*words)
    assert code == 3
    assert "empty" in err


def test_records_resume_in_writable_file_of_read_only_folder(monkeypatch, tmp_path):
    file = tmp_path / "r.jsonl"
    file.touch()
    monkeypatch.setattr("os.access", lambda place, mode: place == file)  # root may write anywhere
    check_results_file(file, resume=True, overwrite=False)
    with pytest.raises(InputError, match="permission denied"):
        check_results_file(tmp_path / "new.jsonl", resume=False, overwrite=False)
