"""``portability --fix``: what is written means what was given, in one rank and with α = r."""

import importlib.util
import json
from collections import OrderedDict

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_diag.diagnostics.portability.measure import make_portable, portability
from lora_diag.errors import InputError
from tests.adapters.making import adapter, base, changes, close, normal, write
from tests.diagnostics.portability.test_command import MODULES, factors
from tests.messages import assert_names, raises_naming

RANKS = (2, 3, 5, 1)


def patterned(tmp_path, **config):
    pattern = dict(zip(MODULES, RANKS, strict=True))
    tensors = factors(RANKS, rows=10)
    return adapter(
        tmp_path, tensors, rank_pattern=pattern, target_modules=["q_proj", "v_proj"], **config
    )


def assert_same_update(path, other, base=None, tolerance=1e-6):
    """Two adapters of one base have the same ΔW."""
    (after, _), (before, _) = changes(path, base), changes(other, base)
    assert after.keys() == before.keys()
    for layer, change in before.items():
        close(after[layer], change, tolerance)


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 7}, "lora_alpha": 5}]
)
def test_fixed_adapter_has_same_update_in_all_programs(tmp_path, config):
    folder = patterned(tmp_path, **config)
    results = make_portable(
        folder, tmp_path / "out", require=["peft", "vllm==0.31", "sglang", "llamacpp", "peft==0.13"]
    )
    assert {record.status for record in results} == {"exact"}
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (5, 5)
    assert not any(key in written for key in ("rank_pattern", "alpha_pattern"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(value.shape) for value in tensors.values()} == {5}
    assert_same_update(tmp_path / "out", folder)


@pytest.mark.slow
def test_peft_applies_what_was_written(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    def make_model():
        torch.manual_seed(0)
        layers = {"q_proj": torch.nn.Linear(12, 10, bias=False), "embed": torch.nn.Embedding(7, 6)}
        return torch.nn.Sequential(OrderedDict(layers))

    tensors = {
        "q_proj.lora_A.weight": normal(2, 12),
        "q_proj.lora_B.weight": normal(10, 2),
        "embed.lora_embedding_A": normal(3, 7),
        "embed.lora_embedding_B": normal(6, 3),
    }
    folder = adapter(
        tmp_path,
        tensors,
        rank_pattern={"embed": 3},
        target_modules=["q_proj", "embed"],
        use_rslora=True,
    )
    make_portable(folder, tmp_path / "out")
    merged = []
    for path in (folder, tmp_path / "out"):
        model = peft.PeftModel.from_pretrained(make_model(), path).merge_and_unload()
        merged.append({name: value.double().numpy() for name, value in model.state_dict().items()})
    plain = make_model().state_dict()
    for name, value in merged[0].items():
        assert np.abs(value - plain[name].double().numpy()).max() > 0.1
        np.testing.assert_allclose(merged[1][name], value, atol=2e-6)


def test_half_precision_is_kept_where_folding_is_exact(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = patterned(tmp_path)
    path = folder / "adapter_model.safetensors"
    halves = {name: torch.from_numpy(value).bfloat16() for name, value in load_file(path).items()}
    for alpha, dtype in ((None, "float32"), (4, "bfloat16")):
        save_file(halves, path)
        config = json.loads((folder / "adapter_config.json").read_text())
        pattern = (
            {module: 2 * rank for module, rank in zip(MODULES, RANKS, strict=True)} if alpha else {}
        )
        (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": pattern}))
        results = make_portable(folder, tmp_path / dtype)
        assert results.run.settings["fixed"]["dtype"] == dtype
        assert results.run.settings["fixed"]["rounding"] < (1e-6 if dtype == "float32" else 1e-12)


def dora_update(w, b, a, m):
    v = w + 1.5 * b @ a
    return m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w


def truncated(x, rank=2):
    u, s, vh = np.linalg.svd(x)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize(("variant", "turned"), [("dora", False), ("dora", True), ("pissa", True)])
def test_adapter_beyond_factors_becomes_the_nearest_lora(tmp_path, variant, turned):
    """Also of a square weight that is stored in × out."""
    w, a, b, m = (
        normal(6, 6),
        normal(2, 6, seed=1),
        normal(6, 2, seed=2),
        np.abs(normal(6, seed=3)) + 1,
    )
    tensors, config = {"q.lora_A.weight": a, "q.lora_B.weight": b}, {"init_lora_weights": "pissa"}
    whole = best = 1.5 * b @ a - truncated(w)
    if variant == "dora":
        tensors["q.lora_magnitude_vector"], config = m, {"use_dora": True}
        whole = dora_update(w, b, a, m)
        best = truncated(whole)
    folder = adapter(tmp_path, tensors, target_modules=["q"], fan_in_fan_out=turned, **config)
    base(tmp_path, {"q.weight": w.T if turned else w})
    for options, message in (
        (((tmp_path / "base",), "dora-to-lora"), ((), "give BASE")) if variant == "dora" else ()
    ):
        with pytest.raises(InputError, match=message):
            make_portable(folder, tmp_path / "out", *options, dora_to_lora=not options)
    results = make_portable(folder, tmp_path / "out", tmp_path / "base", dora_to_lora=True)
    after, _ = changes(tmp_path / "out", None)
    close(after["q.weight"], best, 1e-5)
    epsilon = np.linalg.norm(whole - best) / np.linalg.norm(whole)
    errors = {"q.weight": pytest.approx(epsilon, rel=1e-5)} if variant == "dora" else {}
    assert results.run.settings["fixed"]["truncated"] == errors


def test_update_with_changed_copy_states_its_error(tmp_path):
    """A saved copy of the weight that differs from BASE adds a difference of full rank to PiSSA's
    update.
    """
    w, copy, a, b = normal(6, 6), normal(6, 6, seed=9), normal(2, 6, seed=1), normal(6, 2, seed=2)
    tensors = {"q.lora_A.weight": a, "q.lora_B.weight": b, "q.base_layer.weight": copy}
    folder = adapter(tmp_path, tensors, target_modules=["q"], init_lora_weights="pissa")
    base(tmp_path, {"q.weight": w})
    whole = 1.5 * b @ a - truncated(w) + copy - w
    fixed = make_portable(folder, tmp_path / "out", tmp_path / "base").run.settings["fixed"]
    after, _ = changes(tmp_path / "out", None)
    epsilon = np.linalg.norm(after["q.weight"] - whole) / np.linalg.norm(whole)
    assert epsilon > 0.1
    assert (fixed["truncated"], fixed["epsilon"]) == (
        {"q.weight": pytest.approx(epsilon)},
        pytest.approx(epsilon),
    )


def test_unmatched_weights_are_named_and_left_out_if_allowed(tmp_path, loradiag):
    tensors = {
        "q.lora_A.weight": normal(2, 5),
        "q.lora_B.weight": normal(6, 2),
        "q.lora_B.bias": normal(6),
        "head.weight": normal(4, 5),
    }
    adapter(tmp_path, tensors, lora_bias=True, modules_to_save=["head"], target_modules=["q"])
    ran = loradiag("portability", "adapter", "--fix", "-o", "out")
    assert ran.code == 3
    assert "q.bias: a bias" in ran.err
    assert_names(ran.err, "head.weight")
    assert not (tmp_path / "out").exists()
    ran = loradiag(
        "portability", "adapter", "--fix", "--leave-out", "-o", "out", "--require", "vllm"
    )
    assert ran.code == 0
    assert "left out" in ran.out


def image_base(tmp_path):
    names = ("down_blocks.0.attn.to_q.weight", "mid_block.conv.weight")
    tensors = {names[0]: normal(6, 5), names[1]: normal(4, 3, 2, 2)}
    return base(tmp_path, tensors, {"_class_name": "UNet2DConditionModel"})


def image_adapter(tmp_path):
    tensors = {
        "lora_unet_down_blocks_0_attn_to_q.lora_down.weight": normal(2, 5),
        "lora_unet_down_blocks_0_attn_to_q.lora_up.weight": normal(6, 2),
        "lora_unet_down_blocks_0_attn_to_q.alpha": np.array(3.0),
        "lora_unet_mid_block_conv.lora_down.weight": normal(3, 3, 2, 2),
        "lora_unet_mid_block_conv.lora_up.weight": normal(4, 3, 1, 1),
    }
    return write(tmp_path / "image" / "lora.safetensors", tensors)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_image_adapters_are_written_in_each_layout(tmp_path, form):
    folder, file = image_base(tmp_path), image_adapter(tmp_path)
    results = make_portable(
        file, tmp_path / "out", folder, form=form, consumers=["peft"] if form == "peft" else ()
    )
    assert {record.status for record in results} == {"exact"}
    assert_same_update(tmp_path / "out", file, folder)
    repeated = make_portable(tmp_path / "out", tmp_path / "again", folder, form="kohya")
    assert {record.status for record in repeated} == {"exact"}
    assert_same_update(tmp_path / "again", file, folder)


@pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"
)
def test_diffusers_loads_adapter_of_scale_1(tmp_path):
    from diffusers.utils.peft_utils import get_peft_kwargs

    folder = image_base(tmp_path)
    make_portable(image_adapter(tmp_path), tmp_path / "out", folder, form="diffusers")
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    state = {name.removeprefix("unet."): value for name, value in tensors.items()}
    ranks = {name: value.shape[1] for name, value in state.items() if "lora_B" in name}
    result = get_peft_kwargs(ranks, None, state)
    assert (result["r"], result["lora_alpha"], result["rank_pattern"], result["alpha_pattern"]) == (
        3,
        3,
        {},
        {},
    )
    assert set(result["target_modules"]) == {"down_blocks.0.attn.to_q", "mid_block.conv"}


@pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"
)
def test_diffusers_converts_kohya_output(tmp_path):
    """Its converter of kohya files finds both factors and α = r under the module of the U-Net."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from safetensors.torch import load_file as load

    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    folder = base(
        tmp_path, {f"{module}.weight": normal(6, 5)}, {"_class_name": "UNet2DConditionModel"}
    )
    a, b = normal(2, 5), normal(6, 2)
    adapter(
        tmp_path,
        {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b},
        target_modules=["to_q"],
    )
    make_portable(tmp_path / "adapter", tmp_path / "out", folder, form="kohya")
    state, alphas = _convert_non_diffusers_lora_to_diffusers(
        load(tmp_path / "out" / "lora.safetensors")
    )
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    assert set(state) == {f"{key}.down.weight", f"{key}.up.weight"}
    close((state[f"{key}.up.weight"] @ state[f"{key}.down.weight"]).double().numpy(), 1.5 * b @ a)
    assert list(alphas.values()) == [torch.tensor(2.0).item()]


def test_mlx_layout_round_trip(tmp_path):
    folder = patterned(tmp_path, use_rslora=True)
    results = make_portable(folder, tmp_path / "mlx", form="mlx")
    assert {(record.consumer, record.status) for record in results} == {("mlx", "exact")}
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    make_portable(tmp_path / "mlx", tmp_path / "back", form="peft")
    for path in ("mlx", "back"):
        assert_same_update(tmp_path / path, folder)


LLAMA = {"model_type": "llama", "num_attention_heads": 2}
TABLE, HEAD = "model.embed_tokens", "lm_head"
TABLES = {
    TABLE: {
        f"{TABLE}.lora_embedding_A": normal(2, 9, seed=1),
        f"{TABLE}.lora_embedding_B": normal(6, 2, seed=2),
    },
    HEAD: {
        f"{HEAD}.lora_A.weight": normal(2, 6, seed=3),
        f"{HEAD}.lora_B.weight": normal(9, 2, seed=4),
    },
}
PLAIN = {
    "model.norm_proj.lora_A.weight": normal(2, 6, seed=5),
    "model.norm_proj.lora_B.weight": normal(6, 2, seed=6),
}


def vocabulary_adapter(tmp_path, module, tied):
    """Write a model of an embedding, a layer and perhaps a head of its own, and a LoRA of the layer
    and one table.
    """
    stored = {f"{TABLE}.weight": normal(9, 6), "model.norm_proj.weight": normal(6, 6)}
    config = LLAMA | {"tie_word_embeddings": tied}
    folder = base(
        tmp_path, stored | ({} if tied else {f"{HEAD}.weight": normal(9, 6, seed=8)}), config
    )
    return folder, adapter(
        tmp_path, PLAIN | TABLES[module], target_modules=["norm_proj", module.split(".")[-1]]
    )


def test_mlx_embedding_has_the_shapes_of_its_layer(tmp_path):
    """Of ``LoRAEmbedding``: ``lora_a`` (vocab, r) and ``lora_b`` (r, dim), ΔW = scale·a·b;
    ``LoRALinear`` is turned.
    """
    folder, path = vocabulary_adapter(tmp_path, TABLE, tied=False)
    make_portable(path, tmp_path / "mlx", folder, form="mlx")
    tensors = load_file(tmp_path / "mlx/adapters.safetensors")
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    a, b = (tensors[f"{TABLE}.lora_{side}"].astype(np.float64) for side in "ab")
    assert (a.shape, b.shape) == ((9, 2), (2, 6))
    table = TABLES[TABLE]
    expected = 1.5 * (table[f"{TABLE}.lora_embedding_B"] @ table[f"{TABLE}.lora_embedding_A"]).T
    close(config["lora_parameters"]["scale"] * a @ b, expected, 1e-6)
    assert tensors["model.norm_proj.lora_a"].shape == (6, 2)
    alone, _ = changes(tmp_path / "mlx", None)
    close(alone[f"{TABLE}.weight"], expected, 1e-6)
    make_portable(tmp_path / "mlx", tmp_path / "peft", folder, form="peft")
    names = {
        name.removeprefix("base_model.model.")
        for name in load_file(tmp_path / "peft/adapter_model.safetensors")
    }
    assert names == {
        *PLAIN,
        *table,
    }  # names that PEFT loads: it skips ``embed_tokens.lora_A.weight`` silently


@pytest.mark.parametrize("form", ["gguf", "mlx"])
@pytest.mark.parametrize("module", [TABLE, HEAD])
def test_update_of_tied_table_is_not_written(tmp_path, module, form):
    """As run: llama.cpp aborts or refuses it; mlx-lm refuses the head, and applies the embedding's
    to the head.
    """
    folder, path = vocabulary_adapter(tmp_path, module, tied=True)
    with raises_naming(InputError, f"{module}.weight", "tied"):
        make_portable(path, tmp_path / "out", folder, form=form)
    results = (
        make_portable(path, tmp_path / "out", folder, form=form, leave_out=True)
        if form == "mlx"
        else None
    )
    assert results is None or {record.layer for record in results} == {"model.norm_proj.weight"}


@pytest.mark.parametrize("module", [TABLE, HEAD])
def test_tied_rules_are_judged_with_base(tmp_path, loradiag, module):
    folder, path = vocabulary_adapter(tmp_path, module, tied=True)

    def statuses(*inputs):
        return {record.status for record in portability(*inputs, consumers=["llamacpp"])}

    assert statuses(folder, path) == {"refused"}
    assert statuses(path) == {"unknown"}
    ran = loradiag("portability", path, "--consumers", "llamacpp,peft", "--require", "llamacpp")
    assert ran.code == 1
    assert_names(ran.out, "not known", "llama.cpp", "as intended in PEFT")
    assert_names(ran.out, "tied", "give BASE")
    config = LLAMA | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    write(
        folder / "model.safetensors",
        {n: normal(9, 6) for n in (f"{TABLE}.weight", f"{HEAD}.weight")}
        | {"model.norm_proj.weight": normal(6, 6)},
    )
    assert statuses(folder, path) == {"exact"}
    assert loradiag("portability", folder, path, "--require", "llamacpp").code == 0


def test_mlx_embedding_needs_base_to_become_peft(tmp_path):
    folder, path = vocabulary_adapter(tmp_path, TABLE, tied=False)
    make_portable(path, tmp_path / "mlx", folder, form="mlx")
    with raises_naming(InputError, f"{TABLE}.weight", "give BASE"):
        make_portable(tmp_path / "mlx", tmp_path / "peft", form="peft")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    with raises_naming(InputError, f"{TABLE}.weight", "tied"):
        make_portable(tmp_path / "mlx", tmp_path / "peft", folder, form="peft")


@pytest.mark.parametrize(
    "words",
    [("--format", "peft"), ("--leave-out",), ("--fix",), ("--fix", "-o", "out", "--layers", "q")],
)
def test_write_options_require_each_other(tmp_path, loradiag, words):
    patterned(tmp_path)
    ran = loradiag("portability", "adapter", *words)
    assert (ran.code, ran.out) == (2, "")


def test_extract_writes_unequal_ranks_portably(tmp_path, loradiag):
    """One rank in the file, the ranks that were asked for in the records, and the same update as
    without the option.
    """
    before = {f"{module}.weight": normal(10, 12, seed=n) for n, module in enumerate(MODULES)}
    after = {
        name: weight + normal(10, rank, seed=5) @ normal(rank, 12, seed=6)
        for (name, weight), rank in zip(before.items(), RANKS, strict=True)
    }
    base(tmp_path, before)
    write(tmp_path / "tuned" / "model.safetensors", after)
    for output, options in (("plain", ()), ("one", ("--portable",))):
        ran = loradiag("extract", "base", "tuned", "--energy", "0.999999", "-o", output, *options)
        assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        5,
        5,
        {},
        {},
    )
    assert {record.status for record in portability(tmp_path / "one")} == {"exact"}
    assert {
        record.status for record in portability(tmp_path / "plain", consumers=["llamacpp"])
    } >= {"wrong"}
    assert_same_update(tmp_path / "one", tmp_path / "plain", tolerance=1e-9)
    ran = loradiag(
        "extract", "base", "tuned", "--rank", "2", "-o", "no", "--portable", "--unfactored", "save"
    )
    assert ran.code == 2
