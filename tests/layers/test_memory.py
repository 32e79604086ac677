"""Computations with all singular vectors of several matrices stay within planned memory, or report
what is missing.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

import lora_diag
from lora_diag.diagnostics.geometry import measure as geometry
from lora_diag.diagnostics.interference import measure as interference
from lora_diag.diagnostics.interference.measure import InterferenceSettings
from lora_diag.diagnostics.intruders import measure as intruders
from lora_diag.errors import MemoryLimitError
from lora_diag.running.inputs import compare
from lora_diag.running.updates import LayerUpdates, Update
from tests.conftest import ROOT, save_model
from tests.messages import assert_names
from tests.served import peak

pytestmark = pytest.mark.slow

SHAPE = 1400, 1200
NAME, SMALL = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
SAMPLE = ROOT / "sample_checkpoints"


def print_peak(job):
    """Print the estimated memory of a layer, and by how much the resident memory of a process
    grows.
    """
    needed_and_measured(SMALL, *job["words"])[
        1
    ]()  # the libraries it loads are no part of a layer's memory
    needed, measure = needed_and_measured(NAME, *job["words"])
    before = peak(anew=True)
    measure()
    raise SystemExit(f"{needed} {peak() - before}")


def needed_and_measured(layer, what, base, *updates):
    """Return the estimated memory of a layer, and its measurement."""
    deltas = [
        next(d for d in compare(base, path).pairing.deltas if d.layer == layer) for path in updates
    ]
    if what == "intruders":
        settings = intruders.IntruderSettings()
        return intruders.max_bytes(deltas[0], settings), lambda: intruders.measure_layer(
            deltas[0], settings
        )
    if what == "geometry":
        settings = geometry.GeometrySettings()
        return geometry.max_bytes(deltas[0], settings), lambda: geometry.measure_layer(
            deltas[0], settings
        )
    settings = InterferenceSettings(weights=(1.0, 1.0))
    task = LayerUpdates(
        layer, deltas[0].shape, tuple(Update(f"{n}", 1.0, delta) for n, delta in enumerate(deltas))
    )
    return interference.max_bytes(task, settings), lambda: interference.measure_layer(
        task, settings
    )


def write_models(folder, shape):
    """Write BASE and two updates, each with a large and a small matrix; return their paths."""
    rng = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(size, generator=rng) * 0.02
        for name, size in {NAME: shape, SMALL: (90, 80)}.items()
    }
    result = [save_model(folder / "base", {name: value.bfloat16() for name, value in base.items()})]
    for number in range(2):
        tuned = {
            name: (w + 1e-2 * torch.randn(w.shape, generator=rng)).bfloat16()
            for name, w in base.items()
        }
        result.append(save_model(folder / f"tuned{number}", tuned))
    return list(map(str, result))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("whole"), SHAPE)


@pytest.mark.parametrize("what", ["intruders", "interference", "geometry"])
def test_resident_memory_stays_within_plan(tmp_path, server, what):
    words, prepare = (
        [what, *write_models(tmp_path, (1000, 840))],
        "tests.layers.test_memory:print_peak",
    )
    _, _, err = server.run(words, ROOT, environment={}, prepare=prepare)
    needed, grown = map(int, err.decode().split())
    assert 0.3 * needed < grown <= needed


@pytest.mark.parametrize(
    ("what", "takes"), [("intruders", "both weights"), ("interference", "its updates")]
)
def test_too_large_layer_states_missing_memory_which_suffices(models, loradiag, what, takes):
    words = [
        what,
        *(models[:2] if what == "intruders" else models),
        "--layers",
        "up_proj|q_proj",
        "--json",
    ]
    few = loradiag(*words, "--memory", "505MB")
    assert few.code == 3
    (left,) = [record for record in few.records if record["record"] == "left_out"]
    assert (left["layer"], left["reason"]) == (NAME, "memory")
    assert_names(left["detail"], "1400x1200", "--memory", "136 MB", takes)
    assert_names(few.err, NAME, left["detail"])
    assert {record["layer"] for record in few.records if record["record"] in {what, "union"}} == {
        SMALL
    }
    more = int(left["detail"].split("give ")[1].split(" MB")[0])
    measure = (
        lora_diag.intruders
        if what == "intruders"
        else partial(lora_diag.interference, base=models[0])
    )
    sides = models[:2] if what == "intruders" else [models[1:]]
    assert measure(*sides, layers="up_proj", memory=f"{505 + more - 5}MB").unmeasured
    enough = measure(*sides, layers="up_proj", memory=f"{505 + more}MB")
    assert enough.layers
    assert not enough.unmeasured


def test_ties_remedy_is_stated_where_it_helps():
    deltas = [
        next(d for d in compare(SAMPLE / name, None).pairing.deltas if d.is_matrix)
        for name in ("lora_r4", "lora_r16")
    ]
    task = LayerUpdates(
        NAME, (40000, 8000), tuple(Update(f"{n}", 1.0, delta) for n, delta in enumerate(deltas))
    )
    settings = InterferenceSettings(weights=(1.0, 1.0), memory=10**9)
    text = (
        "the entries of its updates, for TIES, take 5.3 GB; give 4.4 GB more .* or --density 0, "
        "which leaves out TIES"
    )
    with pytest.raises(MemoryLimitError, match=text):
        interference.measure_layer(task, settings)
    assert interference.max_bytes(task, replace(settings, density=0.0)) < 10**9
    assert interference.max_bytes(task, settings) > 10**9
