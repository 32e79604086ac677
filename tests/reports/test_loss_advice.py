"""Planted losses: each rule speaks where its evidence is, leads those on weights, and is silent
without it.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lora_diag.probes.outputs.show import choose_adapters
from lora_diag.probes.sweep.verdict import list_swept
from lora_diag.records import Probe, RunInput
from lora_diag.rendering.losses import gap_half
from tests import oracles
from tests.building import results
from tests.messages import assert_names
from tests.reports.making import flat_to, names, residual, residuals
from tests.reports.test_advice import EASY, evidence, model, steps, told


def probe(kind, subject, loss, *, name="own", shifted=False, **more):
    return Probe(
        probe=kind,
        set=name,
        shifted=shifted,
        subject=subject,
        tokens=9,
        data="0",
        loss=loss,
        **more,
    )


def run(command, records, **settings):
    sides = (("base", "my base"), ("tuned", "full_ft"), ("eval", "own.txt"))
    return results((), command=command, inputs=sides, whole=tuple(records), **settings)


def outputs(adapters, base=2.0, tuned=1.0, error=0.01, sets=("own",), shifted=()):
    """TUNED gains 1 nat; ``adapters`` gives the gap of each, or one a set."""
    records = []
    for place, name in enumerate((*sets, *shifted)):
        where = {"name": name, "shifted": name in shifted}
        records.append(probe("outputs", "base", base, gap=base - tuned, gap_error=0.02, **where))
        records.append(probe("outputs", "tuned", tuned, gap=0.0, gap_error=0.0, **where))
        for path, gaps in adapters.items():
            gap = gaps if isinstance(gaps, float) else gaps[place]
            more = {"gap": gap, "gap_error": error, "kept": 1 - gap / (base - tuned)}
            record = probe("outputs", "adapter", tuned + gap, **more, **where)
            records.append(record.model_copy(update={"name": path}))
    return run("probe outputs", records)


def sweep(losses, base=2.0, own=None, shifted=None, spread=0.001):
    """``losses`` by rank, two seeds ``spread`` apart, ranks in turns; ``shifted`` on a set of BASE
    ``own``.
    """
    records = []
    for name, given, start in (("own", losses, base), ("other", shifted or {}, own)):
        if given:
            where = {"name": name, "shifted": name == "other"}
            records.append(probe("sweep", "base", start, **where))
            for (place, (rank, loss)), seed in itertools.product(enumerate(given.items()), (0, 1)):
                off = (seed - 0.5) * spread * (-1) ** place
                records.append(
                    probe("sweep", "lora", loss + off, rank=rank, lr=1e-3, seed=seed, **where)
                )
    return run("probe sweep", records, seed=0, gain_tolerance=0.02)


def truncation(kept, base=2.0, tuned=1.0, gain_error=0.02, **settings):
    records = [
        probe("truncation", "base", base, gap=base - tuned, gap_error=gain_error),
        probe("truncation", "tuned", tuned, gap=0.0, gap_error=0.0),
    ]
    for rank, share in kept.items():
        loss = base - share * (base - tuned)
        more = {"gap": loss - tuned, "gap_error": 0.01, "kept": share, "energy": share / 2}
        records.append(probe("truncation", "truncated", loss, rank=rank, **more))
    return run(
        "probe truncation",
        records,
        **{"untruncated": "tuned", "layers": None, "exclude": None, **settings},
    )


def words(*results):
    return {contest.name: contest.outcome for contest in evidence(*results).contests}


def test_contest_as_good_keeps_90_percent_within_errors():
    # TUNED gains 1.0: 0.07 + 2 × 0.01 is within a tenth of it, 0.09 + 2 × 0.01 is not.
    assert words(outputs({"a": 0.07, "b": 0.09, "c": -0.2})) == {
        "a": "as good",
        "b": "worse",
        "c": "as good",
    }
    assert words(outputs({"a": 0.09}, error=0.05)) == {"a": "not known"}
    assert words(outputs({"a": 0.0}, error=0.2)) == {
        "a": "not known"
    }  # no difference seen, and none excluded
    # On every set, but for shifted ones.
    assert words(outputs({"a": (0.0, 0.5)}, sets=("own", "two"))) == {"a": "worse"}
    assert words(outputs({"a": (0.0, 0.5)}, shifted=("two",))) == {"a": "as good"}
    # Where the fine-tune itself gains nothing, nothing can be as good.
    assert words(outputs({"a": 0.0}, base=1.01, error=0.001)) == {"a": "not known"}


def test_finetune_worse_than_base_is_no_standard_for_adapters():
    """TUNED loses 0.25 on ``two``: only ``own`` decides there; alone, it decides nothing."""
    own, two = outputs({"a": 0.05}).whole, outputs({"a": 0.3}, base=0.75, sets=("two",)).whole
    results = run("probe outputs", (*own, *two))
    assert words(results) == {"a": "as good"}
    assert told(results) == ["keep the adapter"]
    worse = run("probe outputs", two)
    assert words(worse) == {}
    assert told(worse) == told(model(flat_to(40, 512)), worse) == ["fine-tune worse than BASE"]
    assert steps(worse)["fine-tune worse than BASE"].facts["set"] == "two"


def measured(moves, sequences, seed):
    """Records of losses of sequences: BASE, TUNED and an adapter, each with its mean move from
    BASE.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, 40, sequences)
    base = counts * rng.uniform(1, 3, sequences)
    nll = {
        name: base + counts * (move + 0.01 * rng.normal(size=sequences))
        for name, move in moves.items()
    }
    records = [
        probe(
            "outputs",
            "base",
            base.sum() / counts.sum(),
            nll=tuple(base),
            predictions=tuple(counts.tolist()),
        )
    ]
    records += [
        probe("outputs", name, each.sum() / counts.sum(), nll=tuple(each))
        for name, each in nll.items()
    ]
    all_nll = {"base": base} | nll
    result = []
    for record in records:
        difference = all_nll[record.subject] - nll["tuned"]
        gap = difference.sum() / counts.sum()
        error = oracles.error_of_ratio(difference, counts)
        more = {
            "gap": gap,
            "gap_error": error,
            "name": "runs/a" if record.subject == "adapter" else "",
        }
        result.append(record.model_copy(update=more))
    return result


@pytest.mark.parametrize("sequences", [2, 3, 5, 9, 17])
def test_few_sequences_need_more_than_two_errors(sequences):
    """The rate of false differences of equal models, whose sequences are independent, is near 4.6%
    at any number.
    """
    wrong = 0
    for seed in range(400):
        adapter = measured({"tuned": 0.0, "adapter": 0.0}, sequences, seed)[-1]
        wrong += abs(adapter.gap) > gap_half(adapter)
        freedom = sequences - 1 if sequences < 4 else 1.5 * (sequences / math.isqrt(sequences) - 1)
        assert gap_half(adapter) == pytest.approx(
            stats.t(freedom).ppf(stats.norm.cdf(2)) * adapter.gap_error
        )
    assert wrong / 400 < 0.08


def test_equal_adapter_ends_advice():
    flat = model(flat_to(40, 512))
    assert told(flat) == ["raise the rank"]
    runs = flat, outputs({"runs/a": 0.3, "runs/b": -0.02, "runs/c": 0.01})
    assert told(*runs) == ["keep the adapter"]
    step = steps(*runs)["keep the adapter"]
    assert step.facts["adapter"] == "runs/b"
    assert_names(step.because, "-0.0200", "own", "102%", "runs/c")
    assert step.command == "loradiag gate --policy adapter-basic --base base --adapter runs/b"
    assert "measure the loss" not in steps(*runs)


def rivals(seed=0, apart=0.1, sequences=20):
    """Three adapters: ``b`` is the best, ``a`` about as good, ``c`` worse; sequences differ more
    than adapters do.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(5, 50, sequences)
    hard = counts * rng.uniform(1, 3, sequences)
    shifts = {"a": 0.001, "b": 0.0, "c": apart}
    nll = {
        path: hard + counts * (shift + 0.01 * rng.normal(size=sequences))
        for path, shift in shifts.items()
    }
    records = [probe("outputs", "base", 5.0, predictions=tuple(counts.tolist()), nll=tuple(hard))]
    for path, each in nll.items():
        record = probe("outputs", "adapter", float(each.sum() / counts.sum()), nll=tuple(each))
        records.append(record.model_copy(update={"name": path}))
    return records, counts, nll


def test_adapters_are_compared_with_each_other_on_same_sequences():
    records, counts, nll = rivals()
    (choice,) = choose_adapters(records)
    best, near, far = sorted(nll, key=lambda path: nll[path].sum())
    assert (choice.best, [rival.name for rival in choice.rivals]) == (best, [near, far])
    assert far == "c"
    assert [rival.name for rival in choice.equals] == [near]
    for rival in choice.rivals:
        # Ratio estimator by its definition; two rivals, so 95% for both together is 97.5% for each.
        difference = nll[rival.name] - nll[best]
        gap = difference.sum() / counts.sum()
        error = oracles.error_of_ratio(difference, counts)
        assert rival.behind == pytest.approx(gap)
        assert rival.half == pytest.approx(stats.t(1.5 * (20 / 4 - 1)).ppf(1 - 0.05 / 4) * error)
    assert choice.rivals[0].sequences is None or choice.rivals[0].sequences > 20
    assert choice.rivals[1].sequences is None
    assert choose_adapters([r for r in records if r.name not in {"a", "b"}]) == []
    assert (
        choose_adapters(outputs({"a": 0.1, "b": 0.2}).whole) == []
    )  # of older results, which have no losses of sequences
    one, *_ = rivals(sequences=1)
    assert [rival.half for rival in choose_adapters(one)[0].rivals] == [None, None]


def test_equal_adapters_false_positive_rate_below_5_percent():
    told = 0
    for seed in range(400):
        records, *_ = rivals(seed, apart=0.0)
        records = [r for r in records if r.name != "a"]
        told += not choose_adapters(records)[0].equals
    assert told / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_worse_adapter_is_not_shipped():
    trained = residuals([residual(n, 8, kept=0.3, adapter="b") for n in names(4)], ("b",))
    runs = model(flat_to(40, 512)), trained, outputs({"a": 0.3, "b": 0.2})
    assert told(*runs) == ["close the gap", "raise the rank"]
    step = steps(*runs)["close the gap"]
    assert (step.facts["adapter"], step.facts["ranks"], step.facts["count"]) == (
        "b",
        (16, 32, 64),
        2,
    )  # r=8 lost
    command = (
        "loradiag probe sweep base --data TRAIN_TEXT --eval own.txt --ranks 16,32,64 -o sweep.jsonl"
    )
    assert step.command == command
    assert "measure the loss" not in steps(*runs)


def test_undecided_adapter_needs_more_text():
    assert told(outputs({"a b": 0.09, "c": 0.4}, error=0.05)) == []  # nor is there a gap to close
    step = steps(outputs({"a b": 0.09, "c": 0.4}, error=0.05))["measure the loss"]
    assert step.facts["adapters"] == ("a b",)
    assert (
        step.command
        == "loradiag probe outputs 'my base' full_ft 'a b' --eval MORE_TEXT -o outputs-2.jsonl"
    )


def test_rank_is_not_raised_where_higher_rank_lost():
    full = model(flat_to(40, 512))
    records, *_ = rivals()  # c is shown to be worse than b
    for rank, raised in ((16, False), (2, True)):
        ranks = {"a": 4, "b": 4, "c": rank}
        trained = residuals(
            [
                residual(n, r, 0.3, cosine=0.2, adapter=name)
                for name, r in ranks.items()
                for n in names(4)
            ]
        )
        assert ("raise the rank" in told(full, trained, run("probe outputs", records))) == raised


def test_settled_sweep_gives_rank_rate_and_configuration():
    steep = sweep({4: 1.5, 8: 1.2, 16: 1.1, 64: 1.099})
    step = steps(steep)["sweep"]
    assert (step.facts["rank"], step.facts["lr"], step.facts["outcome"]) == (
        16,
        1e-3,
        "gradual decline",
    )
    assert step.command == "loradiag plan 'my base' --ranks 16"
    assert told(model(flat_to(40, 512)), steep) == ["sweep"]  # no rank by weights
    step = steps(model(flat_to(40, 512)), steep)["sweep"]
    assert step.facts["params"] == 28 * 16 * 1024
    words = f"--params {step.facts['params']} --sweep 'probe sweep.jsonl' -o adapter_config.json"
    assert step.command == f"loradiag allocate spectrum.jsonl {words}"
    assert steps(sweep({4: 1.1, 8: 1.099, 16: 1.098}))["sweep"].facts["rank"] == 4


def test_open_sweep_is_extended():
    repeated = "loradiag probe sweep 'my base' --data TRAIN_TEXT --eval own.txt"
    last = steps(sweep({4: 1.5, 8: 1.2, 16: 1.1}))["sweep"]
    assert last.facts["higher"] == (32, 64)
    assert (
        last.command
        == f"{repeated} --ranks 4,8,16,32,64 --repeats 2 --resume -o 'probe sweep.jsonl'"
    )
    noisy = sweep({4: 1.50, 8: 1.51}, spread=0.04)
    verdict = list_swept(noisy.whole, noisy.run.settings)[0].verdict
    step = steps(noisy)["sweep"]
    assert step.facts["seeds"] == verdict.needed_seeds > 2
    assert f"--repeats {verdict.needed_seeds} --resume" in step.command
    assert f"{math.floor(100 * verdict.confidence)}% confidence" in step.because
    worse = steps(sweep({4: 2.1, 8: 2.2}))["sweep"]
    assert worse.facts["rates"] == (1e-5, 1e-4, 3.3e-4)  # all below 0.001
    assert worse.command == f"{repeated} --ranks 4,8 --lr 1e-05,0.0001,0.00033 -o sweep-2.jsonl"


def test_extended_sweep_repeats_options_of_first():
    first = sweep({4: 1.50, 8: 1.51}, spread=0.04)
    settings = {
        "seed": 7,
        "steps": 9,
        "gain_tolerance": 0.05,
        "target_modules": ["q_proj"],
        "bitfit": True,
        "lr": [1e-3, 1e-2],
    }
    settings |= {"full_lr": [1e-5], "kind": "DoRA"}
    other = RunInput(role="shifted", path="other.txt", kind="", tensors=1)
    first = replace(
        first,
        run=first.run.model_copy(
            update={"inputs": (*first.run.inputs, other), "settings": settings}
        ),
    )
    first = replace(
        first, whole=tuple(r.model_copy(update={"seed": 7 + r.seed}) for r in first.whole)
    )
    words = steps(first)["sweep"].argv
    given = {words[i]: words[i + 1] for i in range(3, len(words) - 1) if words[i].startswith("-")}
    assert given["--shifted"] == "other.txt"
    assert (given["--seed"], given["--steps"], given["--gain-tolerance"]) == ("7", "9", "0.05")
    assert (given["--target-modules"], given["--lr"]) == ("q_proj", "0.001,0.01")
    assert {"--bitfit", "--full", "--dora"} <= {*words}
    assert "--rslora" not in words


def test_truncation_names_rank_that_keeps_gain():
    step = steps(truncation({0: 0.2, 4: 0.5, 16: 0.93, 64: 0.99}))["sufficient rank"]
    assert step.facts["rank"] == 16
    assert_names(step.because, "93%", "20%")
    assert (
        step.command == "loradiag extract 'my base' full_ft --rank 16 --unfactored save -o adapter/"
    )
    # Where norms, biases, embeddings and head bring nothing, or are those of BASE, they need not be
    # saved.
    for runs in (truncation({0: 0.0, 4: 0.95}), truncation({4: 0.95}, untruncated="base")):
        assert "--unfactored" not in steps(runs)["sufficient rank"].argv
    assert told(model(flat_to(40, 512)), truncation({4: 0.95})) == [
        "sufficient rank"
    ]  # its loss decides, not energy


def test_loss_advice_without_evidence_is_empty():
    assert told(truncation({4: 0.5})) == []
    assert told(truncation({4: 0.99}, gain_error=0.9)) == []  # the fine-tune's own gain is noise
    assert told(truncation({4: 0.99}, layers="mlp")) == []  # a selection
    assert told(sweep({4: 1.5})) == []
    assert told(run("probe outputs", [])) == []
    # A rank whose truncation loses gain is not taken for its energy.
    assert steps(model(EASY))["sufficient rank"].facts["rank"] == 4
    assert steps(model(EASY), truncation({4: 0.5}))["sufficient rank"].facts["rank"] == 8


def test_sufficient_rank_is_judged_on_worst_set():
    runs = truncation({4: 0.99}), truncation({4: 0.93})
    two = [
        record.model_copy(update={"set": name})
        for name, one in zip("ab", runs, strict=True)
        for record in one.whole
    ]
    assert_names(
        steps(run("probe truncation", two, untruncated="base"))["sufficient rank"].because, "93%"
    )
    lost = [r.model_copy(update={"kept": 0.5}) if (r.set, r.rank) == ("b", 4) else r for r in two]
    assert told(run("probe truncation", lost, untruncated="base")) == []
    # A rank that was measured on one set only says nothing of the other.
    more = [record for record in truncation({2: 0.97}).whole if record.rank == 2]
    step = steps(
        run("probe truncation", [*two, more[0].model_copy(update={"set": "a"})], untruncated="base")
    )
    assert step["sufficient rank"].facts["rank"] == 4


def test_undecided_adapter_is_ignored_next_to_equal_one():
    runs = outputs({"a": (0.09, 0.09), "b": (0.0, 0.0)}, error=0.04, sets=("own", "two"))
    assert list(steps(runs)) == ["keep the adapter"]
