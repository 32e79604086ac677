"""``overlap`` against NumPy float64 on real checkpoints, adapters and gradients; what is left out,
and why.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.errors import InputError, NothingComparedError, UsageError
from tests.conftest import DATA, ROOT, as_numpy, save_model, weights
from tests.linalg.test_subspace import dense_overlaps
from tests.messages import assert_names, raises_naming
from tests.test_gradients import save_step

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"


def load(folder):
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def check(found, update, gradients, ranks_of):
    """Every record against the dense projections; every record there is."""
    expected = {
        (layer, step, rank)
        for layer in update
        for step in gradients
        for rank in ranks_of(update[layer])
    }
    assert {(r.layer, r.step, r.rank) for r in found} == expected
    for record in found:
        gradient = as_numpy(gradients[record.step][record.layer])
        truth = dense_overlaps(update[record.layer], gradient, record.rank)
        for name, value in truth.items():
            assert getattr(record, name) == pytest.approx(value, abs=1e-6), (record.layer, name)
        assert record.gradient_fro == pytest.approx(np.linalg.norm(gradient), rel=1e-9)
        m, n, r = *record.shape, record.rank
        assert record.kappa_random == pytest.approx(r / np.sqrt(m * n))
        assert record.tangent_random == pytest.approx(np.sqrt(r / m + r / n - r * r / (m * n)))


@pytest.mark.parametrize("where", ["samples", "cases"])
def test_full_fine_tune_spectrum_equals_numpy(where):
    if where == "samples":
        base, tuned, grads = SAMPLES / "base", SAMPLES / "full_ft", SAMPLES / "gradients"
    else:
        case = DATA / "cases" / "gradients"
        base, tuned, grads = case / "base", DATA / "cases" / "full-ft" / "merged", case / "grads"
    before, after = load(base), load(tuned)
    gradients = {
        int(file.stem[-6:]): load_file(file) for file in sorted(grads.glob("*.safetensors"))
    }
    update = {k: as_numpy(after[k]) - as_numpy(before[k]) for k in before if before[k].ndim == 2}
    result = lora_diag.overlap(base, tuned, [grads], ranks=[3, 8])
    check(result, update, gradients, lambda delta: [3, 8])
    assert result.end is not None
    assert {item.reason for item in result.left_out} == {"vector"}


def test_adapter_is_own_reference_at_its_rank():
    adapter = load(SAMPLES / "lora_r4")
    update = {}
    for key in adapter:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            update[name] = (
                2 * as_numpy(adapter[key.replace("lora_A", "lora_B")]) @ as_numpy(adapter[key])
            )
    gradients = {0: load_file(SAMPLES / "gradients" / "grad_step000000.safetensors")}
    path = [SAMPLES / "gradients" / "grad_step000000.safetensors"]
    result = lora_diag.overlap(SAMPLES / "base", SAMPLES / "lora_r4", path, ranks=[2, 16])
    check(result, update, gradients, lambda delta: [2, 4])
    assert {item.layer for item in result.left_out if item.reason == "no_reference"} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }


@pytest.fixture
def model(tmp_path):
    """A small base, a fine-tune of it, and two gradients of every weight."""
    before, change = weights(1), weights(2)
    base = save_model(tmp_path / "base", before)
    tuned = save_model(
        tmp_path / "tuned", {name: value + change[name] for name, value in before.items()}
    )
    for step in (0, 10):
        save_step(tmp_path / "g" / f"{step}.safetensors", weights(step + 3), step)
    return base, tuned, tmp_path / "g"


def without(file, *names, **changed):
    tensors = {name: value for name, value in load_file(file).items() if name not in names}
    save_file(tensors | changed, file, {"step": file.stem})


def test_layers_without_gradient_are_named(model):
    base, tuned, grads = model
    missing = "model.layers.0.mlp.up_proj.weight"
    without(grads / "10.safetensors", missing, "lm_head.weight")
    without(grads / "0.safetensors", "lm_head.weight", other=torch.ones(2, 2))
    result = lora_diag.overlap(base, tuned, [grads], ranks=[2])
    text = {
        item.layer: (item.reason, item.detail)
        for item in result.left_out
        if item.reason != "vector"
    }
    assert text["lm_head.weight"][0] == text[missing][0] == "no_gradient"
    assert_names(text["lm_head.weight"][1], "2 steps")
    assert_names(text[missing][1], "step 10")
    assert text["other"][0] == "not_in_base"
    assert [record.step for record in result if record.layer == missing] == [0]
    assert not any(record.layer == "lm_head.weight" for record in result)


def test_resumed_run_gives_same_file_with_non_finite_gradient(model, tmp_path):
    base, tuned, grads = model
    bad = load_file(grads / "0.safetensors")["lm_head.weight"]
    bad[7, 3] = torch.inf
    without(grads / "0.safetensors", **{"lm_head.weight": bad})
    whole = tmp_path / "whole.jsonl"
    result = lora_diag.overlap(base, tuned, [grads], ranks=[2, 3], output=whole)
    (item,) = [item for item in result.left_out if item.reason == "non_finite"]
    assert item.layer == "lm_head.weight"
    assert_names(item.detail, "step 0", "inf at [7, 3]")
    assert {record.step for record in result if record.layer == "lm_head.weight"} == {10}
    lines = whole.read_text().splitlines(keepends=True)
    for kept in range(2, len(lines)):
        part = tmp_path / f"part{kept}.jsonl"
        part.write_text("".join(lines[:kept]) + lines[kept][:20])
        lora_diag.overlap(base, tuned, [grads], ranks=[2, 3], output=part, resume=True)
        assert part.read_text() == whole.read_text(), kept


def test_run_is_not_resumed_with_other_gradients(model, tmp_path):
    base, tuned, grads = model
    output = tmp_path / "r.jsonl"
    lora_diag.overlap(base, tuned, [grads], output=output, ranks=[2])
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:5]))
    without(grads / "0.safetensors", **{"lm_head.weight": torch.ones(20, 12)})
    with raises_naming(UsageError, "changed since"):
        lora_diag.overlap(base, tuned, [grads], output=output, resume=True, ranks=[2])


def test_zero_update_has_no_subspaces_and_zero_gradient_no_share(model):
    base, tuned, grads = model
    after = load_file(tuned / "model.safetensors")
    same = load_file(base / "model.safetensors")
    save_model(tuned, after | {"lm_head.weight": same["lm_head.weight"]})
    without(grads / "0.safetensors", **{"model.embed_tokens.weight": torch.zeros(20, 12)})
    result = lora_diag.overlap(base, tuned, [grads], ranks=[2])
    reasons = {item.layer: item.reason for item in result.left_out}
    assert reasons["lm_head.weight"] == "no_reference"
    record = result["model.embed_tokens.weight"]
    assert (record.step, record.gradient_fro, record.kappa, record.tangent) == (0, 0.0, None, None)


def test_ranks_beyond_layer_are_left_out_there(model):
    base, tuned, grads = model
    result = lora_diag.overlap(base, tuned, [grads], ranks=[4, 8, 12])
    ranks = {(record.shape, record.rank) for record in result}
    assert ((6, 12), 4) in ranks
    assert ((6, 12), 8) not in ranks
    assert ((12, 16), 12) in ranks
    only = lora_diag.overlap(base, tuned, [grads], ranks=[8])
    assert {item.layer for item in only.left_out if item.reason == "no_reference"} == {
        f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)
    }


def test_gradient_equal_to_update_has_overlap_growing_to_one(model, tmp_path):
    base, tuned, _ = model
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    save_step(
        tmp_path / "own" / "1.safetensors", {name: before[name] - after[name] for name in before}
    )
    result = lora_diag.overlap(base, tuned, [tmp_path / "own"], ranks=[1, 6, 12], layers="up_proj")
    by_rank = {record.rank: record for record in result if "layers.0" in record.layer}
    assert by_rank[12].kappa == pytest.approx(1, abs=1e-6)
    for record in by_rank.values():  # the part of ΔW in its own top-r spaces is C(r)
        assert record.kappa == pytest.approx(record.left, abs=1e-6)
        assert record.kappa == pytest.approx(record.tangent, abs=1e-6)


def test_grown_vocabulary_is_measured_on_base_rows(model):
    base, tuned, grads = model
    after = load_file(tuned / "model.safetensors")
    head = torch.cat([after["lm_head.weight"], torch.ones(4, 12)])
    save_model(tuned, after | {"lm_head.weight": head})
    same = lora_diag.overlap(base, tuned, [grads], ranks=[2], layers="lm_head")
    without(
        grads / "0.safetensors",
        **{"lm_head.weight": torch.cat([weights(3)["lm_head.weight"], torch.ones(4, 12)])},
    )
    without(grads / "10.safetensors", "lm_head.weight")
    grown = lora_diag.overlap(base, tuned, [grads], ranks=[2], layers="lm_head")
    assert grown.layers[0].kappa == same.layers[0].kappa
    assert grown.layers[0].shape == (20, 12)


def test_gradients_of_another_shape_are_left_out(model):
    base, tuned, grads = model
    for step in (0, 10):
        without(
            grads / f"{step}.safetensors",
            **{"model.layers.0.mlp.up_proj.weight": torch.ones(12, 12)},
        )
    result = lora_diag.overlap(base, tuned, [grads], ranks=[2])
    (item,) = [item for item in result.left_out if item.reason == "no_gradient"]
    assert item.layer == "model.layers.0.mlp.up_proj.weight"
    assert_names(item.detail, "shape", "[12, 12]")


def test_nothing_in_common_is_an_error(model, tmp_path):
    base, tuned, _ = model
    path = save_step(tmp_path / "other" / "1.safetensors", {"x.weight": torch.ones(3, 3)})
    with pytest.raises(NothingComparedError, match=r"x\.weight"):
        lora_diag.overlap(base, tuned, [path])
    with raises_naming(UsageError, "gradients", "given"):
        lora_diag.overlap(base, tuned, [])
    with pytest.raises(InputError):
        lora_diag.overlap(base, tuned, [tmp_path / "absent"])


def test_reference_below_rounding_floor_is_noted(tmp_path, model):
    base, _, grads = model
    before = {
        name: value.to(torch.bfloat16)
        for name, value in load_file(base / "model.safetensors").items()
    }
    after = {
        name: value + (weights(5)[name] * 3e-3).to(torch.bfloat16) for name, value in before.items()
    }
    base, tuned = save_model(tmp_path / "b16", before), save_model(tmp_path / "t16", after)
    result = lora_diag.overlap(base, tuned, [grads], ranks=[2])
    assert "unresolved" in {record.verdict for record in result} <= {"unresolved", "floor-limited"}


def test_swapped_gradients_and_checkpoints_are_detected(model, tmp_path):
    base, tuned, _ = model
    first = SAMPLES / "gradients" / "grad_step000000.safetensors"
    with raises_naming(UsageError, "gradients", "BASE", "TUNED"):
        lora_diag.overlap(SAMPLES / "base", first, [SAMPLES / "gradients"])
    (tuned / "config.json").write_text('{"model_type": "llama"}')
    named = tuned.rename(tmp_path / "checkpoint-40")
    result = lora_diag.overlap(base, named, [named], ranks=[2])
    assert result.run.inputs[2].notes == (
        "step 40 is next to a config.json; check that these are gradients, not a checkpoint",
    )
