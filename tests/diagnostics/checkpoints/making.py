"""Training runs written by hand: adapters or full checkpoints at several steps, with what a trainer
logs.
"""

import json
from pathlib import Path

import numpy as np

from tests.adapters.making import lora, write

LAYERS = tuple(
    f"model.layers.{i}.self_attn.{name}.weight" for i in range(3) for name in ("q_proj", "v_proj")
)
STEPS = tuple(range(10, 101, 10))


def cosine_rate(step: int, last: int) -> float:
    return 1e-3 * 0.5 * (1 + np.cos(np.pi * step / last))


def write_state(folder: Path, step: int, last: int, **more) -> None:
    """Write a trainer's state with a log of every fifth step."""
    log = [
        {"step": s, "loss": 4 - s / last, "learning_rate": cosine_rate(s, last)}
        for s in range(5, step + 1, 5)
    ]
    log += [{"step": s, "eval_loss": 3 - s / last} for s in range(10, step + 1, 10)]
    state = {"global_step": step, "max_steps": last, "log_history": log} | more
    (folder / "trainer_state.json").write_text(json.dumps(state))


def healthy(
    seed: int = 0, shape: tuple[int, int] = (24, 20), rank: int = 4
) -> list[dict[str, tuple]]:
    """The factors of a run that follows a line, with noise, by the steps of a cosine schedule."""
    rng = np.random.default_rng(seed)
    ends = {
        name: (rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1])))
        for name in LAYERS
    }
    done, made = dict.fromkeys(LAYERS, 0.0), []
    rates = [sum(cosine_rate(s, STEPS[-1]) for s in range(t - 9, t + 1)) for t in STEPS]
    for rate in rates:
        for name, (b, _) in ends.items():
            done[name] = done[name] + (b + 0.3 * rng.standard_normal(b.shape)) * rate / sum(rates)
        made.append(
            {
                name: (done[name].astype(np.float32), a.astype(np.float32))
                for name, (_, a) in ends.items()
            }
        )
    return made


def save_run(folder: Path, updates, steps=STEPS, scale: float = 1.0, state: bool = True) -> Path:
    """Write the adapters of a run as transformers lays them out."""
    for step, factors in zip(steps, updates, strict=True):
        lora(folder / f"checkpoint-{step}", factors, scale)
        if state:
            write_state(folder / f"checkpoint-{step}", step, steps[-1])
    return folder


def save_full(folder: Path, base, updates, steps) -> Path:
    """Write full checkpoints W + ΔW of a run, and their base."""
    write(folder / "base" / "model.safetensors", base)
    for step, deltas in zip(steps, updates, strict=True):
        tuned = {name: base[name] + delta for name, delta in deltas.items()}
        write(folder / "run" / f"checkpoint-{step}" / "model.safetensors", tuned)
    return folder / "run"
