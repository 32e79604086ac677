"""Costs, batches, order and back-pressure, without a cluster."""

import random
from collections import namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.errors import InputError
from lora_diag.running.engines.schedule import (
    BATCH,
    LAYER_COST,
    Batch,
    Capacity,
    Waiting,
    batches,
    cost,
    in_order,
)

Layer = namedtuple("Layer", "layer shape")

SHAPES = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), max_size=40)


def dense(task):
    return 20 * task.shape[0] * task.shape[1]


def layers(shapes):
    return [Layer(str(at), shape) for at, shape in enumerate(shapes)]


@given(SHAPES, st.integers(1, 64))
def test_batches_contain_every_task_once_in_order(shapes, slots):
    plan = batches(layers(shapes), dense, lambda size: 1 + (size > 10**8), slots)
    assert [at for batch in plan for at in range(batch.start, batch.stop)] == list(
        range(len(shapes))
    )
    for batch in plan:
        own = [shapes[at] for at in range(batch.start, batch.stop)]
        assert batch.cost == sum(m * n * min(m, n) + LAYER_COST for m, n in own)
        assert len(batch) == 1 or batch.cost <= BATCH
        assert {1 + (dense(Layer("", shape)) > 10**8) for shape in own} == {batch.threads}


def test_small_layers_go_in_few_batches_that_fill_all_slots():
    plan = batches(layers([(64, 64)] * 10_000), dense, lambda size: 1, 8)
    assert 32 <= len(plan) < 200
    assert len(batches(layers([(64, 64)] * 40), dense, lambda size: 1, 8)) == 40


def test_next_batch_is_largest_within_reach():
    plan = [
        Batch(at, at + 1, 1, size) for at, size in enumerate([5, 1, 9, 3, 7, 5, 5, 5])
    ]  # 5 on average
    waiting = Waiting(plan, 3)
    taken = [waiting.pop(written, lambda batch: True) for written in (0, 0, 0, 0, 1, 2, 2)]
    assert [batch.start if batch else None for batch in taken] == [2, 4, 0, 1, 3, None, None]
    assert Waiting(plan, 3).pop(0, lambda batch: False) is None


class Machines:
    """Finish what they were sent in any order; some batches kill them, some tasks cannot be
    measured.
    """

    def __init__(self, seed, deadly=(), broken=()):
        self.random, self.deadly, self.broken = random.Random(seed), set(deadly), set(broken)
        self.under_way, self.most, self.sent = [], 0, []

    def send(self, batch):
        self.under_way.append(batch)
        self.sent.append(batch)
        self.most = max(self.most, sum(one.threads for one in self.under_way))
        return batch

    def fetch(self, tickets):
        assert set(tickets) == set(self.under_way)
        assert tickets, "waits for nothing"
        done = self.under_way.pop(self.random.randrange(len(self.under_way)))
        yield done, self.outcomes(done)

    def outcomes(self, batch):
        if self.deadly & set(range(batch.start, batch.stop)):
            return None
        result = []
        for at in range(batch.start, batch.stop):
            if at in self.broken:
                return [*result, InputError(f"broken {at}")]
            result.append(at)
        return result

    def run(self, plan, capacity, reach=8):
        return in_order(
            plan,
            reach,
            lambda: capacity,
            self.send,
            self.fetch,
            lambda batch: InputError(f"lost {batch.start}"),
        )


@given(SHAPES, st.integers(0, 99), st.integers(1, 9), st.integers(1, 12))
def test_outcomes_are_ordered_and_concurrency_limited(shapes, seed, cores, reach):
    plan = batches(layers(shapes), dense, lambda size: 1 + (size > 10**8) * 2, cores)
    machines = Machines(seed)
    assert list(machines.run(plan, Capacity(cores), reach)) == list(range(len(shapes)))
    assert machines.most <= max(2 * cores, 3)
    assert len(machines.sent) == len(plan)


def test_concurrency_equals_requested_workers():
    plan = [Batch(at, at + 1, 1) for at in range(50)]
    machines = Machines(1)
    list(machines.run(plan, Capacity(16, 3)))
    assert machines.most == 3


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_first_error_follows_earlier_outcomes(seed, deadly, broken):
    plan = [Batch(at, at + 5, 1, 5) for at in range(0, 60, 5)]
    machines, result = Machines(seed, [deadly], [broken]), []
    with pytest.raises(InputError) as error:
        result.extend(machines.run(plan, Capacity(2)))
    first = min(deadly, broken)
    assert result == list(range(first))
    assert str(error.value) == (f"lost {first}" if first == deadly else f"broken {first}")
    # Those around a deadly one were tried one by one; nothing is sent far behind an error.
    assert max(batch.start for batch in machines.sent) <= first + 5 * 8 + 5


def test_no_layers_need_no_batches():
    assert list(Machines(0).run([], Capacity(1))) == []
    assert batches([], dense, lambda size: 1, 4) == []
    assert cost((0, 5), 0) == LAYER_COST


class InTurn(Machines):
    """Finish batches in an order that is given, by their first tasks."""

    def __init__(self, turns, deadly=(), broken=()):
        super().__init__(0, deadly, broken)
        self.turns = iter(turns)

    def fetch(self, tickets):
        assert tickets, "waits for nothing"
        turn = next(self.turns)
        done = next(batch for batch in self.under_way if batch.start == turn)
        self.under_way.remove(done)
        yield done, self.outcomes(done)


def test_tasks_near_fatal_task_are_retried_in_order():
    machines = InTurn([0, 0, 1, 2, 3], deadly=[3])
    with pytest.raises(InputError, match="lost 3"):
        list(machines.run([Batch(0, 5, 1, 5)], Capacity(1)))
    assert [batch.start for batch in machines.sent] == [0, 0, 1, 2, 3, 4]


def test_later_error_keeps_earlier_and_stops_sending():
    plan = [Batch(at, at + 5, 1, 5) for at in range(0, 60, 5)]
    machines, result = InTurn([5, 10, 0], broken=[6, 11]), []
    with pytest.raises(InputError, match="broken 6"):
        result.extend(machines.run(plan, Capacity(2, max_batches=3), reach=4))
    assert result == list(range(6))
    assert [batch.start for batch in machines.sent] == [0, 5, 10]
