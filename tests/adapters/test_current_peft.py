"""Adapters made on the spot by the installed PEFT on tiny models, compared with its own merge."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_diag.adapters import open_adapter
from lora_diag.adapters.portable import write_portable
from lora_diag.deltas import FactoredDelta
from lora_diag.storage import open_checkpoint
from tests.adapters.making import close, dense
from tests.merges import gpt2, llama, peft_merge

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 4, "lora_alpha": 10}


class Toy(nn.Module):
    """One of every layer that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(24, 16)
        self.conv = nn.Conv2d(16, 12, 3, padding=1)
        self.conv1d = nn.Conv1d(12, 8, 3, padding=1)
        self.q_proj = nn.Linear(12, 20)
        self.up_proj = nn.Linear(20, 20, bias=False)
        self.norm = nn.LayerNorm(20)
        self.lm_head = nn.Linear(20, 24, bias=False)

    def forward(self, x):
        return self.lm_head(self.norm(self.up_proj(self.q_proj(x))))


def check(model, config, tmp_path, tolerance=1e-5, factored=None):
    made = peft_merge(tmp_path, model, 0.1, made=config)
    before, merged = made.before, made.after
    pairing, notes = open_adapter(tmp_path / "adapter").pair(open_checkpoint(tmp_path / "base"))
    changes = {}
    for delta in pairing.deltas:
        change = (
            (merged[delta.layer].double() - before[delta.layer].double())
            .numpy()
            .reshape(delta.shape)
        )
        size = 2.0**-23 * np.sqrt(change.size) * float(merged[delta.layer].abs().max())
        error = np.linalg.norm(dense(delta) - change)
        assert error <= tolerance * np.linalg.norm(change) + size, (
            f"{delta.layer}: {error / np.linalg.norm(change)}"
        )
        assert (
            factored is None or not delta.is_matrix or isinstance(delta, FactoredDelta) == factored
        )
        changes[delta.layer] = change
    for name, value in before.items():
        if name not in changes:
            assert torch.equal(value, merged[name]), f"{name} changed and was not reported"
    assert changes
    return changes, notes


ALL = ["embed_tokens", "conv", "conv1d", "q_proj", "up_proj", "lm_head"]
LINEAR = ["q_proj", "up_proj"]
BLOCKS = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["up_proj"], "nblocks": 2}


def newer(name):
    """Return a class that older versions of PEFT lack."""
    from peft.tuners.lora import config

    return getattr(config, name, None) or pytest.skip(f"this PEFT has no {name}")


TOY = {
    "lora": (lambda: peft.LoraConfig(target_modules=ALL, **LORA), True),
    "rslora": (lambda: peft.LoraConfig(target_modules=LINEAR, use_rslora=True, **LORA), True),
    "dora": (lambda: peft.LoraConfig(target_modules=["embed_tokens", "conv", *LINEAR], use_dora=True, **LORA), False),
    "bias": (lambda: peft.LoraConfig(target_modules=LINEAR, bias="all", **LORA), True),
    "bias of adapted layers": (lambda: peft.LoraConfig(target_modules=LINEAR, bias="lora_only", **LORA), True),
    "lora_bias": (lambda: peft.LoraConfig(target_modules=["q_proj"], lora_bias=True, **LORA), True),
    "modules_to_save": (
        lambda: peft.LoraConfig(target_modules=LINEAR, modules_to_save=["norm", "lm_head"], **LORA), None
    ),
    "pissa": (lambda: peft.LoraConfig(target_modules=LINEAR, init_lora_weights="pissa", **LORA), True),
    "olora": (lambda: peft.LoraConfig(target_modules=LINEAR, init_lora_weights="olora", **LORA), True),
    "tokens": (
        lambda: peft.LoraConfig(target_modules=LINEAR, trainable_token_indices={"embed_tokens": [3, 1, 20]}, **LORA),
        True,
    ),
    "kasa": (lambda: peft.LoraConfig(target_modules=LINEAR, kasa_config=newer("KasaConfig")(), **LORA), True),
    "bd-lora": (
        lambda: peft.LoraConfig(target_modules=LINEAR, use_bdlora=newer("BdLoraConfig")(**BLOCKS), **LORA), True
    ),
    "pattern": (
        lambda: peft.LoraConfig(target_modules=LINEAR, rank_pattern={"up_proj": 2}, alpha_pattern={"q_.*": 3}, **LORA),
        True,
    ),
    "trainable tokens": (
        lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 2]), True
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(target_modules=LINEAR, init_r=5, target_r=3, lora_alpha=7, total_step=9), True
    ),
    "loha": (lambda: peft.LoHaConfig(target_modules=["conv", *LINEAR], r=3, alpha=5), False),
    "loha tucker": (
        lambda: peft.LoHaConfig(target_modules=["conv", *LINEAR], r=3, alpha=5, use_effective_conv2d=True), False
    ),
    "lokr": (lambda: peft.LoKrConfig(target_modules=["conv", "conv1d", *LINEAR], r=2, alpha=5), False),
    "lokr tucker": (
        lambda: peft.LoKrConfig(target_modules=["conv", *LINEAR], r=2, alpha=5, use_effective_conv2d=True), False
    ),
    "lokr both": (lambda: peft.LoKrConfig(target_modules=LINEAR, r=1, alpha=5, decompose_both=True), False),
    "vera": (lambda: peft.VeraConfig(target_modules=LINEAR, r=6), True),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["conv", *LINEAR], feedforward_modules=["up_proj"]), False
    ),
    "oft": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4), False),
    "oft exact": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, use_cayley_neumann=False), False),
    "oft shared": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, block_share=True), False),
    "oft embedding": (lambda: peft.OFTConfig(target_modules=["embed_tokens", "q_proj"], oft_block_size=4), False),
    "oft conv": (lambda: peft.OFTConfig(target_modules=["conv"], oft_block_size=4), False),
    "oft 3 terms": (
        lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=3), False
    ),
    "fourierft": (lambda: peft.FourierFTConfig(target_modules=LINEAR, n_frequency=50, scaling=20.0), False),
    "ln_tuning": (lambda: peft.LNTuningConfig(target_modules=["norm"]), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOY)
def test_current_peft_types_equal_merge(kind, tmp_path):
    if kind == "bias of adapted layers" and tuple(map(int, peft.__version__.split(".")[:2])) < (
        0,
        21,
    ):
        pytest.skip("PEFT before 0.21 trains these biases and does not save them")
    config, factored = TOY[kind]
    check(Toy(), config(), tmp_path, factored=factored)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera", "fourierft", "mixed"])
def test_gpt2_weights_are_stored_in_out(kind, tmp_path):
    targets = ["c_attn", "c_proj", "c_fc"]
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=targets, **LORA),
        "mixed": lambda: peft.LoraConfig(target_modules=[*targets, "lm_head"], **LORA),
        "dora": lambda: peft.LoraConfig(target_modules=targets, use_dora=True, **LORA),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=["c_proj"]),
        "vera": lambda: peft.VeraConfig(target_modules=targets, r=6),
        "fourierft": lambda: peft.FourierFTConfig(
            target_modules=targets, n_frequency=50, scaling=20.0
        ),
    }[kind]()
    model = gpt2()
    if kind == "mixed":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.randn(24, 16))
    check(model, config, tmp_path)


def test_multihead_attention_count_equals_peft(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2)
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(self.attn(x, x, x)[0])

    changes, notes = check(
        Attention(), peft.LoraConfig(target_modules=["attn", "fc"], **LORA), tmp_path
    )
    assert set(changes) == {"attn.in_proj_weight", "attn.out_proj.weight", "fc.weight"}
    assert any("twice" in note for note in notes)
    written = write_portable(
        open_adapter(tmp_path / "adapter"), tmp_path / "portable", leave_out=True
    )
    assert json.loads((tmp_path / "portable/adapter_config.json").read_text())[
        "target_modules"
    ] == ["fc"]
    assert len(written.unsupported) == 2


def test_target_parameters_equal_current_peft(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    lora = peft.LoraConfig(
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        rank_pattern={"experts.down_proj": 2},
        **LORA,
    )
    made = peft_merge(tmp_path, model, 0.1, made=lora)
    before, merged = made.before, made.after
    pairing, _ = open_adapter(tmp_path / "adapter").pair(open_checkpoint(tmp_path / "base"))
    layers = {delta.layer: dense(delta) for delta in pairing.deltas}
    for name in ("gate_up_proj", "down_proj"):
        full = f"model.layers.0.mlp.experts.{name}"
        change = (merged[full].double() - before[full].double()).numpy()
        for expert in range(3):
            close(layers[f"{full}[{expert}]"], change[expert], 1e-5)
    gate = "model.layers.0.mlp.gate.weight"
    change = (merged[gate].double() - before[gate].double()).numpy()
    close(layers[gate], change, 1e-5)


def test_embedding_and_head_equal_merge(tmp_path):
    model = llama()
    changes, _ = check(
        model,
        peft.LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"], **LORA),
        tmp_path,
    )
    assert "lm_head.weight" in changes


def test_layer_replication_equals_repeated_layers(tmp_path):
    model = llama()
    torch.manual_seed(0)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    lora = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], **LORA)
    tuned = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(before, tmp_path / "base" / "model.safetensors")
    pairing, notes = open_adapter(tmp_path / "adapter").pair(open_checkpoint(tmp_path / "base"))
    last = pairing.deltas[-1]
    assert (last.layer, last.base.name) == (
        "model.layers.2.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    )  # fmt: skip
    layer = dict(tuned.named_modules())["base_model.model.model.layers.2.self_attn.q_proj"]
    expected = layer.get_delta_weight("default").detach().double().numpy()
    assert np.allclose(dense(last), expected, atol=1e-6)
    assert any("layer_replication" in note for note in notes)


def test_pattern_matches_like_peft():
    """Our rule against PEFT's own function, on keys that are easily read otherwise."""
    from peft.utils.other import get_pattern_key

    from lora_diag.adapters.patterns import read_pattern
    from lora_diag.adapters.source import Config

    modules = [
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
        "q_proj",
        "a.proj",
        "b.xproj",
    ]
    keys = ["proj", "q_proj", r"layers.1.self_attn.q_proj", "^q_proj", r".*1\..*q_proj", modules[1]]
    for start in range(len(keys)):
        table = {key: number for number, key in enumerate(keys[start:], 1)}
        pattern = read_pattern(
            Config("config.json", {"rank_pattern": table}), "rank_pattern", modules
        )
        for module in modules:
            expected = table.get(get_pattern_key(table.keys(), module))
            result = pattern.matches(module)
            assert (result[0][1] if result else None) == expected, (module, keys[start:])
