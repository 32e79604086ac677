"""``doctor``: what it finds of the machine, from files of a machine that is not this one, and its
exit codes.
"""

import json
import os
import socket
import sys

import pytest
from packaging.requirements import Requirement

from lora_diag.environment import check
from tests.served import ROOT

SAMPLES_BASE = ROOT / "sample_checkpoints" / "base"


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000 100000\n", 0.5), ("max 100000\n", None), ("junk", None)]
)
def test_cores_follow_quota_of_container(tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert check.cores(tmp_path / "cpu.max") == (usable if cores is None else cores)


def test_memory_is_smaller_of_machine_and_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree: 5 kB\nMemAvailable:    9000000 kB\n")
    assert check.memory(meminfo, tmp_path) == (9_000_000 * 1024, 16_000_000 * 1024)
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3500000000\n")
    assert check.memory(meminfo, tmp_path) == (500_000_000, 4_000_000_000)
    (tmp_path / "memory.current").write_text("5000000000\n")
    assert check.memory(meminfo, tmp_path) == (0, 4_000_000_000)


def test_gaps_name_missing_and_old_packages():
    wanted = [
        Requirement(line) for line in ("numpy>=1.26", "numpy>=999", "no-such-package-at-all>=1")
    ]
    present, gaps = check._find_gaps(wanted)
    assert [each.split()[0] for each in present] == ["numpy", "numpy"]
    assert len(gaps) == 2
    assert ">=999" in gaps[0]
    assert gaps[1].startswith("no-such-package-at-all")


def test_checked_extras_equal_package_extras():
    assert set(check.ADDS) <= set(check._read_requirements())


def rows(ran):
    return {row["key"]: row for row in map(json.loads, ran.out.splitlines())}


def test_doctor_passes_here_and_opens_input(loradiag):
    ran = loradiag("doctor", SAMPLES_BASE, "--json")
    result = rows(ran)
    assert ran.code == 0
    assert result["packages"]["level"] == result["address"]["level"] == "ok"
    assert ".".join(map(str, sys.version_info[:3])) in result["versions"]["lines"][0]


def test_doctor_fails_on_unreadable_input(loradiag, tmp_path):
    ran = loradiag("doctor", tmp_path / "nowhere", "--json")
    assert ran.code == 3
    assert rows(ran)["address"]["level"] == "failure"


def test_doctor_tries_cluster_of_environment(loradiag):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert (
            rows(loradiag("doctor", "--json", env={"RAY_ADDRESS": address}))["ray"]["level"] == "ok"
        )
    assert (
        rows(loradiag("doctor", "--json", env={"RAY_ADDRESS": address}))["ray"]["level"]
        == "warning"
    )


def test_doctor_shortens_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    *_, statement = check._check_folders()
    assert str(tmp_path) not in statement.text
    assert "~" in statement.text
