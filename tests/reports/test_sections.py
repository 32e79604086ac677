"""Several updates, intruders and fleets in the report: any mix of runs, hostile names, the numbers of the records."""

import itertools
import json
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt

from lora_diag.diagnostics.intruders.record import Direction, Intruders
from lora_diag.diagnostics.verify_merge.record import Merge
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.html import html_report, images_of
from lora_diag.reports.markdown import markdown_report
from tests.conftest import ROOT
from tests.diagnostics.verify_merge.test_summary import RIGHT
from tests.messages import assert_names
from tests.plots import making
from tests.reports.making import low_rank, questions
from tests.reports.test_html import HOSTILE, Elements, evidence, small

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"
GITHUB = MarkdownIt("commonmark").enable("table")


def run(command, records, *inputs, left_out=()):
    sides = tuple(RunInput(role=role, path=path, kind="PEFT LoRA", tensors=9) for role, path in inputs)
    end = End(layers=len(records), left_out=len(left_out), fro=None, base_fro=None)
    return Results(Run(command=command, version="0", inputs=sides, settings={}), tuple(records), tuple(left_out), end)


def interference(
    names=("runs/sql", "runs/chat"), layers=("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight")
):
    pairs = [
        making.interference(layer, {8: [0.5] * 8}, {8: [0.2] * 8}, first=first, second=second)
        for layer in layers
        for first, second in itertools.combinations(names, 2)
    ]
    sums = [making.union(layer, 7 + i, 12, 13, updates=tuple(names)) for i, layer in enumerate(layers)]
    return run("interference", [*pairs, *sums], *(("adapter", name) for name in names))


def intruders(layers=("model.layers.0.q_proj.weight",), base="base", tuned="tuned"):
    directions = [
        Direction(sigma=s, similarity=c, nearest=1, window=1, projection=c, projection_random=0.1, kind=kind)
        for s, c, kind in ((3.0, 0.9, "kept"), (2.0, 0.1, "intruder"))
    ]
    records = [
        Intruders(
            layer=layer,
            shape=(32, 64),
            k=2,
            epsilon=0.5,
            window=0.1,
            fro=1.0,
            base_fro=9.0,
            count=1,
            rotated=0,
            intruders=1,
            share=0.5,
            similarity_lowest=0.1,
            similarity_random=0.3,
            count_random=2.0,
            directions=tuple(directions),
            method="exact",
        )
        for layer in layers
    ]
    return run("intruders", records, ("base", base), ("tuned", tuned))


def fleet(names=("runs/a", "runs/b", "runs/c")):
    rng = np.random.default_rng(0)
    same = rng.normal(size=64)
    records = [
        making.adapter(name, 1.0, 0.9, sketch=same if i < 2 else rng.normal(size=64)) for i, name in enumerate(names)
    ]
    records[0] = making.adapter(names[0], 1.0, 0.25, sketch=same)
    return run("spectrum --adapters", records, *(("adapter", name) for name in names))


KINDS = {"interference": interference, "intruders": intruders, "fleet": fleet}


def test_thousand_adapters_are_not_thousand_lines():
    names = [f"runs/adapter-{i:04}" for i in range(1000)]
    rng = np.random.default_rng(0)
    many = run(
        "spectrum --adapters",
        [making.adapter(name, float(rng.uniform(0.9, 1.1)), 0.2, sketch=rng.normal(size=64)) for name in names],
        *(("adapter", name) for name in names),
    )
    page = html_report(evidence(many), images_of(evidence(many)))
    assert "and 980 more" in page
    assert len(page) < 3e6
    assert len(markdown_report(evidence(many))) < 10_000


@pytest.fixture(scope="module")
def plain():
    """The elements of a page whose names are not hostile."""
    runs = evidence(interference(), intruders(), fleet(), *small())
    return Elements(html_report(runs, images_of(evidence(*small())))).seen


def test_several_hostile_names_stay_text(plain):
    layers = [f"model.layers.0.{name}" for name in HOSTILE]
    runs = (
        interference((HOSTILE[0], f"x/{HOSTILE[0]}", "plain"), (*HOSTILE, *layers)),
        *(interference((name, f"x/{name}"), layers[:1]) for name in HOSTILE[1::2]),
        *(intruders(layers, name, name) for name in HOSTILE[::2]),
        fleet([f"{name}{end}" for name in HOSTILE for end in ("/a", "b")]),
    )
    sources = zip(itertools.cycle(HOSTILE), runs, strict=False)
    hostile = Evidence(tuple(Source(name, item) for name, item in sources))
    page = html_report(hostile, images_of(hostile), "now")
    result = Elements(page)
    assert {tag for tag, _ in result.seen} <= {tag for tag, _ in plain} | {"br"}
    scripts = [tag for tag, _ in plain if tag == "script"]
    assert len([tag for tag, _ in result.seen if tag == "script"]) == len(scripts)
    assert not [attr for _, attrs in result.seen for attr in attrs if attr.startswith("on")]
    assert all(attrs["src"].startswith("data:image/svg+xml;base64,") for tag, attrs in result.seen if tag == "img")
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", page)
    text = GITHUB.render(markdown_report(hostile))
    assert not re.search(r"<(script|img|!--|b|a)\b", text)
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", text)


def merged(*statuses):
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(len(statuses))]
    records = [
        Merge(**RIGHT | {"layer": layer, "status": status, "differing_share": i / 8, "scale": 1 - i / 4})
        for i, (layer, status) in enumerate(zip(layers, statuses, strict=True))
    ]
    return run("verify-merge", records, ("base", "base"), ("adapter", "runs/a"), ("merged", "runs/m"))


def test_merge_comes_first_and_one_wrong_layer_decides():
    runs = evidence(merged("ok", "dropped", "ok"))
    page, text = html_report(runs, images_of(runs)), markdown_report(runs)
    for message in (" ".join(Elements(page).words), text):
        assert_names(message, *questions("verify-merge"), "no", "1 of 3", "ΔW")
        assert_names(message, "a in m")
        assert low_rank() not in message
        assert "Failure modes" not in message
    fields = {field["title"]: field["values"] for field in json.loads(Elements(page).scripts["data"])["fields"]}
    assert fields["merge"] == ["ok", "dropped", "ok"]
    assert fields["differing"] == [0, 0.125, 0.25]
    assert fields["scale c"] == [1, 0.75, 0.5]
    by_type = text[text.index("## By module type") :]
    assert "| `self_attn.q_proj` | 3 | dropped |" in by_type
    assert_names(markdown_report(evidence(merged("ok", "ok"))), *questions("verify-merge"), "yes", 2, "ΔW")
