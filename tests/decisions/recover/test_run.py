"""``recover`` end to end: what it writes, and how it ends."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lora_diag
from lora_diag.decisions.recover.show import recovery_lines
from lora_diag.deltas import pair
from lora_diag.layers.recovery import estimate_hidden_energy
from lora_diag.storage import open_checkpoint
from tests.adapters.making import lora, product
from tests.conftest import save_model
from tests.linalg.test_hidden import low_rank_of, planted
from tests.messages import assert_names, raises_naming
from tests.oracles import spectrum

pytestmark = pytest.mark.slow

Q, UP, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "lm_head.weight",
)
NORM, LOST = "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return folders: BASE and TUNED in bfloat16, of which q is of rank 3, up is noise and the head
    did not move.
    """
    folder = tmp_path_factory.mktemp("models")
    q, up = planted(96, 80, 3, 2e-5, 1), planted(64, 80, 0, 1e-5, 2)
    head = torch.randn(40, 80, generator=torch.Generator().manual_seed(3)).mul(0.02).bfloat16()
    base = {Q: q[0].bfloat16(), UP: up[0].bfloat16(), HEAD: head, NORM: torch.ones(80).bfloat16()}
    tuned = {
        Q: q[2].bfloat16(),
        UP: up[2].bfloat16(),
        HEAD: head,
        NORM: torch.full((80,), 1.5).bfloat16(),
    }
    save_model(folder / "base", base)
    save_model(folder / "tuned", tuned)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
    }
    for name in ("base", "tuned"):
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder / "base", folder / "tuned", base, tuned, q[1]


def test_records_compare_the_estimate_with_the_files(models, tmp_path):
    base, tuned, before, after, x = models
    result = lora_diag.recover(base, tuned, tmp_path / "r.jsonl")
    assert {record.layer: record.status for record in result} == {
        Q: "recovered",
        UP: "size_only",
        HEAD: "refused",
    }
    record = result[Q]
    expected = spectrum(before[Q].double().numpy(), after[Q].double().numpy())
    assert record.fro == pytest.approx(expected["fro"])
    assert record.energy["4"] == pytest.approx(float(expected["curve"][3]), abs=1e-6)
    assert record.rank_at["0.9"] == int(np.searchsorted(expected["curve"], 0.9)) + 1
    assert record.rank_at_estimate["0.9"] in {2, 3, None}
    assert record.fro_estimate == pytest.approx(float(x.norm()), rel=0.1)
    assert [item.reason for item in result.left_out] == ["vector"]
    assert lora_diag.read_results(tmp_path / "r.jsonl").layers == result.layers
    assert lora_diag.recover(base, tuned, workers=1, seed=0).layers == result.layers


def recover_layer(folder, before, after):
    """Return the record of a model of one matrix."""
    sides = [
        save_model(folder / str(i), {"model.embed_tokens.weight": w})
        for i, w in enumerate((before, after))
    ]
    (record,) = lora_diag.recover(*sides)
    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resolved_sparse_update_is_not_hidden(tmp_path, dtype):
    """Rows that were never trained, as of an embedding, are not entries that rounding kept the
    same.
    """
    rng = torch.Generator().manual_seed(5)
    w = torch.randn(200, 64, generator=rng).mul(0.02).to(dtype)
    x = torch.zeros(200, 64)
    x[::4] = torch.randn(50, 64, generator=rng) * 0.05
    record = recover_layer(tmp_path, w, (w.float() + x).to(dtype))
    assert record.unchanged == pytest.approx(0.75, abs=0.01)
    assert record.status == "not_hidden"


def test_recover_measures_small_float32_update(tmp_path):
    """An update near the spacing of float32, with entries of which cells are far
    narrower than it.
    """
    rng = torch.Generator().manual_seed(6)
    w, x = torch.randn(64, 48, generator=rng), torch.randn(64, 48, generator=rng) * 3e-8
    x[0], w[0] = 2e-7, w[0] * 1e-8
    record = recover_layer(tmp_path, w, (w.double() + x.double()).float())
    assert record.status in {"recovered", "size_only", "refused"}
    assert record.fro_estimate is None or record.fro_estimate == pytest.approx(
        float(x.norm()), rel=0.3
    )


def test_recovered_adapter_is_svd_of_posterior_mean(models, tmp_path):
    base, tuned, before, after, x = models
    result = lora_diag.recover(base, tuned, tmp_path / "full", checkpoint=True)
    mean = load_file(tmp_path / "full" / "model.safetensors")[Q].double() - before[Q].double()
    result = lora_diag.recover(base, tuned, tmp_path / "adapter", rank=3)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "recovery.jsonl",
    }
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    written, best = product(tmp_path / "adapter", Q), low_rank_of(mean, 3)
    assert np.linalg.norm(written - best) < 1e-4 * np.linalg.norm(best)
    plain = np.linalg.norm(low_rank_of(after[Q].double() - before[Q].double(), 3) - x.numpy())
    assert np.linalg.norm(written - x.numpy()) < 0.5 * plain
    assert {record.layer: record.written for record in result} == {
        Q: "posterior",
        UP: "posterior",
        HEAD: "nothing",
    }
    assert len(factors) == 4  # the head did not move
    assert "estimate" in (tmp_path / "adapter" / "README.md").read_text()
    residual = lora_diag.residual(base, tuned, [tmp_path / "adapter"], layers="q_proj")
    assert residual[0].rank == 3


def test_recover_energy_chooses_ranks(models, tmp_path):
    base, tuned, before, after, _ = models
    result = lora_diag.recover(base, tuned, tmp_path / "a", energy=0.5, nearest=True)
    assert (
        result[Q].energy_estimate[str(result[Q].rank)] >= 0.5
        or result[Q].rank == result[Q].directions
    )
    assert (result[UP].written, result[HEAD].written) == ("posterior", "nothing")
    true = planted(64, 80, 0, 1e-5, 2)[1].double().numpy()
    plain = low_rank_of(after[UP].double() - before[UP].double(), result[UP].rank)
    assert np.linalg.norm(product(tmp_path / "a", UP) - true) < np.linalg.norm(plain - true)


@pytest.fixture(scope="module")
def lost(models, tmp_path_factory):
    """Return folders of a model of which one matrix in three lost its steps to rounding, and of one
    that lost two.
    """
    folder, (*_, before, after, _) = tmp_path_factory.mktemp("lost"), models
    start = torch.randn(96, 80, generator=torch.Generator().manual_seed(7)).mul(0.02).bfloat16()
    drift, now = torch.randn(96, 80, generator=torch.Generator().manual_seed(8)), start.clone()
    for step in range(40):
        now -= (
            1e-5
            * torch.tanh(
                drift + torch.randn(96, 80, generator=torch.Generator().manual_seed(step))
            ).bfloat16()
        )
    for name, weights, trained in (("base", before, start), ("tuned", after, now)):
        save_model(folder / name / "one", {Q: weights[Q], UP: weights[UP], LOST: trained})
        save_model(
            folder / name / "two",
            {Q: weights[Q], LOST: trained, LOST.replace("k_", "v_"): trained.clone()},
        )
    return folder, (now.double() - start.double())


def test_refused_layer_is_written_from_stored_difference(lost, tmp_path):
    folder, d = lost
    base, tuned = folder / "base" / "one", folder / "tuned" / "one"
    for ways in ({"rank": 3}, {"params": 2000}):
        result = lora_diag.recover(base, tuned, tmp_path / str(ways), **ways)
        record = result[LOST]
        assert (record.status, record.written) == ("refused", "file")
        assert record.rank == ways.get("rank", record.rank) > 0
        best = low_rank_of(d, record.rank)
        assert np.linalg.norm(product(tmp_path / str(ways), LOST) - best) < 1e-4 * np.linalg.norm(
            best
        )
        assert sum(r.params for r in result) <= 2000
    result = lora_diag.recover(base, tuned, tmp_path / "out", rank=3, leave_out_refused=True)
    assert {record.layer: record.written for record in result} == {
        Q: "posterior",
        UP: "posterior",
        LOST: "nothing",
    }


def test_model_that_lost_its_steps_is_answered_no(run, lost, tmp_path):
    """The adapter is written, and the exit code says that most of it is not an estimate."""
    folder, _ = lost
    for name, code, answer in (("one", 0, "yes"), ("two", 5, "no")):
        sides = (folder / "base" / name, folder / "tuned" / name)
        ran = run("recover", *sides, "--rank", "2", "-o", tmp_path / f"a{name}")
        assert ran.code == code, ran.err
        result = lora_diag.read_results(tmp_path / f"a{name}" / "recovery.jsonl")
        (finding,) = [line for line in recovery_lines(result) if line.key == "hidden"]
        assert finding.lead.startswith(f"{answer}: ")
    assert "2 of 3" in finding.lead


def test_recover_budget_keeps_leading_directions(models, tmp_path):
    base, tuned, *_ = models
    lora_diag.recover(base, tuned, tmp_path / "r3", rank=3)
    result = lora_diag.recover(base, tuned, tmp_path / "p", params=400)
    assert {record.layer: (record.rank, record.params) for record in result} == {
        Q: (2, 352),
        UP: (0, 0),
        HEAD: (0, 0),
    }
    whole, part = (product(tmp_path / name, Q) for name in ("r3", "p"))
    assert np.linalg.norm(low_rank_of(torch.tensor(whole), 2) - part) < 1e-3 * np.linalg.norm(whole)
    with raises_naming(lora_diag.UsageError, "resume", "budget"):
        lora_diag.recover(base, tuned, tmp_path / "few", params=10)
    more = lora_diag.recover(base, tuned, tmp_path / "few", params=176, resume=True)
    assert more[Q].rank == 1
    estimated = more[Q].values_estimate
    assert sum(x**2 for x in estimated) / more[Q].fro_estimate ** 2 == pytest.approx(
        more[Q].energy_estimate["4"]
    )


def test_recovered_checkpoint_rounds_to_stored_values(models, tmp_path):
    base, tuned, before, after, x = models
    result = lora_diag.recover(base, tuned, tmp_path / "full", checkpoint=True, nearest=True)
    assert {record.layer: record.written for record in result} == {
        Q: "posterior",
        UP: "posterior",
        HEAD: "file",
    }
    tensors = load_file(tmp_path / "full" / "model.safetensors")
    assert set(tensors) == set(after)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), after[name])
    truth = before[Q].float() + x
    assert float((tensors[Q] - truth).norm()) < 0.5 * float((after[Q].float() - truth).norm())
    assert json.loads((tmp_path / "full" / "config.json").read_text())["torch_dtype"] == "float32"
    assert lora_diag.spectrum(base, tmp_path / "full")[Q].fro == pytest.approx(
        float((tensors[Q] - before[Q].float()).norm())
    )


def test_kept_length_scales_the_estimate_to_its_norm(models, tmp_path):
    base, tuned, before, *_ = models
    for name, ways in (("full", {"checkpoint": True}), ("r3", {"rank": 3})):
        lora_diag.recover(base, tuned, tmp_path / name, nearest=True, **ways)
        result = lora_diag.recover(base, tuned, tmp_path / f"{name}long", **ways)
    plain, long = (
        load_file(tmp_path / name / "model.safetensors") for name in ("full", "fulllong")
    )
    for layer in (Q, UP):
        steps = [(tensors[layer].double() - before[layer].double()) for tensors in (plain, long)]
        assert float(steps[1].norm()) == pytest.approx(result[layer].fro_estimate, rel=1e-3)
        assert float(steps[0].norm()) < 0.9999 * float(steps[1].norm())
        assert (
            torch.nn.functional.cosine_similarity(*(step.flatten() for step in steps), dim=0)
            > 0.999
        )
    plain, long = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("r3", "r3long")
    )
    ratio = [
        float(long[key].norm() / plain[key].norm())
        for key in plain
        if Q.removesuffix(".weight") in key
    ]
    assert len(ratio) == 2
    stretch = result[Q].fro_estimate / float(
        (load_file(tmp_path / "full" / "model.safetensors")[Q] - before[Q]).norm()
    )
    assert ratio[0] * ratio[1] == pytest.approx(stretch, rel=1e-2)
    assert_names((tmp_path / "fulllong" / "README.md").read_text(), "scaled", "‖X‖")


def test_recover_resumes_interrupted_run(models, tmp_path):
    base, tuned, *_ = models
    whole = lora_diag.recover(base, tuned, tmp_path / "whole", checkpoint=True)

    def stop(record):
        if record.record == "recovery":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_diag.recover(base, tuned, tmp_path / "again", checkpoint=True, on_record=stop)
    assert not (tmp_path / "again").exists()
    with pytest.raises(lora_diag.UsageError, match="did not finish"):
        lora_diag.recover(base, tuned, tmp_path / "again", checkpoint=True)
    resumed = lora_diag.recover(base, tuned, tmp_path / "again", checkpoint=True, resume=True)
    assert resumed.layers == whole.layers
    for name in ("model.safetensors", "config.json", "recovery.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(lora_diag.UsageError, match="not empty"):
        lora_diag.recover(base, tuned, tmp_path / "again", checkpoint=True)


@pytest.mark.parametrize("ways", [{}, {"checkpoint": True}, {"rank": 3}], ids=str)
def test_recover_time_limit_leaves_layers_for_resume(models, tmp_path, monkeypatch, ways):
    """The clock is stopped for the options, the sample and one layer. q hides more per entry than
    the others.
    """
    base, tuned, *_ = models
    whole = lora_diag.recover(base, tuned, tmp_path / "whole", **ways)
    clock = iter([0.0, 1.0])
    monkeypatch.setattr("lora_diag.decisions.recover.measure.time.time", lambda: next(clock, 1e9))
    some = lora_diag.recover(base, tuned, tmp_path / "some", time="2s", workers=1, **ways)
    assert some.layers == (whole[Q],)
    late = {item.layer: item.detail for item in some.left_out if item.reason == "time"}
    assert set(late) == {UP, HEAD}
    assert "--time 2s" in late[UP]
    assert_names(late[HEAD], "0.0%", "hidden")  # it did not move
    assert recovery_lines(some)[0].key == "left_out"
    resumed = lora_diag.recover(base, tuned, tmp_path / "some", resume=True, **ways)
    assert {record.layer: record for record in resumed} == {
        record.layer: record for record in whole
    }
    assert resumed.left_out == whole.left_out
    assert (
        lora_diag.recover(base, tuned, tmp_path / "some", resume=True, **ways).layers
        == resumed.layers
    )
    if ways:
        names = [
            sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "some")
        ]
        assert names[0] == names[1]
        (model,) = [name for name in names[0] if name.endswith(".safetensors")]
        assert (tmp_path / "some" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    else:
        assert lora_diag.read_results(tmp_path / "some").layers == resumed.layers


def test_hidden_energy_equals_update_beyond_files(models):
    """The update is known: ‖X − D‖² is computed from it."""
    base, tuned, before, after, x = models
    true = {Q: x.double(), UP: planted(64, 80, 0, 1e-5, 2)[1].double(), HEAD: 0.0}
    for delta in pair(open_checkpoint(base), open_checkpoint(tuned)).deltas:
        if delta.layer in true:
            d = after[delta.layer].double() - before[delta.layer].double()
            expected = float((true[delta.layer] - d).square().sum())
            assert estimate_hidden_energy(delta) == pytest.approx(expected, rel=0.3)


def test_recover_stack_of_experts_by_matrix(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    parts = [planted(96, 80, 3, 2e-5, seed) for seed in (1, 4)]
    before, after = (torch.stack([part[k] for part in parts]).bfloat16() for k in (0, 2))
    save_model(tmp_path / "base", {name: before})
    save_model(tmp_path / "tuned", {name: after})
    result = lora_diag.recover(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "full", checkpoint=True, nearest=True
    )
    assert [record.layer for record in result] == [f"{name}[0]", f"{name}[1]"]
    tensor = load_file(tmp_path / "full" / "model.safetensors")[name]
    assert torch.equal(tensor.bfloat16(), after)
    truth = torch.stack([part[0] + part[1] for part in parts])
    assert float((tensor - truth).norm()) < 0.6 * float((after.float() - truth).norm())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--rank", "2", "--checkpoint", "-o", "out"], 2, "give one of"),
        (["--rank", "2"], 2, "-o"),
        (["--energy", "1.5", "-o", "out"], 2, "--energy 1.5"),
        (["--leave-out-refused"], 2, "--leave-out-refused"),
        (["--time", "1h", "--params", "1k", "-o", "out"], 2, "--time"),
        (["--time", "0.000001s", "--rank", "2", "-o", "late"], 5, "--resume"),
        (["--layers", "lm_head", "--params", "1k", "-o", "out"], 5, "nothing was written"),
        (["--layers", "lm_head"], 5, ""),
        (["--layers", "lm_head", "--rank", "2", "-o", "out"], 5, "no entry changed"),
        (["--layers", "lm_head", "--checkpoint", "-o", "out"], 5, "nothing was written"),
        (["--layers", "nowhere"], 4, "--exclude leaves out"),
    ],
)
def test_exit_codes_and_messages(run, models, tmp_path, words, code, message):
    ran = run("recover", *models[:2], *words)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def test_bad_inputs_end_with_one_message(run, models, tmp_path):
    base, tuned, before, *_ = models
    broken = dict(before)
    broken[Q] = before[Q].clone()
    broken[Q][1, 2] = float("nan")
    save_model(tmp_path / "nan", broken)
    ran = run("recover", base, tmp_path / "nan", "--layers", "q_proj")
    assert ran.code == 3
    assert "[1, 2]" in ran.err
    lora(tmp_path / "lora", {Q: (torch.ones(96, 1), torch.ones(1, 80))})
    ran = run("recover", base, tmp_path / "lora")
    assert ran.code == 2
    assert "is an adapter" in ran.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    assert run("recover", base, tuned, "--checkpoint", "-o", "mine", "--overwrite").code == 2
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"mine"


def test_extract_factors_the_update_before_rounding(models, tmp_path):
    base, tuned, *_ = models
    lora_diag.recover(base, tuned, tmp_path / "r", rank=2, nearest=True)
    result = lora_diag.extract(base, tuned, tmp_path / "e", rank=2, recover=True)
    assert {r.layer: r.estimated for r in result} == {Q: True, UP: False}
    first, second = (product(tmp_path / name, Q) for name in ("r", "e"))
    assert np.linalg.norm(first - second) / np.linalg.norm(first) < 1e-4
    card = (tmp_path / "e" / "README.md").read_text()
    assert "is an estimate" in card
    assert card.count("--recover") == 1
    shares = lora_diag.extract(
        base, tuned, tmp_path / "s", signal=True, recover=True, layers="q_proj"
    )
    assert shares[Q].rank == shares[Q].hidden.directions
    budget = lora_diag.extract(base, tuned, tmp_path / "p", params=400, recover=True)
    assert [(r.layer, r.rank) for r in budget] == [(Q, 2)]


def test_residual_expects_distance_to_update_before_rounding(models, tmp_path):
    """The update itself is the oracle: of exactly low rank, and of noise alone."""
    base, tuned, *_, x = models
    true = {Q: x.double(), UP: planted(64, 80, 0, 1e-5, 2)[1].double()}
    lora_diag.recover(base, tuned, tmp_path / "a", rank=3)
    result = lora_diag.residual(
        base, tuned, [tmp_path / "a"], layers="q_proj|up_proj", recover=True
    )
    for record in result:
        gap = product(tmp_path / "a", record.layer) - true[record.layer].numpy()
        epsilon = np.linalg.norm(gap) / float(true[record.layer].norm())
        expected = record.before_rounding
        assert expected.epsilon == pytest.approx(epsilon, abs=0.03)
        assert expected.fro == pytest.approx(float(true[record.layer].norm()), rel=0.05)
    plain = lora_diag.residual(base, tuned, [tmp_path / "a"], layers="q_proj|up_proj")
    assert [r.model_copy(update={"before_rounding": None}) for r in result] == list(plain)
