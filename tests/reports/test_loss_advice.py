"""Planted losses: each rule speaks where its evidence is, leads those on weights, and is silent without it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lora_diag.probes.outputs.choice import choices
from lora_diag.probes.outputs.summary import outputs_lines
from lora_diag.probes.sweep.verdict import verdicts
from lora_diag.records import End, Probe, Results, Run, RunInput
from lora_diag.rendering.losses import gap_half
from lora_diag.rendering.statements import find
from lora_diag.reports.advice import advice
from lora_diag.reports.worth import contests
from tests import oracles
from tests.messages import assert_names
from tests.reports.making import flat_to
from tests.reports.test_advice import evidence, model, told


def probe(kind, subject, loss, *, name="own", shifted=False, **more):
    return Probe(probe=kind, set=name, shifted=shifted, subject=subject, tokens=9, data="0", loss=loss, **more)


def run(command, records, **settings):
    sides = (("base", "my base"), ("tuned", "full_ft"), ("eval", "own.txt"))
    inputs = tuple(RunInput(role=role, path=path, kind="", tensors=1) for role, path in sides)
    end = End(layers=0, left_out=0, fro=None, base_fro=None)
    return Results(Run(command=command, version="0", inputs=inputs, settings=settings), (), (), end, tuple(records))


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
    """``losses`` by rank, two seeds ``spread`` apart, ranks in turns; ``shifted`` on a set of BASE ``own``."""
    records = []
    for name, given, start in (("own", losses, base), ("other", shifted or {}, own)):
        if given:
            where = {"name": name, "shifted": name == "other"}
            records.append(probe("sweep", "base", start, **where))
            records += [
                probe(
                    "sweep",
                    "lora",
                    loss + (seed - 0.5) * spread * (-1) ** place,
                    rank=rank,
                    lr=1e-3,
                    seed=seed,
                    **where,
                )
                for place, (rank, loss) in enumerate(given.items())
                for seed in (0, 1)
            ]
    return run("probe sweep", records, seed=0, tolerance=0.02)


def truncation(kept, base=2.0, tuned=1.0, gain_error=0.02, **settings):
    records = [
        probe("truncation", "base", base, gap=base - tuned, gap_error=gain_error),
        probe("truncation", "tuned", tuned, gap=0.0, gap_error=0.0),
    ]
    for rank, share in kept.items():
        loss = base - share * (base - tuned)
        more = {"gap": loss - tuned, "gap_error": 0.01, "kept": share, "energy": share / 2}
        records.append(probe("truncation", "truncated", loss, rank=rank, **more))
    return run("probe truncation", records, **{"rest": "tuned", "layers": None, "exclude": None, **settings})


def words(*results):
    return {contest.name: contest.outcome for contest in contests(evidence(*results))}


def test_contest_as_good_keeps_90_percent_within_errors():
    # TUNED gains 1.0: 0.07 + 2 × 0.01 is within a tenth of it, 0.09 + 2 × 0.01 is not.
    assert words(outputs({"a": 0.07, "b": 0.09, "c": -0.2})) == {"a": "as good", "b": "worse", "c": "as good"}
    assert words(outputs({"a": 0.09}, error=0.05)) == {"a": "not known"}
    assert words(outputs({"a": 0.0}, error=0.2)) == {"a": "not known"}  # no difference seen, and none excluded
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
    worse = run("probe outputs", two)
    assert words(worse) == {}
    assert told(worse) == ["fine-tune worse than BASE"]


def measured(moves, sequences, seed=3):
    """Records of losses of sequences: BASE, TUNED and an adapter, each with its mean move from BASE."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, 40, sequences)
    base = counts * rng.uniform(1, 3, sequences)
    nll = {name: base + counts * (move + 0.01 * rng.normal(size=sequences)) for name, move in moves.items()}
    records = [probe("outputs", "base", base.sum() / counts.sum(), nll=tuple(base), predictions=tuple(counts.tolist()))]
    records += [probe("outputs", name, each.sum() / counts.sum(), nll=tuple(each)) for name, each in nll.items()]
    all_nll = {"base": base} | nll
    result = []
    for record in records:
        difference = all_nll[record.subject] - nll["tuned"]
        gap = difference.sum() / counts.sum()
        error = oracles.error_of_mean(difference - gap * counts) * sequences / counts.sum()
        more = {"gap": gap, "gap_error": error, "name": "runs/a" if record.subject == "adapter" else ""}
        result.append(record.model_copy(update=more))
    return result, counts, all_nll


@pytest.mark.parametrize(("move", "word"), [(0.1, "worse than BASE"), (-0.1, "better than BASE"), (0.0, "no signif")])
def test_adapter_is_compared_with_base_where_tuned_is_worse(move, word):
    records, counts, nll = measured({"tuned": 0.25, "adapter": move}, 36)
    statement = find(outputs_lines(run("probe outputs", records, length=8, dtype="f", device="cpu", tokens="x")), "on")
    (line,) = [line for line in statement.lines if line.startswith("a: ")]
    assert word in line
    assert f"{(nll['adapter'] - nll['base']).sum() / counts.sum():+.4f}" in line
    assert statement.answer.startswith("TUNED is worse than BASE")
    assert "%" not in statement.text.replace("95%", "")


@pytest.mark.parametrize("sequences", [2, 3, 5, 9, 17])
def test_few_sequences_need_more_than_two_errors(sequences):
    """The rate of false differences of equal models, whose sequences are independent, is near 4.6% at any number."""
    wrong = 0
    for seed in range(400):
        records, _, _ = measured({"tuned": 0.0, "adapter": 0.0}, sequences, seed)
        adapter = records[-1]
        wrong += abs(adapter.gap) > gap_half(adapter)
        freedom = sequences - 1 if sequences < 4 else 1.5 * (sequences / math.isqrt(sequences) - 1)
        assert gap_half(adapter) == pytest.approx(stats.t(freedom).ppf(stats.norm.cdf(2)) * adapter.gap_error)
    assert wrong / 400 < 0.08


def test_equal_adapter_ends_advice():
    flat = model(flat_to(40, 512))
    assert told(flat) == ["raise rank everywhere"]
    (step,) = advice(evidence(flat, outputs({"runs/a": 0.3, "runs/b": -0.02})))
    assert step.rule == "keep the adapter"
    assert_names(step.do, "runs/b")
    assert_names(step.because, "-0.0200 ± 0.010 nats", "own", "102%")
    assert step.command == "loradiag gate --policy adapter-basic --base 'my base' --adapter runs/b"


def rivals(seed=0, apart=0.1, sequences=20, sets=("own",)):
    """Three adapters: ``b`` is the best, ``a`` about as good, ``c`` worse; sequences differ more than adapters do."""
    rng, records = np.random.default_rng(seed), []
    for name in sets:
        counts = rng.integers(5, 50, sequences)
        hard = counts * rng.uniform(1, 3, sequences)
        nll = {path: hard + counts * (shift + 0.01 * rng.normal(size=sequences)) for path, shift in
               (("a", 0.001), ("b", 0.0), ("c", apart))}  # fmt: skip
        records.append(probe("outputs", "base", 5.0, name=name, predictions=tuple(counts.tolist()), nll=tuple(hard)))
        for path, each in nll.items():
            record = probe("outputs", "adapter", float(each.sum() / counts.sum()), name=name, nll=tuple(each))
            records.append(record.model_copy(update={"name": path}))
    return records, counts, nll


def test_adapters_are_compared_with_each_other_on_same_sequences():
    records, counts, nll = rivals()
    (choice,) = choices(records)
    best, near, far = sorted(nll, key=lambda path: nll[path].sum())
    assert (choice.best, [rival.name for rival in choice.rivals]) == (best, [near, far])
    assert far == "c"
    assert [rival.name for rival in choice.equals] == [near]
    for rival in choice.rivals:
        # Ratio estimator by its definition; two rivals, so 95% for both together is 97.5% for each.
        difference = nll[rival.name] - nll[best]
        gap = difference.sum() / counts.sum()
        error = oracles.error_of_mean(difference - gap * counts) * 20 / counts.sum()
        assert rival.behind == pytest.approx(gap)
        assert rival.half == pytest.approx(stats.t(1.5 * (20 / 4 - 1)).ppf(1 - 0.05 / 4) * error)
    assert choice.rivals[0].sequences is None or choice.rivals[0].sequences > 20
    assert choice.rivals[1].sequences is None
    assert choices([r for r in records if r.name not in {"a", "b"}]) == []
    assert choices(outputs({"a": 0.1, "b": 0.2}).whole) == []  # of older results, which have no losses of sequences
    one, *_ = rivals(sequences=1)
    assert [rival.half for rival in choices(one)[0].rivals] == [None, None]


def test_equal_adapters_false_positive_rate_below_5_percent():
    told = 0
    for seed in range(400):
        records, *_ = rivals(seed, apart=0.0)
        records = [r for r in records if r.name != "a"]
        told += not choices(records)[0].equals
    assert told / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_gap_is_stated_before_weights():
    steps = advice(evidence(model(flat_to(40, 512)), outputs({"a": 0.3, "b": 0.2})))
    assert [step.rule for step in steps] == ["close the gap", "raise rank everywhere"]
    assert_names(steps[0].do, "+0.2000 ± 0.010 nats", "r=4", "r=8", "r=16")
    assert_names(steps[0].because, "best of 2")
    command = "loradiag probe sweep base --data TRAIN_TEXT --eval HELD_OUT_TEXT --ranks 4,8,16 -o sweep.jsonl"
    assert steps[0].command == command
    (more,) = advice(evidence(outputs({"a b": 0.09}, error=0.05)))
    assert more.rule == "measure more"
    assert more.command == "loradiag probe outputs 'my base' full_ft 'a b' --eval MORE_TEXT -o outputs-2.jsonl"


def test_sweep_names_rank_and_rate_instead_of_weights():
    steep = sweep({4: 1.5, 8: 1.2, 16: 1.1, 64: 1.099})
    steps = advice(evidence(model(flat_to(40, 512)), steep))
    assert [step.rule for step in steps] == ["sweep: gradual decline"]
    assert_names(steps[0].do, "r=16", "learning rate 0.001")
    assert_names(steps[0].because, 4, 8, 16, 64, "98%")
    assert_names(steps[0].because, "r=8", "11%", "r=64")
    assert steps[0].command == "loradiag plan 'my base' --ranks 16"
    (last,) = advice(evidence(sweep({4: 1.5, 8: 1.2, 16: 1.1})))
    assert_names(last.do, "r=16", "learning rate 0.001", "r=32", "r=64")
    assert last.ranks == (4, 8, 16, 32, 64)
    (fast,) = advice(evidence(sweep({4: 1.1, 8: 1.099, 16: 1.098})))
    assert fast.rule == "sweep: fast saturation"
    assert_names(fast.do, "r=4", "learning rate 0.001")


def test_sweep_without_rank_uses_weights():
    steps = advice(evidence(model(flat_to(40, 512)), sweep({4: 2.1, 8: 2.2})))
    assert [step.rule for step in steps] == ["sweep: no gain", "raise rank everywhere"]
    sweeps = "loradiag probe sweep 'my base' --data DATA --eval own.txt"
    assert steps[0].command == f"{sweeps} --lr 1e-05,0.0001,0.00033 --ranks 4,8 -o sweep-2.jsonl"  # all below 0.001
    noisy = sweep({4: 1.50, 8: 1.51}, spread=0.04)
    steps = advice(evidence(model(flat_to(40, 512)), noisy))
    assert [step.rule for step in steps] == ["sweep: not resolved", "raise rank everywhere"]
    (verdict, _), *_ = verdicts(noisy.whole, 0, 0.02).values()
    assert_names(steps[0].do, "r=4", "learning rate 0.001", f"{verdict.more_seeds} seeds")
    assert f"{math.floor(100 * verdict.confidence)}% confidence" in steps[0].because
    # The command adds seeds to the file that is there.
    command = "loradiag probe sweep 'my base' --data DATA --eval own.txt --ranks 4,8 --seed 0 --gain-tolerance 0.02"
    assert steps[0].command == f"{command} --repeats {verdict.more_seeds} --resume -o 'probe sweep.jsonl'"
    assert verdict.more_seeds > 2


def test_shifted_set_is_judged_separately():
    losses = {4: 1.1, 8: 1.099, 16: 1.098}
    worse = advice(evidence(sweep(losses, own=1.0, shifted={4: 1.2, 8: 1.3, 16: 1.4})))
    assert [step.rule for step in worse] == ["sweep: fast saturation", "shifted set"]
    assert "Least at r=4, by 0.2 nats" in worse[1].because
    assert "--data MIXED_TEXT --eval own.txt --ranks 4,8,16" in worse[1].command
    more = advice(evidence(sweep(losses, own=2.0, shifted={4: 1.5, 8: 1.3, 16: 1.1})))
    assert_names(more[1].do, "r=16", "other", "r=4", "own")
    assert more[1].command == "loradiag plan 'my base' --ranks 4,16"
    assert told(sweep(losses, own=2.0, shifted=losses)) == ["sweep: fast saturation"]
    repeated = sweep({4: 2.1, 8: 2.2}, own=2.0, shifted={4: 2.1, 8: 2.2})
    other = RunInput(role="shifted", path="other.txt", kind="", tensors=1)
    repeated = replace(repeated, run=repeated.run.model_copy(update={"inputs": (*repeated.run.inputs, other)}))
    assert "--data DATA --eval own.txt --shifted other.txt" in advice(evidence(repeated))[0].command


def test_truncation_names_lossless_rank():
    (step,) = advice(evidence(truncation({0: 0.2, 4: 0.5, 16: 0.93, 64: 0.99})))
    assert step.rule == "compress"
    assert_names(step.do, "r=16")
    assert_names(step.because, "93%", "own", "+0.0700 ± 0.010", "C(16) = 0.47")
    assert step.command == "loradiag extract 'my base' full_ft --rank 16 --unfactored save -o adapter/"
    (bare,) = advice(evidence(truncation({4: 0.95}, rest="base")))
    assert "--rest" not in bare.command


def test_loss_advice_without_evidence_is_empty():
    assert told(truncation({4: 0.5})) == []
    assert told(truncation({4: 0.99}, gain_error=0.9)) == []  # the fine-tune's own gain is noise
    assert told(truncation({4: 0.99}, layers="mlp")) == []
    assert told(sweep({4: 1.5})) == []
    assert told(run("probe outputs", [])) == []


def test_shipped_rank_is_judged_on_worst_set():
    (step,) = advice(evidence(truncation({0: 0.95, 4: 0.96})))
    assert_names(step.do, "r=4")
    runs = truncation({4: 0.99}), truncation({4: 0.93})
    two = [
        record.model_copy(update={"set": name}) for name, one in zip("ab", runs, strict=True) for record in one.whole
    ]
    (step,) = advice(evidence(run("probe truncation", two, rest="base")))
    assert_names(step.because, "93%", "gain on b")
    # A rank that was measured on one set only says nothing of the other.
    more = [record for record in truncation({2: 0.97}).whole if record.rank == 2]
    (step,) = advice(evidence(run("probe truncation", [*two, more[0].model_copy(update={"set": "a"})], rest="base")))
    assert_names(step.do, "r=4")
    # Where norms, biases, embeddings and head bring nothing, they need not be saved.
    (step,) = advice(evidence(truncation({0: 0.0, 4: 0.95})))
    assert "--rest" not in step.command


def test_text_and_shifts_are_omitted_under_another_main_answer():
    assert told(outputs({"a": (0.09, 0.09), "b": (0.0, 0.0)}, error=0.04, sets=("own", "two"))) == ["keep the adapter"]
    no_gain = sweep({4: 2.1, 8: 2.2}, own=1.0, shifted={4: 1.2, 8: 1.3})
    assert told(no_gain) == ["sweep: no gain"]
