"""``loradiag fleet`` as a user runs it."""

import json
import shutil
import subprocess

import pytest

from tests.messages import assert_names
from tests.served import PROGRAM, ROOT

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"


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
    assert [
        record["adapter"] for record in records if record["record"] == "fleet"
    ] == listed.split()


def test_checkpoints_of_one_run_are_no_duplicates(loradiag, tmp_path):
    for name in ("out/checkpoint-6", "out/checkpoint-12", "a/copy", "b/copy"):
        shutil.copytree(SAMPLES / "lora_r4", tmp_path / name)
    ran = loradiag("fleet", "out/*")
    assert_names(ran.out, "2 of 2 adapters", "checkpoints out")
    assert "the same update" not in " ".join(ran.out.split())
    assert loradiag("checkpoints", "out").code == 0
    ran = loradiag("fleet", "a/copy", "b/copy")
    assert_names(" ".join(ran.out.split()), "1 with the same update")


def test_fleet_errors_give_one_message(loradiag, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    ran = loradiag("fleet", SAMPLES / "lora_r4", "bad")
    assert ran.code == 3
    assert ran.err.startswith("Error: bad:")
    assert "Not measured" in ran.out
