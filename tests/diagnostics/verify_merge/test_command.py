"""``loradiag verify-merge`` as a user runs it: exit codes, table, records, resume."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.merge_scale import ORDERS, factors
from tests.adapters.making import adapter
from tests.merges import llama, peft_merge
from tests.messages import assert_names

pytestmark = pytest.mark.slow

NAMES = [
    f"model.layers.{block}.self_attn.{module}.weight"
    for block in (0, 1)
    for module in ("q_proj", "v_proj")
]


@pytest.fixture
def merged(tmp_path):
    """A base, an adapter, and a right merge by PEFT, all but the factors in bf16."""
    return peft_merge(tmp_path, llama(torch.bfloat16))


def test_wrong_merge_fails_and_faults_come_first(merged, run):
    def change(before, after):
        after[NAMES[0]] = before[NAMES[0]]
        after["model.norm.weight"] += 1
        del after[NAMES[3]]

    merged.spoil(change)
    ran = run("verify-merge", "base", "adapter", "spoilt")
    assert (ran.code, ran.err) == (1, "")
    rows = [line for line in ran.out.splitlines() if "proj" in line or "norm" in line][:3]
    assert [
        status in row for row, status in zip(rows, ("missing", "dropped", "changed"), strict=True)
    ] == [True] * 3


def test_records_equal_file(merged, loradiag, tmp_path):
    ran = loradiag("verify-merge", "base", "adapter", "merged", "--json", "-o", "merge.jsonl")
    assert ran.code == 0
    run, *layers, end = ran.records
    assert [item["role"] for item in run["inputs"]] == ["base", "adapter", "merged"]
    assert {record["record"] for record in layers} == {"merge"}
    assert {record["layer"] for record in layers} == merged.before.keys()
    assert {record["status"] for record in layers} == {"ok"}
    assert end["layers"] == len(merged.before)
    assert (tmp_path / "merge.jsonl").read_text() == ran.out


SIZE, RANK, S = 96, 4, 1.5


def scaled(folder, dtype, relative, c, size=SIZE) -> None:
    """Write a base, an adapter of one layer of ``relative`` size, and a merge with c times its
    update.
    """
    w, b, a = factors((size, size), RANK, relative, S, dtype, 5)
    layer = "model.layers.0.self_attn.q_proj"
    parts = {
        f"{layer}.lora_A.weight": a.double().numpy(),
        f"{layer}.lora_B.weight": b.double().numpy(),
    }
    adapter(folder, parts, r=RANK, lora_alpha=RANK * S)
    for name, values in (("base", w), ("merged", ORDERS["in float32"](w, b, a, S * c))):
        (folder / name).mkdir()
        save_file({f"{layer}.weight": values}, folder / name / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("c", "code"), [(1.0, 0), (1.002, 1), (1.01, 1), (1.05, 1)])
def test_gate_fails_every_wrong_scale(tmp_path, run, dtype, c, code):
    scaled(tmp_path, dtype, 0.3, c)
    assert run("verify-merge", "base", "adapter", "merged", "-q", "-o", "merge.jsonl").code == code
    ran = run("gate", "--policy", "merge", "merge.jsonl", "--json")
    assert ran.code == code
    (merged,) = [
        record for record in ran.records if record.get("rule") == "merged" and record["layer"]
    ]
    assert merged["status"] == ("failed" if code else "passed")


@pytest.mark.parametrize("c", [1.0, 1.02])
def test_gate_fails_unverifiable_scale(tmp_path, run, c):
    scaled(tmp_path, torch.bfloat16, 1e-4, c, size=16)
    assert run("verify-merge", "base", "adapter", "merged", "-q", "-o", "merge.jsonl").code == 5
    assert run("gate", "--policy", "merge", "merge.jsonl", "-q").code == 5


def test_control_characters_in_names_are_escaped(merged, run):
    def change(before, after):
        after["evil\x1b[2J.weight"] = torch.ones(3)

    merged.spoil(change)
    ran = run("verify-merge", "base", "adapter", "spoilt")
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert_names(ran.out, "only in MERGED")
