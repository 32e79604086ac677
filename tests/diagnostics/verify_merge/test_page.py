"""docs/reference/verify-merge.md shows what the program prints: on merges made here, which are too
large to be kept.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "reference" / "verify-merge.md"
BLOCK = re.compile(r"<!-- shown: (?P<name>\w+) -->\n(?P<shown>.*?)<!-- end -->", re.DOTALL)
COMMAND = "verify-merge sample_checkpoints/base sample_checkpoints/lora_r16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``merged`` in bf16 from sample_checkpoints, and ``spoilt`` with four faults."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")
    base = {}
    for shard in sorted((ROOT / "sample_checkpoints" / "base").glob("*.safetensors")):
        base |= load_file(shard)
    factors = load_file(ROOT / "sample_checkpoints" / "lora_r16" / "adapter_model.safetensors")
    merged, spoilt = {}, {}
    for name, w in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        delta = torch.zeros_like(w).double()
        if f"{key}A.weight" in factors:
            delta = 2 * (factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double())
        merged[name] = (w.double() + delta).bfloat16()
        spoilt[name] = (w.double() + (2 if "k_proj" in name else 1) * delta).bfloat16()
    dropped = "model.layers.0.self_attn.q_proj.weight"
    spoilt[dropped] = base[dropped].bfloat16()
    spoilt["model.layers.2.mlp.up_proj.weight"][100:200] = base[
        "model.layers.2.mlp.up_proj.weight"
    ][100:200].bfloat16()
    spoilt["model.norm.weight"] *= 1.01
    for name, tensors in (("merged", merged), ("spoilt", spoilt)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "code"), [("merged", 0), ("spoilt", 1)])
def test_page_shows_output(name, code, folder, loradiag):
    ran = loradiag(*COMMAND.split(), name, cwd=folder, env={"COLUMNS": "80"}, brief=True)
    assert ran.code == code
    wanted = f"```console\n$ loradiag {COMMAND} {name}\n" + ran.out.strip("\n") + "\n```\n"
    shown = {
        result["name"]: result["shown"]
        for result in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))
    }
    assert shown[name] == wanted, f"put this in the page:\n{wanted}"
