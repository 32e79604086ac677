"""Planted situations: each rule speaks where its evidence is, and is silent where it is missing or at the floor."""

import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_diag
from lora_diag.reports.advice import RULES as STEPS
from lora_diag.reports.advice import advice
from lora_diag.reports.evidence import MAX_ADAPTERS, Evidence, Source, energy_at
from lora_diag.reports.findings import RULES, findings
from lora_diag.reports.html import html_report
from lora_diag.reports.markdown import markdown_report
from lora_diag.reports.subject import subject_of
from tests.conftest import ROOT
from tests.messages import assert_names
from tests.reports.making import (
    MLP,
    TYPES,
    decay,
    flat_to,
    names,
    overlap,
    overlaps,
    residual,
    residuals,
    spectra,
    spectrum,
    vector,
)

EASY, STEEP, FLAT = flat_to(4, 512), decay(512, 1.2), decay(512, 0.05)


def evidence(*results) -> Evidence:
    return Evidence(tuple(Source(f"{item.run.command}.jsonl", item) for item in results))


def told(*results) -> list[str]:
    return [step.rule for step in advice(evidence(*results))]


def seen(*results) -> list[str]:
    return [result.name for result in findings(evidence(*results))]


def model(s=EASY, blocks=4, verdict="resolved", special=None, left_out=()):
    """Every layer has the spectrum ``s``, but for those whose name contains a key of ``special``."""
    special = special or {}
    return spectra(
        [
            spectrum(layer, next((v for part, v in special.items() if part in layer), s), verdict)
            for layer in names(blocks)
        ],
        left_out,
    )


def test_sufficient_small_rank_is_advised():
    (step,) = advice(evidence(model(EASY)))
    assert (step.rule, step.ranks) == ("sufficient rank", (4,))
    assert_names(step.because, "100%", "28 matrices")
    assert findings(evidence(model(EASY))) == []


def test_enough_is_smallest_rank_keeping_90_percent_per_layer():
    results = model(flat_to(8, 512), special={"layers.2.mlp.up_proj": flat_to(16, 512)})
    (step,) = advice(evidence(results))
    assert step.ranks == (16,)  # at 8, one layer keeps a half


def test_full_rank_is_not_sufficient():
    assert told(model(flat_to(4, 16))) == ["sufficient rank"]  # r=4 of 16
    assert told(model(flat_to(9, 16))) == ["sweep"]  # r=16 of 16 keeps all of anything


def test_fractions_are_not_rounded_up_to_one():
    nearly = np.sqrt(np.array([0.999, 0.0, 0.0, 0.0, 0.001, *[0.0] * 507]))
    (step,) = advice(evidence(model(nearly)))
    assert_names(step.because, "r=4", ">99%")


def test_norms_alone_need_no_adapter():
    zero = spectra([spectrum(n, np.zeros(16)) for n in names(1)], [vector("norm.weight", 1.0)])
    (step,) = advice(evidence(zero))
    assert (step.rule, "--bitfit" in step.argv, step.layers) == ("hybrid", True, ("norm.weight",))


def test_insufficient_layers_get_larger_ranks():
    results = model(
        EASY, special={"layers.1.self_attn.o_proj": FLAT * 5, "layers.2.self_attn.o_proj": flat_to(30, 512)}
    )
    # flat_to(30) keeps 8/30 at r=8 and more than half at 16; the flat one never gets there, so no rank mends all.
    (step,) = advice(evidence(results))
    assert step.params == (26 * 8 + 2 * 64) * 1024
    assert_names(step.because, 2, "28 matrices", "50%", "r=64")
    results = model(EASY, special={"layers.2.self_attn.o_proj": flat_to(30, 512)})
    (step,) = advice(evidence(results))
    assert step.rule == "raise rank in named layers"
    assert step.params == (27 * 8 + 16) * 1024
    assert step.layers == ("model.layers.2.self_attn.o_proj.weight",)
    assert step.command == f"loradiag allocate spectrum.jsonl --params {step.params} -o adapter_config.json"
    assert seen(results) == ["Under-ranked critical layers"]


def test_mostly_insufficient_rank_is_raised_everywhere():
    results = model(flat_to(40, 512))
    (step,) = advice(evidence(results))
    assert (step.rule, step.params) == ("raise rank everywhere", 28 * 32 * 1024)
    assert_names(step.do, "4 times", "r=8")
    assert seen(results) == ["Slow spectral decay everywhere"]


def test_full_training_advised_if_no_rank_reaches_half():
    assert told(model(FLAT)) == ["full fine-tuning"]
    (step,) = advice(evidence(model(EASY, special={"mlp.down_proj": FLAT})))
    assert step.rule == "partial fine-tuning"
    assert_names(step.do, "mlp.down_proj")
    assert len(step.layers) == 4


def test_small_matrices_do_not_suggest_full_training():
    """r=64 on 128×128 is a full matrix's worth of parameters: it says nothing about LoRA."""
    assert "full fine-tuning" not in told(model(decay(128, 0.0)))


def test_intermediate_spectrum_suggests_measuring_loss():
    s = flat_to(12, 512)  # C(8) = 0.67, C(16) = 1
    results = model(s, special={"q_proj": flat_to(100, 512)})
    assert told(model(s)) == ["sufficient rank"]
    assert told(results) == ["raise rank in named layers"]
    s = decay(512, 0.75)
    kept = np.cumsum(s**2) / np.sum(s**2)
    assert (kept[7] > 0.5, kept[31] < 0.9) == (True, True)
    (step,) = advice(evidence(model(s)))
    assert step.rule == "sweep"
    assert step.command.endswith(" --data TRAIN_TEXT --eval HELD_OUT_TEXT --ranks 4,8,16 -o sweep.jsonl")


def test_changed_norms_and_biases_suggest_training_them():
    results = model(EASY)
    total = sum(record.fro**2 for record in results)
    share = 0.2
    heavy = vector("model.norm.weight", math.sqrt(total * share / (1 - share)))
    (step,) = advice(evidence(model(EASY, left_out=[heavy])))
    assert step.rule == "hybrid"
    assert_names(step.because, "20%", "‖Δ‖²", 1, "norms and biases")
    (result,) = findings(evidence(model(EASY, left_out=[heavy])))
    assert result.name == "Norm- or bias-heavy update"
    assert "0.45·‖Δ‖" in result.means
    light = vector("model.norm.weight", math.sqrt(total * 0.04))
    assert told(model(EASY, left_out=[light])) == ["sufficient rank"]


def test_selection_without_norms_has_no_norm_statement():
    heavy = vector("model.norm.weight", 1e3)
    selected = heavy.model_copy(update={"layer": "x", "reason": "not_selected"})
    assert "hybrid" not in told(model(EASY, left_out=[heavy, selected]))


def test_changed_head_suggests_modules_to_save():
    results = model(EASY)
    grown = spectra([*results.layers, spectrum("lm_head.weight", EASY * 10)])
    assert told(grown) == ["train embeddings and head"]


def test_layers_without_adapter_widen_placement():
    records = [residual(layer, 8 if "self_attn" in layer else 0, kept=0.95) for layer in names(4)]
    (step,) = advice(evidence(residuals(records)))
    assert step.rule == "widen placement"
    assert_names(step.because, "43%", "‖ΔW‖²", "lora")
    assert step.command == "loradiag spectrum base full_ft -o spectrum.jsonl"
    (step,) = [each for each in advice(evidence(model(), residuals(records))) if each.rule == "widen placement"]
    assert step.params == 16 * 8 * 256
    assert step.command == f"loradiag allocate spectrum.jsonl --params {step.params} -o adapter_config.json"
    small = [residual(layer, 8 if "self_attn" in layer else 0, kept=0.95, fro=1.0 if "self_attn" in layer else 0.1)
             for layer in names(4)]  # fmt: skip
    assert "widen placement" not in told(residuals(small))


def test_weights_trained_in_full_are_adapted():
    """A head in modules_to_save has an update without a rank."""
    head = residual("classifier.weight", 8, kept=0.9, fro=9.0).model_copy(update={"rank": None, "epsilon_min": None})
    layers = [residual(layer, 8, kept=0.95) for layer in names(4)]
    assert "widen placement" not in told(residuals([*layers, head]))
    left_alone = head.model_copy(update={"rank": 0, "adapter_fro": 0.0})
    assert "widen placement" in told(residuals([*layers, left_alone]))


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_wrong_scale_comes_first(factor):
    records = [residual(layer, 16, kept=0.95, scale=factor, limited_by="scale") for layer in names(4)]
    step, *_ = advice(evidence(residuals(records)))
    assert step.rule == "scale"
    assert_names(step.do, "lora_alpha", "lora", f"{factor:.3g}")
    assert step.argv[-1] == "lora"
    (result,) = findings(evidence(residuals(records)))
    assert result.name == "Scale mismatch"
    assert ("rsLoRA" in result.seen) == (factor == 4.0)  # √16


def test_scale_without_direction_is_null():
    records = [residual(layer, 16, kept=0.95, scale=0.3, cosine=0.2) for layer in names(4)]
    assert seen(residuals(records)) == []


def test_adapter_is_judged_by_its_own_rank():
    full = model(flat_to(12, 512))
    short = residuals([residual(layer, 4, kept=1 / 3) for layer in names(4)])
    wide = residuals([residual(layer, 16, kept=1.0) for layer in names(4)])
    (step,) = advice(evidence(full, short))
    assert step.params == 28 * 8 * 256
    assert_names(step.do, "2 times", "lora")
    assert told(full, wide) == ["sufficient rank"]


def test_advice_without_spectrum_suggests_measurement():
    (step,) = advice(evidence(residuals([residual(layer, 4, kept=1 / 3) for layer in names(4)])))
    assert_names(step.do, "rank", 4)
    assert step.command == "loradiag spectrum base full_ft -o spectrum.jsonl"


def test_non_limiting_rank_is_noted_in_advice():
    full = model(flat_to(12, 512))
    records = [residual(layer, 4, kept=1 / 3, limited_by="direction") for layer in names(4)]
    (step,) = advice(evidence(full, residuals(records)))
    assert_names(step.because, "28 matrices")


def test_flat_projections_are_found_and_others_not():
    flat = decay(512, 0.0)
    assert "Flat spectra in projection layers" in seen(model(EASY, special={"o_proj": flat}))
    assert "Flat spectra in projection layers" not in seen(model(EASY, special={"q_proj": flat}))
    connector = spectra([*model(EASY).layers, spectrum("multi_modal_projector.linear_1.weight", flat)])
    (result,) = [item for item in findings(evidence(connector)) if item.name.startswith("Flat")]
    assert result.layers == ("multi_modal_projector.linear_1.weight",)
    assert_names(result.seen, "90%")


def test_gradients_out_of_reach():
    inside = [overlap(layer, step, 0.3, 0.6) for layer in names(1) for step in (0, 100)]
    assert seen(overlaps(inside)) == []
    rejected_options = [overlap(names(1)[0], 100, 0.035, 0.25)]
    (result,) = findings(evidence(overlaps([*inside[:-1], *rejected_options])))
    assert result.layers == (names(1)[0],)
    assert_names(result.seen, "0.25", "‖G‖", "0.25")
    early = [overlap(names(1)[0], 0, 0.035, 0.25), overlap(names(1)[0], 100, 0.3, 0.6)]
    assert seen(overlaps(early)) == []
    unread = [overlap(names(1)[0], 100, 0.035, 0.25, verdict="floor-limited")]
    assert seen(overlaps(unread)) == []
    one_sided = [overlap(names(1)[0], 100, 0.035, 0.6)]
    assert seen(overlaps(one_sided)) == []


@pytest.mark.parametrize("verdict", ["floor-limited", "unresolved"])
@pytest.mark.parametrize("s", [EASY, FLAT, flat_to(40, 512)], ids=["easy", "flat", "forty"])
def test_no_advice_at_rounding_floor(verdict, s):
    results = model(s, verdict=verdict)
    assert (told(results), seen(results)) == ([], [])
    records = [residual(layer, 8, kept=0.1, scale=0.3, verdict=verdict) for layer in names(4)]
    assert (told(residuals(records)), seen(residuals(records))) == ([], [])
    assert any("float32" in what for what, _ in evidence(results).missing())


def test_less_than_half_resolved_has_no_advice():
    layers = names(4)
    mixed = [spectrum(layer, EASY, "resolved" if i < 13 else "unresolved") for i, layer in enumerate(layers)]
    assert told(spectra(mixed)) == []


def test_unresolved_layers_prevent_sufficiency():
    layers = names(4)
    mixed = [spectrum(layer, EASY, "resolved" if i < 27 else "unresolved") for i, layer in enumerate(layers)]
    assert told(spectra(mixed)) == ["sweep"]


def test_adapter_rank_is_not_evidence():
    records = [spectrum(layer, EASY, method="factored") for layer in names(2)]
    assert (told(spectra(records)), seen(spectra(records))) == ([], [])


def test_advice_without_measurement_is_empty():
    empty = spectra([])
    assert (told(empty), seen(empty)) == ([], [])
    assert Evidence(()).missing()


def test_zero_update_has_no_statement():
    results = model(np.zeros(64))
    assert (told(results), seen(results)) == ([], [])


def test_path_with_blanks_stays_one_argument():
    path = "my 'models'/$(rm -rf)"
    results = spectra(model(FLAT).layers, inputs=(("base", path), ("tuned", "t")))
    (step,) = advice(evidence(results))
    assert tuple(shlex.split(step.command)) == step.argv == ("loradiag", "plan", path, "--ranks", "64")


def test_every_rule_states_version_and_source():
    """All that the planted situations above bring out has a condition, a source and a command."""
    heavy = vector("n", 1e3)
    runs = [
        (model(EASY),), (model(FLAT),), (model(flat_to(40, 512)),), (model(EASY, left_out=[heavy]),),
        (model(decay(512, 0.75)),), (model(EASY, special={"2.self_attn.o": flat_to(30, 512)}),),
        (residuals([residual(n, 16, kept=0.95, scale=3) for n in names(4)]),),
        (residuals([residual(n, 8 if n in names(4, TYPES) else 0, kept=0.95) for n in names(4, TYPES + MLP)]),),
    ]  # fmt: skip
    steps = [step for results in runs for step in advice(evidence(*results))]
    result = [item for results in runs for item in findings(evidence(*results))]
    assert len({step.rule for step in steps}) >= 7
    assert all(step.condition and step.source and step.command.startswith("loradiag ") for step in steps)
    assert all(item.condition and item.source and item.means for item in result)
    page = (ROOT / "docs" / "reference" / "report.md").read_text()
    assert len(STEPS) + len(RULES) == 12
    for name in {step.rule for step in steps} | {item.name for item in result}:
        assert name in page, f"docs/reference/report.md does not explain {name!r}"


@pytest.mark.slow
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40), st.integers(1, 50))
def test_kept_is_fraction_of_energy(values, rank):
    s = np.sort(np.array(values))[::-1]
    record = spectrum("x", s)
    wanted = float(np.sum(s[:rank] ** 2) / np.sum(s**2))
    assert energy_at(record, rank) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.slow
@given(st.permutations(range(6)))
def test_advice_is_independent_of_layer_order(order):
    records = [spectrum(layer, flat_to(4 if i % 2 else 30, 512)) for i, layer in enumerate(names(1)[:6])]
    first, second = (advice(evidence(spectra([records[i] for i in o]))) for o in (range(6), order))
    assert [step.rule for step in first] == [step.rule for step in second]
    assert [set(step.layers) for step in first] == [set(step.layers) for step in second]


def test_advice_names_all_adapters_of_one_step():
    layers = names(4)
    same = residuals([residual(n, 4, 0.3, adapter=name) for name in "abcd" for n in layers])
    (step,) = advice(evidence(model(flat_to(12, 512)), same))
    assert_names(step.because, "rank 4", "a, b, c and d", 28, "28 matrices")
    scaled = residuals([residual(n, 16, 0.95, scale=4.0, adapter=name) for name in "ab" for n in layers])
    (step,) = [each for each in advice(evidence(scaled)) if each.rule == "scale"]
    assert (step.adapters, step.argv[-2:]) == (("a", "b"), ("a", "b"))


def test_advice_ignores_adapters_replaced_by_larger():
    full, layers = model(flat_to(12, 512)), names(4)
    small = [residual(n, 4, 0.3, adapter="small") for n in layers]
    large = [residual(n, 16, 1.0, adapter="large") for n in layers]
    assert told(full, residuals(small)) == ["raise rank everywhere"]
    assert told(full, residuals([*small, *large])) == told(full, residuals(large)) == ["sufficient rank"]
    # Two halves are one whole: what one adapter leaves alone another adapts.
    halves = [residual(n, 8 if ("mlp" in n) == (name == "mlp") else 0, 0.95, adapter=name)
              for name in ("mlp", "attention") for n in layers]  # fmt: skip
    assert "widen placement" not in told(residuals(halves))
    assert "widen placement" in told(residuals(halves[:28]))


def test_advice_names_each_fine_tune_once():
    one = model(flat_to(40, 512))
    other = spectra(one.layers, inputs=(("base", "base"), ("tuned", "other")))
    runs = Evidence((Source("one.jsonl", one), Source("other.jsonl", other)))
    assert [(step.about, step.argv[2]) for step in advice(runs)] == [
        (("full_ft",), "one.jsonl"),
        (("other",), "other.jsonl"),
    ]
    flat = [Evidence(tuple(Source("s.jsonl", spectra(model(FLAT).layers, inputs=(("base", "b"), ("tuned", name))))
                           for name in group)) for group in (["x"], ["x", "y"])]  # fmt: skip
    assert advice(flat[0]) == advice(flat[1])  # the same step for both, once


def test_advice_spends_budget_of_allocation():
    full = model(flat_to(40, 512))
    plan = lora_diag.allocate(full, params=50_000, exclude="o_proj")
    assert told(full) == ["raise rank everywhere"]
    (step,) = advice(evidence(full, plan))
    assert step.rule == "take the allocation"
    assert step.params == plan.whole[0].params <= 50_000
    words = "loradiag allocate spectrum.jsonl --params 50000 --exclude o_proj -o adapter_config.json"
    assert step.command == words
    from tests.reports.test_advice_probes import sensitivity  # which imports this file

    gains = sensitivity([0.5, 0.4, 0.3, *[0.0] * 7])
    (place,) = [each for each in advice(evidence(full, plan, gains)) if each.rule == "place by gain"]
    assert place.params == step.params


def test_unfinished_run_is_announced_first_and_supports_no_step():
    results = replace(model(flat_to(40, 512)), end=None)
    runs = evidence(results)
    assert advice(runs) == []
    (line,) = subject_of(runs).unfinished
    assert "28 records" in line
    first, second, *_ = markdown_report(runs).split("\n\n")
    assert (first[:2], second[:16]) == ("# ", "> **Unfinished:*")
    page = html_report(runs)
    assert page.index("Unfinished.") < page.index('class="answers"')
    assert subject_of(evidence(model())).unfinished == ()


def test_many_adapters_are_shortened_and_counted():
    records = [residual(n, 4, 0.3, adapter=f"a{i}") for i in range(12) for n in names(1)]
    told = subject_of(evidence(residuals(records)))
    assert told.silent == 12 - MAX_ADAPTERS
    assert_names(markdown_report(evidence(residuals(records))), "4 more", "adapters")
