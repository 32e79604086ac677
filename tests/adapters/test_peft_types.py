"""PEFT's other types against float64 formulas."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_diag.adapters import open_adapter
from lora_diag.errors import InputError
from tests.adapters.making import adapter, base, changes, close, normal
from tests.messages import raises_naming

W = normal(8, 6, seed=3)


def test_pruned_adalora_update_is_read(tmp_path):
    a, b, e = normal(3, 6), normal(8, 3), normal(3, 1)
    tensors = {"fc.lora_A": a, "fc.lora_B": b, "fc.lora_E": e}
    pattern = {"fc.lora_E": [True, False, True, True]}
    path = adapter(
        tmp_path, tensors, peft_type="ADALORA", init_r=4, lora_alpha=4, rank_pattern=pattern
    )
    close(changes(path, None)[0]["fc.weight"], b @ (a * e) * 4 / (3 + 1e-5))
    with pytest.raises(InputError, match="has rank 3, but"):
        open_adapter(
            adapter(
                tmp_path, tensors, peft_type="ADALORA", init_r=4, lora_alpha=4, rank_pattern=None
            )
        )


def test_lokr_of_convolution_multiplies_channels_of_conv1d_ends(tmp_path):
    """PEFT 0.21.2 multiplies the sides of a Conv1d as ``torch.kron`` lays them: w1's columns into
    the kernel.
    """
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
    tensors |= {
        "base_model.model.fc.vera_lambda_b": normal(8),
        "base_model.model.fc.vera_lambda_d": normal(3),
    }
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


def test_oft_constrained_is_refused(tmp_path):
    with pytest.raises(InputError, match="coft"):
        open_adapter(
            adapter(tmp_path, {"fc.oft_R.weight": normal(2, 3)}, peft_type="OFT", coft=True)
        )


def test_type_with_integer_tensors_is_refused_by_name(tmp_path):
    path = adapter(tmp_path, {"x": normal(2)}, peft_type="SHIRA")
    save_file(
        {"q_proj.shira_indices": torch.ones(2, 3, dtype=torch.int32)},
        path / "adapter_model.safetensors",
    )
    with raises_naming(InputError, "SHIRA", "supported"):
        open_adapter(path)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with raises_naming(InputError, "shira_indices", "int32"):
        open_adapter(path)


def test_every_type_of_installed_peft_is_read_or_refused_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    read = {
        "LORA",
        "ADALORA",
        "LOHA",
        "LOKR",
        "VERA",
        "IA3",
        "OFT",
        "FOURIERFT",
        "LN_TUNING",
        "TRAINABLE_TOKENS",
    }
    for name in {kind.value for kind in peft.PeftType} - read:
        with pytest.raises(InputError, match=name):
            open_adapter(adapter(tmp_path / name, {"x": normal(2)}, peft_type=name))
