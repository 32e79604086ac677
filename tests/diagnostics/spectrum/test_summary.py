"""What the summary says of a run: only what its records can carry."""

import math
import re

import pytest

import lora_diag
from lora_diag.diagnostics.spectrum.summary import summary_lines
from lora_diag.diagnostics.spectrum.table import spectrum_table
from lora_diag.records import End, LeftOut, Results, Run, RunInput
from lora_diag.rendering.statements import find
from tests.building import layer_spectrum
from tests.conftest import ROOT, save_model, weights

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


def test_embeddings_that_moved_alone_are_change(tmp_path):
    text = said(changed(tmp_path, "model.embed_tokens.weight"))
    assert "only embeddings and head; ΔW is zero in the 8 matrices outside them" in text
    assert "in model.embed_tokens" in text
    assert "100% in embeddings and head" in text
    assert "Moved nothing" not in text


def test_norms_that_moved_alone_are_change(tmp_path):
    text = said(changed(tmp_path, "model.layers.0.input_layernorm.weight"))
    assert "only norms and biases: ΔW is zero in every matrix" in text
    assert "meant" not in text


def test_how_far_weights_moved_says_of_how_many():
    head = record("lm_head.weight")
    assert "over the 1 matrix outside embeddings and head" in said(results_of([record(), head]))
    assert "over the 1 matrix Resolution" in said(results_of([record()]))  # which needs no "most" and "least"
    assert "over all 2 matrices" in said(results_of([record(), record("model.layers.1.q_proj.weight")]))


def test_no_measured_matrix_is_not_change_of_zero():
    nan = LeftOut(layer="q.weight", shape=(3, 3), reason="non_finite", detail="TUNED holds nan at [0, 0]")
    norm = LeftOut(layer="norm.weight", shape=(3,), reason="vector", detail="1-D", fro=0.5, base_fro=1.0)
    text = said(results_of([], [nan, norm]))
    assert "no matrix could be measured: 1 not finite, 1 one-dimensional (norms, biases)" in text
    assert "zero" not in text
    assert "0 matrices" not in text


def test_shares_are_of_what_was_measured_where_change_is_unknown():
    cut = LeftOut(layer="q.weight", shape=(3, 3), reason="shape_differs", detail="[3, 3] in BASE against [2, 3]")
    assert "of the whole change ‖Δ‖² in what was measured, 100% in the matrices" in said(results_of([record()], [cut]))
    assert "of the whole change ‖Δ‖², 100% in the matrices" in said(results_of([record()]))


def test_every_reason_has_words():
    from typing import get_args

    from lora_diag.diagnostics.spectrum.summary import REASONS
    from lora_diag.records.run import Reason

    assert set(REASONS) == set(get_args(Reason))


@pytest.mark.slow
def test_median_rank_counts_layers_beyond_values_kept():
    whole, cut = lora_diag.spectrum(*SAMPLE), lora_diag.spectrum(*SAMPLE, top=50)
    median = re.search(r"Rank at 90% median (\d+), from (\d+) to", said(whole))
    assert median
    assert f"Rank at 90% median {median[1]}, from {median[2]} to > 50 of 64 to 128" in said(cut)
    text = said(results_of([record(kept=30), record("b.weight", kept=20), record("c.weight", shape=(8, 8))]))
    assert "Rank at 90% median 29, from 8 to > 30" in text
    text = said(results_of([record(kept=20), record("b.weight", kept=20), record("c.weight", shape=(8, 8))]))
    assert "Rank at 90% median > 20, from 8 to > 20" in text


def test_ranks_that_were_not_computed_are_named():
    assert "Low rank C(8) was not computed: measure with --top 8 or more" in said(results_of([record(kept=4)]))
    text = said(results_of([record(kept=8)]))
    assert "Low rank no, judged at r=8" in text
    assert "C(16) was not computed: measure with --top 16 or more" in text


def test_adapter_cut_by_top_has_no_claimed_direction_count():
    text = said(lora_diag.spectrum(ROOT / "sample_checkpoints" / "lora_r16", top=2))
    assert "Rank used 90% of the energy in > 2 directions at the median" in text
    assert "28 of 28 layers need more than the 2 that --top kept" in text
    assert "of 2 directions" not in text


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["resolved"] * 2, "yes: "),
        (["floor-limited"] * 3, "limited: all 3 matrices are floor-limited (~): "),
        (["floor-limited"], "limited: the matrix is floor-limited (~): "),
        (["floor-limited", "unresolved"], "limited: of 2 matrices 1 floor-limited (~) and 1 unresolved (!): "),
        (["resolved", "floor-limited"], "partly: of 2 matrices 1 floor-limited (~): "),
        (["resolved", "unresolved", "unresolved"], "no: of 3 matrices 2 unresolved (!): "),
        (["unresolved"] * 2, "no: all 2 matrices are unresolved (!): "),
    ],
)
def test_resolved_is_said_in_word_that_fits(verdicts, words):
    records = [record(f"layers.{i}.q_proj.weight", verdict=verdict) for i, verdict in enumerate(verdicts)]
    assert f"Resolution {words}rounding" in said(results_of(records))
    levels = {"yes": "note", "limited": "warning", "partly": "warning", "no": "failure"}
    assert find(summary_lines(results_of(records)), "resolved").level == levels[words.partition(":")[0]]


def test_unmeasured_layers_are_counted():
    nan = [LeftOut(layer=f"q.{i}.weight", shape=(3, 3), reason="non_finite", detail="is nan") for i in range(9)]
    text = said(results_of([record()], nan))
    assert "q.4: is nan and 4 more" in text
    assert "q.5: is nan" not in text
    assert "more" not in said(results_of([record()], nan[:5])).split("Not measured")[1]


def test_layers_no_larger_than_rank_do_not_count_at_it():
    small = [record(f"layers.{i}.k_proj.weight", shape=(8, 32)) for i in range(3)]
    text = said(results_of([record(), *small]))
    assert "Low rank partly, judged at r=16" in text
    assert "r=8 keeps 25% of the one layer larger, at worst 25% in model.layers.0.q_proj" in text
    two = said(results_of([record(), record("b.q_proj.weight"), *small]))
    assert "r=8 keeps 25% at the median of the 2 layers larger than r, at worst" in two
    assert "r=64 says nothing: no layer is larger" in text
    assert "Low rank r=8 says nothing: no layer is larger" in said(results_of(small))


def test_rank_is_judged_in_one_place():
    text = said(results_of([record()]))
    assert text.count("r=16 keeps") == 1


def test_roles_of_any_length_are_aligned():
    text = spectrum_table(results_of([record()], roles=("base", "adapter")), 100)
    paths = [line.index("there/") for line in text.splitlines() if "there/" in line]
    assert len(set(paths)) == 1


def test_one_dimensional_tensors_are_named(tmp_path):
    assert "2 one-dimensional (norms, biases)" in said(changed(tmp_path, "lm_head.weight"))


@pytest.mark.parametrize("beta", [0.02, 0.98])
def test_layers_together_show_a_start_that_one_does_not(beta):
    """Errors of 0.3 of ten layers are 0.09 together. Noise is 1 of ‖ΔW‖² = 32, and 0.19 without that of BASE."""
    noise = {"noise_fro": 1.0, "signal_rank": 32, "verdict": "floor-limited", "base_noise_fro": 0.9}
    names = [f"model.layers.{i}.q_proj.weight" for i in range(10)]
    seen = noise | {"start": "unknown", "base_rounding": (beta, 0.3)}
    layers = [layer_spectrum(name, [1.0] * 32, [8, 16, 64], shape=(32, 32), resolution=seen) for name in names]
    text = said(results_of(layers))
    shown = "all layers together show the start (0.02 ± 0.09, where 1 is a rounded copy and 0 the start itself); "
    assert (shown + "then 10 of the 10 are resolved" in text) == (beta < 0.5)
    assert "in 10 of 10 matrices BASE may be a rounded copy" in text
