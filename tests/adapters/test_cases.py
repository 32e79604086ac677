"""ΔW of real adapters against PEFT's own merge.

The files were made with peft and transformers; each case has a file with its reference values.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.errors import LoradiagError
from lora_diag.storage import open_checkpoint
from tests.adapters.making import dense
from tests.conftest import DATA

CASES = sorted(
    path.parent.name
    for path in (DATA / "cases").glob("*/adapter")
    if (path.parent / "merged").exists()
)
# A bf16 merge is rounded to 8 bits, so its ΔW is off by more than the adapter's.
TOLERANCE = {"llama-bf16": 5e-3}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    result = {}
    for file in folder.glob("*.safetensors"):
        result |= load_file(file)
    for file in folder.glob("*.bin"):
        result |= torch.load(file, weights_only=True)
    return {name: value.double() for name, value in result.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_what_peft_merges(case):
    folder = DATA / "cases" / case
    base, merged = tensors(folder / "base"), tensors(folder / "merged")
    truth = json.loads((folder / "truth.json").read_text())
    pairing, _ = open_adapter(folder / "adapter").pair(open_checkpoint(folder / "base"))
    tolerance = TOLERANCE.get(case, 1e-5)
    seen = set()
    for delta in pairing.deltas:
        name, _, index = delta.layer.removesuffix("]").partition("[")
        change = merged[name] - base[name]
        change = (change[int(index)] if index else change).numpy()
        ours = dense(delta).reshape(change.shape)
        # Rounding of the merge itself: half an ulp of float32 (or bf16) of the largest weight.
        floor = (
            0
            if case in TOLERANCE
            else 2.0**-24 * np.sqrt(change.size) * float(merged[name].abs().max())
        )
        assert np.linalg.norm(ours - change) <= tolerance * np.linalg.norm(change) + floor, (
            delta.layer
        )
        if not index and truth[name]["s"] is not None and change.ndim == 2:
            s = np.linalg.svd(ours, compute_uv=False)[: len(truth[name]["s"])]
            assert np.abs(s - truth[name]["s"]).max() <= tolerance * s[0] + floor
        seen.add(name)
    for name in base:
        if name not in seen:
            assert torch.equal(base[name], merged[name]), f"{name} changed and was not reported"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("adapter-config-invalid-json", r"adapter_config\.json.*line 24 column 15"),
        ("adapter-config-missing", "scaling .*unknown"),
        ("adapter-r-wrong", r"has rank 4, but adapter_config\.json says 16"),
        ("adapter-evil-regex", "rank_pattern: the key .* is not a valid regular expression"),
        ("adapter-lora-a-only", r"self_attn\.q_proj has no lora_B"),
        ("adapter-other-model", r"14|7 of its weights match none of .*transformer\.blocks\.0"),
    ],
)
def test_malformed_adapter_is_refused_with_one_message(case, words):
    folder = DATA / "bad" / case
    assert is_adapter(folder / "adapter")
    with pytest.raises(LoradiagError, match=words) as error:
        open_adapter(folder / "adapter").pair(open_checkpoint(folder / "base"))
    assert "\n" not in str(error.value)
