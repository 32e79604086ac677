"""GGUF adapters: files laid out as the gguf package does, read as llama.cpp's converter and runtime
mean them.
"""

import json
from types import MappingProxyType

import numpy as np
import pytest

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.diagnostics.portability.measure import make_portable
from lora_diag.errors import InputError, LoradiagError
from lora_diag.storage import open_checkpoint
from lora_diag.storage.gguf_model import ARCHITECTURES, OUTSIDE_BLOCKS
from tests.adapters import making
from tests.adapters.making import changes, close, dense, normal
from tests.conftest import DATA
from tests.messages import raises_naming
from tests.storage.gguf_files import write_gguf
from tests.storage.test_shared_cases import assert_true

gguf = pytest.importorskip("gguf")
CASES = [DATA / "formats" / name for name in ("gguf-lora", "gguf-lora-embed")]
CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def write(path, tensors, alpha=16.0, arch="llama", fields=MappingProxyType({})):
    """Write an adapter as llama.cpp's converter does."""
    fields = {
        "general.architecture": arch,
        "general.type": "adapter",
        "adapter.type": "lora",
    } | fields
    return write_gguf(
        path, fields if alpha is None else fields | {"adapter.lora.alpha": alpha}, tensors
    )


def pairs(name, a, b):
    return {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}


def in_pairs(b, heads):
    """Put the rows of each head in llama.cpp's order, one row at a time."""
    size = len(b) // heads
    out = np.empty_like(b)
    for row in range(len(b)):
        head, inside = divmod(row, size)
        half, place = divmod(inside, size // 2)
        out[head * size + 2 * place + half] = b[row]
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_gguf_case_has_true_weights(case):
    truth = json.loads((case / "truth.json").read_text())
    result, _ = changes(case / "adapter", case / "base")
    assert set(result) == {name for name in truth if name != "_meta"}
    for name, matrix in result.items():
        assert list(matrix.shape) == truth[name]["shape"]
        assert_true(matrix, truth[name])


@pytest.fixture
def llama(tmp_path):
    """Write an adapter of mixed ranks, with q and k in llama.cpp's order, and its BASE."""
    layer = "model.layers.0."
    shapes = {"q_proj": (64, 32), "k_proj": (32, 32), "o_proj": (32, 64)}
    weights = {f"{layer}self_attn.{leaf}.weight": normal(*shape) for leaf, shape in shapes.items()}
    weights |= {"model.embed_tokens.weight": normal(50, 32), "lm_head.weight": normal(50, 32)}
    base = making.base(tmp_path, weights, CONFIG)
    a = {
        leaf: normal(r, shapes[leaf][1], seed=1)
        for leaf, r in (("q_proj", 2), ("k_proj", 4), ("o_proj", 2))
    }
    b = {leaf: normal(shapes[leaf][0], a[leaf].shape[0], seed=2) for leaf in a}
    table = normal(50, 3, seed=3), normal(32, 3, seed=4)
    tensors = {
        **pairs("blk.0.attn_q", a["q_proj"], in_pairs(b["q_proj"], 4)),
        **pairs("blk.0.attn_k", a["k_proj"], in_pairs(b["k_proj"], 2)),
        **pairs("blk.0.attn_output", a["o_proj"], b["o_proj"]),
        **pairs("token_embd", *table),
        "blk.0.attn_norm.weight": normal(32),
    }
    expected = {f"{layer}self_attn.{leaf}.weight": b[leaf] @ a[leaf] for leaf in a}
    expected["model.embed_tokens.weight"] = table[0] @ table[1].T
    ranks = {"q_proj": 2, "k_proj": 4, "o_proj": 2, "embed_tokens": 3}
    ranks = {name: next(r for leaf, r in ranks.items() if leaf in name) for name in expected}
    return base, tensors, expected, ranks, tmp_path / "a.gguf"


@pytest.mark.parametrize("alpha", [16.0, 0.0, None])
def test_gguf_scale_is_alpha_by_the_rank_of_each_tensor(llama, alpha):
    base, tensors, expected, ranks, path = llama
    result, notes = changes(write(path, tensors, alpha), base)
    assert set(result) == set(expected)
    for name, matrix in result.items():
        close(matrix, expected[name] * (alpha / ranks[name] if alpha else 1.0))
    assert any("norms are in the file" in note for note in notes)
    assert any("give no alpha" in note for note in notes) == (not alpha)


def test_gguf_without_base_has_the_same_singular_values(llama):
    _, tensors, expected, ranks, path = llama
    result, notes = changes(write(path, tensors), None)
    for name, matrix in result.items():
        wanted = np.linalg.svd(expected[name] * 16 / ranks[name], compute_uv=False)
        np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), wanted, atol=1e-4)
    assert any("llama.cpp's order" in note for note in notes)


def test_gguf_q8_0_factors_are_decoded(llama):
    _, tensors, _, _, path = llama
    name = "blk.0.attn_output.weight.lora_a"
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(tensors[name].astype(np.float32), kind)
    result, _ = changes(
        write(path, tensors | {name: ("Q8_0", tensors[name].shape, blocks.tobytes())}), None
    )
    a = gguf.quants.dequantize(blocks, kind)
    close(
        result["model.layers.0.self_attn.o_proj.weight"], tensors[name.replace("_a", "_b")] @ a * 8
    )


def test_gguf_without_alpha_uses_stated_alpha(llama):
    base, tensors, expected, ranks, path = llama
    write(path, tensors, None)
    pairing, notes = open_adapter(path, 6.0).pair(open_checkpoint(base))
    for delta in pairing.deltas:
        close(dense(delta), expected[delta.layer] * 6 / ranks[delta.layer])
    assert any("alpha = 6 was given" in note for note in notes)


def test_gguf_experts_are_one_update_each(tmp_path):
    a, b = normal(3, 2, 8), normal(3, 12, 2)
    path = write(tmp_path / "a.gguf", pairs("blk.1.ffn_up_exps", a, b), 4.0, "qwen3moe")
    result, _ = changes(path, None)
    for expert in range(3):
        close(
            result[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"], b[expert] @ a[expert] * 2
        )


def test_gguf_of_unknown_architecture_keeps_its_names(tmp_path):
    path = write(
        tmp_path / "a.gguf", pairs("blk.1.attn_q", normal(2, 8), normal(8, 2)), arch="bloom"
    )
    result, notes = changes(path, None)
    assert list(result) == ["blk.1.attn_q.weight"]
    assert any("'bloom' are not known" in note for note in notes)


def test_gguf_ignores_peft_config_in_folder(llama):
    _, tensors, _, _, path = llama
    (path.parent / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 99}'
    )
    adapter = open_adapter(write(path, tensors))
    assert is_adapter(path)
    assert (adapter.form, adapter.source.config) == ("gguf", None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"general.type": "model"}, "general.type is 'model'"),
        ({"adapter.type": "control"}, "adapter.type 'control'"),
        ({"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha is nan"),
    ],
)
def test_gguf_header_without_lora_is_refused(tmp_path, change, problem):
    path = write(
        tmp_path / "a.gguf", pairs("blk.1.attn_q", normal(2, 8), normal(8, 2)), None, fields=change
    )
    with pytest.raises(InputError, match=problem):
        open_adapter(path)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"blk.0.attn_q.weight.lora_a": normal(2, 8)}, "has no .lora_b"),
        ({"blk.0.attn_q.weight": normal(8, 8)}, "llama.cpp refuses the file"),
        (pairs("blk.0.attn_q", normal(2, 8), normal(8, 3)), r"are not \(r, in\) and \(out, r\)"),
        (pairs("blk.0.attn_q", normal(8), normal(8)), r"are not \(r, in\)"),
        (pairs("token_embd", normal(2, 8), normal(8, 2)), r"are not \(vocab, r\)"),
        (pairs("blk.0.ffn_up_exps", normal(3, 2, 8), normal(4, 8, 2)), r"are not \(r, in\)"),
    ],
)
def test_mismatched_gguf_factors_are_refused(tmp_path, tensors, problem):
    path = write(tmp_path / "a.gguf", tensors)
    with pytest.raises(InputError, match=problem):
        open_adapter(path)


@pytest.mark.parametrize(
    ("heads", "problem"), [(None, "gives no num_attention_heads"), (3, "gives 3 heads for 64")]
)
def test_gguf_rows_need_the_heads_of_base(llama, heads, problem):
    base, tensors, _, _, path = llama
    (base / "config.json").write_text(json.dumps({"num_attention_heads": heads} if heads else {}))
    with pytest.raises(LoradiagError, match=problem):
        changes(write(path, tensors), base)


def test_gguf_names_equal_library():
    keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    for names in ARCHITECTURES.values():
        table = gguf.get_tensor_name_map(keys[names.architecture], 3)
        for stem in (*(f"blk.2.{part}" for part in names.block), *OUTSIDE_BLOCKS):
            theirs = names.in_transformers(f"{stem}.weight")
            result = table.get_name(theirs.replace(".{}", ""), try_suffixes=(".weight",))
            if (
                result is None and stem in OUTSIDE_BLOCKS
            ):  # a tied head, a final norm without a weight
                continue
            assert result == f"{stem}.weight", (names.architecture, stem)
            assert names.in_gguf(theirs) == f"{stem}.weight"


@pytest.fixture
def peft(llama):
    """Write the same adapter as a PEFT folder with rsLoRA and patterns, and return the ΔW that it
    means.
    """
    base, _, expected, ranks, path = llama
    result = {}
    for layer, rank in ranks.items():
        module = layer.removesuffix(".weight")
        u, s, vh = np.linalg.svd(expected[layer], full_matrices=False)
        b, a = u[:, :rank] * s[:rank], vh[:rank]
        if "embed" in module:
            result |= {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        else:
            result |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    pattern = {layer.removesuffix(".weight"): rank for layer, rank in ranks.items()}
    config = {
        "rank_pattern": pattern,
        "use_rslora": True,
        "target_modules": [*pattern],
        "lora_alpha": 6,
    }
    folder = making.adapter(path.parent, result, **config)
    return (
        base,
        folder,
        {layer: change * 6 / ranks[layer] ** 0.5 for layer, change in expected.items()},
    )


def test_gguf_written_is_the_same_update_by_the_library(peft):
    """The file by gguf's own reader: one α, one rank, rows in llama.cpp's order, the embedding
    turned.
    """
    base, folder, expected = peft
    out = folder.parent / "out"
    results = make_portable(folder, out, base, form="gguf")
    assert {(record.consumer, record.status) for record in results} == {("llamacpp", "exact")}
    reader = gguf.GGUFReader(out / "adapter.gguf")
    fields = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    alpha = {"adapter.lora.alpha": 4.0}
    assert (
        fields
        == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
        | alpha
    )
    result = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    layer = "model.layers.0.self_attn."
    for stem, name, heads in (("q", "q_proj", 4), ("k", "k_proj", 2), ("output", "o_proj", 0)):
        a, b = (result.pop(f"blk.0.attn_{stem}.weight.lora_{side}") for side in "ab")
        assert a.shape[0] == b.shape[1] == 4
        wanted = expected[f"{layer}{name}.weight"]
        close(b @ a, in_pairs(wanted, heads) if heads else wanted, 1e-5)
    a, b = (result.pop(f"token_embd.weight.lora_{side}") for side in "ab")
    close(a @ b.T, expected["model.embed_tokens.weight"], 1e-5)
    assert not result


@pytest.mark.parametrize("form", ["peft", "mlx", "gguf"])
def test_gguf_is_written_in_another_layout_and_back(peft, form):
    base, folder, expected = peft
    make_portable(folder, folder.parent / "one", base, form="gguf")
    make_portable(folder.parent / "one", folder.parent / "two", base, form=form)
    result, _ = changes(folder.parent / "two", base)
    assert set(result) == set(expected)
    for layer, change in result.items():
        close(change, expected[layer], 1e-5)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "bloom"}, "llama.cpp's names for model type 'bloom' are not known"),
        ({"model_type": "llama"}, "gives no heads"),
        ({"model_type": "llama", "num_attention_heads": 5}, "gives 5 heads"),
        (None, "give BASE"),
    ],
)
def test_gguf_of_unknown_model_is_refused(peft, config, problem):
    base, folder, _ = peft
    (base / "config.json").write_text(json.dumps(config or {}))
    with pytest.raises(InputError, match=problem):
        make_portable(folder, folder.parent / "out", base if config else None, form="gguf")
    assert not (folder.parent / "out").exists()


def test_gguf_rows_without_base_are_kept_or_refused(llama):
    _, tensors, _, _, path = llama
    write(path, tensors)
    make_portable(path, path.parent / "out", form="gguf")
    one, two = (changes(file, None)[0] for file in (path, path.parent / "out"))
    for layer, change in one.items():
        close(two[layer], change, 1e-6)
    with pytest.raises(InputError, match="give BASE"):
        make_portable(path, path.parent / "peft", form="peft")


def test_tied_gguf_head_is_not_written(tmp_path):
    base = making.base(tmp_path, {"model.embed_tokens.weight": normal(9, 6)}, CONFIG)
    tensors = {"lm_head.lora_A.weight": normal(2, 6), "lm_head.lora_B.weight": normal(9, 2)}
    folder = making.adapter(tmp_path, tensors, target_modules=["lm_head"])
    with raises_naming(InputError, "tied", "embedding"):
        make_portable(folder, tmp_path / "out", base, form="gguf")
