"""Every step's command does what its sentence says: its words, parsed by the program itself, against its fields."""

import re

import click
import pytest
import typer

import lora_diag
from lora_diag.cli.app import application
from lora_diag.rendering.statements import make_statement, summary_of
from lora_diag.rendering.text import to_text
from lora_diag.reports.advice import advice
from lora_diag.reports.findings import findings
from lora_diag.reports.worth import rejected_options
from tests.reports.making import MLP, TYPES, decay, flat_to, names, residual, residuals, spectra, spectrum, vector
from tests.reports.test_advice import EASY, FLAT, evidence, model
from tests.reports.test_advice_probes import adapter, bounds, fisher, intrinsic, sensitivity
from tests.reports.test_loss_advice import outputs, sweep, truncation

pytestmark = pytest.mark.slow

COST = list(range(1, 13))
SHORT = residuals([residual(n, 4, kept=1 / 3) for n in names(4)])
HEAVY = vector("n", 1e3)
SITUATIONS = {
    "sufficient rank": (model(EASY),),
    "full": (model(FLAT),),
    "partial": (model(EASY, special={"mlp.down_proj": FLAT}),),
    "everywhere": (model(flat_to(40, 512)),),
    "named": (model(EASY, special={"2.self_attn.o": flat_to(30, 512)}),),
    "hybrid": (model(EASY, left_out=[HEAVY]),),
    "hybrid measured": (model(EASY, left_out=[HEAVY]), truncation({0: 0.5, 4: 0.7, 8: 0.8})),
    "norms alone": (spectra([spectrum(n, 0 * EASY) for n in names(1)], [HEAVY]),),
    "vocabulary": (spectra([*model(EASY).layers, spectrum("lm_head.weight", EASY * 10)]),),
    "sweep": (model(decay(512, 0.75)),),
    "scale": (residuals([residual(n, 16, kept=0.95, scale=3) for n in names(4)]),),
    "placement": (
        model(),
        residuals([residual(n, 8 if n in names(4, TYPES) else 0, 0.95) for n in names(4, TYPES + MLP)]),
    ),
    "adapter": (model(flat_to(12, 512)), SHORT),
    "adapter alone": (SHORT,),
    "allocation": (
        model(flat_to(40, 512)),
        lora_diag.allocate(model(flat_to(40, 512)), memory_budget="2MB", max_rank=9),
    ),
    "allocation by rank": (model(FLAT), lora_diag.allocate(model(FLAT), total_rank=99, allowed_ranks=[4, 8])),
    "keep": (outputs({"a": 0.0, "b c": 0.3}),),
    "worse": (outputs({"a": 0.3}),),
    "unknown": (outputs({"a": 0.09, "b": 0.1}, error=0.05),),
    "distrust": (model(FLAT), outputs({"a": 0.09}, base=0.5)),
    "saturated": (sweep({4: 1.1, 8: 1.099, 16: 1.098}),),
    "rising": (sweep({4: 1.5, 8: 1.2, 16: 1.1}),),
    "noisy": (sweep({4: 1.50, 8: 1.51}, spread=0.04),),
    "no gain": (sweep({4: 2.1, 8: 2.2}),),
    "shift": (sweep({4: 1.1, 8: 1.099, 16: 1.098}, own=1.0, shifted={4: 1.2, 8: 1.3, 16: 1.4}),),
    "shift asks for more": (sweep({4: 1.1, 8: 1.099, 16: 1.098}, own=2.0, shifted={4: 1.5, 8: 1.3, 16: 1.1}),),
    "compress": (truncation({0: 0.2, 4: 0.5, 16: 0.93, 64: 0.99}),),
    "gains": (model(), sensitivity([0.5, 0.4, 0.3, *[0.0] * 7])),
    "gains alone": (sensitivity([0.5, 0.4, 0.3, *[0.0] * 7]),),
    "fisher": (model(), fisher(COST[::-1], COST)),
    "fisher alone": (fisher(COST[::-1], COST, measured=False),),
    "bound": (bounds(700.0),),
    "fits": (adapter(16), intrinsic({2: (0.95, 0.93), 8: (0.99, 0.98)})),
    "falls short": (adapter(8), intrinsic({2: (0.5, 0.6), 8: (0.7, 0.75)})),
}


def parsed(argv):
    """Return the command's name and what the program makes of its words."""
    assert argv[0] == "loradiag"
    command, words = typer.main.get_command(application()), list(argv[1:])
    context = click.Context(command, info_name="loradiag")
    name = []
    while hasattr(command, "resolve_command"):
        part, command, words = command.resolve_command(context, words)
        name.append(part)
    return " ".join(name), command.make_context(name[-1], words, parent=context).params


def numbers(value):
    return [] if value is None else [float(part) for part in str(value).split(",")]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_step_command_has_numbers_of_its_text(situation):
    steps = advice(evidence(*SITUATIONS[situation]))
    assert steps
    assert len({step.argv for step in steps}) == len(steps)
    for step in steps:
        name, given = parsed(step.argv)
        ranks = numbers(given.get("ranks") or given.get("rank")) if {"--rank", "--ranks"} & {*step.argv} else []
        assert ranks == list(step.ranks), step
        assert numbers(given.get("rates")) == list(step.rates) or not step.rates, step
        assert given.get("repeats", 2) == (step.seeds or given.get("repeats", 2)), step
        assert set(step.adapters) <= set(step.argv), step
        # What the sentence asks for is in the command, and no other rank or number of parameters is.
        options = step.do.replace("as many as with r=8 everywhere", "")
        assert {float(rank) for rank in re.findall(r"\br=(\d+)", options)} <= {*ranks}, step
        amounts = [int(each.replace(",", "")) for each in re.findall(r"([\d,]+)(?: trainable)? parameters", step.do)]
        assert amounts == ([] if step.params is None else [step.params]), step
        if name == "allocate":
            spends = {key: given[key] for key in ("params", "total_rank", "memory_budget") if given[key] is not None}
            assert len(spends) == 1
            assert step.rule == "take the allocation" or spends == {"params": str(step.params)}


def test_steps_and_findings_match_snapshot(snapshot):
    """What pages show of them: run ``pytest --snapshot-update`` after a change of words, and read the difference."""
    shown = {}
    for situation, runs in SITUATIONS.items():
        steps = [(step.rule, step.do, step.because, step.condition, step.command) for step in advice(evidence(*runs))]
        result = [(item.name, item.seen, item.means, item.condition) for item in findings(evidence(*runs))]
        shown[situation] = steps + result
    assert shown == snapshot


@pytest.mark.parametrize(
    "situation", ["everywhere", "named", "adapter", "placement", "allocation", "allocation by rank"]
)
def test_step_budget_matches_its_command(situation):
    spectrum_run = SITUATIONS[situation][0]
    (step,) = [step for step in advice(evidence(*SITUATIONS[situation])) if step.argv[1] == "allocate"]
    _, given = parsed(step.argv)
    budget = {key: given[key] for key in ("params", "total_rank", "memory_budget") if given[key] is not None}
    limits = {key: given[key] for key in ("max_rank", "min_rank") if given[key]}
    choice = {"allowed_ranks": [int(n) for n in numbers(given["allowed_ranks"])]} if given["allowed_ranks"] else {}
    (certificate,) = lora_diag.allocate(spectrum_run, **budget, **limits, **choice).whole
    assert certificate.params <= step.params
    if step.rule == "take the allocation":
        assert certificate == SITUATIONS[situation][1].whole[0]
    elif step.rule.startswith("raise rank"):
        assert f"they keep {100 * certificate.kept:.0f}% of the energy" in step.because or certificate.kept > 0.99


def test_steps_avoid_ranks_with_higher_loss():
    full = model(flat_to(12, 512))
    trained = residuals([residual(n, 4, 1 / 3, cosine=0.2, adapter="r4") for n in names(4)])
    by_rule = {step.rule: step for step in advice(evidence(full, trained))}
    assert by_rule["raise rank everywhere"].params == 28 * 8 * 256
    # An adapter of r=8 lost: half of the energy at r=8 is no reason to train at it again.
    both = residuals(
        [residual(n, r, r / 12, cosine=0.2, adapter=f"r{r}") for r in (4, 8) for n in names(4)], ("r4", "r8")
    )
    measured = outputs({"r4": 0.4, "r8": 0.3})
    steps = {step.rule: step for step in advice(evidence(full, both, measured))}
    assert min(steps["close the gap"].ranks) == 16
    # A sweep in which r=8 is shown not to be enough.
    swept = sweep({4: 1.5, 8: 1.4, 16: 1.1, 32: 1.1})
    assert rejected_options(evidence(swept)).trained == 8
    assert min(next(step for step in advice(evidence(both, measured, swept))).ranks) > 8


def test_steps_avoid_ranks_that_lose_gain():
    assert [step.ranks for step in advice(evidence(model(EASY)))] == [(4,)]
    assert [step.ranks for step in advice(evidence(model(EASY), truncation({4: 0.5})))] == [(8,)]
    cut = residuals([residual(n, 8, 0.999999, adapter="svd") for n in names(4)], ("svd",))
    steps = advice(evidence(model(EASY), cut, outputs({"svd": 0.4})))
    assert all(step.argv[1] != "extract" or min(step.ranks) > 8 for step in steps)
    assert [step.ranks for step in advice(evidence(truncation({8: 0.95}), cut, outputs({"svd": 0.4})))
            if step.rule == "compress"] == []  # fmt: skip


def test_more_rank_is_not_advised_where_higher_rank_lost():
    from tests.reports.test_loss_advice import rivals, run

    full = model(flat_to(40, 512))
    ranks = {"a": 4, "b": 4, "c": 16}
    trained = residuals([residual(n, r, 0.3, cosine=0.2, adapter=name) for name, r in ranks.items() for n in names(4)])
    records, *_ = rivals()  # c is shown to be worse than b
    rules = [step.rule for step in advice(evidence(full, trained, run("probe outputs", records)))]
    assert not any(rule.startswith("raise rank") for rule in rules)
    other = residuals(
        [residual(n, r, 0.3, cosine=0.2, adapter=name) for name, r in {**ranks, "c": 2}.items() for n in names(4)]
    )
    rules = [step.rule for step in advice(evidence(full, other, run("probe outputs", records)))]
    assert any(rule.startswith("raise rank") for rule in rules)


def test_placement_omits_units_without_gain():
    layers = names(20, ("mlp.up_proj", "self_attn.q_proj"))
    records = residuals([residual(n, 8 if "q_proj" in n else 0, 0.95) for n in layers])
    assert "widen placement" in [step.rule for step in advice(evidence(records))]
    gains = sensitivity([*[0.0] * 19, 0.5])  # of mlp.up_proj in 20 blocks
    assert "widen placement" not in [step.rule for step in advice(evidence(records, gains))]


def test_fine_tune_worse_than_base_is_not_a_target():
    rules = [step.rule for step in advice(evidence(model(flat_to(40, 512)), outputs({"a": 0.1}, base=0.5)))]
    assert rules[0] == "fine-tune worse than BASE"
    assert not any(rule.startswith("raise rank") for rule in rules)


def test_summary_states_unfinished_run_first():
    statements = [
        make_statement("compared", "Compared", "a"),
        make_statement("unfinished", "Warning", "b"),
        make_statement("left_out", "Left out", "c"),
    ]
    text = to_text(summary_of(statements, "d"), 80, False)
    assert [line.split()[-1] for line in text.splitlines() if line.strip()] == ["b", "a", "c", "d"]
