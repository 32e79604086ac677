"""``loradiag plot`` as a user runs it."""

import pytest

from tests.plots import making

pytestmark = pytest.mark.slow


@pytest.fixture
def spectra(tmp_path):
    making.results(making.model(2)).write(tmp_path / "spectrum.jsonl")
    return "spectrum.jsonl"


@pytest.fixture
def adapters(tmp_path):
    making.results(making.residuals(2)).write(tmp_path / "residual.jsonl")
    return "residual.jsonl"


def test_plot_draws_available_figures(loradiag, spectra, adapters, tmp_path):
    ran = loradiag("plot", spectra, adapters)
    assert (ran.code, ran.err) == (0, "")
    made = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert made == ["energy.png", "heatmap.png", "residual.png", "spectrum.png"]
    assert all(f"figures/{name}" in ran.out for name in made)


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_one_file_takes_one_figure(loradiag, spectra, tmp_path, suffix, begins):
    ran = loradiag("plot", spectra, "-o", f"one.{suffix}", "--figure", "spectrum", "--width", "column")
    assert ran.code == 0
    assert (tmp_path / f"one.{suffix}").read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.glob("*one*")] == [f"one.{suffix}"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--figure", "overlap"], 2, "loradiag overlap BASE TUNED GRADIENTS -o overlap.jsonl"),
        (["--figure", "sweep"], 2, "loradiag probe sweep BASE --data FILE --eval FILE -o sweep.jsonl"),
        (["--figure", "heatmap", "--field", "nope"], 2, "use one of fro, base_fro"),
        (["-o", "x.gif"], 2, ".png, .svg, .pdf"),
        (["--label", "a", "--label", "b"], 2, "2 labels for 1 results"),
        (["--layers", "nothing at all"], 4, "no layer left to draw: no name matches nothing at all"),
    ],
)
def test_impossible_request_is_one_message(loradiag, spectra, tmp_path, words, code, message):
    ran = loradiag("plot", spectra, *words)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["spectrum.jsonl"]


def test_probe_results_are_drawn_though_they_have_no_layers(loradiag, spectra, tmp_path):
    making.probed(making.swept()).write(tmp_path / "sweep.jsonl")
    ran = loradiag("plot", "sweep.jsonl", "-o", "figures")
    assert ran.code == 0
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["sweep.png"]
    assert loradiag("plot", "sweep.jsonl", spectra, "-o", "x.png", "--figure", "sweep").code == 0
