"""Planted probes of parts: each rule speaks where its evidence is beyond the noise, and is silent elsewhere."""

import numpy as np
import pytest

from lora_diag.probes.curvature.record import LossBound
from lora_diag.probes.fisher.record import Effect, Fisher
from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.sensitivity.record import Sensitivity
from lora_diag.reports.advice import advice
from tests.messages import assert_names
from tests.reports.making import names, residual, residuals
from tests.reports.test_advice import evidence, model, told
from tests.reports.test_loss_advice import outputs, run, sweep, truncation

UNITS = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(20)]


def sensitivity(gains, noise=0.05, sequences=50, set="own"):
    """Each unit gains so much in every sequence, and a number of its own there with this standard deviation.

    That is one for all units, or one each.
    """
    rng = np.random.default_rng(0)
    counts = np.full(sequences, 10)
    base = counts * 2.0 + rng.normal(size=sequences)
    more = {"set": set, "data": "0", "tokens": 10 * sequences}
    records = [Sensitivity(loss=2.0, nll=tuple(base), predictions=tuple(counts.tolist()), **more)]
    for unit, gain, spread in zip(UNITS, gains, np.broadcast_to(noise, len(gains)), strict=False):
        own = rng.normal(size=sequences)
        nll = base - counts * (gain + spread * (own - own.mean()))
        how = {"unit": unit, "layers": (unit,), "rank": 8, "params": 64, "lr": 1e-3, "nll": tuple(nll)}
        records.append(Sensitivity(loss=2.0 - gain, gain=gain, gain_error=0.1, **how, **more))
    return run("probe sensitivity", records, rank=8, seed=0, delta=None, per="layer")


def fisher(energy, cost, measured=True):
    """One layer for each number: its energy beyond r = 8, and what the Fisher and the truncation say of it."""
    records = []
    for place, (tail, price) in enumerate(zip(energy, cost, strict=True)):
        effect = {"8": Effect(loss=1.0, gap=price, gap_error=None, kl=price)} if measured else None
        sums = {name: {"8": 1.0} for name in ("linear", "data", "kfac")} | {"weight": {"8": tail}}
        more = {"set": "own", "labels": "model", "sequences": 2, "predictions": 10, "tokens": 10, "fro": 1.0}
        more |= {"fisher": (2 * price,) * 9, "on": "own" if measured else None, "effect": effect}
        records.append(Fisher(layer=f"model.layers.{place}.mlp.up_proj.weight", shape=(16, 16), **sums, **more))
    return run("probe fisher", records, ranks=[4, 8])


def bounds(times, error=0.1):
    """The gap is 1/r nats with this relative error, and the bound so many times that."""
    result = []
    for rank in (1, 4, 16):
        gap = 1 / rank
        more = {"tail_energy": 1.0, "linear": 0.0, "quadratic": gap, "upper": times * gap, "lower": None, "holds": True}
        more |= {"curvature": 1.0, "loss": 1 + gap, "gap": gap, "gap_error": error * gap}
        result.append(LossBound(set="own", data="0", tokens=9, rank=rank, along=1.0, **more))
    return run("probe curvature", result)


def intrinsic(shares, rates=(1e-4, 1e-3, 1e-2), best=1e-3, full_best=1e-3):
    """Full fine-tuning gains 1 nat; ``shares`` by rank, one a seed. The best rate lies inside the grid if not asked."""
    result = [Intrinsic(set="own", data="0", tokens=9, subject="base", params=0, loss=2.0)]
    for subject, rank, seeds in (("full", None, (1.0, 1.0)), *(("lora", r, s) for r, s in shares.items())):
        at = full_best if rank is None else best if isinstance(best, float) else best[rank]
        for lr in rates:
            for seed, share in enumerate(seeds if lr == at else seeds[:1]):
                loss = 2.0 - share + 0.5 * (lr != at)
                more = {"subject": subject, "rank": rank, "params": 9, "lr": lr, "seed": seed, "loss": loss}
                result.append(Intrinsic(set="own", data="0", tokens=9, **more))
    return run("probe intrinsic", result, seed=0, share=0.9, ranks=list(shares), dims=[10])


def test_gaining_units_are_named_and_losing_units_omitted():
    (step,) = advice(evidence(sensitivity([0.5, 0.4, 0.3, *[0.0] * 7])))
    assert step.rule == "place by gain"
    assert_names(step.do, *(f"model.layers.{i}.mlp.up_proj" for i in range(3)), "little in")
    assert_names(step.because, "own", "+0.5000 ± 0.0055 nats")
    assert_names(step.because, 3, "10 gains", 7)
    assert step.layers == tuple(UNITS[:3])
    assert step.command == "loradiag spectrum 'my base' full_ft -o spectrum.jsonl"
    steps = advice(evidence(model(), sensitivity([0.5, 0.4, 0.3, *[0.0] * 7])))
    assert [step.rule for step in steps] == ["place by gain", "sufficient rank"]  # weights have their own last word
    assert steps[0].params == 8 * sum(sum(record.shape) for record in model())
    spend = f"loradiag allocate spectrum.jsonl --params {steps[0].params} --layer-weights 'probe sensitivity.jsonl'"
    assert steps[0].command == f"{spend} -o adapter_config.json"


def test_unit_is_named_or_omitted_only_beyond_its_error():
    """Errors are 0.0072 nats, 2.8 of them 0.020, and a tenth of what the best surely gains is 0.048."""
    (step,) = advice(evidence(sensitivity([0.5, 0.4, 0.3, 0.015, *[0.0] * 6])))
    assert_names(step.because, 3, "10 gains", 7)  # two errors are not enough for one of ten
    (step,) = advice(evidence(sensitivity([0.5, 0.4, 0.3, 0.04, *[0.0] * 6])))
    assert_names(step.because, 4, "10 gains", 6)  # less than a tenth, but not surely
    # The best is 0.5 ± 0.07, which is 0.3 for sure: 0.04 is more than a tenth of that, and nobody is left out.
    (step,) = advice(evidence(sensitivity([0.5, 0.4, 0.3, *[0.04] * 7], noise=[0.5, *[0.01] * 9])))
    assert "little in" not in step.do


def test_paired_losses_are_of_deciding_set():
    own, other = sensitivity([0.5, 0.4, 0.3, 0.2, 0.2]), sensitivity([0.5] * 5, sequences=30, set="other")
    shifted = [record.model_copy(update={"shifted": True}) for record in other.whole]
    both = run("probe sensitivity", [*shifted, *own.whole], rank=8, seed=0, delta=None, per="layer")
    assert told(both) == told(own) == ["place by gain"]


def test_unequal_gains_suggest_ranks_by_gain():
    (step,) = advice(evidence(sensitivity([0.5, 0.4, 0.3, 0.2, 0.2])))
    assert_names(step.do, "model.layers.0.mlp.up_proj")
    assert told(sensitivity([0.3, 0.29, 0.28, 0.27, 0.26])) == []


@pytest.mark.parametrize(
    "silent",
    [
        sensitivity([0.5, 0.4, 0.3, *[0.0] * 7], noise=5.0),  # nothing is told from nothing
        sensitivity([0.3, 0.25, 0.2, 0.15, 0.1], noise=0.7),  # the best is, but not from the others
        sensitivity([0.5, 0.4, 0.3, 0.0]),  # four have no order
        sensitivity([0.021, *[0.0] * 18, -0.01]),  # 2.9 standard errors: one of 20 does that by chance
        sensitivity([-0.2] * 6),
        run("probe sensitivity", sensitivity([0.5]).whole[:1], rank=8, seed=0, delta=None, per="layer"),
        run("probe sensitivity", sensitivity([0.5, 0.4, *[0.0] * 7]).whole, rank=8, seed=0, delta=None, layers="mlp"),
        run("probe sensitivity", sensitivity([0.5, 0.4, *[0.0] * 7]).whole, rank=8, seed=0, delta=None, exclude="mlp"),
    ],
    ids=["noise", "overlap", "few", "chance", "worse", "unfinished", "selection", "exclusion"],
)
def test_gains_within_noise_have_no_statement(silent):
    assert told(silent) == []


def test_energy_order_against_cost_order_is_flagged():
    cost = list(range(1, 13))
    (step,) = advice(evidence(fisher(cost[::-1], cost)))
    assert step.rule == "rank by Fisher"
    assert_names(step.do, "Fisher information", "energy")
    assert_names(step.because, "1.00 [0.98, 1.00]", "Fisher", "-1.00 [-1.00, -0.98]", "energy")
    both = advice(evidence(model(), fisher(cost[::-1], cost)))
    assert "--layer-weights 'probe fisher.jsonl'" in both[0].command
    assert told(fisher(cost, cost)) == []  # energy knows as well
    assert told(fisher([2, 1, *cost[2:]], cost)) == []  # 0.99 and 1.00 are not told apart
    assert told(fisher(cost[3::-1], cost[:4])) == []  # four have no order


def test_two_orders_without_cost_need_measurement():
    cost = list(range(1, 13))
    (step,) = advice(evidence(fisher(cost[::-1], cost, measured=False)))
    assert step.command == (
        "loradiag probe fisher 'my base' full_ft --data TEXT --eval HELD_OUT_TEXT --ranks 8 -o fisher-2.jsonl"
    )
    assert told(fisher(cost, cost, measured=False)) == []
    nothing = [0] * 20  # layers of a lower rank, of which r = 8 cuts nothing, have no place in either order
    assert told(fisher(cost[::-1] + nothing, cost + nothing, measured=False)) == ["rank by Fisher"]
    assert told(fisher([3, 1, 2, 5, 4], [1, 2, 3, 4, 5], measured=False)) == []  # five that may well agree


def test_loose_bound_chooses_no_rank():
    (step,) = advice(evidence(bounds(700.0)))
    assert step.rule == "loose loss bound"
    assert_names(step.because, "own", 700, "700 times", "r=1", "r=4", "r=16")
    assert (
        step.command == "loradiag probe truncation 'my base' full_ft --eval own.txt --ranks 1,4,16 -o truncation.jsonl"
    )
    assert told(bounds(20.0)) == []
    assert told(bounds(700.0, error=0.6)) == []  # the gap itself is noise
    assert "loose loss bound" not in told(bounds(700.0), truncation({4: 0.5}))
    far, near = bounds(700.0).whole, bounds(20.0).whole
    assert told(run("probe curvature", [*far[:2], near[2]])) == []  # at one rank it says something
    early = [record.model_copy(update={"along": 0.1}) for record in far]
    assert told(run("probe curvature", [*early, far[0]])) == []  # one rank; the others are of a tenth of the way


def adapter(rank):
    return residuals([residual(n, rank, 0.95) for n in names(2)])


def test_chosen_rank_is_compared_with_smallest_equal():
    result = intrinsic({2: (0.95, 0.93), 8: (0.99, 0.98)})
    step = next(step for step in advice(evidence(adapter(16), result)) if step.rule == "fit the rank")
    assert step.do == "Try r=2 instead of r=16"
    assert_names(step.because, "own", "r=2", "93%", "95%")
    assert step.command == ("loradiag probe sweep 'my base' --data TEXT --eval own.txt --ranks 2,16 -o sweep.jsonl")
    weak = intrinsic({2: (0.5, 0.6), 8: (0.7, 0.75)})
    step = next(step for step in advice(evidence(adapter(8), weak)) if step.rule == "fit the rank")
    assert_names(step.do, "r=8", "r=16", "r=32")
    assert "--ranks 8,16,32 " in step.command


@pytest.mark.parametrize(
    ("rank", "result"),
    [
        (2, intrinsic({2: (0.95, 0.93), 8: (0.99, 0.98)})),  # it is the smallest
        (16, intrinsic({2: (0.95, 0.85), 8: (0.99, 0.98)})),  # not with every seed
        (16, intrinsic({2: (0.95,), 8: (0.99,)})),  # one seed
        (16, intrinsic({2: (0.95, 0.93), 8: (0.8, 0.8)})),  # no threshold: seeds or rates decide
        (16, intrinsic({2: (0.95, 0.93)}, full_best=1e-2)),  # full fine-tuning may gain more
        (16, intrinsic({2: (0.5, 0.6), 8: (0.7, 0.75)})),  # nothing was trained at r=16
        (8, intrinsic({2: (0.5, 0.6), 8: (0.7, 0.75)}, best=1e-2)),  # a better rate may lie beyond
        (8, intrinsic({2: (0.5, 0.6), 8: (0.85, 0.95)})),  # one seed comes to it
        (8, intrinsic({2: (0.5, 0.6), 8: (0.8, 0.95)})),  # one seed does, though not their mean
        (4, intrinsic({4: (0.5, 0.6), 8: (0.7, 0.75)}, best={4: 1e-3, 8: 1e-2})),  # the higher one may gain more
    ],
)
def test_fitting_or_undecided_rank_is_unchanged(rank, result):
    assert "fit the rank" not in told(adapter(rank), result)
    assert told(result) == []  # no adapter, no rank


def test_adapter_of_several_ranks_is_compared_at_largest():
    several = residuals([residual(n, rank, 0.95) for n, rank in zip(names(2), [4, 16] * 7, strict=True)])
    assert "fit the rank" not in told(several, intrinsic({8: (0.5, 0.6)}))
    assert "fit the rank" in told(several, intrinsic({16: (0.5, 0.6)}))


def test_losses_of_whole_model_come_first():
    result = intrinsic({2: (0.95, 0.93), 8: (0.99, 0.98)})
    gains = sensitivity([0.5, 0.4, 0.3, *[0.0] * 7])
    assert told(gains, outputs({"a": 0.3})) == ["close the gap", "place by gain"]
    assert told(gains, outputs({"a": 0.0})) == ["keep the adapter"]
    assert "fit the rank" not in told(adapter(16), result, sweep({4: 1.1, 8: 1.099, 16: 1.098}))
