"""Allocations: budgets, caps, groups, baselines and the certificate, each against its
definition.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.decisions.allocate.measure import Budget, Constraints, allocate
from lora_diag.errors import UsageError
from lora_diag.records import LeftOut
from tests.decisions.allocate.records import llama, record
from tests.messages import raises_naming


def cost(record_):
    return sum(record_.shape)


def share(spectra, ranks):
    """Σ kept energy / Σ energy from the definition."""
    total = sum(r.fro**2 for r in spectra)
    return sum(float((np.array(r.s[: ranks[r.layer]]) ** 2).sum()) for r in spectra) / total


def ranks_of(found):
    return {layer.layer: layer.rank for layer in found.layers}


def params(amount):
    return Budget("params", amount, f"--params {amount}")


def lowest(spectra, least, listed):
    """What must be spent at least: the smallest ranks of all layers, or the cheapest
    rank of any.
    """
    first = next((rank for rank in listed or () if rank >= least), least)
    every = sum((first if least else 0) * cost(r) for r in spectra)
    return every or min(cost(r) for r in spectra) * (listed[0] if listed else 1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4000),
    st.integers(0, 3),
    st.sampled_from([None, 3, 5]),
    st.sampled_from([None, (2, 4, 8), (4, 16)]),
)
def test_no_budget_is_ever_exceeded_and_certificate_holds(seed, amount, least, most, listed):
    if listed and not any(least <= rank <= (most or rank) for rank in listed):
        listed = None
    spectra = llama(2, seed)
    if amount < (lowest(spectra, least, listed)):
        with pytest.raises(UsageError, match=r"at least|more than the budget"):
            allocate(spectra, params(amount), Constraints(least, most, listed))
        return
    result = allocate(spectra, params(amount), Constraints(least, most, listed))
    ranks = ranks_of(result)
    spent = sum(ranks[r.layer] * cost(r) for r in spectra)
    certificate = result.certificate
    assert (
        spent
        == certificate.spent
        == certificate.params
        == sum(layer.params for layer in result.layers)
        <= amount
    )
    assert certificate.kept == pytest.approx(share(spectra, ranks), abs=1e-9)
    assert 0 <= certificate.gap <= 1
    assert certificate.kept <= certificate.bound + 1e-12
    for layer in result.layers:
        assert most is None or layer.rank <= most
        assert least <= layer.rank <= layer.cap
        assert listed is None or layer.rank in {0, *listed}
        assert layer.kept == pytest.approx(
            share([r for r in spectra if r.layer == layer.layer], ranks), abs=1e-9
        )
    for baseline in certificate.baselines:
        assert baseline.spent <= amount
        assert baseline.kept <= baseline.equal + 1e-12 <= certificate.bound + 1e-9


def test_ranks_for_energy_equal_spectra():
    spectra = llama(3, 5)
    result = allocate(spectra, Budget("energy", 0.9, "--energy 0.9"))
    assert ranks_of(result) == {
        r.layer: min(r.rank_at["0.9"], math.prod(r.shape) // sum(r.shape)) for r in spectra
    }
    assert result.certificate.budget is None
    assert result.certificate.spent == result.certificate.params
    assert result.certificate.bound >= result.certificate.kept
    best = allocate(spectra, params(result.certificate.params))
    assert best.certificate.kept >= result.certificate.kept - 1e-12


def test_rank_budget_takes_largest_singular_values():
    spectra = llama(2, 1)
    all_records = sorted(((value, r.layer) for r in spectra for value in r.s), reverse=True)
    wanted = dict.fromkeys((r.layer for r in spectra), 0)
    for _, layer in all_records[:20]:
        wanted[layer] += 1
    result = allocate(spectra, Budget("total_rank", 20, "--total-rank 20"))
    assert ranks_of(result) == wanted
    assert result.certificate.spent == 20
    assert result.certificate.optimal


def test_budget_of_bytes_counts_every_copy_of_parameter():
    spectra = llama(2, 1)
    by_bytes = allocate(spectra, Budget("bytes", 16_015, "--memory 16015B", 16.0))
    by_params = allocate(spectra, params(1000))
    assert ranks_of(by_bytes) == ranks_of(by_params)
    assert by_bytes.certificate.spent == 16 * by_params.certificate.spent <= 16_015
    assert by_bytes.certificate.price == pytest.approx(by_params.certificate.price / 16)
    one = [record("a.weight", (16, 16), np.ones(16))]
    for amount, rank in ((16 * 64, 2), (16 * 64 - 1, 1)):
        assert allocate(one, Budget("bytes", amount, "--memory", 16.0)).layers[0].rank == rank


def best_shares(spectra, allowed, most):
    """The largest share that any ranks keep at each cost 0, …, most: dynamic programming from the
    definition.
    """
    best = np.zeros(most + 1)
    for r in spectra:
        choices = [
            (rank * cost(r), float((np.array(r.s[:rank]) ** 2).sum())) for rank in [0, *allowed(r)]
        ]
        best = np.array(
            [max(best[b - c] + gain for c, gain in choices if c <= b) for b in range(most + 1)]
        )
    return best / sum(r.fro**2 for r in spectra)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(2, 6),
            st.integers(2, 6),
            st.lists(st.floats(0.01, 10), min_size=1, max_size=2),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(12, 80),
    st.sampled_from([None, (1, 2, 4), (2,)]),
    st.sampled_from([("params", 1.0), ("bytes", 4.0), ("bytes", 6.0)]),
)
def test_more_at_most_bounds_larger_budgets(layers, amount, listed, counted):
    spectra = [
        record(f"layers.{i}.weight", (m, n), sorted(np.resize(s, min(m, n) // 2 + 1), reverse=True))
        for i, (m, n, s) in enumerate(layers)
    ]
    unit, each = counted
    amount = int(amount * each) + (3 if unit == "bytes" else 0)
    try:
        result = allocate(
            spectra, Budget(unit, amount, "--budget", each), Constraints(ranks_from=listed)
        )
    except UsageError:
        return
    caps = {layer.layer: layer.cap for layer in result.layers}
    more = range(int(60 * each))
    allowed = {
        layer: [rank for rank in listed or range(1, 7) if rank <= cap]
        for layer, cap in caps.items()
    }
    best = best_shares(spectra, lambda r: allowed[r.layer], int((amount + len(more)) / each))
    for n in more:
        reachable = best[int((amount + n) // each)]
        assert reachable <= result.certificate.kept + result.certificate.more_at_most(n) + 1e-9


def test_uniform_rank_is_largest_that_fits():
    spectra = llama(2, 3)
    per_rank = sum(map(cost, spectra))
    result = allocate(spectra, params(5 * per_rank + per_rank // 2))
    uniform = result.certificate.baselines[0]
    assert uniform.name == "uniform r=5"
    assert uniform.spent == 5 * per_rank
    assert uniform.kept == pytest.approx(share(spectra, {r.layer: 5 for r in spectra}))
    assert uniform.epsilon_min == pytest.approx(math.sqrt(1 - uniform.kept))
    assert {layer.uniform_rank for layer in result.layers} == {5}


def test_prior_is_proportional_to_sensitivity():
    spectra = [
        record(f"l.{i}.weight", (16, 16), np.ones(16), base_fro=1 / (i + 1)) for i in range(2)
    ]
    prior = allocate(spectra, params(32 * 9)).certificate.baselines[1]  # ranks 3 and 6
    assert (prior.spent, prior.kept) == (32 * 9, pytest.approx(9 / 32))


def test_layers_get_no_rank_from_noise():
    spectra = [
        record("a.weight", (8, 8), np.ones(8), signal=2, verdict="floor-limited"),
        record("b.weight", (8, 8), np.ones(8) * 0.5, signal=0, verdict="unresolved"),
        record("c.weight", (8, 8), np.zeros(8), signal=0),
        record("d.weight", (8, 8), np.ones(8), signal=None),
    ]
    result = allocate(spectra, params(10**6), Constraints(min_rank=1))
    assert ranks_of(result) == {"a.weight": 2, "b.weight": 0, "c.weight": 0, "d.weight": 4}
    assert [layer.capped_by for layer in result.layers] == [
        "signal_rank",
        "signal_rank",
        "update_rank",
        "break_even",
    ]
    assert result.layers[2].kept is None
    with raises_naming(UsageError, "rounding noise"):
        allocate(spectra[1:3], params(10**6))
    with raises_naming(UsageError, "ΔW", "zero"):
        allocate(spectra[2:3], params(10**6))
    with raises_naming(UsageError, "smallest allowed"):
        allocate(spectra, params(10**6), Constraints(ranks_from=(64,)))


def test_truncated_spectrum_caps_ranks_with_error():
    spectra = [
        record("a.weight", (8, 8), [3.0, 2.0], fro=5.0, complete=False, error=1e-3),
        record("b.weight", (8, 8), np.ones(8), fro=math.sqrt(8)),
    ]
    result = allocate(spectra, params(10**6))
    assert [(layer.rank, layer.capped_by) for layer in result.layers] == [
        (2, "values_kept"),
        (4, "break_even"),
    ]
    assert result.layers[0].kept == pytest.approx(13 / 25)
    assert result.certificate.energy_error == pytest.approx(1e-3 * 25 / 33)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 0.02))
def test_epsilon_min_of_certificate_is_lower_bound(seed, kept, error):
    """Of a truncated spectrum with an error, and a rank beyond the values that were kept."""
    s = np.sort(np.random.default_rng(seed).exponential(size=32))[::-1]
    fro = float(np.sqrt((s**2).sum()))
    found_less = s[:kept] * np.sqrt(np.maximum(0, 1 - error * fro**2 / kept / s[:kept] ** 2))
    layer = record("a.weight", (32, 32), found_less, fro=fro, complete=False, error=error)
    result = allocate([layer], params(10**6), Constraints(ranks_from=(8,)))
    rank = result.layers[0].rank
    assert rank == 8
    assert result.certificate.epsilon_min <= np.sqrt((s[rank:] ** 2).sum()) / fro + 1e-9


def test_list_of_ranks_may_round_cap_up_to_its_next_entry():
    spectra = [record("a.weight", (32, 32), [9, 8, 7, 6, 5, *[0.01] * 27], signal=5)]
    result = allocate(spectra, params(10**6), Constraints(ranks_from=(4, 8, 16)))
    assert (result.layers[0].rank, result.layers[0].cap, result.layers[0].capped_by) == (
        8,
        8,
        "ranks_from",
    )
    result = allocate(spectra, params(10**6), Constraints(ranks_from=(4, 8, 16), max_rank=7))
    assert result.layers[0].rank == 4


def test_expert_stack_shares_rank_and_pays_for_each_expert():
    rng = np.random.default_rng(0)
    stack = [record(f"mlp.experts.up_proj[{i}]", (8, 6), rng.exponential(size=6)) for i in range(3)]
    alone = record("self_attn.q_proj.weight", (8, 8), rng.exponential(size=8))
    result = allocate([*stack, alone], params(14 * 3 * 2 + 16))
    assert len({layer.rank for layer in result.layers[:3]}) == 1
    assert {layer.group for layer in result.layers} == {"mlp.experts.up_proj", None}
    best = max(
        share([*stack, alone], {**{r.layer: a for r in stack}, alone.layer: b})
        for a in range(7)
        for b in range(9)
        if 42 * a + 16 * b <= 100
    )
    assert result.certificate.kept == pytest.approx(best)


def test_embeddings_head_and_routers_are_excluded_unless_named():
    names = ("model.embed_tokens", "lm_head", "layers.0.mlp.gate", "layers.0.q_proj")
    spectra = [record(f"{name}.weight", (8, 8), np.ones(8)) for name in names]
    result = allocate(spectra, params(10**6))
    assert list(ranks_of(result)) == ["layers.0.q_proj.weight"]
    assert [item.layer for item in result.left_out] == [r.layer for r in spectra[:3]]
    for patterns in ({"target": "lm_head|q_proj"}, {"target": ".", "exclude": "gate|embed"}):
        named = allocate(spectra, params(10**6), **patterns)
        assert list(ranks_of(named)) == ["lm_head.weight", "layers.0.q_proj.weight"]
    with pytest.raises(UsageError, match="no layer"):
        allocate(spectra, params(10**6), target="nothing")
    with pytest.raises(UsageError, match="regular expression"):
        allocate(spectra, params(10**6), target="(")


def test_weights_shift_rank_and_relative_counts_layers_alike():
    small, large = (
        record("a.weight", (8, 8), np.ones(8)),
        record("b.weight", (8, 8), np.ones(8) * 10),
    )
    plain = allocate([small, large], params(64))
    assert ranks_of(plain) == {"a.weight": 0, "b.weight": 4}
    weighted = allocate([small, large], params(64), weights={"a.weight": 1000.0, "b.weight": 1.0})
    assert ranks_of(weighted) == {"a.weight": 4, "b.weight": 0}
    assert weighted.certificate.kept == pytest.approx(4000 / (8000 + 800))
    assert weighted.certificate.epsilon_min == pytest.approx(math.sqrt(1 - 4 / 808))
    steep = record("a.weight", (8, 8), 0.5 ** np.arange(8))
    relative = allocate([steep, large], params(64), relative=True)
    assert ranks_of(relative)["a.weight"] == 2


def test_impossible_budget_states_shortfall():
    spectra = llama(2, 0)
    per_rank = sum(map(cost, spectra))
    with raises_naming(UsageError, f"{3 * per_rank} parameters", "8 parameters"):
        allocate(spectra, params(3 * per_rank - 8), Constraints(min_rank=3))
    with pytest.raises(UsageError, match=r"--params 10.* at least 24 parameters"):
        allocate(spectra, params(10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_rank": -1},
        {"max_rank": 0},
        {"min_rank": 9, "max_rank": 8},
        {"ranks_from": ()},
        {"ranks_from": (0, 8)},
        {"min_rank": 9, "ranks_from": (4, 8)},
        {"max_rank": 3, "ranks_from": (4, 8)},
    ],
)
def test_invalid_constraints_are_refused(wrong):
    with pytest.raises(UsageError, match="--"):
        Constraints(**wrong)


def test_heads_in_full_are_charged_first():
    layer = record("bert.encoder.layer.0.query.weight", (16, 16), np.ones(16))
    head = record("classifier.weight", (7, 16), 5 * np.ones(7))
    bias = LeftOut(layer="classifier.bias", shape=(7,), reason="vector", detail="", fro=1.0)
    new = LeftOut(layer="score.weight", shape=(2, 16), reason="only_in_tuned", detail="")
    still = record("bert.pooler.dense.weight", (16, 16), np.zeros(16))
    size = 7 * 16 + 7 + 2 * 16
    result = allocate([layer, head, still], params(size + 70), left_out=[bias, new])
    assert {item.layer for item in result.left_out if item.reason == "saved"} == {
        head.layer,
        bias.layer,
        new.layer,
    }
    assert ranks_of(result)[layer.layer] == 2
    assert (
        (result.certificate.saved, result.certificate.params)
        == (size, size + 64)
        == (size, result.certificate.spent)
    )
    with raises_naming(UsageError, "151 parameters", "1 parameters"):
        allocate([layer, head], params(150), left_out=[bias, new])
    by_rank = allocate([layer, head], Budget("total_rank", 2, "x"), left_out=[bias])
    assert (by_rank.certificate.spent, by_rank.certificate.params) == (2, 64 + 119)
    named = allocate([layer, head], params(500), target="query|classifier", left_out=[bias])
    assert (named.certificate.saved, "classifier.weight" in ranks_of(named)) == (0, True)
    frozen = allocate([layer, head], params(500), exclude="classifier", left_out=[bias])
    assert (frozen.certificate.saved, set(ranks_of(frozen))) == (0, {layer.layer})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([None, (1, 2, 4, 8, 16, 32)]),
    st.integers(0, 9),
)
def test_no_rank_has_more_parameters_than_its_matrix(m, n, listed, least):
    if least > 0 and listed:
        least = 1
    layers = [
        record("a.weight", (m, n), np.ones(min(m, n))),
        record("b.weight", (32, 32), np.ones(32)),
    ]
    result = allocate(layers, params(10**6), Constraints(min_rank=least, ranks_from=listed))
    for layer in result.layers:
        assert layer.params <= math.prod(layer.shape)
        larger = [rank for rank in listed or range(1, 64) if layer.rank < rank]
        assert not larger or larger[0] * sum(layer.shape) > math.prod(layer.shape)
