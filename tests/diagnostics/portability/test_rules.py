"""The rules of consumers against shared truths, against the consumers' own code, and against
formulas written anew.
"""

import importlib.util
import json
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.adapters.contents import Contents, Item
from lora_diag.diagnostics.portability.consumers import CONSUMERS, is_before
from lora_diag.diagnostics.portability.measure import FEATURES, portability
from lora_diag.errors import UsageError
from tests.conftest import DATA
from tests.messages import assert_names

# The names of the truths -> what ``--for`` takes.
NAMES = {
    "peft": "peft==0.21.2",
    "vllm": "vllm==0.33.0",
    "vllm_old": "vllm==0.10.0",
    "sglang": "sglang==0.5.23",
    "llamacpp": "llamacpp",
    "diffusers": "diffusers==0.42.1",
    "diffusers_old": "diffusers==0.36.0",
    "kohya": "kohya",
}
CASES = sorted(path.parent for path in (DATA / "formats").glob("serve-*/truth.json"))
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_rules_agree_with_the_truth_of_each_case(case):
    truth = json.loads((case / "truth.json").read_text())
    known = [
        name for name in truth["_consumers"] if truth["_consumers"][name]["verdict"] != "unknown"
    ]
    results = portability(
        case / "base", case / "adapter", consumers=[NAMES[name] for name in known]
    )
    result = {(record.layer, record.consumer, record.version): record for record in results}
    for layer in (name for name in truth if not name.startswith("_")):
        for name in known:
            consumer, _, version = NAMES[name].partition("==")
            record = result.pop((layer, consumer, version or CONSUMERS[consumer].newest))
            scale, epsilon = truth[layer]["scale"][name], truth[layer]["epsilon"][name]
            if isinstance(scale, str):
                assert record.status == scale
            else:
                assert record.scale == pytest.approx(scale, rel=1e-9)
                assert record.status == ("exact" if epsilon < 1e-9 else "wrong")
                assert record.rank == truth[layer]["rank"]
            if epsilon is None:
                assert record.epsilon is None
            else:
                assert record.epsilon == pytest.approx(epsilon, abs=1e-9)
            assert record.fro == pytest.approx(truth[layer]["fro"], rel=1e-5)
    assert not result


LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")


def item_of(module, rank, scale, alpha=None, kind="factors"):
    return Item(f"{module}.weight", module, kind, f"{module}.lora_B.weight", rank, scale, alpha)


@st.composite
def adapters(draw):
    """A PEFT config with patterns, and the rank and α of each module by PEFT's rule,
    written anew.
    """
    modules = [f"model.layers.{n}.self_attn.{leaf}" for n in (1, 11) for leaf in LEAVES]
    keys = st.sampled_from([*LEAVES, *modules, "layers.1.self_attn.q_proj", "1.self_attn.k_proj"])
    numbers = st.integers(1, 64)
    config = {
        "peft_type": "LORA",
        "r": draw(numbers),
        "lora_alpha": draw(numbers),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(keys, numbers, max_size=2)),
        "alpha_pattern": draw(st.dictionaries(keys, numbers, max_size=2)),
        "target_modules": list(LEAVES),
    }

    def value(table, module, default):
        for key, number in table.items():
            parts, ends = module.split("."), key.split(".")
            if parts[-len(ends) :] == ends:
                return number
        return default

    ranks = {module: value(config["rank_pattern"], module, config["r"]) for module in modules}
    alphas = {
        module: value(config["alpha_pattern"], module, config["lora_alpha"]) for module in modules
    }
    power = 0.5 if config["use_rslora"] else 1.0
    scales = {module: alphas[module] / ranks[module] ** power for module in modules}
    items = tuple(item_of(module, ranks[module], scales[module]) for module in modules)
    return Contents("peft", items, config), ranks, alphas


def applied(name, contents):
    """Return the scale of each module, or the reason of a refusal."""
    consumer, _, version = name.partition("==")
    rule = CONSUMERS[consumer].find_rule(version)
    if reason := rule.refuses(contents):
        return reason
    return {item.module: rule.applies(contents, item).scale for item in contents.items}


@given(adapters())
def test_llamacpp_divides_one_alpha_by_each_rank(drawn):
    contents, ranks, _ = drawn
    expected = {module: contents.config["lora_alpha"] / rank for module, rank in ranks.items()}
    assert applied("llamacpp", contents) == pytest.approx(expected)
    without = replace(contents, config={**contents.config, "lora_alpha": 0})
    assert set(applied("llamacpp", without).values()) == {
        1.0
    }  # α = 0 means no scale there, and no update in PEFT


@given(adapters())
def test_sglang_has_one_scale_and_takes_one_rank(drawn):
    contents, ranks, _ = drawn
    result = applied("sglang", contents)
    if set(ranks.values()) == {contents.config["r"]}:
        assert set(result.values()) == {contents.config["lora_alpha"] / contents.config["r"]}
    else:
        assert_names(result, "assertion fails")


@given(adapters())
def test_vllm_reads_patterns_since_0_32(drawn):
    contents, ranks, alphas = drawn
    config = contents.config
    power = 0.5 if config["use_rslora"] else 1.0
    new = {module: alphas[module] / ranks[module] ** power for module in ranks}
    assert applied("vllm==0.32", contents) == pytest.approx(new)
    one = config["lora_alpha"] / config["r"] ** power
    assert applied("vllm==0.31", contents) == pytest.approx(dict.fromkeys(ranks, one))


@given(adapters())
def test_old_peft_needs_a_dot_before_a_key(drawn):
    """0.14, as read: a key is found where some name and a dot stand before it; a whole name only by
    itself.
    """
    contents, ranks, _ = drawn
    config = contents.config

    def old(table, module, default):
        hits = [
            number
            for key, number in table.items()
            if re.fullmatch(rf".+\.{re.escape(key)}", module)
        ]
        return hits[0] if hits else table.get(module, default)

    settings = {
        module: (
            old(config["rank_pattern"], module, config["r"]),
            old(config["alpha_pattern"], module, None),
        )
        for module in ranks
    }
    result = applied("peft==0.14", contents)
    if any(settings[module][0] != rank for module, rank in ranks.items()):
        assert "size mismatch" in result
    else:
        power = 0.5 if config["use_rslora"] else 1.0
        for module, rank in ranks.items():
            alpha = settings[module][1]
            assert result[module] == pytest.approx(
                (config["lora_alpha"] if alpha is None else alpha) / rank**power
            )


@pytest.mark.parametrize(("version", "does"), [("0.14.0", "dropped"), ("0.15.0", "full")])
def test_peft_0_14_does_not_read_token_rows(version, does):
    item = Item("embed_tokens.weight", "embed_tokens", "rows")
    assert (
        CONSUMERS["peft"].find_rule(version).applies(Contents("peft", (item,)), item).does == does
    )


def test_peft_before_0_14_refuses_configs_with_later_fields():
    contents = FEATURES["one rank, one alpha"]
    later = replace(contents, config={**contents.config, "alora_invocation_tokens": None})
    assert isinstance(applied("peft==0.13.2", contents), dict)
    assert_names(applied("peft==0.13.2", later), "alora_invocation_tokens")
    assert isinstance(applied("peft==0.14.0", later), dict)


@pytest.mark.parametrize("saved", ["lm_head", ["lm_head"], {"lm_head": 1}, 5])
def test_vllm_refuses_saved_modules_however_they_are_written(saved):
    contents = FEATURES["one rank, one alpha"]
    assert isinstance(applied("vllm==0.33.0", contents), dict)
    reason = applied(
        "vllm==0.33.0", replace(contents, config={**contents.config, "modules_to_save": saved})
    )
    assert str(saved).strip("[]'") in reason


@pytest.mark.slow
def test_peft_itself_gives_the_intended_scales():
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    def make_model():
        blocks = [
            OrderedDict((name, torch.nn.Linear(8, 8)) for name in ("q_proj", "v_proj"))
            for _ in range(2)
        ]
        return torch.nn.Sequential(
            OrderedDict(layers=torch.nn.Sequential(*map(torch.nn.Sequential, blocks)))
        )

    for rslora in (False, True):
        config = {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": rslora,
            "rank_pattern": {"layers.1.q_proj": 2},
            "alpha_pattern": {"v_proj": 5, "^layers.0.q_proj": 7},
        }
        model = peft.get_peft_model(
            make_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **config)
        )
        contents = contents_of_peft(model, config)
        scales = {
            name.removeprefix("base_model.model."): module.scaling["default"]
            for name, module in model.named_modules()
            if hasattr(module, "scaling")
        }
        assert len(scales) == 4
        assert applied("peft", contents) == pytest.approx(scales)


def contents_of_peft(model, config):
    """Return what PEFT saves of a model, read as an adapter."""
    import tempfile

    from lora_diag.adapters import open_adapter
    from lora_diag.adapters.contents import read_contents

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read_contents(open_adapter(folder))


@pytest.mark.skipif(not HAS_DIFFUSERS, reason="diffusers is not installed")
@given(
    st.lists(
        st.tuples(st.sampled_from([4, 8, 16]), st.one_of(st.none(), st.sampled_from([2.0, 4.0]))),
        min_size=1,
        max_size=5,
    )
)
def test_diffusers_scales_equal_its_own_function(modules):
    """``get_peft_kwargs`` of the installed version, and PEFT's rule on what it returns."""
    import diffusers
    from diffusers.utils.peft_utils import get_peft_kwargs

    keys = [f"transformer.block{n}.to_q" for n in range(len(modules))]
    ranks = {f"{key}.lora_B.weight": rank for key, (rank, _) in zip(keys, modules, strict=True)}
    alphas = {
        f"{key}.alpha": alpha
        for key, (_, alpha) in zip(keys, modules, strict=True)
        if alpha is not None
    }
    result = get_peft_kwargs(ranks, alphas or None, dict.fromkeys(ranks))
    items = tuple(
        item_of(key, rank, (alpha or rank) / rank, alpha)
        for key, (rank, alpha) in zip(keys, modules, strict=True)
    )
    ours = applied(f"diffusers=={diffusers.__version__}", Contents("diffusers", items))
    for key, (rank, _) in zip(keys, modules, strict=True):
        alpha = result["alpha_pattern"].get(key, result["lora_alpha"])
        assert result["rank_pattern"].get(key, result["r"]) == rank
        assert ours[key] == pytest.approx(alpha / rank)


KOHYA_LAYERS = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2",
    "lora_unet_down_blocks_0_attentions_0_proj_in",
    "lora_unet_mid_block_resnets_0_conv1",
)


@pytest.mark.skipif(not HAS_DIFFUSERS, reason="diffusers is not installed")
@given(
    st.lists(
        st.sampled_from([2.0, 4.0, 6.0]), min_size=len(KOHYA_LAYERS), max_size=len(KOHYA_LAYERS)
    )
)
def test_diffusers_alphas_of_unet_equal_its_own_functions(alphas):
    """Its conversion of kohya's names, and PEFT's rule for the α that it makes of them."""
    import torch
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft
    from diffusers.utils.peft_utils import get_peft_kwargs

    items, tensors = [], {}
    for name, alpha in sorted(zip(KOHYA_LAYERS, alphas, strict=True)):
        items.append(item_of(name, 4, alpha / 4, alpha))
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_up.weight"] = torch.zeros(4, 4)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    converted, found = _convert_non_diffusers_lora_to_diffusers(tensors)
    state = convert_unet_state_dict_to_peft(
        {key.removeprefix("unet."): tensor for key, tensor in converted.items()}
    )
    modules = [
        key.removesuffix(".lora_B.weight") for key in state if key.endswith(".lora_B.weight")
    ]
    ranks = {f"^{module}.lora_B.weight": 4 for module in modules}
    result = get_peft_kwargs(
        ranks, {key.removeprefix("unet."): alpha for key, alpha in found.items()}, state
    )
    ours = applied("diffusers", Contents("kohya", tuple(items)))
    assert len(modules) == len(items)
    for item, module in zip(items, modules, strict=True):
        assert module.replace(".", "_") == item.module.removeprefix("lora_unet_")
        assert ours[item.module] == pytest.approx(
            result["alpha_pattern"].get(module, result["lora_alpha"]) / 4
        )


ENCODERS = [
    [
        f"lora_te{n}_text_model_encoder_layers_0_{leaf}"
        for leaf in ("self_attn_q_proj", "self_attn_out_proj", "mlp_fc1")
    ]
    for n in (1, 2)
]
TRANSFORMERS = (
    "lora_unet_double_blocks_0_img_attn_proj",
    "lora_unet_transformer_blocks_0_attn_to_q",
)


@pytest.mark.parametrize(
    ("consumer", "names", "rank", "alphas", "scales"),
    [
        ("diffusers", TRANSFORMERS, 4, (2.0, 8.0), [0.5, 2.0]),
        ("diffusers", ENCODERS[0], 4, (8.0, 8.0, 2.0), [2.0, 2.0, 2.0]),
        ("diffusers", ENCODERS[1], 4, (8.0, 8.0, 2.0), [2.0, 2.0, 0.5]),
        (
            "kohya",
            ("lora_unet_0", "lora_unet_1", "lora_unet_2"),
            8,
            (None, 0.0, 2.0),
            [1.0, 1.0, 0.25],
        ),
    ],
)
def test_alphas_of_kohya_files_are_read(consumer, names, rank, alphas, scales):
    """Also where α is missing: it is the rank."""
    items = tuple(
        item_of(name, rank, 1.0, alpha) for name, alpha in zip(names, alphas, strict=True)
    )
    assert list(applied(consumer, Contents("kohya", items)).values()) == scales


ENCODER = "text_encoder.text_model.encoder.layers.0"


@pytest.mark.parametrize(
    ("form", "module", "up", "alpha", "problem"),
    [
        ("diffusers", "unet.mid_block.attn.to_q", "lora_B", 8.0, "alpha"),
        ("diffusers", "transformer.attn.to_q", "lora_B", 8.0, ""),
        ("diffusers", f"{ENCODER}.self_attn.q_proj", "lora_B", 8.0, "alpha"),
        ("diffusers", f"{ENCODER}.self_attn.q_proj", "lora_B", None, ""),
        ("diffusers", f"{ENCODER}.mlp.fc1", "lora_B", None, "recognized"),
        ("diffusers", f"{ENCODER}.mlp.fc1", "lora_linear_layer.up", None, ""),
        ("diffusers", f"{ENCODER}.self_attn.to_q_lora", "up", None, "recognized"),
        ("diffusers", f"{ENCODER}.self_attn.to_out_lora", "up", None, ""),
        (
            "kohya",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_up",
            8.0,
            "recognized",
        ),
        ("kohya", "lora_te1_text_model_encoder_layers_0_self_attn_out_proj", "lora_up", 8.0, ""),
        ("kohya", "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_up", 8.0, ""),
    ],
)
def test_diffusers_refuses_what_its_loader_does_not_name(form, module, up, alpha, problem):
    item = Item(f"{module}.weight", module, "factors", f"{module}.{up}.weight", 4, 1.0, alpha)
    reason = CONSUMERS["diffusers"].rules[0].refuses(Contents(form, (item,)))
    assert problem in reason
    assert bool(problem) == bool(reason)


@pytest.mark.parametrize(
    ("form", "names", "does"),
    [
        ("kohya", ("self_attn_q_proj.lora_up", "mlp_fc1.lora_up"), ["dropped", "applied"]),
        (
            "kohya",
            ("self_attn_q_proj.lora_up", "self_attn_out_proj.lora_up"),
            ["applied", "applied"],
        ),
        (
            "diffusers",
            ("self_attn.to_v_lora.up", "mlp.fc1.lora_linear_layer.up"),
            ["dropped", "applied"],
        ),
        (
            "diffusers",
            ("self_attn.to_v_lora.up", "self_attn.to_out_lora.up"),
            ["applied", "applied"],
        ),
        ("diffusers", ("self_attn.q_proj.lora_B", "mlp.fc1.lora_B"), ["applied", "applied"]),
    ],
)
def test_diffusers_drops_old_projections_without_an_output(form, names, does):
    """Run with diffusers 0.42.1 and transformers 5: ``_load_lora_into_text_encoder``."""
    start = f"{ENCODER}." if form == "diffusers" else "lora_te_text_model_encoder_layers_0_"
    keys = [f"{start}{name}.weight" for name in names]
    contents = Contents(
        form, tuple(Item(key, key.rsplit(".", 3)[0], "factors", key, 4, 1.0, None) for key in keys)
    )
    rule = CONSUMERS["diffusers"].rules[0]
    assert rule.refuses(contents) == ""
    assert [rule.applies(contents, item).does for item in contents.items] == does


@pytest.mark.parametrize(("form", "does"), [("kohya", "applied"), ("diffusers", "intended")])
def test_diffusers_deletes_the_magnitudes_of_kohya(form, does):
    item = item_of(KOHYA_LAYERS[0], 4, 0.5, 2.0, kind="dora")
    assert CONSUMERS["diffusers"].rules[0].applies(Contents(form, (item,)), item).does == does


@pytest.mark.parametrize(
    ("version", "mixed"),
    [("0.42", {16: 1.0, 4: 1.0}), ("0.40", {16: 1.0, 4: 1.0}), ("0.36", {16: 1.0, 4: 4.0})],
)
def test_diffusers_before_0_40_uses_first_rank_as_alpha(version, mixed):
    contents = FEATURES["no alpha, unequal ranks"]
    result = applied(f"diffusers=={version}", contents)
    assert {item.rank: result[item.module] for item in contents.items} == mixed


def test_mlx_refuses_config_without_sizes_of_its_layers():
    item = item_of("layers.0.q", 4, 2.0)
    whole = {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    assert applied("mlx", Contents("mlx", (item,), whole)) == {"layers.0.q": 2.0}
    short = {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}}
    assert "dropout" in applied("mlx", Contents("mlx", (item,), short))
    assert "num_layers" in applied(
        "mlx", Contents("mlx", (item,), {"lora_parameters": whole["lora_parameters"]})
    )


@pytest.mark.parametrize(
    ("module", "config", "problem"),
    [
        ("model.layers.1.self_attn.q_proj", {"num_layers": 3}, ""),
        ("model.layers.1.self_attn.q_proj", {"num_layers": -1}, ""),
        (
            "model.layers.1.self_attn.q_proj",
            {"num_layers": 2},
            "model.layers.1.self_attn.q_proj num_layers",
        ),
        ("model.layers.1.self_attn.q_proj", {"keys": ["self_attn.q_proj"]}, ""),
        (
            "model.layers.1.mlp.up_proj",
            {"keys": ["self_attn.q_proj"]},
            "model.layers.1.mlp.up_proj keys",
        ),
        (
            "model.layers.1.mlp.up_proj",
            {"keys": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
            "",
        ),
        ("model.embed_tokens", {"keys": ["self_attn.q_proj", "model.embed_tokens"]}, ""),
        ("model.embed_tokens", {}, "model.embed_tokens keys"),
    ],
)
def test_mlx_refuses_factors_without_a_layer(module, config, problem):
    """``linear_to_lora_layers`` makes layers in the last blocks, of the modules that ``keys``
    names.
    """
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0} | {
        key: config[key] for key in config if key == "keys"
    }
    names = (module, "model.layers.3.self_attn.q_proj")
    items = tuple(item_of(name, 4, 2.0) for name in names)
    whole = {"num_layers": config.get("num_layers", 4), "lora_parameters": settings}
    result = applied("mlx", Contents("mlx", items, whole))
    if problem:
        assert_names(result, *problem.split())
    else:
        assert result == dict.fromkeys(names, 2.0)


@pytest.mark.parametrize("leaf", ["q_proj", "v_proj", "k_proj"])
def test_sglang_refuses_a_layer_with_one_of_joined_factors(leaf):
    modules = [
        f"model.layers.{n}.self_attn.{name}"
        for n, name in ((0, "q_proj"), (0, "v_proj"), (1, leaf))
    ]
    items = tuple(item_of(module, 8, 1.0) for module in modules)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(LEAVES)}
    assert "model.layers.1.self_attn" in applied("sglang", Contents("peft", items, config))
    assert isinstance(applied("sglang", Contents("peft", items[:2], config)), dict)


def test_consumer_rules_cover_every_version():
    for consumer in CONSUMERS.values():
        assert consumer.rules[0].until == ""
        for newer, older in zip(consumer.rules, consumer.rules[1:], strict=False):
            assert older.until == newer.since
        for rule in consumer.rules:
            assert all(consumer.find_rule(version) is rule for version in rule.read)


@pytest.mark.parametrize("version", ["0.9.9", "rubbish", "0.32; rm"])
def test_version_without_rule_is_refused(version):
    with pytest.raises(UsageError):
        CONSUMERS["vllm"].find_rule(version)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
def test_versions_are_ordered_number_by_number(one, other):
    padded = [(*parts, 0, 0)[:3] for parts in (one, other)]
    assert is_before(".".join(map(str, one)), ".".join(map(str, other))) == (padded[0] < padded[1])


def test_rank_to_set_is_the_next_that_a_server_has():
    for rank, needed in {8: None, 16: None, 17: 32, 300: 320, 512: 512}.items():
        contents = Contents("peft", (item_of("q", rank, 1.0),), {"r": rank})
        assert CONSUMERS["vllm"].find_rank_to_set(contents) == needed
    assert CONSUMERS["vllm"].largest_rank == 512
