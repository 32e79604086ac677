"""Statements on scores, from constructed gains with known answers."""

import random
from dataclasses import replace

import pytest

from lora_diag.catalog import table
from lora_diag.probes.sensitivity.gains import gains_of
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from tests import building
from tests.messages import assert_names

SETTINGS = {
    "by": "layer",
    "rank": 2,
    "delta": None,
    "lr": [0.1],
    "steps": 1,
    "repeats": 1,
    "seed": 0,
    "batch": 1,
}
SETTINGS |= {
    "kind": "LoRA",
    "optimizer": "AdamW",
    "length": 8,
    "dtype": "float32",
    "device": "cpu",
    "tokens": "bytes",
}


def results(gains, scores, sizes, noise=0.0):
    """Ten sequences of one prediction each, all of which gain the same but for noise."""
    rng = random.Random(0)
    same = {"set": "own", "data": "", "tokens": 10}
    records = [Sensitivity(**same, loss=3.0, nll=(3.0,) * 10, predictions=(1,) * 10)]
    for i, (gain, score, size) in enumerate(zip(gains, scores, sizes, strict=True)):
        name = f"h.{i}.q.weight"
        first = {
            "layer": name,
            "shape": (4, 4),
            "rank": 2,
            "gradient_fro": score**0.5,
            "sequences": 1,
            "data": "",
        }
        records.append(FirstOrder(**first, top=score, fresh=score / 2, adam=score))
        nll = tuple(3.0 - gain + rng.gauss(0, noise + 1e-6) for _ in range(10))
        unit = {"unit": name, "layers": (name,), "rank": 2, "params": size, "lr": 0.1}
        records.append(
            Sensitivity(**same, **unit, loss=sum(nll) / 10, gain=3.0 - sum(nll) / 10, nll=nll)
        )
    return building.results((), command="probe sensitivity", whole=records, **SETTINGS)


RISING = [0.1 * i for i in range(1, 9)]
MIXED = [0.4, 0.1, 0.8, 0.3, 0.6, 0.2, 0.7, 0.5]


@pytest.mark.parametrize(
    ("gains", "scores", "sizes", "noise", "text"),
    [
        (RISING, RISING, MIXED, 0.0, "yes: Σσ_i(G)² to r ranks the 8 with ρ = 1.00"),
        (RISING, RISING, RISING, 0.0, "no: the number of parameters ranks the 8 as well"),
        (
            RISING,
            MIXED,
            [1] * 8,
            0.0,
            "no: no score from one gradient ranks the 8 significantly better than chance",
        ),
        (RISING, RISING, MIXED, 9.0, "not known: "),
    ],
    ids=["the gradient", "its size", "chance", "noise"],
)
def test_gradient_scores_are_compared_with_gains(gains, scores, sizes, noise, text):
    shown = table(results(gains, scores, [round(100 * size) for size in sizes], noise), 120)
    assert f"Proxies {text}" in " ".join(shown.split())


def test_edge_of_unit_uses_own_rates():
    """Beyond the grid only some units are tried: a rate that others went past is still
    their last.
    """
    result = results([0.3, 0.3], [1, 1], [1, 1])
    base, first, second = (record for record in result.whole if isinstance(record, Sensitivity))
    worse = {"loss": 2.9, "nll": (2.9,) * 10, "gain": 0.1}
    records = [base, first, second]
    records += [unit.model_copy(update={"lr": 0.01, **worse}) for unit in (first, second)]
    records.append(second.model_copy(update={"lr": 0.33, **worse}))
    gains = gains_of(records, "own", "own", 2, 0)
    assert [(gain.unit, gain.lr, gain.edge) for gain in gains] == [
        ("h.0.q.weight", 0.1, 1),
        ("h.1.q.weight", 0.1, 0),
    ]
    text = " ".join(table(replace(result, whole=tuple(records)), 120).split())
    assert_names(text, 2, 1, "--lr")
