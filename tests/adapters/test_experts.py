"""Fused experts: whose rows and columns are whose, and which way round they are stored."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diag.adapters import open_adapter
from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from tests.adapters.making import adapter, base, changes, close, normal
from tests.messages import raises_naming

E, R = 3, 2
OWNER = "model.layers.0.mlp.experts"


def oracle(a: np.ndarray, b: np.ndarray, scale: float) -> list[np.ndarray]:
    """Row e·r + k of A and column k·E + e of B belong to expert e."""
    experts = []
    for e in range(E):
        change = np.zeros((b.shape[0], a.shape[1]))
        for k in range(R):
            change += scale * np.outer(b[:, k * E + e], a[e * R + k])
        experts.append(change)
    return experts


def folder_of(tmp_path, targets, stacks, **config):
    """Write the nested wrappers of the parameters, the last one outermost."""
    tensors = {}
    for depth, (a, b) in enumerate(reversed(stacks)):
        wrapped = OWNER + ".base_layer" * depth
        tensors |= {f"{wrapped}.lora_A.weight": a, f"{wrapped}.lora_B.weight": b}
    return adapter(tmp_path, tensors, target_parameters=targets, **config)


def factors(columns, out, seed=0):
    return normal(E * R, columns, seed=seed), normal(out, R * E, seed=seed + 1)


def test_parameter_follows_wrapper_depth(tmp_path):
    up, down = factors(8, 10), factors(5, 8, seed=4)
    folder = base(
        tmp_path, {f"{OWNER}.gate_up_proj": normal(E, 10, 8), f"{OWNER}.down_proj": normal(E, 8, 5)}
    )
    for targets in (
        ["experts.gate_up_proj", "experts.down_proj"],
        ["experts.down_proj", "experts.gate_up_proj"],
    ):
        result, _ = changes(folder_of(tmp_path, targets, [up, down]), folder)
        for e in range(E):
            close(result[f"{OWNER}.gate_up_proj[{e}]"], oracle(*up, 1.5)[e])
            close(result[f"{OWNER}.down_proj[{e}]"], oracle(*down, 1.5)[e])


@pytest.mark.parametrize("by_name", [["q_proj"], r".*\.q_proj"])
def test_bare_parameter_names_mean_module_of_same_nesting(tmp_path, by_name):
    """What PEFT 0.21 writes for ``all-linear`` on a mixture: the router by its path, the experts by
    their leaves.
    """
    up, down, router, query = (
        factors(8, 10),
        factors(5, 8, seed=4),
        normal(R, 8),
        normal(R, 8, seed=3),
    )
    folder = folder_of(
        tmp_path, ["gate.weight", "gate_up_proj", "down_proj"], [up, down], target_modules=by_name
    )
    layer = OWNER.removesuffix(".mlp.experts")
    more = {
        f"{layer}.mlp.gate": (router, normal(E, R)),
        f"{layer}.self_attn.q_proj": (query, normal(6, R)),
    }
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {
        f"base_model.model.{module}.lora_{part}.weight": torch.tensor(value, dtype=torch.float32)
        for module, pair in more.items()
        for part, value in zip("AB", pair, strict=True)
    }
    save_file(tensors, file)
    result, _ = changes(folder, None)
    for module, (a, b) in more.items():
        close(result[f"{module}.weight"], 1.5 * b @ a)
    for e in range(E):
        close(result[f"{OWNER}.gate_up_proj[{e}]"], oracle(*up, 1.5)[e])
        close(result[f"{OWNER}.down_proj[{e}]"], oracle(*down, 1.5)[e])


def test_rank_and_alpha_are_looked_up_by_parameter_s_path(tmp_path):
    down = factors(5, 8)
    path = folder_of(
        tmp_path, ["experts.down_proj"], [down], r=7, rank_pattern={"experts.down_proj": 2}
    )
    close(changes(path, None)[0][f"{OWNER}.down_proj[1]"], oracle(*down, 1.5)[1])


def test_experts_stored_one_by_one_get_their_rows(tmp_path):
    up = factors(8, 10)
    disk = "model.layers.0.block_sparse_moe.experts"
    folder = base(
        tmp_path,
        {f"{disk}.{e}.{name}.weight": normal(5, 8) for e in range(E) for name in ("w1", "w3")},
    )
    result, _ = changes(folder_of(tmp_path, ["experts.gate_up_proj"], [up]), folder)
    assert len(result) == 2 * E
    for e in range(E):
        close(result[f"{disk}.{e}.w1.weight"], oracle(*up, 1.5)[e][:5])
        close(result[f"{disk}.{e}.w3.weight"], oracle(*up, 1.5)[e][5:])


def test_fully_adapted_experts_leave_no_rows_out(tmp_path):
    disk = "model.layers.0.block_sparse_moe.experts"
    one_by_one = {
        f"{disk}.{e}.{name}.weight": normal(5, 8) for e in range(E) for name in ("w1", "w3")
    }
    values = normal(E, 10, 8, seed=4)
    q_proj = "model.layers.0.self_attn.q_proj"
    factors_of_q = {
        f"{q_proj}.lora_A.weight": normal(R, 8),
        f"{q_proj}.lora_B.weight": normal(6, R),
    }
    path = adapter(tmp_path, factors_of_q | {f"{OWNER}.gate_up_proj": values}, r=R)
    on = open_checkpoint(base(tmp_path, one_by_one | {f"{q_proj}.weight": normal(6, 8)}))
    pairing, _ = open_adapter(path).pair(on)
    assert len(pairing.deltas) == 2 * E + 1
    assert not pairing.unpaired


def test_experts_stored_in_out_are_detected_by_shape(tmp_path):
    up = factors(8, 10)
    result, _ = changes(
        folder_of(tmp_path, ["experts.gate_up_proj"], [up]),
        base(tmp_path, {f"{OWNER}.gate_up_proj": normal(E, 8, 10)}),
    )
    close(result[f"{OWNER}.gate_up_proj[1]"], oracle(*up, 1.5)[1].T)


def test_all_linear_in_config_excludes_parameters(tmp_path):
    down = factors(5, 8)
    folder = folder_of(tmp_path, ["down_proj"], [down], target_modules="all-linear")
    result, _ = changes(folder, base(tmp_path, {f"{OWNER}.down_proj": normal(E, 8, 5)}))
    close(result[f"{OWNER}.down_proj[2]"], oracle(*down, 1.5)[2])


@pytest.mark.parametrize(
    ("model_type", "version", "in_out"),
    [
        ("mixtral", "0.21.2", False),
        ("mixtral", "0.19.1", False),
        ("mixtral", "0.19.0", True),
        ("mixtral", "0.18.1", True),
        ("mixtral", None, True),
        ("gpt_oss", "0.21.2", True),
        ("gpt_oss", "0.19.0", False),
        ("gpt_oss", "0.18.0", True),
        ("qwen3_vl_moe", "0.21.2", False),
        ("qwen3_vl_moe", "0.18.0", True),
    ],
)
def test_square_expert_layout_follows_model_and_version(tmp_path, model_type, version, in_out):
    square = factors(8, 8)
    folder = base(tmp_path, {f"{OWNER}.down_proj": normal(E, 8, 8)}, {"model_type": model_type})
    path = folder_of(tmp_path, ["experts.down_proj"], [square], peft_version=version)
    expected = oracle(*square, 1.5)[1]
    close(changes(path, folder)[0][f"{OWNER}.down_proj[1]"], expected.T if in_out else expected)


def test_fraction_of_expert_is_refused(tmp_path):
    path = folder_of(tmp_path, ["experts.down_proj"], [factors(5, 8)], r=4)
    with raises_naming(InputError, "experts", "rank 4"):
        changes(path, None)


@pytest.mark.parametrize("names", [("w1", "w3"), ("gate_proj", "up_proj")])
def test_experts_adapted_one_by_one_meet_in_fused_base(tmp_path, names):
    parts = {name: (normal(R, 8, seed=i), normal(5, R, seed=i)) for i, name in enumerate(names)}
    tensors = {}
    for e in range(E):
        for name, (a, b) in parts.items():
            tensors |= {
                f"{OWNER}.{e}.{name}.lora_A.weight": a + e,
                f"{OWNER}.{e}.{name}.lora_B.weight": b,
            }
    result, _ = changes(
        adapter(tmp_path, tensors), base(tmp_path, {f"{OWNER}.gate_up_proj": normal(E, 10, 8)})
    )
    assert len(result) == E
    expected = np.concatenate([1.5 * b @ (a + 2) for a, b in parts.values()])
    close(result[f"{OWNER}.gate_up_proj[2]"], expected, 1e-5)
