"""Figures of spectra in another metric than the weights' say so, and σ of two metrics never share an axis."""

from dataclasses import replace

import pytest

from lora_diag import plots
from lora_diag.errors import UsageError
from lora_diag.records import End, Results, Run, RunInput
from lora_diag.rendering.figures.fields import title_in
from lora_diag.rendering.statements import find
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.subject import sections_of
from tests.messages import assert_names, raises_naming
from tests.plots import making
from tests.plots.making import TYPES, spectrum

pytestmark = pytest.mark.slow

OF = {"data": "ΔW·C^½", "kfac": "G^½·ΔW·C^½"}


def results(metric: str = "weights", tuned: str = "full_ft") -> Results:
    records = tuple(
        spectrum(f"model.layers.{i}.{name}.weight", [1 / i for i in range(1, 33)]).model_copy(update={"metric": metric})
        for i in range(2)
        for name in TYPES
    )
    roles = [("base", "base"), ("tuned", tuned), *([("activations", "act.safetensors")] if metric != "weights" else [])]
    inputs = tuple(RunInput(role=role, path=path, kind="safetensors file", tensors=9) for role, path in roles)
    run = Run(command="spectrum", version="0.1.0", inputs=inputs, settings={"ranks": [8, 16], "method": metric})
    return Results(run, records, (), End(layers=len(records), left_out=0, fro=1.0, base_fro=1.0))


def words(figure) -> str:
    artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " ".join(" ".join(artist.get_text() for artist in artists).split())


@pytest.mark.parametrize("metric", OF)
@pytest.mark.parametrize("width", ["slide", "column"])
def test_titles_and_axes_name_metric(metric, width):
    for name, text in (
        ("energy", f"Energy fraction C(r) of {OF[metric]}"),
        ("spectrum", f"σᵢ of {OF[metric]}"),
        ("heatmap", f"C(8) of {OF[metric]}"),
    ):
        message = words(plots.figure(name, results(metric), width=width))
        assert text in message
        assert {"data": "in the data's metric", "kfac": "in K-FAC's metric"}[metric] in message
    assert f"‖{OF[metric]}‖_F²" in words(plots.figure("energy", results(metric))).replace("\xa0", " ")
    assert OF[metric] in plots.spectrum(results(metric)).get_ylabel()
    assert OF[metric] in plots.energy(results(metric)).get_ylabel()


def test_figure_in_weights_names_no_metric():
    for name in ("energy", "spectrum", "heatmap"):
        message = words(plots.figure(name, results()))
        assert "metric" not in message
        assert "C^½" not in message
    assert plots.energy(results()).get_ylabel() == "energy fraction C(r)"


def test_metric_shares_are_labelled_and_singular_values_refused():
    both = [results(), results("data")]
    message = words(plots.figure("energy", both))
    assert_names(message, "full_ft", "weights' metric")
    assert_names(message, "full_ft", "data's metric")
    assert "‖ΔW‖_F²" not in message
    assert_names(words(plots.figure("energy", both, labels=["yours", "mine"])), "mine", "data's metric")
    with raises_naming(UsageError, "common axis"):
        plots.figure("spectrum", both)
    assert plots.why_not("spectrum", [results("data"), results("data", "other")]) is None


def test_norms_are_named_in_their_metric():
    assert title_in("fro", results("data").layers) == "‖ΔW·C^½‖_F"
    assert title_in("relative", results("kfac").layers) == "‖G^½·ΔW·C^½‖_F / ‖G^½·W_base·C^½‖_F"
    assert title_in("fro", (*results().layers, *results("data").layers)) == "‖ΔW‖_F and ‖ΔW·C^½‖_F"
    assert title_in("fro", results().layers) == "‖ΔW‖_F"


def test_allocation_states_metric_of_energy():
    allocated = making.results(making.allocations(2), [making.certificate()])
    run = allocated.run.model_copy(update={"settings": {**allocated.run.settings, "metric": "kfac"}})
    weighted = replace(allocated, run=run)
    assert_names(words(plots.figure("allocation", weighted)), "Energy", "K-FAC's metric")
    assert "metric" not in words(plots.figure("allocation", allocated))
    (section,) = sections_of(Evidence((Source("a.jsonl", weighted),)))
    assert_names(find(section.statements, "keeps").text, "energy", "K-FAC's metric")
