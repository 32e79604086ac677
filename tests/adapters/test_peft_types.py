"""PEFT's other types against float64 formulas."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_diag.adapters import FAMILIES, open_adapter
from lora_diag.adapters.peft import CHANGES_NO_WEIGHT, DEPENDS_ON_INPUT
from lora_diag.errors import InputError
from tests.adapters.making import adapter, base, changes, close, normal
from tests.messages import raises_naming

W = normal(8, 6, seed=3)


def test_pruned_adalora_update_is_read(tmp_path):
    a, b, e = normal(3, 6), normal(8, 3), normal(3, 1)
    tensors = {"fc.lora_A": a, "fc.lora_B": b, "fc.lora_E": e}
    pattern = {"fc.lora_E": [True, False, True, True]}
    path = adapter(tmp_path, tensors, peft_type="ADALORA", init_r=4, lora_alpha=4, rank_pattern=pattern)
    close(changes(path, None)[0]["fc.weight"], b @ (a * e) * 4 / (3 + 1e-5))
    with pytest.raises(InputError, match="has rank 3, but"):
        open_adapter(adapter(tmp_path, tensors, peft_type="ADALORA", init_r=4, lora_alpha=4, rank_pattern=None))


def test_lokr_takes_its_rank_from_config(tmp_path):
    w1, w2 = normal(2, 3), normal(4, 2)
    path = adapter(tmp_path, {"fc.lokr_w1": w1, "fc.lokr_w2": w2}, peft_type="LOKR", r=4, alpha=6)
    close(changes(path, base(tmp_path, {"fc.weight": W}))[0]["fc.weight"], 1.5 * np.kron(w1, w2))


def test_lokr_of_convolution_multiplies_channels_of_conv1d_ends(tmp_path):
    """PEFT 0.21.2 multiplies the sides of a Conv1d as ``torch.kron`` lays them: w1's columns into the kernel."""
    w1, w2 = normal(2, 3), normal(4, 2, 3, 3)
    path = adapter(tmp_path, {"fc.lokr_w1": w1, "fc.lokr_w2": w2}, peft_type="LOKR", r=4, alpha=6)
    result, _ = changes(path, base(tmp_path, {"fc.weight": normal(8, 6, 3, 3)}))
    close(result["fc.weight"], 1.5 * np.einsum("ab,cdkl->acbdkl", w1, w2))
    w2 = normal(4, 2, 5)
    path = adapter(tmp_path, {"fc.lokr_w1": w1, "fc.lokr_w2": w2}, peft_type="LOKR", r=4, alpha=6)
    result, _ = changes(path, base(tmp_path, {"fc.weight": normal(8, 6, 5)}))
    close(result["fc.weight"], 1.5 * np.kron(w1, w2))


def vera(tmp_path, **more):
    a, b = normal(3, 10), normal(12, 3)
    tensors = {"base_model.vera_A": a, "base_model.vera_B": b} | more
    tensors |= {"base_model.model.fc.vera_lambda_b": normal(8), "base_model.model.fc.vera_lambda_d": normal(3)}
    return adapter(tmp_path, tensors, prefix="", peft_type="VERA", r=3), a, b


def test_vera_cuts_its_shared_matrices(tmp_path):
    path, a, b = vera(tmp_path)
    expected = (normal(8)[:, None] * b[:8]) @ (normal(3)[:, None] * a[:, :6])
    close(changes(path, base(tmp_path, {"fc.weight": W}))[0]["fc.weight"], expected)
    with raises_naming(InputError, "BASE", "needed"):
        changes(path, None)


def test_vera_without_shared_matrices_is_refused(tmp_path):
    tensors = {"fc.vera_lambda_b": normal(8), "fc.vera_lambda_d": normal(3)}
    with pytest.raises(InputError, match="save_projection=false"):
        open_adapter(adapter(tmp_path, tensors, peft_type="VERA"))


def test_ia3_update_is_read(tmp_path):
    out, into = normal(8, 1), normal(1, 6)
    tensors = {"k.ia3_l": out, "ff.ia3_l": into}
    path = adapter(tmp_path, tensors, peft_type="IA3", feedforward_modules=["ff"])
    bias = normal(8, seed=4)
    result, _ = changes(path, base(tmp_path, {"k.weight": W, "k.bias": bias, "ff.weight": W, "ff.bias": bias}))
    close(result["k.weight"], (out - 1) * W)
    close(result["k.bias"], (out[:, 0] - 1) * bias)
    close(result["ff.weight"], (into - 1) * W)
    assert "ff.bias" not in result


@pytest.mark.parametrize("shared", [False, True])
def test_oft_update_is_read_exactly(tmp_path, shared):
    stored = normal(1 if shared else 2, 3) * 0.3
    path = adapter(tmp_path, {"fc.oft_R.weight": stored}, peft_type="OFT", use_cayley_neumann=False, block_share=shared)
    rotation = np.zeros((6, 6))
    for block in range(2):
        q = np.zeros((3, 3))
        q[np.triu_indices(3, 1)] = stored[0 if shared else block]
        q = q - q.T
        place = slice(3 * block, 3 * block + 3)
        rotation[place, place] = (np.eye(3) - q) @ np.linalg.inv(np.eye(3) + q)
    close(changes(path, base(tmp_path, {"fc.weight": W}))[0]["fc.weight"], (rotation @ W.T).T - W)


def test_oft_constrained_is_refused(tmp_path):
    with pytest.raises(InputError, match="coft"):
        open_adapter(adapter(tmp_path, {"fc.oft_R.weight": normal(2, 3)}, peft_type="OFT", coft=True))


@pytest.mark.parametrize("name", sorted(CHANGES_NO_WEIGHT | DEPENDS_ON_INPUT | {"BOFT", "NEWTHING"}))
def test_unsupported_type_is_refused_by_name(tmp_path, name):
    with pytest.raises(InputError, match=name):
        open_adapter(adapter(tmp_path, {"x": normal(2)}, peft_type=name))


def test_type_with_integer_tensors_is_refused_by_name(tmp_path):
    path = adapter(tmp_path, {"x": normal(2)}, peft_type="SHIRA")
    save_file({"q_proj.shira_indices": torch.ones(2, 3, dtype=torch.int32)}, path / "adapter_model.safetensors")
    with raises_naming(InputError, "SHIRA", "supported"):
        open_adapter(path)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with raises_naming(InputError, "shira_indices", "int32"):
        open_adapter(path)


def test_exactly_one_family_reads_adapter(tmp_path):
    from lora_diag.adapters.source import open_source

    source = open_source(adapter(tmp_path, {"fc.lora_A.weight": normal(2, 3), "fc.lora_B.weight": normal(4, 2)}))
    assert [family.name for family in FAMILIES if family.claims(source)] == ["PEFT LoRA"]


def test_every_type_of_installed_peft_is_read_or_refused_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    read = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "FOURIERFT", "LN_TUNING", "TRAINABLE_TOKENS"}
    for name in {kind.value for kind in peft.PeftType} - read:
        with pytest.raises(InputError, match=name):
            open_adapter(adapter(tmp_path / name, {"x": normal(2)}, peft_type=name))
