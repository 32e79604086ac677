"""Runs of Adam on a LoRA, simulated with NumPy: healthy ones raise no alarm, planted faults are
found.

Each layer has the loss ‖(sBA − M)X‖², with inputs X of unequal variance and noise in the outputs.
"""

import json

import numpy as np
import pytest

import lora_diag
from lora_diag.diagnostics.checkpoints.show import checkpoints_lines
from tests.adapters.making import lora
from tests.messages import assert_names

SCALE = 2.0
LAYERS, OUT, IN, BATCH = 6, 48, 32, 16


def name_of(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


SCHEDULES = {
    "constant": lambda x: 1.0,
    "cosine": lambda x: min(1.0, 20 * x) * (0.5 + 0.5 * np.cos(np.pi * x)),
    "linear": lambda x: 1.0 - x + 1e-3,
    "restarts": lambda x: 0.5 + 0.5 * np.cos(np.pi * ((4 * x) % 1)),
    "steps": lambda x: 0.1 ** int(4 * x),
}


class Simulation:
    """Adam (β₁ = 0.9, β₂ = 0.999) on the factors of all layers; ``change`` may alter it before a
    step.
    """

    def __init__(self, seed, rank=8, target_rank=6, decay=1.0, noise=0.3, signal=1.0):
        self.rng = rng = np.random.default_rng(seed)
        weights = np.arange(1.0, target_rank + 1) ** -decay
        left, right = (
            rng.normal(size=(LAYERS, OUT, target_rank)),
            rng.normal(size=(LAYERS, target_rank, IN)),
        )
        self.target = signal * 0.1 * (left * weights) @ right / np.sqrt(target_rank)
        self.spread, self.noise = np.exp(0.7 * rng.normal(size=(LAYERS, IN, 1))), noise
        self.factors = [
            np.zeros((LAYERS, OUT, rank)),
            rng.uniform(-1, 1, (LAYERS, rank, IN)) / np.sqrt(IN),
        ]
        self.first = [np.zeros_like(factor) for factor in self.factors]
        self.second = [np.zeros_like(factor) for factor in self.factors]
        self.pace = np.ones((LAYERS, 1, 1))

    def step(self, t, rate):
        b, a = self.factors
        x = self.rng.normal(size=(LAYERS, IN, BATCH)) * self.spread
        error = (SCALE * b @ a - self.target) @ x + 0.3 * self.noise * self.rng.normal(
            size=(LAYERS, OUT, BATCH)
        )
        gradient = SCALE * error @ x.mT / BATCH
        for i, each in enumerate((gradient @ a.mT, b.mT @ gradient)):
            self.first[i] = 0.9 * self.first[i] + 0.1 * each
            self.second[i] = 0.999 * self.second[i] + 0.001 * each**2
            step = self.first[i] / (1 - 0.9**t) / (np.sqrt(self.second[i] / (1 - 0.999**t)) + 1e-8)
            self.factors[i] = self.factors[i] - rate * self.pace * step

    def run(self, schedule="constant", change=None, steps=300, every=20, at=(), peak=2e-3):
        """Return the factors by step, and the log."""
        saved, log = {}, []
        for t in range(1, steps + 1):
            if change is not None:
                change(self, t)
            rate = peak * SCHEDULES[schedule](t / steps)
            self.step(t, rate)
            if t % 5 == 0:
                loss = float(
                    np.square(SCALE * self.factors[0] @ self.factors[1] - self.target).sum()
                )
                log.append({"step": t, "learning_rate": rate, "loss": loss})
            if t % every == 0 or t in at:
                saved[t] = [factor.astype(np.float32) for factor in self.factors]
        return saved, log


def judge(folder, saved, log):
    """Write the checkpoints of a run, and return what ``checkpoints`` says of it."""
    for t, (b, a) in saved.items():
        step = folder / f"checkpoint-{t}"
        lora(step, {name_of(i): (b[i], a[i]) for i in range(LAYERS)}, SCALE)
        history = [entry for entry in log if entry["step"] <= t]
        (step / "trainer_state.json").write_text(
            json.dumps({"global_step": t, "log_history": history})
        )
    return lora_diag.checkpoints(folder).whole[-1]


def alarms(found):
    return (
        {name: layers for name, layers in found.affected.items() if layers},
        found.swapped,
        found.other_run,
    )


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_healthy_simulated_run_raises_no_alarm(tmp_path, schedule, noise):
    found = judge(tmp_path, *Simulation(0, noise=noise).run(schedule))
    assert alarms(found) == ({}, None, None)
    assert found.state in {"settled", "growing", "moving"}


@pytest.mark.slow
@pytest.mark.parametrize("early", [(1,), (1, 2), (2, 5)])
@pytest.mark.parametrize(("target_rank", "decay"), [(1, 1.0), (6, 2.5)])
@pytest.mark.parametrize("seed", range(2))
def test_early_checkpoint_is_no_collapse(tmp_path, seed, target_rank, decay, early):
    """Adam's first step is lr·sign(g), of a higher rank than what follows."""
    simulation = Simulation(seed, rank=16, target_rank=target_rank, decay=decay)
    found = judge(tmp_path, *simulation.run("cosine", steps=200, at=early))
    assert alarms(found) == ({}, None, None)


def keep_one_direction(simulation, t):
    if t >= 170:
        u, s, vh = np.linalg.svd(simulation.factors[0][:2], full_matrices=False)
        s[:, 1:] *= 0.02
        simulation.factors[0][:2] = (u * s[:, None]) @ vh


def freeze(simulation, t):
    if t > 160:
        simulation.pace[3] = 0.0


def freeze_most(simulation, t):
    if t > 160:
        simulation.pace[:4] = 0.0


def rush(simulation, t):
    simulation.pace[4] = 60.0 if 210 <= t < 215 else 1.0


def start_late(simulation, t):
    simulation.pace[5] = 0.0 if t <= 160 else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_collapse_from_any_rank_is_found(tmp_path, schedule, decay):
    found = judge(tmp_path, *Simulation(0, decay=decay).run(schedule, keep_one_direction))
    assert (found.state, found.step) == ("collapsed", 180)
    assert found.affected["collapsed"] == (name_of(0), name_of(1))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("change", "frozen"), [(freeze, [3]), (freeze_most, [0, 1, 2, 3])])
def test_layer_frozen_during_run_is_named(tmp_path, schedule, change, frozen):
    found = judge(tmp_path, *Simulation(0).run(schedule, change))
    assert (found.state, found.step, found.frozen_step) == ("frozen", 160, 160)
    assert alarms(found)[0] == {"frozen": tuple(map(name_of, frozen))}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_five_large_steps_of_one_layer_are_named(tmp_path, schedule):
    found = judge(tmp_path, *Simulation(0).run(schedule, rush))
    assert (found.state, found.step) == ("spiked", 220)
    assert found.affected["spiked"] == (name_of(4),)
    results = lora_diag.checkpoints(tmp_path)
    assert_names(
        "\n".join(line.text for line in checkpoints_lines(results)),
        "spiked at step 220",
        "layers.4",
    )


@pytest.mark.slow
def test_layer_that_starts_late_is_no_alarm(tmp_path):
    assert alarms(judge(tmp_path, *Simulation(0).run("constant", start_late))) == ({}, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("is_other", [lambda t: t > 160, lambda t: t % 40 == 0, lambda t: t == 180])
@pytest.mark.parametrize("evidence", ["weights and logs", "weights"])
def test_checkpoints_of_two_runs_are_called_so(tmp_path, is_other, evidence):
    (first, log), (second, other_log) = (Simulation(seed).run("cosine") for seed in (0, 1))
    judge(tmp_path / "other", second, other_log)
    saved = {t: second[t] if is_other(t) else factors for t, factors in first.items()}
    if evidence == "weights":
        log = []
    found = judge(tmp_path / "out", saved, log)
    assert (found.state, found.step) == (
        "two runs",
        min(t for t in saved if is_other(t) != is_other(20)),
    )
    if evidence == "weights":
        return
    for t in filter(is_other, saved):
        (tmp_path / "out" / f"checkpoint-{t}").rename(tmp_path / f"checkpoint-{t}")
        (tmp_path / "other" / f"checkpoint-{t}").rename(tmp_path / "out" / f"checkpoint-{t}")
    assert lora_diag.checkpoints(tmp_path / "out").whole[-1].state == "two runs"


def save_walk(folder, seed, momentum=0.0, drift=0.0, interval=20, count=20):
    """Write checkpoints of a walk of B, with momentum and a constant part, and a fixed orthonormal
    A.
    """
    rng, saved = np.random.default_rng(seed), {}
    a = np.linalg.qr(rng.normal(size=(LAYERS, IN, 8)))[0].mT
    constant = drift * rng.normal(size=(LAYERS, OUT, 8))
    b, velocity = np.zeros_like(constant), np.zeros_like(constant)
    for t in range(1, interval * count + 1):
        velocity = momentum * velocity + (1 - momentum) * rng.normal(size=b.shape)
        b = b + velocity + constant
        if t % interval == 0:
            saved[t] = b.astype(np.float32), a.astype(np.float32)
    return judge(folder, saved, [])


@pytest.mark.parametrize(
    ("momentum", "interval"), [(0.0, 20), (0.9, 20), (0.9, 10), (0.9, 100), (0.5, 5)]
)
def test_walk_with_momentum_is_a_random_walk(tmp_path, momentum, interval):
    found = save_walk(tmp_path, 0, momentum, interval=interval)
    assert found.state == "random walk"
    expected = momentum and found.cosine_momentum
    if momentum in {0.0, 0.9}:
        assert found.cosine == pytest.approx(expected, abs=0.04)


def test_walk_with_drift_is_no_random_walk(tmp_path):
    """Its constant part has c²n² of c²n² + n per entry: 26% of the energy, and a cosine of about
    0.02.
    """
    steps = 20 * 20
    drift = np.sqrt(0.26 / 0.74 / steps)
    found = save_walk(tmp_path, 0, drift=drift)
    assert found.state != "random walk"
    assert found.cosine < 0.05
    assert found.drift == pytest.approx(0.26, abs=0.07)


def test_walk_of_few_steps_is_not_judged(tmp_path):
    found = save_walk(tmp_path, 0, interval=2, count=8)
    assert (found.drift, found.state) == (None, "growing")
