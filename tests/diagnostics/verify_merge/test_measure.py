"""Merges by the installed PEFT: none that is right fails, and every fault planted in one is found
and named.
"""

import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diag.adapters import open_adapter
from lora_diag.deltas import Side
from lora_diag.diagnostics.verify_merge.faults import MergedLayer
from lora_diag.diagnostics.verify_merge.measure import verify, verify_merge
from lora_diag.diagnostics.verify_merge.record import outcome
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.running.engines import local
from lora_diag.storage import open_checkpoint
from lora_diag.storage.file_bytes import READING
from tests.adapters import making
from tests.conftest import DATA, save_model
from tests.merges import Merged, gpt2, llama, mixtral, peft_merge, write
from tests.messages import assert_names, raises_naming

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CASES = sorted(
    path.parent.name
    for path in (DATA / "cases").glob("*/adapter")
    if (path.parent / "merged").exists()
)
Q, Q1 = (f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1))
UP = "model.layers.0.mlp.up_proj.weight"
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def sample_some_rows(monkeypatch):
    """Rule hypotheses out by a part of the rows of these small layers, as of large ones."""
    monkeypatch.setattr("lora_diag.diagnostics.verify_merge.faults.SAMPLED_ENTRIES", 512)


def verified(merged: Merged, path=None, **options):
    results = verify_merge(merged.base, merged.adapter, path or merged.merged, **options)
    assert results.end is not None
    return results


def statuses(results) -> dict[str, str]:
    return {record.layer: record.status for record in results if record.status != "ok"}


# --- correct merges
# -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES, reason="the shared cases are not here")
@pytest.mark.parametrize("case", CASES)
def test_shared_correct_merges_pass(case):
    folder = DATA / "cases" / case
    results = verify_merge(folder / "base", folder / "adapter", folder / "merged")
    assert outcome(results) == "correct"
    # PiSSA's part of W was taken out by a float32 SVD; everything else is right to the last bit.
    assert {record.status for record in results} <= (
        {"ok", "coarse"} if case == "llama-pissa" else {"ok"}
    )
    assert all(record.residual < 1e-5 for record in results if record.status == "coarse")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("size", [0.05, 0.0005])
def test_lora_equals_every_peft_merge(tmp_path, dtype, safe, size):
    for autocast in (True, False):  # float32 factors on a bf16 model, or bf16 ones
        merged = peft_merge(tmp_path / str(autocast), llama(dtype), size, safe, autocast)
        results = verified(merged)
        assert statuses(results) == {}
        assert outcome(results) == "correct"
        assert max(record.max_ulp for record in results) <= (3 if dtype == torch.float32 else 1)


@dataclass
class Kind:
    model: object
    config: dict
    size: float = 0.01

    @property
    def settings(self) -> dict:
        return {
            key: getattr(peft, value) if key == "kind" else value
            for key, value in self.config.items()
        }


KINDS = {
    "conv1d": Kind(gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "dora": Kind(llama, {"use_dora": True}),
    "rslora": Kind(llama, {"use_rslora": True}),
    "tied embedding": Kind(
        lambda dtype: llama(dtype, tied=True), {"target_modules": ["embed_tokens", "q_proj"]}
    ),
    "tied, both ends": Kind(
        lambda dtype: llama(dtype, tied=True), {"target_modules": ["embed_tokens", "lm_head"]}
    ),
    "saved modules": Kind(llama, {"modules_to_save": ["lm_head", "norm"]}),
    "experts": Kind(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "loha": Kind(
        llama, {"kind": "LoHaConfig", "r": 4, "alpha": 8, "target_modules": ["q_proj"]}, 0.05
    ),
    "lokr": Kind(
        llama, {"kind": "LoKrConfig", "r": 4, "alpha": 8, "target_modules": ["q_proj"]}, 0.05
    ),
    "oft": Kind(
        llama, {"kind": "OFTConfig", "oft_block_size": 4, "target_modules": ["q_proj"]}, 0.05
    ),
    "ia3": Kind(
        llama, {"kind": "IA3Config", "target_modules": ["q_proj"], "feedforward_modules": []}, 0.005
    ),
    "vera": Kind(llama, {"kind": "VeraConfig", "r": 4, "target_modules": ["q_proj"]}, 0.05),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_every_peft_merge_passes(tmp_path, name, dtype):
    kind = KINDS[name]
    results = verified(peft_merge(tmp_path, kind.model(dtype), kind.size, **kind.settings))
    assert outcome(results) == "correct", statuses(results)
    assert any(record.adapted for record in results)


CASTS = {
    "saved in bf16": (lambda w, d: (w + d).bfloat16(), "ok"),
    "base loaded in bf16": (lambda w, d: (w.bfloat16().double() + d).bfloat16(), "ok"),
    "merged in bf16, saved in float32": (lambda w, d: (w + d).bfloat16().float(), "ok"),
    "merged in fp16, saved in bf16": (lambda w, d: (w + d).half().bfloat16(), "ok"),
    "saved in float64": (lambda w, d: (w + d).float().double(), "ok"),
    "product in bf16": (lambda w, d: (w + d.bfloat16().double()).float(), "coarse"),
    "base in bf16, sum in float32": (
        lambda w, d: (w.bfloat16().double() + d).float(),
        "other base",
    ),
}


@pytest.mark.parametrize("name", CASTS)
def test_dtypes_that_change_between_sides(tmp_path, name):
    cast, status = CASTS[name]
    merged = peft_merge(tmp_path, llama(), 0.01)

    def change(before, after):
        for key, w in before.items():
            adapted = f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight" in factors
            after[key] = cast(
                w.double(), merged.delta(key) if adapted else torch.zeros_like(w).double()
            )

    factors = load_file(merged.adapter / "adapter_model.safetensors")
    results = verified(merged, merged.spoil(change))
    assert {record.status for record in results if record.adapted} == {status}
    if status != "other base":
        assert outcome(results) == "correct"


def test_untied_head_of_merge_is_separate(tmp_path):
    merged = peft_merge(tmp_path, llama(tied=True), target_modules=["embed_tokens"])
    table = "model.embed_tokens.weight"
    untied = merged.spoil(
        lambda before, after: after.update({"lm_head.weight": before[table].clone()})
    )
    assert outcome(verified(merged, untied)) == "correct"


def test_merge_with_grown_vocabulary_is_checked(tmp_path):
    """The base has 40 rows; the adapter was trained on 44 and holds them all, and the merge has
    them.
    """
    base, model = llama(), llama()
    model.resize_token_embeddings(44)
    merged = peft_merge(tmp_path, model, modules_to_save=["lm_head", "embed_tokens"])
    before = {name: value.detach() for name, value in base.state_dict().items()}
    before |= {
        name: value for name, value in merged.before.items() if value.shape == before[name].shape
    }
    small = write(tmp_path / "small", before)
    added = "lm_head.weight (added rows)"
    results = verify_merge(small, merged.adapter, merged.merged)
    assert outcome(results) == "correct"
    assert results[added].shape == (4, 32)
    wrong = merged.spoil(lambda before, after: after["lm_head.weight"][42:].zero_())
    assert statuses(verify_merge(small, merged.adapter, wrong)) == {added: "other"}


# --- faults
# ---------------------------------------------------------------------------------------------------------


def repeated(merged: Merged, after, name: str, delta: torch.Tensor) -> None:
    w = merged.before[name]
    after[name] = (w.double() + delta).to(w.dtype)


def only(rows: slice, columns: slice):
    def change(merged, before, after):
        after[UP][rows, columns] = before[UP][rows, columns]

    return change


# Factor of ΔW -> what the cause names.
SCALES = {
    -1: "subtracted, or BASE and MERGED",
    0.4: r"times 0\.4: .*lora_alpha",
    2: r"α/√r where the adapter says α/r",
    0.5: r"rsLoRA \(r = 4\)",
    1.3: "not a known fault",
}
FAULTS = {
    f"times {factor}": (
        Q,
        lambda m, b, a, factor=factor: repeated(m, a, Q, m.delta(Q) * factor),
        "wrong scale",
        cause,
    )
    for factor, cause in SCALES.items()
}
FAULTS |= {
    "dropped": (Q, lambda m, b, a: a.update({Q: b[Q].clone()}), "dropped", "was not added"),
    "twice": (
        Q,
        lambda m, b, a: a.update({Q: (a[Q].double() + m.delta(Q)).to(a[Q].dtype)}),
        "wrong scale",
        "times 2: it was added twice",
    ),
    "transposed": (Q, lambda m, b, a: repeated(m, a, Q, m.delta(Q).T), "transposed", "ΔWᵀ"),
    "of another layer": (
        Q,
        lambda m, b, a: repeated(m, a, Q, m.delta(Q1)),
        "wrong order",
        f"the ΔW of {Q1} was",
    ),
    "rows missing": (
        UP,
        only(slice(10, 20), slice(None)),
        "partial",
        "rows 10-19 of 48 have no update",
    ),
    "columns missing": (
        UP,
        only(slice(None), slice(16, None)),
        "partial",
        "columns 16-31 of 32 have no update",
    ),
    "layer missing": (Q, lambda m, b, a: a.pop(Q), "missing", "no such weight"),
    "other shape": (Q, lambda m, b, a: a.update({Q: a[Q][:16]}), "missing", "another shape"),
    "nan": (Q, lambda m, b, a: a[Q].view(-1)[3].fill_(float("nan")), "other", r"nan at \[0, 3\]"),
    "noise": (Q, lambda m, b, a: a.update({Q: b[Q].flip(0) * 3}), "other base", "unrelated"),
    "one entry": (
        UP,
        lambda m, b, a: a[UP].view(-1)[40].add_(0.5),
        "other",
        "wrong entries: 1, in rows 1 of 48",
    ),
    "untouched": (
        "model.norm.weight",
        lambda m, b, a: a["model.norm.weight"].view(-1)[7].mul_(1.02),
        "changed",
        "not touched by the adapter",
    ),
}


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    """One merge for each dtype and size of ΔW; the smallest lies below the grain of bf16."""
    made = {}

    def get(dtype, size) -> Merged:
        if (dtype, size) not in made:
            made[dtype, size] = peft_merge(tmp_path_factory.mktemp("merge"), llama(dtype), size)
        return made[dtype, size]

    return get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.02, 0.0002])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found_and_named(merges, name, dtype, size):
    layer, change, status, words = FAULTS[name]
    merged = merges(dtype, size)
    results = verified(
        merged, merged.spoil(lambda before, after: change(merged, before, after), name)
    )
    assert outcome(results) == "failed"
    assert statuses(results) == {layer: status}
    assert re.search(words, results[layer].cause), results[layer].cause


def test_entry_off_within_coarse_arithmetic_is_not_right(merges):
    merged = merges(torch.float32, 0.02)
    sizes = merged.delta(UP).abs().view(-1)

    def change(before, after):
        after[UP].view(-1)[sizes.argmax()].add_(0.005 * float(sizes.max()))

    record = verified(merged, merged.spoil(change, "one entry a little"))[UP]
    assert (record.status, record.differing) == ("other", 1)


def test_verify_merge_distinguishes_other_base(merges):
    merged = merges(torch.bfloat16, 0.02)
    torch.manual_seed(0)

    def change(before, after):
        after[UP] = (after[UP].double() * (1 + 0.03 * torch.randn(48, 32))).bfloat16()

    record = verified(merged, merged.spoil(change, "on another base"))[UP]
    assert (record.status, record.scale) == ("other base", pytest.approx(1, abs=0.05))


@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_of_experts(tmp_path, dtype):
    config = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    merged = peft_merge(tmp_path, mixtral(dtype), 0.02, **config)

    def with_delta(name, change):
        def spoil(before, after):
            delta = after[name].double() - before[name].double()
            after[name] = (before[name].double() + change(delta)).to(dtype)

        return verified(merged, merged.spoil(spoil))

    order = with_delta(GATE_UP, lambda delta: delta[[1, 2, 0, 3]])
    assert statuses(order) == {f"{GATE_UP}[{e}]": "wrong order" for e in (0, 1, 2)}
    assert_names(order[f"{GATE_UP}[0]"].cause, "ΔW", f"{GATE_UP}[1]")
    dropped = with_delta(DOWN, lambda delta: delta * torch.tensor([1.0, 0, 0, 1])[:, None, None])
    assert statuses(dropped) == {f"{DOWN}[{e}]": "dropped" for e in (1, 2)}
    halves = with_delta(GATE_UP, lambda delta: delta.roll(24, 1))
    assert set(statuses(halves).values()) == {"wrong order"}
    assert_names(halves[f"{GATE_UP}[3]"].cause, "lower half")


@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_of_unfactored_updates(tmp_path, dtype):
    merged = peft_merge(tmp_path, llama(dtype), 0.02, use_dora=True, modules_to_save=["lm_head"])
    head = "lm_head.weight"
    dropped = merged.spoil(
        lambda before, after: after.update({Q: before[Q], head: before[head]}), "dropped"
    )
    assert statuses(verified(merged, dropped)) == {Q: "dropped", head: "dropped"}
    twice = merged.spoil(
        lambda b, a: a.update({Q: (2 * a[Q].double() - b[Q].double()).to(dtype)}), "twice"
    )
    assert statuses(verified(merged, twice)) == {Q: "wrong scale"}


def exact(merged: Merged, model) -> dict[str, torch.Tensor]:
    """The float64 merge that PEFT makes of the saved adapter and the model as it is stored."""
    tuned = peft.PeftModel.from_pretrained(
        model.double(), merged.adapter, autocast_adapter_dtype=False
    ).double()
    return tuned.merge_and_unload().state_dict()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", ["dora", "loha", "lokr", "oft", "ia3"])
def test_wrong_scale_of_every_family_is_named(tmp_path, name, dtype):
    size = 0.05 if name in {"oft", "ia3"} else 0.02
    merged = peft_merge(tmp_path, llama(dtype, hidden=96), size, **KINDS[name].settings)
    whole = exact(merged, llama(dtype, hidden=96))
    right, spoilt = verified(merged, layers=re.escape(Q)), {}
    for factor in (0.98, 1.01, 1.02, 1.05):

        def change(before, after, factor=factor):
            after[Q] = (before[Q].double() + factor * (whole[Q] - before[Q].double())).to(dtype)

        spoilt[factor] = verified(
            merged, merged.spoil(change, f"times {factor}"), layers=re.escape(Q)
        )[Q]
    assert right[Q].status == "ok"
    for factor, record in spoilt.items():
        assert record.status == "wrong scale", (factor, record.cause)
        assert float(record.cause.removeprefix("ΔW was added times ").split()[0]) == pytest.approx(
            factor, abs=4e-3
        )


def test_update_beyond_memory_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "PROGRAM_BYTES", 0)
    monkeypatch.setattr(local, "MIN_BYTES", 0)
    merged = peft_merge(
        tmp_path, llama(torch.bfloat16), 0.02, use_dora=True, modules_to_save=["lm_head"]
    )
    plain = verified(merged)
    m, n = plain[Q].shape
    assert m == n
    result = verified(merged, memory=(72 + 16 + 16) * m * n - 1, workers=1)
    left = {item.layer: item for item in result.unmeasured}
    assert {Q, Q1} <= set(left)
    assert left[Q].reason == "memory"
    assert_names(left[Q].detail, "held whole")
    assert [record for record in plain if record.layer not in left] == list(result)
    assert "lm_head.weight" in {record.layer for record in result}
    assert Q in {
        record.layer for record in verified(merged, memory=(72 + 16 + 16) * m * n, workers=1)
    }
    assert list(verified(merged, memory="1MB", workers=1)) == list(plain)


# --- what a file cannot tell
# ----------------------------------------------------------------------------------------


def test_update_rounded_away_is_neither_right_nor_wrong(tmp_path):
    """Also where it was merged in bf16 and saved in float32, or dropped: the same file."""
    merged = peft_merge(tmp_path, llama(torch.bfloat16), 1e-9)
    assert all(torch.equal(merged.before[name], merged.after[name]) for name in merged.before)
    sides = {"wide_base": merged.before, "wide": merged.after}
    base, wide = (
        write(tmp_path / name, {k: v.float() for k, v in side.items()})
        for name, side in sides.items()
    )
    for results in (verified(merged), verify_merge(base, merged.adapter, wide)):
        assert outcome(results) == "inconclusive"
        assert {(record.status, record.scale) for record in results if record.adapted} == {
            ("inconclusive", 0.0)
        }


def test_untrained_adapter_is_inconclusive(tmp_path):
    results = verified(peft_merge(tmp_path, llama(), 0.0))
    assert outcome(results) == "inconclusive"
    assert statuses(results) == {}


# --- quantized
# ------------------------------------------------------------------------------------------------------


def float8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to FP8 with one scale: codes and scale."""
    scale = w.abs().max().double() / 448
    return (w.double() / scale).to(torch.float8_e4m3fn), scale.float()


def quantized(folder, tensors, names):
    stored = {}
    for name, value in tensors.items():
        if name in names:
            codes, scale = float8(value)
            stored |= {name: codes, f"{name}_scale": scale.reshape(1)}
        else:
            stored[name] = value.clone()
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fbgemm_fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dequantized", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_merge_into_quantized_base(tmp_path, dtype, dequantized):
    merged = peft_merge(tmp_path, llama(), 0.02)
    base = quantized(tmp_path / "fp8", merged.before, {Q, UP})
    after = {name: value.to(dtype) for name, value in merged.after.items()}
    for name in (Q, UP):
        codes, scale = float8(merged.before[name])
        w = (codes.double() * scale.double()).to(dequantized).double()
        after[name] = (w + merged.delta(name)).to(dtype)
    assert outcome(verify_merge(base, merged.adapter, write(tmp_path / "m", after))) == "correct"
    after[Q] = (after[Q].double() + merged.delta(Q)).to(dtype)
    assert statuses(verify_merge(base, merged.adapter, write(tmp_path / "m2", after))) == {
        Q: "wrong scale"
    }


def test_quantized_base_with_rounded_scale(tmp_path):
    merged = peft_merge(tmp_path, llama(), 0.0005)
    after = {name: value.bfloat16() for name, value in merged.after.items()}
    for name in (Q, UP):
        codes, scale = float8(merged.before[name])
        w = codes.bfloat16() * scale.bfloat16()
        after[name] = (w.double() + merged.delta(name)).bfloat16()
    base = quantized(tmp_path / "fp8", merged.before, {Q, UP})
    assert statuses(verify_merge(base, merged.adapter, write(tmp_path / "m", after))) == {}


def test_quantized_merge_of_float_base(tmp_path):
    merged = peft_merge(tmp_path, llama(), 0.05)
    right = quantized(tmp_path / "right", merged.after, {Q, UP})
    assert outcome(verified(merged, right)) == "correct"
    after = dict(merged.after) | {Q: merged.before[Q]}
    assert statuses(verified(merged, quantized(tmp_path / "dropped", after, {Q, UP}))) == {
        Q: "dropped"
    }
    tiny = peft_merge(tmp_path / "tiny", llama(), 1e-8)
    lost = verified(tiny, quantized(tmp_path / "lost", tiny.after, {Q, UP}))
    assert statuses(lost) == {Q: "inconclusive", UP: "inconclusive"}
    assert outcome(lost) == "inconclusive"


# --- numbers, selection, errors
# -------------------------------------------------------------------------------------


def test_numbers_of_record(merges):
    merged = merges(torch.bfloat16, 0.0002)
    record = verified(merged)[Q]
    w, m, d = (t.double().numpy() for t in (merged.before[Q], merged.after[Q], merged.delta(Q)))
    assert record.scale == record.retained == pytest.approx(((m - w) * d).sum() / (d**2).sum())
    assert record.residual == pytest.approx(np.linalg.norm(m - w - d) / np.linalg.norm(d))
    assert record.unchanged == np.mean(m == w) > 0.2
    assert record.expected_fro == pytest.approx(np.linalg.norm(d))
    assert record.observed_fro == pytest.approx(np.linalg.norm(m - w))
    assert record.base_fro == pytest.approx(np.linalg.norm(w))
    assert (record.differing, record.differing_share, record.dtype) == (0, 0.0, "bfloat16")
    untouched = verified(merged)["model.norm.weight"]
    assert (untouched.adapted, untouched.scale, untouched.unchanged, untouched.shape) == (
        False,
        None,
        1.0,
        (32,),
    )


def test_layers_and_exclude(merges):
    merged = merges(torch.float32, 0.02)
    results = verified(merged, layers="q_proj")
    assert [record.layer for record in results] == [Q, Q1]
    assert {item.reason for item in results.left_out} == {"not_selected"}
    spoilt = merged.spoil(lambda before, after: after.update({Q: before[Q]}), "selected")
    assert outcome(verified(merged, spoilt, exclude=r"layers\.0\..*q_proj")) == "correct"
    with raises_naming(NothingComparedError, "adapted weight"):
        verified(merged, layers="norm")


def test_invalid_options_are_refused(merges, tmp_path):
    merged = merges(torch.float32, 0.02)
    with pytest.raises(UsageError, match="not an adapter; the order is"):
        verify_merge(merged.base, merged.merged, merged.adapter)
    with raises_naming(UsageError, "merged checkpoint"):
        verify_merge(merged.base, merged.adapter, merged.adapter)
    integers = write(
        tmp_path / "int", dict(merged.after) | {Q: torch.zeros(32, 32, dtype=torch.int32)}
    )
    with pytest.raises(InputError, match=r"q_proj.*int32"):
        verified(merged, integers)


def test_non_finite_base_is_left_out(merges, tmp_path):
    merged = merges(torch.float32, 0.02)
    before = {name: value.clone() for name, value in merged.before.items()}
    before[Q][0, 1] = float("inf")
    results = verify_merge(write(tmp_path / "inf", before), merged.adapter, merged.merged)
    assert [(item.layer, item.reason, item.detail) for item in results.left_out] == [
        (Q, "non_finite", "BASE holds inf at [0, 1]")
    ]


def test_overflowing_squares_are_left_out(tmp_path):
    huge = {"w.weight": torch.full((4, 4), 1e200, dtype=torch.float64)}
    base, merged = (save_model(tmp_path / side, huge) for side in ("base", "merged"))
    adapter = making.lora(
        tmp_path / "adapter", {"w": (np.full((4, 1), 1e100), np.full((1, 4), 1e100))}
    )
    (item,) = verify_merge(base, adapter, merged).left_out
    assert (item.layer, item.reason) == ("w.weight", "non_finite")
    assert "overflow float64" in item.detail


def test_layer_of_other_shape_is_not_a_candidate(tmp_path):
    name = "model.layers.{}.mlp.up_proj"
    shapes = {name.format(0): (8, 6), name.format(1): (10, 7)}
    weights = {f"{module}.weight": making.normal(*shape) for module, shape in shapes.items()}
    tensors = {}
    for module, (m, n) in shapes.items():
        tensors |= {
            f"{module}.lora_A.weight": making.normal(2, n),
            f"{module}.lora_B.weight": making.normal(m, 2),
        }
    wrong = {key: value + making.normal(*value.shape, seed=9) for key, value in weights.items()}
    base, adapter = making.base(tmp_path, weights), making.adapter(tmp_path, tensors)
    result = verify_merge(base, adapter, making.base(tmp_path / "merged", wrong))
    assert {record.layer: record.status for record in result} == dict.fromkeys(weights, "other")


def test_faulty_layer_is_read_once_where_it_fits_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_diag.deltas.BLOCK_ENTRIES", 240)  # four blocks
    monkeypatch.setattr("lora_diag.diagnostics.verify_merge.faults.SAMPLED_ENTRIES", 240)
    shape = (40, 24)
    weight = making.normal(*shape)
    base = making.base(tmp_path, {"w.weight": weight})
    merged = making.base(tmp_path / "merged", {"w.weight": weight + making.normal(*shape, seed=1)})
    adapter = making.adapter(
        tmp_path,
        {
            "w.lora_A.weight": making.normal(2, shape[1]),
            "w.lora_B.weight": making.normal(shape[0], 2),
        },
    )
    pairing, _ = open_adapter(adapter).pair(open_checkpoint(base))
    sides = [Side(open_checkpoint(path), "w.weight") for path in (base, merged)]
    task = MergedLayer("w.weight", shape, *sides, pairing.deltas)

    def passes(memory: int | None) -> float:
        READING.clear()
        assert verify(task, memory).status == "other"
        return READING.total()[0] / (2 * 4 * weight.size)

    assert 1 < passes(None) == passes(task.footprint) < 1.2  # and the factors
    assert passes(task.footprint - 1) > 1.5
