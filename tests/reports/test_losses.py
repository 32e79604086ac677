"""Losses in the report: they lead, in any mix of runs; every number is a record's; names of sets stay text."""

import pytest
from markdown_it import MarkdownIt

from lora_diag.catalog import features
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.reports.html import html_report, images_of
from lora_diag.reports.markdown import markdown_report
from tests.plots import making
from tests.reports.test_html import HOSTILE, Elements, evidence

pytestmark = pytest.mark.slow

SETTINGS = {
    "length": 32,
    "dtype": "float32",
    "device": "cpu",
    "tokens": "bytes",
    "batch": 8,
    "steps": 9,
    "seed": 0,
    "tolerance": 0.02,
    "targets": "all-linear",
    "alpha_over_rank": 2,
    "optimizer": "AdamW",
    "rest": "tuned",
    "layers": None,
    "exclude": None,
}


def run(command, records, *more, base="models/base"):
    sides = [("base", base), ("tuned", "models/full"), *more, ("eval", "held_out.txt")]
    inputs = tuple(RunInput(role=role, path=path, kind="folder", tensors=1) for role, path in sides)
    end = End(layers=0, left_out=0, fro=None, base_fro=None)
    return Results(Run(command=command, version="0", inputs=inputs, settings=SETTINGS), (), (), end, tuple(records))


def outputs(sets=("held_out", "other"), gaps=(0.3, 0.01)):
    records = []
    adapters = [f"runs/lora_{i}" for i in range(len(gaps))]
    for place, name in enumerate(sets):
        where = {"name": name, "shifted": place > 0}

        def one(subject, path, gap, where=where, **more):
            record = making.probe("outputs", subject, 1.2345 + gap, gap=gap, gap_error=0.0123, **where, **more)
            return record.model_copy(update={"name": path})

        records.append(one("base", "", 0.8, kept=0.0, distance=1.0, kl=0.5, agreement=0.4, hidden=(None, 1.0, 1.0)))
        records.append(one("tuned", "", 0.0, kept=1.0, distance=0.0, kl=0.0, agreement=1.0, hidden=(None, 0.0, 0.0)))
        for path, gap in zip(adapters, gaps, strict=True):
            kept = 1 - gap / 0.8
            more = {"kept": kept, "distance": 0.654, "kl": 0.21, "agreement": 0.83, "hidden": (None, 0.9, 0.777)}
            records.append(one("adapter", path, gap, **more))
    return run("probe outputs", records, *(("adapter", path) for path in adapters))


KINDS = {
    "outputs": outputs,
    "sweep": lambda: run("probe sweep", making.swept()),
    "truncation": lambda: run("probe truncation", making.truncated()),
}


def test_tables_have_numbers_of_records():
    page = html_report(evidence(outputs(), KINDS["truncation"](), KINDS["sweep"]()))
    words = Elements(page).words
    for record in outputs().whole:
        assert f"{record.loss:.4f}" in words
    for record in KINDS["truncation"]().whole:
        assert f"{record.loss:.4f}" in words
        assert record.energy is None or f"{record.energy:.2f}" in words
    # The hidden states, depth by depth; where TUNED has BASE's there is no distance.
    assert {"0 (input)", "same", "0.90", "0.78"} <= set(words)
    assert {"0.654", "83%", "0.21"} <= set(words)


def test_hostile_names_of_sets_and_adapters_stay_text():
    evil = outputs(sets=HOSTILE[:3])
    runs = evidence(
        evil,
        run("probe sweep", making.swept(sets=HOSTILE[3:5])),
        run("probe truncation", making.truncated(sets=HOSTILE)),
    )
    seen = Elements(html_report(runs, images_of(runs)))
    assert not {"b", "a"} & {tag for tag, a in seen.seen if "href" in a and "x.example" in a["href"]}
    assert sum(tag == "script" for tag, _ in seen.seen) == 1  # no layers: the one that sorts the tables
    assert not [a for tag, a in seen.seen if "onerror" in a]
    rendered = Elements(MarkdownIt("commonmark").enable("table").render(markdown_report(runs)))
    assert not {"script", "img", "b", "a"} & {tag for tag, _ in rendered.seen}
    assert "".join(rendered.words).count("alert(1)") > 2


def test_unfinished_run_is_shown_partially():
    whole = outputs()
    for count in range(len(whole.whole) + 1):
        cut = Results(whole.run, (), (), None, whole.whole[:count])
        assert 'role="alert"' in html_report(evidence(cut))
    for name in ("sweep", "truncation"):
        cut = Results(KINDS[name]().run, (), (), None, KINDS[name]().whole[:1])
        assert markdown_report(evidence(cut))


def test_every_probe_with_table_has_section():
    commands = {feature.name for feature in features() if feature.statements and feature.name.startswith("probe ")}
    assert commands == {feature.name for feature in features() if feature.section and feature.name.startswith("probe ")}
