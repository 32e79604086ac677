"""The walk over sizes, rates and seeds: on made-up losses, whose best rate is known."""

import math
from dataclasses import replace

import pytest
import torch

from lora_diag.models.data import Sequence, Texts
from lora_diag.models.training import TrainingSettings
from lora_diag.probes.sweep import SweepOptions
from lora_diag.records import Probe, ResultsWriter, Run
from lora_diag.running.progress import ProgressReporter, RunRecords
from lora_diag.running.training_runs import (
    Arm,
    RunPlan,
    StepCost,
    TrainRun,
    Trial,
    count_saved_bytes,
    extrapolate_steps,
)

HELD = Texts("held", "held.txt", (), "0", "text")


def loss_of(size, rate, best):
    """A valley over the logarithm of the rate; far above its floor training diverges."""
    return None if rate > 30 * best else 1 / size + math.log(rate / best) ** 2


class Case:
    """Runs of made-up losses, with the rate at which each size is best."""

    def __init__(self, best, widen, seeds=2, stop_after=None):
        self.best, self.ran, self.stop_after, self.ticks = best, [], stop_after, []
        run = Run(command="probe sweep", version="0", inputs=(), settings={})
        watch = ProgressReporter(
            lambda event: self.ticks.append((event.label, event.done, event.total))
        )
        kept = RunRecords(ResultsWriter(None, run, False), watch)
        self.walk = RunPlan(TrainingSettings(HELD, 3, 1, 7), [HELD], seeds, widen, kept)

    def arm(self, rates):
        return Arm(tuple(self.best), rates, self.trial)

    def trial(self, size, rate, seed):
        fields = {"subject": "lora", "rank": size, "lr": rate, "seed": seed}

        def train(training, sets, after):
            if len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            self.ran.append((size, rate, seed))
            for _ in range(training.steps):
                after()
            loss = loss_of(size, rate, self.best[size])
            return [Probe(probe="sweep", set="held", data="0", tokens=1, loss=loss, **fields)]

        return Trial(fields, f"r={size} lr={rate:g}", train)


@pytest.mark.parametrize(
    ("best", "widen", "tried"),
    [
        (3e-3, 2, [1e-3, 3e-3, 1e-2]),
        (3e-2, 0, [1e-3, 3e-3, 1e-2]),
        (1e-2, 2, [1e-3, 3e-3, 1e-2, 0.033]),
        (3e-2, 2, [1e-3, 3e-3, 1e-2, 0.033, 0.11]),
        (9.0, 2, [1e-3, 3e-3, 1e-2, 0.033, 0.11]),
        (1e-4, 9, [1e-3, 3e-3, 1e-2, 3.3e-4, 1.1e-4, 3.7e-5]),
        (1e-6, 1, [1e-3, 3e-3, 1e-2, 3.3e-4]),
    ],
)
def test_rates_extend_until_best_is_inside(best, widen, tried):
    case = Case({4: best}, widen)
    arm = case.arm((1e-3, 3e-3, 1e-2))
    case.walk.expect(case.walk.count_unfinished(arm))
    case.walk.run(arm)
    lost = [rate for rate in tried if loss_of(4, rate, best) is None]
    assert [rate for _, rate, seed in case.ran if seed == 7] == pytest.approx(tried)
    chosen = min(
        (rate for rate in tried if rate not in lost),
        key=lambda rate: loss_of(4, rate, best),
        default=None,
    )
    assert [rate for _, rate, seed in case.ran if seed == 8] == (
        [] if chosen is None else [pytest.approx(chosen)]
    )
    if chosen is not None:  # what was told before the last run is what was done
        assert case.ticks[-1][1:] == (3 * len(case.ran), 3 * len(case.ran))


def test_single_rate_is_kept_and_refined_grid_steps_are_short():
    case = Case({4: 1.0}, 5)
    case.walk.run(case.arm((1e-3,)))
    assert [rate for _, rate, _ in case.ran] == [1e-3, 1e-3]
    case = Case({4: 1.0}, 1)
    case.walk.run(case.arm((1.04e-2, 1.041e-2)))  # the next step would be written as 0.01
    assert [rate for _, rate, _ in case.ran] == [1.04e-2, 1.041e-2, 1.041e-2]
    case = Case({4: 5.0}, 1)
    case.walk.run(case.arm((2.5, 5.0)))  # the next would be 10, which --lr refuses
    assert [rate for _, rate, _ in case.ran] == [2.5, 5.0, 5.0]
    case = Case({4: 1.0}, 1)
    case.walk.run(case.arm((1e-3, 1e-1)))
    assert [rate for _, rate, _ in case.ran] == [
        1e-3,
        1e-1,
        pytest.approx(0.33),
        pytest.approx(0.33),
    ]


@pytest.mark.parametrize("stop_after", range(9))
def test_resume_runs_remaining_cells_once(stop_after):
    best, rates = {2: 1e-2, 4: 2e-3}, (1e-3, 3e-3, 1e-2)
    whole = Case(best, 2)
    whole.walk.run(whole.arm(rates))
    assert len(whole.ran) == 2 * 3 + 1 + 2
    case = Case(best, 2, stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        case.walk.run(case.arm(rates))
    case.stop_after = None
    arm = case.arm(rates)
    beyond = sum(run[1] not in rates and run[2] == 7 for run in whole.ran[stop_after:])
    assert case.walk.count_unfinished(arm) == len(whole.ran) - stop_after - beyond
    case.walk.watch.done = case.walk.watch.total = 0
    case.walk.expect(case.walk.count_unfinished(arm))
    case.walk.run(arm)
    assert case.ran == whole.ran
    assert (
        case.ticks[-1][1:] == (3 * (len(whole.ran) - stop_after),) * 2
    )  # what is finished is no work to come


def test_record_of_another_kind_is_not_a_trial():
    case = Case({4: 1e-3}, 0, seeds=1)
    case.walk.run(case.arm((1e-3,)))
    done = {"subject": "lora", "rank": 4, "lr": 1e-3, "seed": 7}
    assert case.walk.has(**done)
    assert not case.walk.has(**done, unit="model.layers.0.q_proj.weight")
    assert not case.walk.kept.has(["held", "other"], **done)


def test_first_set_decides_rates_others_are_reported():
    case = Case({4: 1e-3}, 0)
    case.walk = replace(case.walk, sets=[HELD, replace(HELD, name="other")])

    def trial(size, rate, seed):
        plain = case.trial(size, rate, seed)

        def train(*how):
            (held,) = plain.train(*how)
            return [held, held.model_copy(update={"set": "other", "loss": -held.loss})]

        return replace(plain, train=train)

    case.walk.run(replace(case.arm((1e-3, 3e-3)), trial=trial))
    assert case.ran == [(4, 1e-3, 7), (4, 3e-3, 7), (4, 1e-3, 8)]


def test_second_step_of_largest_size_is_timed(monkeypatch):
    """The first step of a run also warms the machine up: it is not the time of the others."""
    case, clock, ran = Case({2: 1e-3, 4: 1e-3}, 2), [100.0], []
    monkeypatch.setattr("lora_diag.running.training_runs.time.perf_counter", lambda: clock[0])

    def trial(size, rate, seed):
        def train(training, sets, after):
            ran.append((size, training.steps))
            for seconds in (50.0, 2.0, 5.0):
                clock[0] += seconds
                after()
            return []

        return Trial({}, "", train)

    assert case.walk.time_step(replace(case.arm((1e-3, 1e-2)), trial=trial)) == StepCost(2.0, 5.0)
    assert ran == [(4, 2)]
    assert case.ran == []


def test_numbers_at_their_limits_are_valid():
    for valid in (
        {"lr": [9.9], "steps": 1, "widen": 0, "seed": 0},
        {"seed": 2**31 - 1, "max_sequences": None},
    ):
        TrainRun("probe sweep", {"data": "t", **valid}, SweepOptions)


def test_short_steps_bracket_line_and_proportion(monkeypatch):
    """On a fake clock where a step takes 1 s and 0.01 s a token: of 2 sequences of 512 tokens,
    11.24 s. By hand from 2 · 64 tokens: 8 · 2.28 s, and the line through 2 · 16 is the truth.
    """
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    sequence = Sequence(tuple(range(512)), tuple(range(512)))
    texts = Texts("text", "text.txt", (sequence,) * 4, "0", "text")
    lengths = []

    def train(training, sets, after):
        for batch in [*training.batches(), sets[0].sequences]:
            assert batch[0].ids[-1] == batch[0].labels[-1] == 511
            lengths.append(len(batch[0].ids))
            now[0] += 1 + 0.01 * sum(len(one.ids) for one in batch)
            after()

    cost = extrapolate_steps(train, TrainingSettings(texts, 9, 2, 0), [texts])
    assert lengths == [16] * 3 + [64] * 3
    assert [cost.seconds, cost.evaluation_seconds] == pytest.approx([8 * 2.28] * 2)
    assert (1 - cost.error) * cost.seconds == pytest.approx(11.24)


def test_saved_bytes_are_counted_per_backward_pass():
    """A product of w, x and z keeps each of them and w·x for its backward pass."""
    w, x, z = (torch.ones(100, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with count_saved_bytes() as totals:
        for _ in range(2):
            (w * x * z).sum().backward()
    assert totals == [4 * 800] * 2  # w, x, z and w·x
