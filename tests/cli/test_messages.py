"""How text is made to fit: messages for a log or a terminal, and signs that a terminal lacks."""

import io
import json
import sys

import pytest

from lora_diag.cli.output import print_json, print_message, print_result
from lora_diag.errors import InputError


@pytest.mark.parametrize("name", ["x" * 10**6, "\x1b" * 10**4])
def test_long_message_keeps_path_and_fix(capsys, name):
    error = InputError(f"a/model.safetensors: has a tensor {name}; rename it")
    assert len(str(error)) <= 2000
    print_message(f"Error: {error}")
    (shown,) = capsys.readouterr().err.splitlines()
    assert len(shown) <= 2000
    assert shown.startswith("Error: a/model.safetensors: has a tensor")
    assert shown.endswith("rename it")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_terminal_without_utf_8_gets_ascii_and_json_is_whole(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, newline="\n"))
    print_result("q_proj ‖ΔW‖ ≥ 2 ▁▅█ \udce9")
    record = {"layer": "café.文.\U0001f600", "unit": "‖ΔW‖²"}
    print_json(json.dumps(record, ensure_ascii=False))
    table, written = raw.getvalue().decode(encoding).splitlines()
    assert table == ("q_proj ‖ΔW‖ ≥ 2 ▁▅█ ?" if encoding == "utf-8" else "q_proj |dW| >= 2 .+@ ?")
    assert json.loads(written) == record
