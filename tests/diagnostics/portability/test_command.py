"""``loradiag portability`` as a user runs it, and its numbers against ΔW formed in float64."""

import re

import numpy as np
import pytest

from lora_diag.adapters import open_adapter
from lora_diag.adapters.contents import read_contents
from lora_diag.diagnostics.portability.measure import (
    choose_rules,
    estimate_bytes,
    make_tasks,
    portability,
)
from lora_diag.layers.task import LayerSettings
from tests.adapters.making import adapter, base, normal, write
from tests.messages import assert_names

PARTS_OF_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b")
MODULES = [f"model.layers.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in ("q_proj", "v_proj")]


def factors(ranks=(2, 2, 2, 2), rows=12):
    result = {}
    for n, (module, rank) in enumerate(zip(MODULES, ranks, strict=True)):
        result[f"{module}.lora_A.weight"] = normal(rank, 12, seed=n)
        result[f"{module}.lora_B.weight"] = normal(rows, rank, seed=9 + n)
    return result


@pytest.fixture
def patterned(tmp_path):
    """An adapter whose v_proj have an alpha of their own."""
    return adapter(
        tmp_path, factors(), alpha_pattern={"v_proj": 6}, target_modules=["q_proj", "v_proj"]
    )


def test_required_program_with_wrong_update_fails(patterned, run):
    ran = run("portability", "adapter", "--require", "vllm", "--json")
    assert ran.code == 0
    ran = run("portability", "adapter", "--require", "llamacpp", "--json")
    assert ran.code == 1
    found = [record for record in ran.records if record["record"] == "portability"]
    result = {r["layer"]: (r["status"], r["scale"], r["intended"], r["epsilon"]) for r in found}
    assert result == {
        f"{module}.weight": ("exact", 1.5, 1.5, 0.0)
        if "q_proj" in module
        else ("wrong", 1.5, 3.0, 0.5)
        for module in MODULES
    }


def test_epsilon_equals_float64_matrices(tmp_path):
    ranks = (2, 3, 2, 4)
    tensors = factors(ranks)
    pattern = dict(zip(MODULES, ranks, strict=True))
    folder = adapter(tmp_path, tensors, rank_pattern=pattern, use_rslora=True)
    results = portability(folder, consumers=["llamacpp"])
    for module, rank in zip(MODULES, ranks, strict=True):
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        intended, applied = 3 / np.sqrt(rank) * product, 3 / rank * product
        record, norm = results[module], np.linalg.norm(intended)
        assert record.epsilon == pytest.approx(np.linalg.norm(applied - intended) / norm)
        assert record.fro == pytest.approx(norm)


def test_memory_of_update_formed_as_a_whole_is_counted(tmp_path):
    """By hand: of LoHa, 64·64 numbers of 8 bytes, and a factor of the product."""
    tensors = {
        f"lora_unet_q.hada_{part}": normal(*((64, 2) if part[-1] == "a" else (2, 64)))
        for part in PARTS_OF_LOHA
    }
    path = write(tmp_path / "a.safetensors", tensors | {"lora_unet_q.alpha": np.array(2.0)})
    opened = open_adapter(path)
    contents = read_contents(opened)
    (task,) = make_tasks(contents, choose_rules([], contents.form), pairing=opened.pair(None)[0])
    assert task.item.part == "other"
    assert estimate_bytes(task, LayerSettings()) >= 2 * 8 * 64 * 64


def test_dora_without_its_magnitudes_is_measured_with_the_base(tmp_path):
    """sd-scripts adds B·A and ignores the magnitudes."""
    w, down, up = normal(6, 5), normal(2, 5, seed=1), normal(6, 2, seed=2)
    lengths = np.abs(normal(6, 1, seed=3)) + 1
    name = "lora_unet_block_to_q"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.dora_scale": lengths,
    }
    tensors[f"{name}.alpha"] = np.array(1.0)
    write(tmp_path / "lora.safetensors", tensors)
    base(tmp_path, {"block.to_q.weight": w})
    (record,) = portability(tmp_path / "base", tmp_path / "lora.safetensors", consumers=["kohya"])
    plain = 0.5 * up @ down
    v = w + plain
    whole = lengths * v / np.linalg.norm(v, axis=1, keepdims=True) - w
    assert record.status == "wrong"
    assert record.epsilon == pytest.approx(
        np.linalg.norm(plain - whole) / np.linalg.norm(whole), rel=1e-5
    )
    (alone,) = portability(tmp_path / "lora.safetensors", consumers=["kohya"])
    assert (alone.status, alone.epsilon, alone.fro) == ("wrong", None, None)


def test_intended_scales_of_another_program(patterned):
    results = portability(patterned, consumers=["peft", "vllm==0.31"], intended="llamacpp")
    assert {(r.consumer, r.status) for r in results if "v_proj" in r.layer} == {
        ("peft", "wrong"),
        ("vllm", "exact"),
    }
    assert {r.epsilon for r in results if r.consumer == "peft" and "v_proj" in r.layer} == {1.0}


@pytest.mark.parametrize("form", ["dora", "ia3"])
def test_suggested_remedy_runs(tmp_path, run, form):
    if form == "dora":
        lengths = {f"{module}.lora_magnitude_vector": np.ones(12) for module in MODULES}
        adapter(tmp_path, factors() | lengths, use_dora=True, target_modules=["q_proj", "v_proj"])
    else:
        scales = {f"{module}.ia3_l": np.full((12, 1), 1.1) for module in MODULES}
        adapter(
            tmp_path,
            scales,
            peft_type="IA3",
            target_modules=["q_proj", "v_proj"],
            feedforward_modules=[],
        )
    base(tmp_path, {f"{module}.weight": normal(12, 12, seed=n) for n, module in enumerate(MODULES)})
    text = " ".join(run("portability", "base", "adapter").out.split())
    command = re.search(r"Next loradiag (.*?) \(", text)[1]
    assert run(*command.split()).code == 0


def test_weight_that_intended_program_drops(tmp_path):
    """SGLang skips an embedding that target_modules does not name; PEFT applies it."""
    table = {
        "model.embed_tokens.lora_embedding_A": normal(2, 9),
        "model.embed_tokens.lora_embedding_B": normal(12, 2),
    }
    folder = adapter(tmp_path, factors() | table, target_modules=["q_proj", "v_proj"])
    by_name = {
        r.consumer: r
        for r in portability(folder, consumers=["peft", "sglang"])
        if "embed" in r.layer
    }
    assert (by_name["sglang"].status, by_name["sglang"].epsilon) == ("dropped", 1.0)
    results = portability(folder, consumers=["peft", "sglang"], intended="sglang")
    by_name = {r.consumer: r for r in results if "embed" in r.layer}
    assert (by_name["sglang"].status, by_name["sglang"].intended) == ("exact", 0.0)
    assert (by_name["peft"].status, by_name["peft"].epsilon) == ("wrong", None)
    assert "drops this weight" in by_name["peft"].why


def test_untrained_layer_is_exact(tmp_path):
    tensors = factors() | {f"{MODULES[1]}.lora_B.weight": np.zeros((12, 2))}
    folder = adapter(tmp_path, tensors, alpha_pattern={"v_proj": 6})
    results = portability(folder, consumers=["llamacpp"])
    dead, other = results[MODULES[1]], results[MODULES[3]]
    assert (dead.status, dead.epsilon, dead.fro) == ("exact", None, 0.0)
    assert other.status == "wrong"


def test_ranks_above_server_limit(tmp_path, run):
    adapter(tmp_path, factors((20, 20, 20, 20)), r=20, target_modules=["q_proj", "v_proj"])
    ran = run("portability", "adapter", "--consumers", "vllm")
    assert (ran.code, "--max-lora-rank 32" in ran.out) == (0, True)
    ran = run("portability", "adapter", "--require", "vllm", "--max-lora-rank", "16")
    assert ran.code == 1
    assert "rank 20 is above --max-lora-rank 16" in ran.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("adapter", "--consumers", "ollama"), 2, "give one of peft"),
        (("adapter", "--consumers", "ollama", "--fix", "-o", "out"), 2, "give one of peft"),
        (("adapter", "--consumers", "vllm==0.2"), 2, "no rule is known"),
        (("base",), 2, "not an adapter"),
        (("adapter", "adapter"), 2, "not a base"),
        (("--layers", "q"), 2, "no adapter is given"),
        (("adapter", "--intended", "kohya"), 2, "refuses this adapter"),
        (("adapter", "--layers", "nothing"), 4, "no weight"),
        (("adapter", "base"), 2, "the order is"),
        (("base", "adapter", "--layers", "q_proj"), 3, "match none of"),
    ],
)
def test_portability_refuses_bad_input(patterned, tmp_path, run, words, code, message):
    base(tmp_path, {"other.weight": normal(3, 3)})
    ran = run("portability", *words)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_non_finite_entry_is_named(tmp_path, run):
    tensors = factors()
    tensors[f"{MODULES[0]}.lora_B.weight"][0, 0] = np.nan
    adapter(tmp_path, tensors)
    ran = run("portability", "adapter", "-o", "p.jsonl")
    assert ran.code == 3
    assert MODULES[0] in ran.err


def test_names_equal_base(tmp_path):
    """kohya's underscores become the names of BASE, which alone tells them apart."""
    tensors = {
        "lora_unet_a_b_to_q.lora_down.weight": normal(2, 5),
        "lora_unet_a_b_to_q.lora_up.weight": normal(6, 2),
    }
    write(tmp_path / "lora.safetensors", tensors)
    base(tmp_path, {"a.b.to_q.weight": normal(6, 5)})
    results = portability(tmp_path / "base", tmp_path / "lora.safetensors")
    assert {record.layer for record in results} == {"a.b.to_q.weight"}
    assert {record.consumer for record in results} == {"diffusers", "kohya"}


@pytest.mark.parametrize(("limit", "code"), [(0.01, 1), (0.6, 0)])
def test_results_are_judged_by_a_gate_and_reported(patterned, tmp_path, run, limit, code):
    assert run("portability", "adapter", "-o", "p.jsonl").code == 0
    (tmp_path / "gate.toml").write_text(
        f'[[rule]]\nname = "x"\nrequire = "portability.epsilon <= {limit}"\n'
    )
    assert run("gate", "gate.toml", "p.jsonl").code == code
    assert run("report", "p.jsonl", "-o", "report.html").code == 0


def test_rules_need_no_adapter(run):
    ran = run("portability", "--rules")
    assert ran.code == 0
    assert_names(ran.out, "target_modules")


@pytest.mark.parametrize("consumer", ["vllm", "vllm==0.31"])
@pytest.mark.parametrize("turned", [False, True], ids=["this PEFT", "the other orientation"])
def test_stacked_experts_are_not_known_in_vllm(tmp_path, run, consumer, turned):
    """Its source does not say which model classes take them, and in which orientation."""
    owner, experts, rank = "model.layers.0.mlp.experts", 3, 2
    sizes = (5, 8) if turned else (8, 5)
    pair = {
        f"{owner}.lora_A.weight": normal(experts * rank, sizes[0]),
        f"{owner}.lora_B.weight": normal(sizes[1], experts * rank, seed=1),
    }
    query = "model.layers.0.self_attn.q_proj"
    plain = {
        f"{query}.lora_A.weight": normal(rank, 8),
        f"{query}.lora_B.weight": normal(6, rank, seed=2),
    }
    adapter(
        tmp_path, pair | plain, target_parameters=["experts.down_proj"], target_modules=["q_proj"]
    )
    ran = run("portability", "adapter", "--consumers", consumer, "--require", consumer, "--json")
    assert ran.code == 1
    found = [record for record in ran.records if record["record"] == "portability"]
    experts_found = [record for record in found if record["part"] == "experts"]
    assert {(record["status"], record["epsilon"]) for record in experts_found} == {
        ("unknown", None)
    }
    assert all("model class" in record["why"] for record in experts_found)
    assert {record["status"] for record in found if record["part"] == "factors"} == {"exact"}
    assert_names(run("portability", "adapter", "--consumers", consumer).out, "not known", "vLLM")
