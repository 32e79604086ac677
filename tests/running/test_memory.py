"""What commands say of layers that are read in row blocks is what they say of layers that memory
holds.
"""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import lora_diag
from lora_diag import deltas
from lora_diag.diagnostics.spectrum import gradients as module
from lora_diag.errors import UsageError
from lora_diag.linalg import methods
from lora_diag.running import layers as measuring
from lora_diag.running.engines import local
from tests.conftest import ROOT, save_model
from tests.messages import assert_names, mentions, raises_naming

BASE, TUNED = "sample_checkpoints/base", "sample_checkpoints/full_ft"
LAYERS = r"layers\.0\..*(up|down)_proj"


@pytest.fixture
def small(monkeypatch):
    """A program and blocks that take next to nothing: matrices of 128 columns are then too large
    for 2 MB.
    """
    monkeypatch.setattr(local, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(local, "MIN_BYTES", 0)
    monkeypatch.setattr(methods, "READING_BYTES", 0)
    monkeypatch.setattr(deltas, "BLOCK_ENTRIES", 5000)


# What depends on whether a layer is read in row blocks.
OF_BLOCKS = {"method", "blocks", "energy_error"}


def check(plain, blocks) -> None:
    """Hold records against each other, all of them from row blocks."""
    assert len(plain) == len(blocks) > 0
    assert all(one.blocks is None for one in plain)
    assert all(two.blocks > 1 for two in blocks)
    for values in (False, True):
        one, two = (results.to_pandas(values) for results in (plain, blocks))
        compared = [name for name in one if name.partition(".")[0] not in OF_BLOCKS]
        pd.testing.assert_frame_equal(one[compared], two[compared], rtol=1e-6, atol=1e-6)


CASES = {
    "spectrum": (lora_diag.spectrum, "1MB", {}),
    "extract rank": (lora_diag.extract, "3MB", {"rank": 8}),
    "extract energy": (lora_diag.extract, "3MB", {"energy": 0.5}),
    "overlap": (
        lora_diag.overlap,
        "2MB",
        {"gradients": ["sample_checkpoints/gradients"], "ranks": [8]},
    ),
    "residual": (
        lora_diag.residual,
        "4MB",
        {"adapters": ["sample_checkpoints/lora_r16"], "reference": "other"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_stays_within_limit(small, tmp_path, case):
    measure, memory, options = CASES[case]
    if "reference" in options:
        other = load_file(f"{TUNED}/model.safetensors")
        generator = torch.Generator().manual_seed(0)
        other = {
            name: value + torch.randn(value.shape, generator=generator) * 1e-3
            for name, value in other.items()
        }
        options = options | {"reference": save_model(tmp_path / "other", other)}
    outputs = [
        {"output": tmp_path / name} if case.startswith("extract") else {}
        for name in ("plain", "blocks")
    ]
    check(
        measure(BASE, TUNED, **outputs[0], **options, layers=LAYERS),
        measure(BASE, TUNED, **outputs[1], **options, layers=LAYERS, memory=memory, workers=1),
    )


def test_unstreamable_layer_is_left_out_and_rest_measured(small):
    result = lora_diag.spectrum(BASE, TUNED, layers=LAYERS, memory="1MB", workers=1, svd="exact")
    assert len(result) == 0
    assert {item.reason for item in result.unmeasured} == {"memory"}
    assert all(
        mentions(item.detail, "--svd", "blocks") and item.fro > 0 for item in result.unmeasured
    )


def test_gradients_beyond_memory_limit_are_left_out(small, monkeypatch):
    monkeypatch.setattr(module, "READING_BYTES", 0)
    options = {
        "gradients": ["sample_checkpoints/gradients"],
        "layers": r"layers\.0\.(mlp\.up|self_attn\.q)",
    }
    plain = {record.layer: record for record in lora_diag.spectrum(BASE, **options)}
    result = lora_diag.spectrum(
        BASE, **options, memory="2MB", workers=1
    )  # 128x128 take 0.9 MB, 384x128 4.1
    for record in result:
        assert record.model_dump(exclude=OF_BLOCKS) == plain[record.layer].model_dump(
            exclude=OF_BLOCKS
        )
    assert [record.shape for record in result] == [(128, 128)]
    (left,) = result.unmeasured
    assert (left.reason, left.shape) == ("memory", (384, 128))
    assert_names(left.detail, "4 MB", "3 MB", "--workers", "--exclude")
    assert len(lora_diag.spectrum(BASE, **options, memory="5MB", workers=1)) == 2


def test_memory_is_of_this_machine():
    with raises_naming(UsageError, "memory", "engine"):
        lora_diag.spectrum(BASE, TUNED, memory="1GB", engine=lora_diag.Ray())


def test_fleet_uses_requested_workers(monkeypatch):
    options, layout_for = [], measuring.layout_for
    monkeypatch.setattr(
        measuring, "layout_for", lambda *words: options.append(words) or layout_for(*words)
    )
    lora_diag.fleet([ROOT / "sample_checkpoints" / "lora_r4"], device="cpu", workers=3)
    assert [words[1:3] for words in options] == [(3, "cpu")]
