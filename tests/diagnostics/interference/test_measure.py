"""Interference against float64 NumPy written from the definitions, planted subspaces, chance, and
PEFT's own merges.
"""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

import lora_diag
from lora_diag.diagnostics.interference.measure import select_spectra
from lora_diag.diagnostics.interference.record import Interference, Union
from lora_diag.diagnostics.interference.show import compare_lengths, interference_lines
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.linalg.distance import merge_entries
from lora_diag.storage import open_checkpoint
from tests import oracles
from tests.adapters.making import dense, lora
from tests.conftest import ROOT, save_model, weights

SAMPLES = ROOT / "sample_checkpoints"
LAYER = "model.layers.0.mlp.up_proj.weight"


def adapters(tmp_path, pairs, scales=None):
    scales = scales or [1.0] * len(pairs)
    return [lora(tmp_path / f"a{i}", {LAYER: pair}, scales[i]) for i, pair in enumerate(pairs)]


def records(found):
    pairs = [record for record in found if isinstance(record, Interference)]
    return pairs, [record for record in found if isinstance(record, Union)]


# ---- oracles


def level_of(found, key):
    return next(statement.level for statement in interference_lines(found) if statement.key == key)


def svd(x):
    return np.linalg.svd(x, full_matrices=False)


def overlap(x, y, rank, side):
    u, v = (svd(z)[0] if side == "columns" else svd(z)[2].T for z in (x, y))
    k = [min(rank, np.linalg.matrix_rank(z)) for z in (x, y)]
    cosines = np.linalg.svd(u[:, : k[0]].T @ v[:, : k[1]], compute_uv=False)
    return float((cosines**2).mean())


def sti(parts):
    result = [svd(x) for x in parts]
    ranks = [np.linalg.matrix_rank(x) for x in parts]
    u = np.hstack([u[:, :r] for (u, _, _), r in zip(result, ranks, strict=True)])
    v = np.hstack([vh[:r].T for (_, _, vh), r in zip(result, ranks, strict=True)])
    s = np.concatenate([s[:r] for (_, s, _), r in zip(result, ranks, strict=True)])
    return np.abs((u.T @ u - np.eye(len(s))) @ np.diag(s) @ (v.T @ v - np.eye(len(s)))).sum()


def ties(parts, weights, density):
    """Entry by entry, as the paper and PEFT describe it."""
    keep = int(density * parts[0].size)
    trimmed = []
    for x in parts:
        order = np.argsort(-np.abs(x).ravel(), kind="stable")[:keep]
        kept = np.zeros(x.size)
        kept[order] = x.ravel()[order]
        trimmed.append(kept)
    out = np.zeros(parts[0].size)
    for i in range(out.size):
        column = [x[i] for x in trimmed]
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [w * x for x, w in zip(column, weights, strict=True) if np.sign(x) == sign]
        out[i] = sum(agreeing) / max(1, len(agreeing))
    return out.reshape(parts[0].shape), trimmed


def conflicts(columns):
    shared = [c for c in columns if sum(x != 0 for x in c) >= 2]
    return None if not shared else sum(min(c) < 0 < max(c) for c in shared) / len(shared)


def check_union(record, parts, weights, density):
    total = sum(w * x for w, x in zip(weights, parts, strict=True))
    scaled = [w * x for w, x in zip(weights, parts, strict=True)]
    u, s, vh = svd(total)
    fro = np.linalg.norm(total)
    assert record.fro == pytest.approx(fro, rel=1e-7)
    assert record.parts_fro == pytest.approx([np.linalg.norm(x) for x in scaled], rel=1e-7)
    assert record.energy_ratio == pytest.approx(
        fro**2 / sum(np.linalg.norm(x) ** 2 for x in scaled), rel=1e-6
    )
    for share in (0.9, 0.95, 0.99):
        apart = sum(oracles.rank_at(svd(x)[1], share) for x in parts)
        rank = oracles.rank_at(s, share)
        assert record.spectrum.rank_at[str(share)] == rank
        assert record.parts_rank_at[str(share)] == apart
        assert record.additive[str(share)] == pytest.approx(rank / apart)
        kept = [
            min(
                np.linalg.norm(u[:, :r].T @ x @ vh[:r].T) ** 2 / np.linalg.norm(x) ** 2
                for x in parts
            )
            for r in range(1, len(s) + 1)
        ]
        enough = [r for r, value in enumerate(kept, 1) if value >= share * (1 - 1e-9)]
        assert record.rank_for_all[str(share)] == (enough[0] if enough else None)
        assert record.weakest_kept[str(share)] == pytest.approx(kept[rank - 1], abs=1e-6)
    erank = sum(oracles.effective_rank(svd(x)[1]) for x in parts)
    assert record.parts_effective_rank == pytest.approx(erank, rel=1e-6)
    assert record.additive_effective == pytest.approx(oracles.effective_rank(s) / erank, rel=1e-5)
    k = next(
        k
        for k in range(1, len(s) + 1)
        if np.linalg.norm(total - u[:, :k] @ u[:, :k].T @ total) <= 0.05 * fro
    )
    assert record.alignment_rank == k
    sar = [np.linalg.norm(u[:, :k] @ u[:, :k].T @ x) / np.linalg.norm(x) for x in parts]
    assert record.alignments == pytest.approx(sar, abs=1e-6)
    assert record.alignment == pytest.approx(np.mean(sar), abs=1e-6)
    for rank, left in record.recompressed.items():
        best = oracles.best_approximation(total, int(rank))
        assert left == pytest.approx(np.linalg.norm(total - best) / fro, abs=1e-6)
    merged, trimmed = ties(parts, weights, density)
    check_loss(record.merges["ties_dense"], total, merged)
    assert record.sign_conflicts == pytest.approx(
        conflicts(list(zip(*[x.ravel() for x in parts], strict=True)))
    )
    assert record.trimmed_conflicts == pytest.approx(conflicts(list(zip(*trimmed, strict=True))))


def check_loss(found, total, merged, tolerance=1e-6):
    fro = np.linalg.norm(total)
    assert found.residual == pytest.approx(np.linalg.norm(total - merged) / fro, abs=tolerance)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(merged) / fro, abs=tolerance)
    if not merged.any():
        assert found.best_scale is None
        return
    scale = (total * merged).sum() / (merged**2).sum()
    assert found.best_scale == pytest.approx(scale, abs=tolerance)
    assert found.residual_best_scale == pytest.approx(
        np.linalg.norm(total - scale * merged) / fro, abs=tolerance
    )


# ---- against the definitions


@pytest.mark.slow
def test_samples_against_numpy():
    """Mixed: two adapters and a full fine-tune, of one layer of each shape."""
    paths = [SAMPLES / name for name in ("lora_r4", "lora_r16", "full_ft")]
    result = lora_diag.interference(
        paths, base=SAMPLES / "base", layers=r"layers\.1\.(mlp.down|self_attn.k)"
    )
    base, tuned = open_checkpoint(SAMPLES / "base"), open_checkpoint(SAMPLES / "full_ft")
    opened = [lora_diag.running.inputs.compare(path, None) for path in paths[:2]]
    known = [{d.layer: dense(d) for d in side.pairing.deltas} for side in opened]
    pairs, unions = records(result)
    assert (len(pairs), len(unions)) == (6, 2)
    for union in unions:
        full = (
            (tuned.read(union.layer).double() - base.read(union.layer).double())
            .numpy()
            .reshape(union.shape)
        )
        parts = [known[0][union.layer], known[1][union.layer], full]
        assert union.ranks == (4, 16, None)
        check_union(union, parts, (1, 1, 1), 0.2)
        by_name = dict(zip(map(str, paths), parts, strict=True))
        for pair in (record for record in pairs if record.layer == union.layer):
            x, y = by_name[pair.first], by_name[pair.second]
            assert pair.cosine == pytest.approx(
                (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6
            )
            assert pair.cosine_random == pytest.approx(1 / math.sqrt(x.size))
            for rank in pair.columns:
                r = int(rank)
                for side in ("columns", "rows"):
                    assert getattr(pair, side)[rank].overlap == pytest.approx(
                        overlap(x, y, r, side), abs=1e-5
                    )
                u, w = (svd(z)[0][:, : min(r, np.linalg.matrix_rank(z))] for z in (x, y))
                energy = pair.energy[rank]
                assert energy.second_in_first == pytest.approx(
                    np.linalg.norm(u.T @ y) ** 2 / np.linalg.norm(y) ** 2
                )
                assert energy.first_in_second == pytest.approx(
                    np.linalg.norm(w.T @ x) ** 2 / np.linalg.norm(x) ** 2
                )
                assert energy.random_first == u.shape[1] / len(u)
                assert energy.random_second == w.shape[1] / len(w)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(2, 14),
    n=st.integers(2, 14),
    ranks=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    density=st.sampled_from([0.2, 0.5, 1.0]),
)
def test_random_adapters_against_numpy(tmp_path_factory, seed, m, n, ranks, density):
    rng = np.random.default_rng(seed)
    pairs = [(rng.standard_normal((m, r)), rng.standard_normal((r, n))) for r in ranks]
    scales = rng.uniform(0.5, 2.0, len(ranks)).round(3).tolist()
    given_weights = rng.uniform(0.5, 2.0, len(ranks)).round(3).tolist()
    paths = adapters(tmp_path_factory.mktemp("x"), pairs, scales)
    result = lora_diag.interference(paths, ranks=[1, 2, 64], density=density, weights=given_weights)
    parts = [s * b @ a for (b, a), s in zip(pairs, scales, strict=True)]
    _, (union,) = records(result)
    check_union(union, parts, given_weights, density)
    scaled = [w * x for w, x in zip(given_weights, parts, strict=True)]
    assert union.sti == pytest.approx(sti(scaled), rel=1e-5)
    assert union.merges["cat"].residual < 1e-12
    if len(set(ranks)) == 1:
        roots = [math.sqrt(w * s) for w, s in zip(given_weights, scales, strict=True)]
        b, a = (
            sum(c * pair[side] for c, pair in zip(roots, pairs, strict=True)) for side in (0, 1)
        )
        check_loss(union.merges["linear"], sum(scaled), b @ a)
    else:
        assert union.merges["linear"] is None


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(140, 132), (132, 140)], ids=str)
def test_full_updates_of_more_values_than_ranks(tmp_path, shape):
    """Only the vectors of the largest requested rank are computed, and all values."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal(shape)
    parts = [
        oracles.with_spectrum(np.arange(1, 133) ** -p, *shape, seed=seed)
        for p, seed in ((0.3, 1), (1.0, 2))
    ]
    for name, weight in (("base", base), ("x", base + parts[0]), ("y", base + parts[1])):
        save_model(tmp_path / name, {LAYER: torch.from_numpy(weight)})
    paths = [tmp_path / "x", tmp_path / "y"]
    (pair,), (union,) = records(
        lora_diag.interference(paths, base=tmp_path / "base", ranks=[2, 5], weights=[1, 0.5])
    )
    check_union(union, parts, [1, 0.5], 0.2)
    for rank in (2, 5):
        for side in ("columns", "rows"):
            assert getattr(pair, side)[str(rank)].overlap == pytest.approx(
                overlap(*parts, rank, side), abs=1e-6
            )
        u, w = (svd(x)[0][:, :rank] for x in parts)
        energy = [
            np.linalg.norm(v.T @ x) ** 2 / np.linalg.norm(x) ** 2
            for v, x in ((u, parts[1]), (w, parts[0]))
        ]
        assert [
            pair.energy[str(rank)].second_in_first,
            pair.energy[str(rank)].first_in_second,
        ] == pytest.approx(energy)


# ---- planted


def orthonormal(rng, m, k):
    return np.linalg.qr(rng.standard_normal((m, k)))[0]


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, math.pi / 2])
def test_planted_angles_are_found(tmp_path, angle):
    rng = np.random.default_rng(3)
    q, p = orthonormal(rng, 40, 8), orthonormal(rng, 30, 8)
    turned = math.cos(angle) * q[:, :4] + math.sin(angle) * q[:, 4:]
    s = np.array([4.0, 3.0, 2.0, 1.0])
    paths = adapters(tmp_path, [(q[:, :4] * s, p[:, :4].T), (turned * s, p[:, 4:].T)])
    (pair,), (union,) = records(lora_diag.interference(paths, ranks=[4]))
    assert pair.columns["4"].cosines == pytest.approx([math.cos(angle)] * 4, abs=1e-6)
    assert pair.rows["4"].overlap == pytest.approx(0, abs=1e-12)
    assert pair.energy["4"].second_in_first == pytest.approx(math.cos(angle) ** 2, abs=1e-9)
    assert pair.cosine == pytest.approx(0, abs=1e-12)
    assert union.energy_ratio == pytest.approx(1)


@pytest.mark.parametrize("skills", [2, 5])
def test_orthogonal_updates_have_no_interference(tmp_path, skills):
    rng = np.random.default_rng(4)
    q, p = (np.split(orthonormal(rng, size, 4 * skills), skills, axis=1) for size in (40, 30))
    parts = [(left, right.T) for left, right in zip(q, p, strict=True)]
    found = lora_diag.interference(adapters(tmp_path, parts))
    pairs, (union,) = records(found)
    assert compare_lengths([union]) == pytest.approx(skills**0.5)
    assert level_of(found, "length") == "note"
    assert {pair.relation for pair in pairs} == {"apart"}
    assert union.spectrum.rank_at["0.99"] == 4 * skills
    assert union.additive["0.99"] == 1
    assert union.additive_effective == pytest.approx(1)
    assert union.energy_ratio == pytest.approx(1)
    assert union.sti_relative == pytest.approx(0, abs=1e-10)
    assert union.rank_for_all["0.99"] == 4 * skills


@pytest.mark.parametrize("copies", [2, 3])
def test_identical_updates_need_rank_of_one(tmp_path, copies):
    rng = np.random.default_rng(5)
    part = orthonormal(rng, 40, 4), orthonormal(rng, 30, 4).T
    found = lora_diag.interference(adapters(tmp_path, [part] * copies))
    pairs, (union,) = records(found)
    assert compare_lengths([union]) == pytest.approx(copies)
    assert level_of(found, "length") == "warning"
    assert {pair.relation for pair in pairs} == {"reinforce"}
    assert all(pair.cosine == pytest.approx(1) for pair in pairs)
    assert union.spectrum.rank_at["0.99"] == union.rank_for_all["0.99"] == 4
    assert union.additive["0.99"] == pytest.approx(1 / copies)
    assert union.additive_effective == pytest.approx(1 / copies)
    assert union.energy_ratio == pytest.approx(copies)
    assert union.alignment == pytest.approx(1)
    assert union.sign_conflicts == 0
    assert union.sti_relative == pytest.approx((copies - 1) ** 2)


def test_opposite_updates_cancel_and_no_rank_keeps_both(tmp_path):
    rng = np.random.default_rng(6)
    b, a = rng.standard_normal((12, 2)), rng.standard_normal((2, 12))
    (pair,), (union,) = records(lora_diag.interference(adapters(tmp_path, [(b, a), (-b, a)])))
    assert (pair.relation, union.fro, union.energy_ratio) == ("cancel", 0.0, 0.0)
    assert union.rank_for_all == {}
    assert union.spectrum.rank_at["0.9"] == 0


# ---- chance


def test_sum_not_spanning_every_update_has_no_common_rank(tmp_path):
    """Stored side by side in one row space each: the sum is u(a + b)ᵀ, and beyond it its vectors
    are rounding.
    """
    rng = np.random.default_rng(5)
    u, a, b = orthonormal(rng, 24, 1), *np.split(orthonormal(rng, 20, 2), 2, axis=1)
    zero = {LAYER: np.zeros((24, 20))}
    folders = [
        save_model(
            tmp_path / name,
            {key: torch.tensor(value, dtype=torch.float32) for key, value in held.items()},
        )
        for name, held in (("base", zero), ("one", {LAYER: u @ a.T}), ("two", {LAYER: u @ b.T}))
    ]
    for result in (
        lora_diag.interference(folders[1:], base=folders[0]),
        lora_diag.interference(adapters(tmp_path, [(u, a.T), (u, b.T)])),
    ):
        ((record,),) = records(result)[1:]
        assert record.rank_for_all == {"0.9": None, "0.95": None, "0.99": None}
        assert record.weakest_kept["0.9"] == pytest.approx(0.5, abs=1e-6)


def test_random_updates_meet_their_baselines(tmp_path):
    """Means over 60 pairs of random directions, within four standard errors of what is said of
    chance.
    """
    rng = np.random.default_rng(7)
    m, n, r, runs = 64, 48, 4, 60
    layers = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(runs)]
    paths = [
        lora(
            tmp_path / name, {x: (orthonormal(rng, m, r), orthonormal(rng, n, r).T) for x in layers}
        )
        for name in ("a", "b")
    ]
    pairs, unions = records(lora_diag.interference(paths, ranks=[r]))

    def meets(values, expected):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - expected) < 4 * error, (np.mean(values), expected, error)

    meets([pair.columns["4"].overlap for pair in pairs], pairs[0].columns["4"].random)
    meets([pair.rows["4"].overlap for pair in pairs], pairs[0].rows["4"].random)
    meets([pair.energy["4"].second_in_first for pair in pairs], pairs[0].energy["4"].random_first)
    meets([pair.cosine**2 for pair in pairs], pairs[0].cosine_random ** 2)
    meets([union.sign_conflicts for union in unions], 0.5)
    assert unions[0].sign_conflicts_random == 0.5
    assert np.mean([union.sti_relative for union in unions]) == pytest.approx(
        unions[0].sti_random, rel=0.1
    )
    assert sum(pair.relation == "apart" for pair in pairs) >= 0.9 * runs


@pytest.mark.parametrize("scale", [1e150, 1e-160])
def test_updates_of_norms_beyond_comparison_are_left_out(tmp_path, scale):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.standard_normal((12, 2)) * scale, rng.standard_normal((2, 9)) * scale)
        for _ in range(2)
    ]
    result = lora_diag.interference(adapters(tmp_path, pairs))
    assert not result.layers
    (item,) = result.left_out
    assert "its norm is" in item.detail


# ---- PEFT's own merges


def test_tie_of_signs_is_positive_as_in_peft():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    x, y = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[-1.0, 2.0, -1.0]])
    truth = merge_utils.ties(
        [x, y], torch.ones(2), density=0.99999
    )  # 2 of 3 entries: -2, 3 and 2, one of ±1
    full = merge_entries(torch.stack([x, y]).double(), torch.ones(2))
    assert full.tolist() == [[1.0, 2.0, 3.0]]
    assert truth[0, 1:].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd"])
def test_predicted_residual_equals_peft_merge(tmp_path, kind):
    peft = pytest.importorskip("peft")
    if "svd" in kind and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT before 0.21 gives another matrix for merges by SVD")
    torch.manual_seed(0)
    tiny = torch.nn.Sequential(OrderedDict(up_proj=torch.nn.Linear(20, 24, bias=False)))
    names, used = ("one", "two", "three"), [1.0, 0.5, 2.0]
    model = None
    for i, name in enumerate(names):
        config = peft.LoraConfig(
            r=4, lora_alpha=4 * (i + 1), target_modules=["up_proj"], init_lora_weights=False
        )
        if model is None:
            model = peft.get_peft_model(tiny, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(tmp_path)
    options = {"density": 0.3} if "ties" in kind else {}
    rank = 20 if kind == "ties_svd" else 4  # the full rank, so that nothing but TIES is lost
    model.add_weighted_adapter(
        list(names), used, "merged", combination_type=kind, svd_rank=rank, **options
    )
    layer = model.base_model.model.up_proj

    def of(name):
        return layer.get_delta_weight(name).detach().double().numpy()

    total = sum(w * of(name) for w, name in zip(used, names, strict=True))
    truth = np.linalg.norm(total - of("merged")) / np.linalg.norm(total)
    result = lora_diag.interference(
        [tmp_path / name for name in names], weights=used, density=0.3, ranks=[2, 8]
    )
    _, (union,) = records(result)
    if kind == "svd":
        assert union.recompressed["4"] == pytest.approx(
            truth, abs=1e-5
        )  # PEFT's own rank, though it was not asked
    else:
        merge = union.merges["ties_dense" if kind == "ties_svd" else kind]
        assert merge.residual == pytest.approx(truth, abs=1e-5)
        assert (truth > 0.1) == (kind != "cat")


# ---- inputs


def test_layer_of_one_update_has_no_pair_but_spectrum(tmp_path):
    rng = np.random.default_rng(9)
    other = LAYER.replace("0", "1")

    def factors():
        return rng.standard_normal((10, 2)), rng.standard_normal((2, 8))

    paths = [
        lora(tmp_path / "a", {LAYER: factors()}),
        lora(tmp_path / "b", {LAYER: factors(), other: factors()}),
    ]
    result = lora_diag.interference(paths)
    pairs, unions = records(result)
    assert [pair.layer for pair in pairs] == [LAYER]
    alone = unions[1]
    assert (alone.layer, alone.updates, alone.additive["0.9"], alone.merges) == (
        other,
        (str(paths[1]),),
        None,
        {},
    )
    spectra = select_spectra(result)
    assert [record.layer for record in spectra] == [LAYER, other]
    assert spectra.run.command == "spectrum"


def test_dead_adapter_counts_in_merge_without_pair(tmp_path):
    rng = np.random.default_rng(10)
    b, a, c = rng.standard_normal((10, 2)), rng.standard_normal((2, 8)), rng.standard_normal((2, 8))
    e, d = rng.standard_normal((10, 2)), rng.standard_normal((2, 8))
    pairs, (union,) = records(
        lora_diag.interference(adapters(tmp_path, [(b, a), (0 * b, c), (e, d)]))
    )
    assert len(pairs) == 1
    assert len(union.updates) == 2
    check_loss(union.merges["linear"], b @ a + e @ d, (b + e) @ (a + c + d))


def test_incomparable_inputs_are_reported(tmp_path):
    rng = np.random.default_rng(11)
    pair = rng.standard_normal((10, 2)), rng.standard_normal((2, 8))
    one, two = adapters(tmp_path, [pair, pair])
    wider = lora(tmp_path / "w", {LAYER: (pair[0], rng.standard_normal((2, 9)))})
    elsewhere = lora(tmp_path / "e", {LAYER.replace("0", "7"): pair})
    for error, message, updates, options in (
        (UsageError, "at least two", [one], {}),
        (UsageError, "given twice", [one, one], {}),
        (UsageError, "1 weights for 2", [one, two], {"weights": [1.0]}),
        (UsageError, "must be positive", [one, two], {"weights": [1.0, -1.0]}),
        (UsageError, "density", [one, two], {"density": 1.5}),
        (InputError, "not updates of one model", [one, wider], {}),
        (NothingComparedError, "no weight is changed by two", [one, elsewhere], {}),
    ):
        with pytest.raises(error, match=message):
            lora_diag.interference(updates, **options)


def test_non_finite_update_is_left_out_by_name(tmp_path):
    before = weights(1)
    bad = {name: value.clone() for name, value in before.items()}
    bad[LAYER][2, 3] = math.nan
    good = {name: value + weights(2)[name] for name, value in before.items()}
    paths = [
        save_model(tmp_path / name, x)
        for name, x in (("base", before), ("bad", bad), ("good", good))
    ]
    result = lora_diag.interference(paths[1:], base=paths[0])
    (item,) = [item for item in result.left_out if item.reason == "non_finite"]
    assert item.layer == LAYER
    assert str(paths[1]) in item.detail
    assert LAYER not in {record.layer for record in result}


def test_without_entries_there_are_no_signs(tmp_path):
    rng = np.random.default_rng(12)
    paths = adapters(
        tmp_path, [(rng.standard_normal((10, 2)), rng.standard_normal((2, 8))) for _ in range(2)]
    )
    _, (union,) = records(lora_diag.interference(paths, density=0))
    assert union.sign_conflicts is union.merges["ties_dense"] is union.merges["ties"] is None
    assert union.merges["linear"] is not None
