"""Many adapters: each against float64 NumPy, planted oddities, and pairs that are alike."""

import json
import math
import shutil

import numpy as np
import pytest

import lora_diag
from lora_diag.diagnostics.fleet import measure as run
from lora_diag.diagnostics.fleet.measure import expand_patterns, measure_dense, measure_thin
from lora_diag.diagnostics.fleet.show import describe_outliers
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.metrics.statistics import find_near_duplicates
from lora_diag.running.inputs import compare
from tests import oracles
from tests.adapters.making import dense, lora
from tests.conftest import ROOT
from tests.messages import assert_names, raises_naming

SAMPLES = ROOT / "sample_checkpoints"
LAYERS = [
    f"model.layers.{i}.self_attn.{name}.weight" for i in range(3) for name in ("q_proj", "v_proj")
]


@pytest.mark.slow
def test_every_adapter_against_numpy():
    result = lora_diag.fleet([SAMPLES / "lora_*"])
    assert [record.rank for record in result] == [4, 16]
    for record in result:
        deltas = {
            delta.layer: dense(delta) for delta in compare(record.adapter, None).pairing.deltas
        }
        assert set(record.layers) == set(deltas)
        for name, x in deltas.items():
            s = np.linalg.svd(x, compute_uv=False)
            layer = record.layers[name]
            assert layer.fro == pytest.approx(np.linalg.norm(x), rel=1e-6)
            assert layer.rank_99 == oracles.rank_at(s, 0.99)
            assert layer.spike == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=1e-6)
        total = math.sqrt(sum(np.linalg.norm(x) ** 2 for x in deltas.values()))
        assert record.fro == pytest.approx(total, rel=1e-6)
        assert record.total_rank == record.rank * len(deltas)
        assert (
            record.used
            == sum(layer.rank_99 for layer in record.layers.values()) / record.total_rank
        )
        assert (record.dead, record.modules) == (0, 28)


def factors(rng, m=48, n=40, r=4):
    return rng.standard_normal((m, r)), rng.standard_normal((r, n))


def relations(fleet):
    """Return the relations of near-duplicates by the names of their folders."""
    names = [record.adapter.rpartition("/")[2] for record in fleet]
    found = find_near_duplicates(
        [record.update for record in fleet], [record.space for record in fleet]
    )
    return {(names[pair.first], names[pair.second]): pair.relation for pair in found}


def test_planted_outliers_are_found(tmp_path):
    rng = np.random.default_rng(1)
    plain = [{layer: factors(rng) for layer in LAYERS} for _ in range(8)]
    for i, updates in enumerate(plain):
        lora(tmp_path / f"plain{i}", updates)
    dead = {layer: (0 * b, a) for layer, (b, a) in plain[0].items()}
    half = {
        layer: pair if i % 2 else (0 * pair[0], pair[1])
        for i, (layer, pair) in enumerate(plain[1].items())
    }
    spiked = {layer: (b * [100, 1, 1, 1], a) for layer, (b, a) in plain[2].items()}
    large = {layer: (50 * b, a) for layer, (b, a) in plain[3].items()}
    for name, updates in (("dead", dead), ("half", half), ("spiked", spiked), ("large", large)):
        lora(tmp_path / name, updates)
    result = lora_diag.fleet([tmp_path / "*"])
    names = [record.adapter.rpartition("/")[2] for record in result]
    message = dict(zip(names, describe_outliers(result.layers), strict=True))
    assert all(message[f"plain{i}"] == "" for i in range(8))
    assert message["dead"] == "dead"
    assert "3 of 6 dead" in message["half"]
    assert_names(message["spiked"], "over-ranked", "spiked")
    assert "norm" in message["large"]
    pairs = relations(result)
    assert pairs[("large", "plain3")] == "same"
    assert set(pairs.values()) <= {"same", "space", "near"}
    assert not any("dead" in pair for pair in pairs)
    assert not any(a.startswith("plain") and b.startswith("plain") for a, b in pairs)


def test_same_column_space_other_update_is_found(tmp_path):
    rng = np.random.default_rng(2)
    first = {layer: factors(rng) for layer in LAYERS}
    second = {
        layer: (b @ rng.standard_normal((4, 4)), rng.standard_normal((4, 40)))
        for layer, (b, _) in first.items()
    }
    near = {layer: (b, a + 0.15 * rng.standard_normal(a.shape)) for layer, (b, a) in first.items()}
    for name, updates in (("a", first), ("b", second), ("c", near)):
        lora(tmp_path / name, updates)
    found = relations(lora_diag.fleet([tmp_path / "*"]))
    assert (found["a", "b"], found["a", "c"]) == ("space", "near")


def test_layer_without_torch_equals_torch(tmp_path):
    """Also where a factor repeats a column: sketches of one fleet are compared.

    A zero update is left to torch.
    """
    rng = np.random.default_rng(5)
    b, a = factors(rng)
    repeated = b @ np.diag([1, 1, 0, 0]) + b[:, [1, 1, 1, 0]]
    updates = {"x.weight": (b, a), "y.weight": (repeated, a), "z.weight": (0 * b, a)}
    lora(tmp_path / "lora", updates)
    deltas = compare(tmp_path / "lora", None).pairing.deltas
    by_layer = dict(zip([delta.layer for delta in deltas], measure_thin(deltas), strict=True))
    for delta in deltas:
        thin, dense = by_layer[delta.layer], measure_dense("lora", delta, "cpu")
        if delta.layer == "z.weight":
            assert thin is dense.update is None
            continue
        assert thin.layer == measure_thin([delta])[0].layer
        assert (thin.layer.rank, thin.layer.rank_99) == (dense.layer.rank, dense.layer.rank_99)
        assert thin.layer.fro == pytest.approx(dense.layer.fro, rel=1e-9)
        assert thin.sigma_1 == pytest.approx(dense.sigma_1, rel=1e-9)
        assert thin.update == pytest.approx(dense.update, abs=1e-9 * np.linalg.norm(dense.update))
        assert thin.space == pytest.approx(dense.space, abs=1e-6 * np.linalg.norm(dense.space))


@pytest.mark.parametrize("size", [1.0, 1e18, 1e-19])
def test_factors_in_float32_have_sketches_of_float64(tmp_path, size):
    """Products of such factors are beyond the range of float32, in which sketches are
    transformed.
    """
    b, a = (np.float32(size) * x.astype(np.float32) for x in factors(np.random.default_rng(6)))
    lora(tmp_path / "lora", {"x.weight": (b, a)})
    (delta,) = compare(tmp_path / "lora", None).pairing.deltas
    (thin,), dense = measure_thin([delta]), measure_dense("lora", delta, "cpu")
    assert delta.thin.read_b().dtype == np.float32
    for one, other in ((thin.update, dense.update), (thin.space, dense.space)):
        assert one == pytest.approx(other, abs=1e-5 * np.linalg.norm(other))


def test_patterns_name_each_adapter_once(tmp_path):
    rng = np.random.default_rng(4)
    for name in ("x/a2", "x/a10", "y"):
        lora(tmp_path / name, {LAYERS[0]: factors(rng)})
    (tmp_path / "notes").mkdir()
    result = [
        str(path.relative_to(tmp_path))
        for path in expand_patterns([f"{tmp_path}/**", tmp_path / "y"])
    ]
    assert result == ["x/a2", "x/a10", "y"]
    with pytest.raises(NothingComparedError, match="no adapter"):
        expand_patterns([f"{tmp_path}/notes/*"])


@pytest.mark.slow
def test_processes_write_the_bytes_of_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    monkeypatch.chdir(ROOT)
    files = []
    for least in (2**40, 0):
        monkeypatch.setattr(run, "PROCESS_BYTES", least)
        lora_diag.fleet(
            ["sample_checkpoints/lora_*", "missing"], workers=2, output=tmp_path / f"{least}.jsonl"
        )
        files.append((tmp_path / f"{least}.jsonl").read_bytes())
    assert files[0] == files[1]


def test_fleet_update_beyond_root_of_range_is_measured(tmp_path):
    """The square of its norm is not a number."""
    b, a = factors(np.random.default_rng(8))
    (result,) = lora_diag.fleet([lora(tmp_path / "lora", dict.fromkeys(LAYERS, (1e160 * b, a)))])
    assert result.fro == pytest.approx(
        1e160 * math.sqrt(len(LAYERS)) * np.linalg.norm(b @ a), rel=1e-9
    )
    assert result.spike == pytest.approx(result.layers[LAYERS[0]].spike, rel=1e-9)


def test_unreadable_adapter_does_not_stop_others(tmp_path):
    rng = np.random.default_rng(5)
    good = lora(tmp_path / "good", {LAYERS[0]: factors(rng)})
    bad = lora(tmp_path / "bad", {LAYERS[0]: factors(rng)})
    (bad / "adapter_model.safetensors").write_bytes(b"short")
    nan = lora(tmp_path / "nan", {LAYERS[0]: (np.full((48, 4), np.nan), factors(rng)[1])})
    zero_times_nan = lora(
        tmp_path / "zero", {LAYERS[0]: (np.zeros((48, 4)), np.full((4, 32), np.nan))}
    )
    b, a = factors(rng)
    b[3, 1] = np.inf
    infinite = lora(tmp_path / "infinite", {LAYERS[0]: (b, a)})
    unreadable = [bad, nan, zero_times_nan, infinite, tmp_path / "missing"]
    result = lora_diag.fleet([good, *unreadable])
    assert [record.adapter for record in result] == [str(good)]
    assert {item.layer for item in result.left_out} == {str(path) for path in unreadable}
    assert {item.reason for item in result.left_out} == {"unreadable"}


def test_invalid_pattern_is_a_usage_error():
    with raises_naming(UsageError, "layers=", "regular expression"):
        lora_diag.fleet([SAMPLES / "lora_r4"], layers="q_(")


def test_checkpoint_of_a_fleet_has_a_hash():
    result = lora_diag.fleet(
        [SAMPLES / "full_ft"], base=SAMPLES / "base", layers="layers.0.*q_proj", verify=True
    )
    assert [bool(side.sha256) for side in result.run.inputs] == [True]


def test_folder_of_adapters_message_suggests_pattern(loradiag):
    ran = loradiag("fleet", SAMPLES)
    assert ran.code == 3
    assert_names(ran.err, SAMPLES, f"'{SAMPLES}/**'")
    assert "Next" not in ran.out
    assert_names(loradiag("fleet", SAMPLES / "base").err, SAMPLES / "base", "--base")


@pytest.mark.parametrize("verify", [False, True])
def test_resume_refuses_changed_adapter(tmp_path, verify):
    """Sizes tell one of another rank; every byte, where that was asked, one of the same size."""
    rng = np.random.default_rng(7)
    for name in ("a", "b"):
        lora(tmp_path / name, {LAYERS[0]: factors(rng)})
    output = tmp_path / "f.jsonl"
    whole = lora_diag.fleet([tmp_path / "*"], output=output, verify=verify)
    assert all(bool(side.sha256) == verify for side in whole.run.inputs)
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "a" / "training.log").write_text("what is beside it may grow")
    assert lora_diag.fleet([tmp_path / "*"], output=output, resume=True, verify=verify) == whole
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:2]))
    shutil.rmtree(tmp_path / "a")
    lora(tmp_path / "a", {LAYERS[0]: factors(rng, r=4 if verify else 5)})
    with raises_naming(UsageError, "changed since"):
        lora_diag.fleet([tmp_path / "*"], output=output, resume=True, verify=verify)


def test_hostile_pattern_makes_one_adapter_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_diag.adapters.patterns.SECONDS", 1.0)
    folder = shutil.copytree(SAMPLES / "lora_r4", tmp_path / "hostile")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {r"([a-z_.0-9]+)(?#:)+X": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = lora_diag.fleet([SAMPLES / "lora_r4", folder, SAMPLES / "lora_r16"])
    assert [record.rank for record in result] == [4, 16]
    (item,) = result.left_out
    assert (item.layer, item.reason) == (str(folder), "unreadable")
    assert "rank_pattern: the pattern" in item.detail
