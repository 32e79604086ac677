"""Results at a prompt and in a notebook."""

from dataclasses import replace

import pytest

from lora_diag.catalog import read_results
from lora_diag.errors import UsageError
from lora_diag.records import Results
from tests.conftest import ROOT
from tests.reports.making import decay, names, residual, residuals, run, spectra, spectrum, vector
from tests.reports.test_html import Elements

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.jsonl"))
HOSTILE = "h.0.<script>alert(1)</script>\n\u202e&\"'.weight"


@pytest.fixture
def results():
    records = [spectrum(name, decay(20, 1)) for name in names(2)]
    return spectra(records, [vector("norm.weight", 0.1)])


def test_records_by_index_and_slice(results):
    assert results[0] is results.layers[0]
    assert results[-1] is results.layers[-1]
    part = results[2:6:2]
    assert part.layers == results.layers[2:6:2]
    assert (part.end.layers, part.end.left_out) == (2, 1)
    assert part.end.fro == pytest.approx(sum(record.fro**2 for record in part) ** 0.5)
    assert replace(results, end=None)[:2].end is None
    with pytest.raises(IndexError):
        results[len(results)]


def test_names_need_no_weight(results):
    record = results.layers[3]
    assert results[record.layer] is record
    assert results[record.layer.removesuffix(".weight")] is record
    assert record.layer.removesuffix(".weight") in results
    assert record in results
    assert "layers.0" not in results


def test_exact_name_comes_before_one_without_weight():
    first, second = spectrum("a.weight.weight", decay(20, 1)), spectrum("a.weight", decay(20, 2))
    assert spectra([first, second])["a.weight"] is second


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("model.layers.1.self_attn.q_prj", "model.layers.1.self_attn.q_proj"),
        ("layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj"),
        ("", "14 layers"),
        ("zzz", "14 layers"),
    ],
)
def test_unknown_name_suggests_similar_name(results, wrong, meant):
    with pytest.raises(KeyError) as error:
        results[wrong]
    assert meant in error.value.args[0]


def test_repr_of_hostile_names_is_short(results):
    assert ", unfinished" in repr(replace(results, end=None))
    assert len(repr(replace(results, run=run("spectrum", ("base", HOSTILE)))).splitlines()) == 5
    assert len(repr(Results(run("spectrum", *[("adapter", str(i)) for i in range(99)]), ()))) < 200


@pytest.mark.parametrize("command", ["residual", "<i>"])
def test_html_escapes_names_and_loads_nothing(command):
    records = [residual(HOSTILE, 8, 0.5, adapter=path) for path in ("<b>x</b>", "y")]
    inputs = [("base", HOSTILE), ("adapter", "<b>x</b>"), ("adapter", "y")]
    page = replace(residuals(records), run=run(command, *inputs))._repr_html_()
    allowed = {
        "div",
        "p",
        "b",
        "br",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "details",
        "summary",
    }
    tags = Elements(page).seen
    assert {tag for tag, _ in tags} <= allowed
    assert {name for _, attributes in tags for name in attributes} <= {"style"}
    assert not any("url" in attributes.get("style", "") for _, attributes in tags)
    assert command == "<i>" or "&lt;script&gt;" in page
    assert "\u202e" not in page


def test_plot_draws_first_figure():
    results = read_results(EXAMPLES[-1])
    page = results.plot(width="column", files=["update.jsonl"])
    assert page._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="nonsense"):
        results.plot("nonsense")
