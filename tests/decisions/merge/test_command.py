"""The command: what it writes equals an independent merge, what it records, and how it refuses."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.errors import UsageError
from tests import merges
from tests.conftest import ROOT
from tests.messages import assert_names
from tools.refresh import prompt

Q, UP, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.norm"
SAMPLES = ROOT / "sample_checkpoints"
SHAPES = {Q: (12, 16), UP: (20, 16)}


def make_base(folder, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {
        f"{name}.weight": rng.standard_normal(shape) * 0.05 for name, shape in SHAPES.items()
    }
    tensors[f"{NORM}.weight"] = rng.standard_normal(16)
    save(folder, tensors)
    return {name: np.float32(values).astype(float) for name, values in tensors.items()}


def save(folder, tensors, dtype=torch.float32):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    save_file(
        {name: torch.tensor(values).to(dtype) for name, values in tensors.items()},
        folder / "model.safetensors",
    )


def make_adapter(folder, seed, rank=2, alpha=4.0, layers=(Q, UP), factors=None, **config):
    """Write a PEFT adapter; return ΔW of its layers."""
    rng, tensors, deltas = np.random.default_rng(seed), {}, {}
    for name in layers:
        out, columns = SHAPES[name]
        b, a = factors or (
            rng.standard_normal((out, rank)),
            rng.standard_normal((rank, columns)) * 0.1,
        )
        b, a = np.float32(b), np.float32(a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.tensor(b)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.tensor(a)
        deltas[f"{name}.weight"] = alpha / rank * b.astype(float) @ a.astype(float)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in layers]
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": names,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return deltas


@pytest.fixture
def three(tmp_path):
    """BASE and three adapters; the last has one layer only."""
    base = make_base(tmp_path / "base")
    layers = {"a": (Q, UP), "b": (Q, UP), "c": (Q,)}
    deltas = [
        make_adapter(tmp_path / name, n, rank=n + 1, layers=layers[name])
        for n, name in enumerate(layers, 1)
    ]
    return base, deltas


def read_deltas(adapter, rows=SHAPES):
    """Return ΔW of a written PEFT adapter, whose scale is 1."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    b, a = (
        {
            key.split(f".lora_{side}")[0]: value
            for key, value in tensors.items()
            if f"lora_{side}" in key
        }
        for side in "BA"
    )
    return {
        f"{key.removeprefix('base_model.model.')}.weight": (
            b[key].double() @ a[key].double()
        ).numpy()
        for key in b
    }


def near(found, expected, tolerance=1e-5):
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def total(deltas, weights, layer):
    return sum(w * delta[layer] for w, delta in zip(weights, deltas, strict=True) if layer in delta)


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ([], [1 / 3] * 3),
        (["--weights", "1,2,1"], [0.25, 0.5, 0.25]),
        (["--method", "sum", "--weights", "1,-2,0.5", "--scale", "2"], [2, -4, 1]),
    ],
)
def test_adapter_is_weighted_sum(run, three, tmp_path, words, weights):
    _, deltas = three
    ran = run("merge", "base", "a", "b", "c", "-o", "out", "--json", *words)
    assert ran.code == 0, ran.err
    written = read_deltas(tmp_path / "out")
    assert written.keys() == deltas[0].keys()
    for layer, found in written.items():
        assert near(found, total(deltas, weights, layer))
    records = [record for record in ran.records if record["record"] == "merged"]
    assert [(r["layer"], r["update"]) for r in records] == [
        *((f"{UP}.weight", name) for name in "ab"),
        *((f"{Q}.weight", name) for name in "abc"),
    ]
    for record in records:
        layer, k = record["layer"], "abc".index(record["update"])
        own, merged = deltas[k][layer], total(deltas, weights, layer)
        others = (merged - weights[k] * own) / weights[k]
        square = (own**2).sum()
        assert record["rank"] == {f"{Q}.weight": 9, f"{UP}.weight": 5}[layer]
        assert record["fro"] == pytest.approx(np.sqrt(square), rel=1e-6)
        assert record["norm_ratio"] == pytest.approx(
            np.linalg.norm(merged) / np.sqrt(square), rel=1e-5
        )
        assert record["kept"] == pytest.approx((merged * own).sum() / square, rel=1e-5)
        mean = (total(deltas, [1 / 3] * 3, layer) * own).sum() / square
        assert record["kept_mean"] == pytest.approx(mean, rel=1e-5)
        assert record["kept_random"] == pytest.approx(weights[k], rel=1e-12)
        assert record["others"] == pytest.approx((others * own).sum() / square, rel=1e-4, abs=1e-6)
        signs = np.sign(own) * np.sign(others) * np.sign(weights[k]) ** 2
        assert record["sign_conflict"] == pytest.approx((signs < 0).mean(), abs=1e-9)
        assert record["sign_conflict_error"] == 0
        assert record["directions"] == pytest.approx(1, abs=1e-6)
        assert record["epsilon"] < 1e-6


@pytest.mark.parametrize("method", ["sum", "tsv", "ties"])
def test_rank_writes_truncated_merge(run, three, tmp_path, method):
    """The best approximation of the exact merge, and its error; the recipe is in the file."""
    _, deltas = three
    exact = {"ties": ["--energy", "1"]}.get(method, [])
    assert run("merge", "base", "a", "b", "-o", "whole", "--method", method, *exact).code == 0
    ran = run("merge", "base", "a", "b", "-o", "cut", "--method", method, "--rank", "2", "--json")
    whole, cut = read_deltas(tmp_path / "whole"), read_deltas(tmp_path / "cut")
    for layer in whole:
        u, s, vh = np.linalg.svd(whole[layer])
        assert near(cut[layer], (u[:, :2] * s[:2]) @ vh[:2])
        records = [r for r in ran.records if r.get("layer") == layer and r["record"] == "merged"]
        for record, delta in zip(records, deltas[:2], strict=True):
            assert record["rank"] == 2
            error = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
            assert record["epsilon"] == pytest.approx(error, rel=1e-4)
            assert record["epsilon_min"] == pytest.approx(error, rel=1e-4)
            inside = u[:, :2].T @ delta[layer] @ vh[:2].T
            assert record["directions"] == pytest.approx(
                (inside**2).sum() / (delta[layer] ** 2).sum(), rel=1e-3
            )
            assert record["kept"] == pytest.approx(
                (cut[layer] * delta[layer]).sum() / (delta[layer] ** 2).sum(), rel=1e-5
            )
    with safe_open(tmp_path / "cut" / "adapter_model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["loradiag.merge"])
    assert (recipe["method"], [item["path"] for item in recipe["updates"]]) == (method, ["a", "b"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_is_base_plus_merge(run, tmp_path, dtype):
    """Of an adapter and a fine-tune; 1-D tensors and untouched ones are there, rounded once."""
    base = make_base(tmp_path / "base")
    delta = make_adapter(tmp_path / "a", 1)
    rng = np.random.default_rng(5)
    tuned = {
        name: np.float32(value + rng.standard_normal(value.shape) * 0.01)
        for name, value in base.items()
    }
    save(tmp_path / "tuned", tuned)
    ran = run("merge", "base", "a", "tuned", "-o", "out", "--checkpoint", "--output-dtype", dtype)
    assert ran.code == 0, ran.err
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == base.keys()
    for name, value in base.items():
        expected = torch.tensor(
            value + (delta.get(name, 0) + tuned[name].astype(float) - value) / 2
        )
        assert written[name].dtype == getattr(torch, dtype)
        # W_tuned − W is computed in float32, whose last digit may differ
        assert torch.allclose(
            written[name], expected.to(getattr(torch, dtype)), rtol=1.2e-7, atol=1e-8
        )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_verify_merge_accepts_written_checkpoint(run, three, tmp_path):
    """Against the adapter of the same merge; another merge fails, and one of several updates is
    refused.
    """
    for method in ("mean", "sum"):
        assert run("merge", "base", "a", "b", "-o", method, "--method", method).code == 0
    assert run("merge", "base", "a", "b", "-o", "merged", "--checkpoint").code == 0
    right = run("verify-merge", "base", "mean", "merged")
    assert right.code == 0, right.out
    assert_names(right.out, "merge of 2 updates", "as ADAPTER")
    wrong = run("verify-merge", "base", "sum", "merged")
    assert wrong.code == 1
    assert_names(wrong.out, "not the merge of the same updates")
    alone = run("verify-merge", "base", "a", "merged")
    assert alone.code == 2
    assert_names(alone.err, "merged", "2 updates", "--checkpoint")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    for damaged in ("[", '{"updates": 3}', '{"updates": [3]}'):
        save_file(tensors, tmp_path / "merged" / "model.safetensors", {"loradiag.merge": damaged})
        assert run("verify-merge", "base", "mean", "merged").code == 0


@pytest.mark.parametrize(
    "words", [["--scale", "0.75"], ["--method", "sum", "--weights", "-3", "--scale", "-0.25"]]
)
def test_single_update_is_written_at_its_strength(run, three, tmp_path, words):
    """With the exact rank of its factors; no word or column compares it with others."""
    _, deltas = three
    ran = run("merge", "base", "c", "-o", "out", *words)
    assert ran.code == 0, ran.err
    assert_names(ran.out, "0.75·ΔW of c", "rank 4")
    for word in ("updates", "chance", "mean", "√K", "Collisions"):
        assert word not in ran.out
    ((layer, written),) = read_deltas(tmp_path / "out").items()
    assert near(written, 0.75 * deltas[2][layer])
    card = (tmp_path / "out" / "README.md").read_text()
    assert_names(card, "single update", "0.75·ΔW of `c`")
    assert "updates of" not in card


def test_single_update_is_written_with_its_exact_rank(run, tmp_path):
    make_base(tmp_path / "base")
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((12, 3)), rng.standard_normal((3, 16))
    b[:, 2] = b[:, 1]
    make_adapter(tmp_path / "a", 1, rank=3, layers=(Q,), factors=(b, a))
    ran = run("merge", "base", "a", "--scale", "2", "-o", "out", "--json")
    (record,) = [record for record in ran.records if record["record"] == "merged"]
    assert record["rank"] == 2
    assert (record["kept"], record["kept_random"]) == (pytest.approx(2), pytest.approx(2))
    assert (record["others"], record["sign_conflict"]) == (0, None)


def test_fine_tune_is_written_in_dtype_of_base(run, tmp_path):
    base = make_base(tmp_path / "rough")
    rng = np.random.default_rng(5)
    save(tmp_path / "base", base, torch.bfloat16)
    save(
        tmp_path / "tuned",
        {n: w + rng.standard_normal(w.shape) * 0.01 for n, w in base.items()},
        torch.bfloat16,
    )
    ran = run("merge", "base", "tuned", "--scale", "0.3", "--checkpoint", "-o", "out")
    assert ran.code == 0, ran.err
    before, after, written = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "out")
    )
    assert list(written) == list(before)
    for name, weight in before.items():
        exact = weight.double() + 0.3 * (after[name].double() - weight.double())
        assert written[name].dtype == torch.bfloat16
        # Half a unit in the last of 8 digits is up to 2⁻⁸ of a number.
        assert ((written[name].double() - exact).abs() <= 1.001 * 2.0**-8 * exact.abs()).all()


def test_merge_without_updates_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no update"):
        lora_diag.merge(SAMPLES / "base", [], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "alpha_pattern": {"up_proj": 3}}])
def test_single_update_equals_merge_and_unload_of_peft(run, tmp_path, config):
    """PEFT merges what was written to W + t·ΔW, which the checkpoint is; verify-merge agrees."""
    from peft import PeftModel

    made = merges.peft_merge(tmp_path, merges.llama(), **config)
    for scale in (1.0, 0.7):
        ours, merged = tmp_path / f"ours-{scale}", tmp_path / f"merged-{scale}"
        words = ("merge", "base", "adapter", "--scale", str(scale), "-o")
        assert run(*words, ours.name).code == 0
        assert run(*words, merged.name, "--checkpoint").code == 0
        written = load_file(merged / "model.safetensors")
        loaded = merges.state(PeftModel.from_pretrained(merges.llama(), ours).merge_and_unload())
        assert written.keys() == made.before.keys()
        for name, before in made.before.items():
            exact = before.double() + scale * (made.after[name].double() - before.double())
            # W + ΔW and the factors were rounded to float32: a few units in the last digit of the
            # largest entry.
            limit = 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
            assert float((written[name].double() - exact).abs().max()) <= limit
            assert float((loaded[name].double() - exact).abs().max()) <= limit
        checked = run("verify-merge", "base", ours.name, merged.name)
        assert checked.code == 0, checked.out
    assert run("verify-merge", "base", "adapter", "merged-1.0").code == 0
    other = run("verify-merge", "base", "adapter", "merged-0.7")
    assert other.code == 2
    assert_names(other.err, "0.7 times one update", "--checkpoint")


@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_checkpoint_states_rounding_as_plan_merge_predicts(run, tmp_path, to):
    base, adapter = SAMPLES / "base", SAMPLES / "lora_r4"
    words = ("merge", base, adapter, "--checkpoint", "--output-dtype", to, "-o", "merged")
    shown = run(*words, "--layers", r"layers\.0\.")
    assert shown.code == 0
    before, after = (
        {
            name: value
            for file in folder.glob("*.safetensors")
            for name, value in load_file(file).items()
        }
        for folder in (base, tmp_path / "merged")
    )
    change = lora_diag.merge(base, [adapter], tmp_path / "factors", layers=r"layers\.0\.")
    factors = load_file(tmp_path / "factors" / "adapter_model.safetensors")
    form = {"bfloat16": "bf16", "float16": "fp16"}[to]
    planned = {
        record.layer: record.error
        for record in lora_diag.plan_merge(base, adapter, to=form, layers=r"layers\.0\.")
    }
    records = lora_diag.read_results(tmp_path / "merged" / "merge.jsonl").layers
    assert len(records) == len(change.layers) == len(planned)
    for record in records:
        stem = "base_model.model." + record.layer.removesuffix(".weight")
        update = (
            factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
        )
        exact = before[record.layer].double() + update
        error = float((after[record.layer].double() - exact).norm() / update.norm())
        assert record.epsilon == pytest.approx(error, rel=1e-4)
        assert record.epsilon == pytest.approx(planned[record.layer], rel=1e-3)


def test_card_has_the_command_that_wrote_the_merge(run, three, tmp_path):
    assert (
        run("merge", "base", "a", "b", "-o", "out", "--method", "sum", "--weights", "1,3").code == 0
    )
    (line,) = re.findall(
        r"^    loradiag (.*)$", (tmp_path / "out" / "README.md").read_text(), re.MULTILINE
    )
    before = read_deltas(tmp_path / "out")
    ran = run(*shlex.split(line), "--overwrite")
    assert ran.code == 0, ran.err
    for layer, delta in read_deltas(tmp_path / "out").items():
        assert np.array_equal(delta, before[layer])


def test_opposite_updates_cancel(run, tmp_path):
    """In one layer: it is said, and BASE stays; in all: nothing is written."""
    make_base(tmp_path / "base")
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((12, 2)), rng.standard_normal((2, 16))
    make_adapter(tmp_path / "a", 1, layers=(Q,), factors=(b, a))
    make_adapter(tmp_path / "b", 1, layers=(Q,), factors=(-b, a))
    ran = run("merge", "base", "a", "b", "-o", "out")
    assert ran.code == 4
    assert_names(ran.err, "cancel", "--weights")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()
    make_adapter(tmp_path / "c", 3, layers=(UP,))
    make_adapter(tmp_path / "d", 4, layers=(UP,))
    ran = run("merge", "base", "a", "b", "c", "d", "-o", "out")
    assert ran.code == 0
    assert_names(ran.out, "cancel", "q_proj")
    assert read_deltas(tmp_path / "out").keys() == {f"{UP}.weight"}


def test_density_below_one_entry_is_named(run, three, tmp_path):
    """Trimmed updates did not cancel; here only the layer of 12 × 16 entries loses all of them, or
    both do.
    """
    ran = run(
        "merge",
        "base",
        "a",
        "b",
        "-o",
        "out",
        "--method",
        "ties",
        "--rank",
        "2",
        "--density",
        "1e-6",
    )
    assert ran.code == 4
    assert_names(ran.err, "--density", "1e-06")
    assert "cancel" not in ran.err
    assert not (tmp_path / "out").exists()
    ran = run(
        "merge",
        "base",
        "a",
        "b",
        "-o",
        "out",
        "--method",
        "ties",
        "--rank",
        "2",
        "--density",
        "0.004",
    )
    assert ran.code == 0
    assert_names(ran.out, "no entry is kept", "q_proj")


def test_output_inside_an_input_is_refused(run, three, tmp_path):
    (tmp_path / "link").symlink_to("a")
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    for output, source in (("a/merged", "a"), ("link/merged", "a"), ("base/merged", "base")):
        ran = run("merge", "base", "a", "b", "-o", output)
        assert ran.code == 2, output
        assert_names(ran.err, "inside", source, "-o")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before
    assert run("merge", "base", "a", "b", "-o", "ab").code == 0  # a name that begins alike


def test_longer_sum_is_warned_about(run, three, tmp_path):
    """Copies add up to K times the update: longer than √K, and a note says that they are copies."""
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    long = run("merge", "base", "a", "copy", "-o", "out", "--method", "sum")
    assert "√K" in long.out
    assert_names(long.out, "copy of a")
    assert "√K" not in run("merge", "base", "a", "b", "-o", "out2", "--method", "sum").out


def test_colliding_layer_is_named(run, tmp_path):
    make_base(tmp_path / "base")
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((12, 2)), rng.standard_normal((2, 16))
    make_adapter(tmp_path / "a", 1, layers=(Q,), factors=(b, a))
    make_adapter(tmp_path / "b", 1, layers=(Q,), factors=(-0.5 * b, a))
    ran = run("merge", "base", "a", "b", "-o", "out")
    assert ran.code == 0
    assert re.search(r"Collisions +in 1 of 1 .*q_proj", ran.out, re.DOTALL)


def test_trained_biases_outside_adapter_are_named(loradiag):
    """A merged adapter has factors only: what else an update changes is not silently lost."""
    pair = [SAMPLES / "full_ft", SAMPLES / "lora_r4"]
    ran = loradiag("merge", SAMPLES / "base", *pair, "-o", "out", "--rank", "2", brief=True)
    assert ran.code == 0, ran.err
    assert "9 changed 1-D tensors" in ran.out
    assert "--checkpoint" in ran.out


REFUSED = [
    (["a", "--method", "ties", "--rank", "2"], "several updates", 2),
    (["a", "--method", "all"], "several updates", 2),
    (["tuned"], "--checkpoint", 2),
    (["a", "a"], "twice", 2),
    (["base", "a"], "base", 2),
    (["a", "b", "--weights", "1"], "--weights", 2),
    (["a", "b", "--weights", "1,-1"], "--weights", 2),
    (["a", "b", "--weights", "1,nan"], "--weights", 2),
    (["a", "b", "--method", "ties"], "--rank", 2),
    (["a", "b", "--method", "sum", "--density", "0.5"], "--density", 2),
    (["a", "b", "--method", "ties", "--rank", "2", "--density", "0"], "--density", 2),
    (["a", "b", "--scale", "0"], "--scale", 2),
    (["a", "b", "--rank", "0"], "--rank", 2),
    (["a", "b", "--rank", "2", "--energy", "0.5"], "--energy", 2),
    (["a", "b", "--checkpoint", "--rank", "2"], "--rank", 2),
    (["a", "tuned"], "--checkpoint", 2),
    (["a", "tuned", "--method", "core_ties", "--rank", "2"], "factors", 2),
    (["a", "nan", "--layers", "q_proj"], "nan", 3),
    (["a", "wide"], "wide", 3),
    (["a", "other"], "other", 3),
    (["a", "missing"], "missing", 3),
    (["a", "only_up", "--layers", "q_proj"], "only_up", 4),
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    base = make_base(folder / "base")
    for n, name in enumerate("ab"):
        make_adapter(folder / name, n)
    make_adapter(folder / "only_up", 3, layers=(UP,))
    b = np.full((12, 2), np.nan)
    make_adapter(folder / "nan", 2, layers=(Q,), factors=(b, np.ones((2, 16))))
    make_adapter(folder / "wide", 2, layers=(Q,), factors=(np.ones((12, 2)), np.ones((2, 17))))
    make_adapter(folder / "other", 2, layers=(Q,))
    shutil.move(folder / "other", folder / "moved")
    (folder / "other").mkdir()
    tensors = {
        k.replace("q_proj", "elsewhere"): v
        for k, v in load_file(folder / "moved/adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "other" / "adapter_model.safetensors")
    shutil.copy(folder / "moved" / "adapter_config.json", folder / "other")
    save(folder / "tuned", {name: value + 0.1 for name, value in base.items()})
    return folder


@pytest.mark.parametrize(("words", "named", "code"), REFUSED)
def test_bad_input_is_refused_and_nothing_written(loradiag, hostile, words, named, code):
    ran = loradiag("merge", "base", *words, "-o", "out", cwd=hostile)
    assert ran.code == code, ran.err
    assert named in ran.err
    assert not (hostile / "out").exists()
    assert not (hostile / "out.part").exists()


def test_foreign_folder_is_kept_and_run_resumes(loradiag, three, tmp_path):
    """A trained adapter is not overwritten; an interrupted run ends with the same bytes."""
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    shutil.copytree(tmp_path / "a", tmp_path / "trained")
    assert loradiag("merge", "base", "a", "b", "-o", "trained", "--overwrite").code == 2
    assert (tmp_path / "trained" / "adapter_model.safetensors").read_bytes() == before
    fixed = {"SOURCE_DATE_EPOCH": "1700000000"}
    assert loradiag("merge", "base", "a", "b", "-o", "out", env=fixed).code == 0
    assert loradiag("merge", "base", "a", "b", "-o", "out").code == 2
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    part = tmp_path / "out.part"
    shutil.move(tmp_path / "out", part)
    for name in whole.keys() - {"merge.jsonl"}:
        (part / name).unlink()
    lines = whole["merge.jsonl"].splitlines(keepends=True)
    (part / "merge.jsonl").write_bytes(b"".join(lines[:1]))
    assert loradiag("merge", "base", "a", "b", "-o", "out", "--resume", env=fixed).code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_docs_show_what_is_printed(loradiag, tmp_path):
    page = (ROOT / "docs" / "reference" / "merge.md").read_text(encoding="utf-8")
    (tmp_path / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")
    blocks = re.findall(r"<!-- shown: (merge .*?) -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert len(blocks) == 3
    for words, shown in blocks:
        printed = loradiag(*words.split(), env={"COLUMNS": "80"}, brief=True).out.strip("\n")
        assert shown == f"```console\n{prompt(words)}\n{printed}\n```\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("combination", "method", "extra"),
    [
        ("cat", "sum", {}),
        ("svd", "sum", {"rank": 3}),
        ("ties_svd", "ties", {"rank": 3, "density": 0.3}),
    ],
)
def test_merge_equals_that_of_peft(tmp_path, combination, method, extra):
    """``add_weighted_adapter`` of adapters whose ranks and scales differ, except for
    ``ties_svd``.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=40,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]), "first"
    )
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    svd = {"svd_rank": 3} if "rank" in extra else {}
    svd |= {"density": extra["density"]} if "density" in extra else {}
    model.add_weighted_adapter(
        ["first", "second"], [0.7, 1.5], "merged", combination_type=combination, **svd
    )
    model.save_pretrained(tmp_path / "saved")
    updates = [tmp_path / "saved" / name for name in ("first", "second")]
    lora_diag.merge(
        tmp_path / "base", updates, tmp_path / "out", method=method, weights=(0.7, 1.5), **extra
    )
    model.load_adapter(tmp_path / "out", "ours")
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            theirs, ours = (
                module.get_delta_weight(name).detach().numpy() for name in ("merged", "ours")
            )
            assert near(ours, theirs)
