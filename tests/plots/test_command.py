"""``loradiag plot`` as a user runs it."""

import pytest

from tests.plots import making

pytestmark = pytest.mark.slow


@pytest.fixture
def spectra(tmp_path):
    making.results(making.model(2)).write(tmp_path / "spectrum.jsonl")
    return "spectrum.jsonl"


def test_plot_draws_available_figures(run, spectra, tmp_path):
    making.results(making.residuals(2)).write(tmp_path / "residual.jsonl")
    ran = run("plot", spectra, "residual.jsonl")
    assert (ran.code, ran.err) == (0, "")
    made = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert made == ["energy.png", "heatmap.png", "residual.png", "spectrum.png"]
    assert all(f"figures/{name}" in ran.out for name in made)


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_one_file_takes_one_figure(run, spectra, tmp_path, suffix, begins):
    ran = run("plot", spectra, "-o", f"one.{suffix}", "--figure", "spectrum", "--width", "column")
    assert ran.code == 0
    assert (tmp_path / f"one.{suffix}").read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.glob("*one*")] == [f"one.{suffix}"]
