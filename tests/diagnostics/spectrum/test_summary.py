"""What the summary says of a run: only what its records can carry."""

import math

import pytest

import lora_diag
from lora_diag.diagnostics.spectrum.show import spectrum_table, summary_lines
from lora_diag.records import End, LeftOut, Results, Run, RunInput
from lora_diag.rendering.statements import find
from tests.building import layer_spectrum
from tests.conftest import ROOT, save_model, weights
from tests.messages import assert_names

SAMPLE = (ROOT / "sample_checkpoints" / "base", ROOT / "sample_checkpoints" / "full_ft")


def record(layer="model.layers.0.q_proj.weight", shape=(32, 32), kept=None, verdict="resolved", energy=None, **fields):
    """Return a record of equal singular values: C(r) = r/min(shape)."""
    full = min(shape)
    ranks, s = (8, 16, 64), [1.0] * (kept or full)
    fields = ({"energy": energy} if energy else {}) | {"tail": {}, "fro": math.sqrt(full) if kept else None, **fields}
    seen = {"noise_fro": 0.1, "signal_rank": full, "verdict": verdict}
    return layer_spectrum(layer, s, ranks, shape=shape, complete=not kept, resolution=seen, **fields)


def results_of(records, left_out=(), roles=("base", "tuned")):
    inputs = tuple(RunInput(role=role, path=f"there/{role}", kind="a file", tensors=1) for role in roles)
    run = Run(command="spectrum", version="0", inputs=inputs, settings={"ranks": [8, 16, 64], "top": None})
    end = End(layers=len(records), left_out=len(left_out), fro=1.0, base_fro=1.0)
    return Results(run, tuple(records), tuple(left_out), end)


def said(results, width=200):
    """Return the summary in one line."""
    return " ".join(spectrum_table(results, width).split())


def changed(tmp_path, *names):
    before = weights(1)
    after = {name: value + 0.1 if name in names else value for name, value in before.items()}
    return lora_diag.spectrum(save_model(tmp_path / "a", before), save_model(tmp_path / "b", after))


def left(layer, reason, shape=(3, 3), detail="is nan", **norms):
    return LeftOut(layer=layer, shape=shape, reason=reason, detail=detail, **norms)


def test_changed_embeddings_count_as_change(tmp_path):
    text = said(changed(tmp_path, "model.embed_tokens.weight"))
    assert_names(text, "ΔW", "8 matrices")
    assert "in model.embed_tokens" in text
    assert_names(text, "100%", "embeddings")
    assert "Moved nothing" not in text


def test_every_reason_has_text():
    from typing import get_args

    from lora_diag.records.run import Reason
    from lora_diag.rendering.statements import REASONS

    assert set(REASONS) == set(get_args(Reason))


@pytest.mark.parametrize(
    ("verdicts", "level"),
    [
        (["resolved"] * 2, "note"),
        (["floor-limited"] * 3, "warning"),
        (["floor-limited", "unresolved"], "warning"),
        (["resolved", "floor-limited"], "warning"),
        (["resolved", "unresolved", "unresolved"], "failure"),
    ],
)
def test_level_of_resolution_follows_from_verdicts(verdicts, level):
    records = [record(f"layers.{i}.q_proj.weight", verdict=verdict) for i, verdict in enumerate(verdicts)]
    assert find(summary_lines(results_of(records)), "resolved").level == level


def with_start(seen, number_of=10):
    """Return results of matrices whose noise is 1 of ‖ΔW‖² = 32, and 0.19 without that of BASE."""
    noise = {"noise_fro": 1.0, "signal_rank": 32, "verdict": "floor-limited", "base_noise_fro": 0.9}
    names = [f"model.layers.{i}.q_proj.weight" for i in range(number_of)]
    return results_of(
        [
            layer_spectrum(name, [1.0] * 32, [8, 16, 64], shape=(32, 32), resolution=noise | seen(i))
            for i, name in enumerate(names)
        ]
    )


@pytest.mark.parametrize(("beta", "cleared"), [(0.02, True), (0.98, False)])
def test_pooled_layers_resolve_rounded_start(beta, cleared):
    """Errors of 0.3 of ten layers are 0.09 together."""
    start = find(summary_lines(with_start(lambda _: {"start": "unknown", "base_rounding": (beta, 0.3)})), "start")
    assert_names(start.lead, "10 of 10 matrices")
    assert_names(start.details, f"{beta} ± 0.09")
    assert ("are resolved" in start.lead) == cleared


def test_start_without_consequence_is_not_stated():
    seen = {"start": "unknown", "base_rounding": (0.02, 0.3), "verdict": "resolved"}
    assert find(summary_lines(with_start(lambda _: seen)), "start") is None


def test_layers_that_disagree_on_the_start_are_a_warning():
    """One BASE has one start: layers that show both cannot all be right."""
    kinds = {0: {"start": "exact", "base_rounding": (0.4, 0.01)}, 1: {"start": "rounded", "base_rounding": (0.6, 0.01)}}
    start = find(summary_lines(with_start(lambda i: kinds[i % 2])), "start")
    assert start.level == "warning"
    assert_names(start.lead, "5 of 10 matrices", 5)


@pytest.mark.parametrize(("resolved", "known"), [(2, False), (5, True), (10, True)])
def test_low_rank_has_no_verdict_below_half_of_the_layers(resolved, known):
    records = [
        record(f"layers.{i}.q_proj.weight", verdict="resolved" if i < resolved else "unresolved") for i in range(10)
    ]
    statements = summary_lines(results_of(records))
    assert_names(find(statements, "low_rank").text, "all 10" if resolved == 10 else f"{resolved} of 10", "matrices")
    assert (find(statements, "low_rank").lead.startswith("partly"), "keeps" in find(statements, "low_rank").text) == (
        known,
        known,
    )
    assert (find(statements, "rank_at_90") is not None) == known
