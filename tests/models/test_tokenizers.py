"""A damaged tokenizer is one message that names its file, and is never replaced by bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.models.opening import open_model, open_tokenizer
from tests.conftest import ROOT
from tests.messages import assert_names, raises_naming

BASE = ROOT / "sample_checkpoints" / "base"  # whose vocabulary is that of bytes
LETTERS = {"[UNK]": 0, **{chr(code): code - 96 for code in range(97, 123)}}
WORDS = {"type": "WordLevel", "vocab": LETTERS, "unk_token": "[UNK]"}
SPLIT = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}

# What is damaged -> the content of tokenizer.json, or values of it.
DAMAGED: dict[str, Any] = {
    "a panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "//////////8="}},
    "merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b", "zz zz"]}},
    "unknown": {"model": {**WORDS, "vocab": {"a": 0}}},
    "infinity": '{"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0], ["b", '
    "-Infinity]]}}",
    "depth": "[" * 100_000,
    "no JSON": "\0",
    "no object": "7",
    "one word": {"model": {**WORDS, "vocab": {"[UNK]": 0}}},
}


def tokenizer(folder: Path, content: Any) -> Path:
    """Write a tokenizer.json."""
    usual = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": SPLIT,
        "model": WORDS,
    }
    path = folder / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(usual | content))
    return path


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_tokenizer_names_its_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = shutil.copytree(BASE, tmp_path / "base")
    path = tokenizer(folder, DAMAGED[kind])
    with raises_naming(InputError, str(path)):
        open_tokenizer(folder)
    assert capfd.readouterr() == ("", "")


def test_damaged_requested_tokenizer_names_its_file(tmp_path: Path) -> None:
    path = tokenizer(tmp_path, DAMAGED["a panic"])
    with raises_naming(InputError, str(path)):
        open_model(BASE, torch.device("cpu"), tokenizer=str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_other_damaged_vocabulary_is_not_replaced(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(BASE, tmp_path / "base")
    (folder / name).write_bytes(b"\0\1garbage")
    with raises_naming(InputError, name):
        open_tokenizer(folder)


def test_whole_tokenizer_is_used(tmp_path: Path) -> None:
    folder = shutil.copytree(BASE, tmp_path / "base")
    tokenizer(folder, {})
    assert open_tokenizer(folder).tokens.ids("abz") == [1, 2, 26]


def test_tokenizer_that_fails_on_a_text_names_its_file(tmp_path: Path) -> None:
    letters = set("The year 1936.a")
    vocabulary = {letter: index for index, letter in enumerate(sorted(letters))}
    path = tokenizer(tmp_path, {"model": {**WORDS, "vocab": vocabulary}})
    tokens = open_tokenizer(BASE, tokenizer=str(tmp_path)).tokens
    assert len(tokens.ids("a year")) == 6
    with raises_naming(InputError, str(path)):
        tokens.ids("Z")


@pytest.mark.slow
def test_panic_of_tokenizer_is_one_message_with_exit_code_3(loradiag, tmp_path: Path) -> None:
    folder = shutil.copytree(BASE, tmp_path / "base")
    path = tokenizer(folder, DAMAGED["a panic"])
    samples = ROOT / "sample_checkpoints"
    ran = loradiag(
        "probe",
        "strength",
        folder,
        samples / "lora_r4",
        "--eval",
        samples / "eval" / "in_domain.txt",
    )
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert_names(ran.err, str(path))
