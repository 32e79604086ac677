"""Planted situations: each rule applies where its evidence is, and not where it is missing or at
the noise floor.
"""

import shlex
from dataclasses import replace

import click
import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import lora_diag
from lora_diag.cli.app import application
from lora_diag.reports.advice import RULES, advice
from lora_diag.reports.evidence import Evidence, Source, energy_at
from lora_diag.reports.html import html_report
from lora_diag.reports.markdown import markdown_report
from lora_diag.reports.subject import subject_of
from tests.conftest import ROOT
from tests.plots.making import searched
from tests.reports.making import (
    decay,
    flat_to,
    names,
    residual,
    residuals,
    spectra,
    spectrum,
)

EASY, STEEP, FLAT = flat_to(4, 512), decay(512, 1.2), decay(512, 0.05)


def evidence(*results) -> Evidence:
    return Evidence(tuple(Source(f"{item.run.command}.jsonl", item) for item in results))


def told(*results) -> list[str]:
    """Return the rules that apply, but for the request to measure a loss, which all pages without
    one have.
    """
    return [step.rule for step in advice(evidence(*results)) if step.rule != "measure the loss"]


def steps(*results) -> dict[str, object]:
    return {step.rule: step for step in advice(evidence(*results))}


def model(s=EASY, blocks=4, verdict="resolved", special=None, left_out=()):
    """Every layer has the spectrum ``s``, but for those whose name contains a key of
    ``special``.
    """
    special = special or {}
    return spectra(
        [
            spectrum(layer, next((v for part, v in special.items() if part in layer), s), verdict)
            for layer in names(blocks)
        ],
        left_out,
    )


def test_sufficient_small_rank_is_extracted():
    assert told(model(EASY)) == ["sufficient rank"]
    step = steps(model(EASY))["sufficient rank"]
    assert step.facts["rank"] == 4
    assert step.command == "loradiag extract base full_ft --rank 4 -o adapter/"
    # At 8, one layer keeps a half.
    results = model(flat_to(8, 512), special={"layers.2.mlp.up_proj": flat_to(16, 512)})
    assert steps(results)["sufficient rank"].facts["rank"] == 16


def test_full_rank_is_not_sufficient():
    assert told(model(flat_to(4, 16))) == ["sufficient rank"]  # r=4 of 16
    assert told(model(flat_to(9, 16))) == []  # r=16 of 16 keeps all of anything


def test_insufficient_layers_are_named_and_get_rank():
    # flat_to(30) keeps 8/30 at r=8, and half of its energy needs 15.
    results = model(EASY, special={"layers.2.self_attn.o_proj": flat_to(30, 512)})
    step = steps(results)["raise the rank"]
    assert step.layers == ("model.layers.2.self_attn.o_proj.weight",)
    assert step.facts["worst"] == "27%"
    assert (
        step.command
        == "loradiag allocate spectrum.jsonl --energy 0.5 --min-rank 8 -o adapter_config.json"
    )


def test_advised_allocation_leaves_no_layer_short():
    results = model(flat_to(40, 512), special={"q_proj": EASY})
    step = steps(results)["raise the rank"]
    planned = lora_diag.allocate(results, energy=0.5, min_rank=8)
    assert step.argv[3:7] == ("--energy", "0.5", "--min-rank", "8")
    assert all(record.kept >= 0.5 and record.rank >= min(8, 4) for record in planned)
    assert {record.rank for record in planned if "q_proj" not in record.layer} == {20}


def test_adapter_is_judged_by_its_own_rank():
    full = model(flat_to(40, 512))
    short = residuals([residual(layer, 4, kept=0.1) for layer in names(4)])
    wide = residuals([residual(layer, 32, kept=0.8, adapter="wide") for layer in names(4)])
    assert steps(full, short)["raise the rank"].facts["min_rank"] == 4
    assert (
        told(full, wide) == told(full, residuals([*short, *wide])) == []
    )  # the larger one replaces the smaller


def test_small_rank_without_spectrum_suggests_measurement():
    step = steps(residuals([residual(layer, 4, kept=1 / 3) for layer in names(4)]))[
        "raise the rank"
    ]
    assert (step.facts["rank"], step.facts["worst"]) == ("4", "33%")
    assert step.command == "loradiag spectrum base full_ft -o spectrum.jsonl"


@pytest.mark.parametrize(("by_direction", "rules"), [(15, []), (14, ["raise the rank"])])
def test_rank_is_not_raised_for_other_solutions(by_direction, rules):
    limits = ["direction"] * by_direction + ["rank"] * (28 - by_direction)
    records = [
        residual(layer, 4, kept=0.1, limited_by=limit)
        for layer, limit in zip(names(4), limits, strict=True)
    ]
    assert told(model(flat_to(40, 512)), residuals(records)) == rules


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_wrong_scale_comes_before_rank(factor):
    records = [
        residual(layer, 16, kept=0.4, cosine=0.6, scale=factor, limited_by="scale")
        for layer in names(4)
    ]
    step, *_ = advice(evidence(residuals(records)))
    assert step.rule == "scale"
    assert step.facts["factors"] == {"lora": pytest.approx(factor)}
    assert step.command == "loradiag residual base full_ft lora"
    assert ("rsLoRA" in step.because) == (factor == 4.0)  # √16
    assert told(residuals(records)) == ["scale", "raise the rank"]


@pytest.mark.parametrize(("scale", "cosine"), [(0.3, 0.2), (1.2, 0.9)])
def test_scale_without_direction_or_near_one_is_kept(scale, cosine):
    assert (
        told(
            residuals(
                [residual(layer, 16, kept=0.95, scale=scale, cosine=cosine) for layer in names(4)]
            )
        )
        == []
    )


@pytest.mark.parametrize("verdict", ["floor-limited", "unresolved"])
@pytest.mark.parametrize("s", [EASY, FLAT, flat_to(40, 512)], ids=["easy", "flat", "forty"])
def test_unresolved_files_support_no_rule_on_weights(verdict, s):
    assert told(model(s, verdict=verdict)) == []
    records = [residual(layer, 8, kept=0.1, scale=0.3, verdict=verdict) for layer in names(4)]
    assert told(residuals(records)) == []


def test_page_without_update_has_no_step():
    factored = spectra(
        [spectrum(layer, EASY, method="factored") for layer in names(2)]
    )  # a rank is a setting
    for results in (factored, spectra([]), model(np.zeros(64))):
        assert advice(evidence(results)) == []
    assert advice(Evidence(())) == []


def test_distances_ask_for_loss():
    step = steps(model(EASY))["measure the loss"]
    assert (
        step.command
        == "loradiag probe truncation base full_ft --eval HELD_OUT_TEXT -o truncation.jsonl"
    )
    step = steps(residuals([residual(layer, 4, kept=1 / 3) for layer in names(4)]))[
        "measure the loss"
    ]
    assert step.argv[5] == "lora"


def test_rank_is_raised_without_condition_if_an_adapter_is_worse():
    from tests.reports.test_loss_advice import outputs

    short = model(FLAT)
    worse, undecided = outputs({"a": 0.3}), outputs({"a": 0.09}, error=0.05)
    actions = [
        steps(*runs)["raise the rank"].do for runs in ((short, worse), (short, undecided), (short,))
    ]
    assert ["if the loss needs it" in action for action in actions] == [False, True, True]


def test_path_with_blanks_stays_one_argument():
    path = "my 'models'/$(rm -rf) {base}"
    results = spectra(model(EASY).layers, inputs=(("base", path), ("tuned", "t")))
    step = steps(results)["sufficient rank"]
    assert tuple(shlex.split(step.command)) == step.argv == (
        "loradiag", "extract", path, "t", "--rank", "4", "-o", "adapter/",
    )  # fmt: skip


def situations():
    """Return runs in which each rule applies, several for those with more than one command."""
    from tests.reports.test_loss_advice import outputs, sweep, truncation  # which import this file

    short = residuals([residual(n, 16, kept=0.4, cosine=0.6, scale=3) for n in names(4)])
    settled = sweep({4: 1.5, 8: 1.2, 16: 1.1, 64: 1.099})
    return [
        (model(EASY),), (model(flat_to(40, 512)),), (short,),
        (outputs({"a": 0.0, "b c": 0.3}),), (outputs({"a": 0.3}),), (outputs({"a": 0.09}, error=0.05),),
        (outputs({"a": 0.1}, base=0.5),), (settled,), (model(EASY), settled), (sweep({4: 1.5, 8: 1.2, 16: 1.1}),),
        (sweep({4: 1.50, 8: 1.51}, spread=0.04),), (sweep({4: 2.1, 8: 2.2}),),
        (sweep({4: 1.1, 8: 1.099, 16: 1.098}, own=1.0, shifted={4: 1.2, 8: 1.3, 16: 1.4}),),
        (truncation({0: 0.2, 4: 0.5, 16: 0.93, 64: 0.99}),), (searched(),),
    ]  # fmt: skip


@pytest.mark.slow
def test_every_rule_has_parsable_command_and_page_in_docs():
    """The program itself parses every command."""
    found = [step for results in situations() for step in advice(evidence(*results))]
    assert {step.rule for step in found} == {rule.name for rule in RULES}
    for step in found:
        command, words = typer.main.get_command(application()), list(step.argv[1:])
        context = click.Context(command, info_name="loradiag")
        while hasattr(command, "resolve_command"):
            name, command, words = command.resolve_command(context, words)
        params = command.make_context(name, words, parent=context).params
        for key in ("rank", "ranks"):
            if f"--{key}" in step.argv and not isinstance(step.facts.get(key), str):
                given = [int(part) for part in str(params[key]).split(",")]
                assert given == [step.facts.get("rank")] or set(
                    step.facts.get("ranks", (0,))
                ) <= set(given)
    page = (ROOT / "docs" / "reference" / "report.md").read_text()
    assert [rule.name for rule in RULES if f"| `{rule.name}` |" not in page] == []


def test_rule_excluded_by_later_one_would_never_be():
    for place, rule in enumerate(RULES):
        assert set(rule.unless) <= {earlier.name for earlier in RULES[:place]}, rule.name


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
    records = [
        spectrum(layer, flat_to(4 if i % 2 else 30, 512)) for i, layer in enumerate(names(1)[:6])
    ]
    first, second = (advice(evidence(spectra([records[i] for i in o]))) for o in (range(6), order))
    assert [step.rule for step in first] == [step.rule for step in second]
    assert [set(step.layers) for step in first] == [set(step.layers) for step in second]


def test_advice_names_each_fine_tune_once():
    one = model(flat_to(40, 512))
    other = spectra(one.layers, inputs=(("base", "base"), ("tuned", "other")))
    runs = Evidence((Source("one.jsonl", one), Source("other.jsonl", other)))
    raised = [step for step in advice(runs) if step.rule == "raise the rank"]
    assert [(step.about, step.argv[2]) for step in raised] == [
        (("full_ft",), "one.jsonl"),
        (("other",), "other.jsonl"),
    ]
    flat = [Evidence(tuple(Source("s.jsonl", spectra(model(FLAT).layers, inputs=(("base", "b"), ("tuned", name))))
                           for name in group)) for group in (["x"], ["x", "y"])]  # fmt: skip
    assert [step for step in advice(flat[1]) if step.rule == "raise the rank"] == advice(flat[0])[
        -1:
    ]  # for both, once


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
