"""``loradiag fleet`` as a user runs it."""

import json
import shutil
import subprocess

import pytest

from tests.messages import assert_names
from tests.served import PROGRAM, ROOT

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"


def test_pattern_table_and_gate(loradiag, tmp_path):
    shutil.copytree(SAMPLES / "lora_r4", tmp_path / "fleet" / "one")
    shutil.copytree(SAMPLES / "lora_r4", tmp_path / "fleet" / "copy")
    shutil.copytree(SAMPLES / "lora_r16", tmp_path / "fleet" / "other")
    ran = loradiag("fleet", "fleet/**", "-o", "f.jsonl")
    assert ran.code == 0, ran.err
    assert_names(ran.out, "copy × one", "1.000 1.00")
    text = (tmp_path / "f.jsonl").read_text()
    assert [json.loads(line)["record"] for line in text.splitlines()] == ["run", "fleet", "fleet", "fleet", "end"]


def test_list_on_standard_input(server, tmp_path):
    listed = "".join(f"{SAMPLES / name}\n" for name in ("lora_r4", "lora_r16"))
    done = subprocess.run(
        [*PROGRAM, "fleet", "-", "--json"],
        input=listed.encode(),
        capture_output=True,
        cwd=tmp_path,
        check=True,
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["adapter"] for record in records if record["record"] == "fleet"] == listed.split()


def test_fleet_errors_give_one_message(loradiag, tmp_path):
    none = loradiag("fleet", "nowhere/**")
    assert none.code == 4
    assert_names(none.err, "adapter found")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    ran = loradiag("fleet", SAMPLES / "lora_r4", "bad")
    assert ran.code == 3
    assert ran.err.startswith("Error: bad:")
    assert "Not measured" in ran.out
