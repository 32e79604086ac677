"""Figures of probe records: every point is a record's, and the finding in a title is the verdict's."""

import numpy as np
import pytest

from lora_diag import plots
from tests.plots import making


def lines(ax, label):
    return [np.array(line.get_xydata()) for line in ax.lines if line.get_label() == label]


def words(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def test_a_sweep_shows_the_mean_over_seeds_at_each_rank_s_best_rate():
    records = making.swept()
    ax = plots.sweep(making.probed(records))
    (mean,) = lines(ax, "_mean")
    expected = {
        rank: np.mean([r.loss for r in records if (r.set, r.rank, r.lr) == ("held_out", rank, 1e-3)])
        for rank in (4, 8, 16, 64)
    }
    np.testing.assert_allclose(mean, list(expected.items()))
    (seeds,) = lines(ax, "_seeds")
    assert len(seeds) == 12
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"{rank}\n0.001" for rank in expected]
    assert lines(ax, "_BASE 1.800")[0][0, 1] == 1.8
    # 0.15/16 - 0.15/64 = 0.007 is within 2% of the gain, 0.15/8 - 0.15/64 = 0.016 is not.
    assert ax.get_title(loc="left").replace("\xa0", " ") == "held_out: r = 16 is enough, gradual decline"
    assert lines(ax, "_enough")[0][0, 0] == 16
    other = plots.sweep(making.probed(records), name="other")
    assert "BASE 1.900 ↑" in [text.get_text() for text in other.texts]


def test_a_sweep_without_a_gain_says_so_and_a_base_far_away_is_named_and_not_drawn():
    assert "every rank is worse than BASE" in plots.sweep(making.swept(base=1.0)).get_title(loc="left")
    ax = plots.sweep(making.swept(base=90.0))
    assert [text.get_text() for text in ax.texts] == ["BASE 90.000 ↑"]
    assert ax.get_ylim()[1] < 2


def test_other_trainings_are_lines_of_their_own():
    full = [making.probe("sweep", "full", loss, lr=lr) for loss, lr in ((1.7, 1e-5), (1.55, 1e-4))]
    ax = plots.sweep(making.swept() + full)
    assert lines(ax, "_full fine-tuning 1.550")[0][0, 1] == 1.55
    assert not lines(ax, "_full fine-tuning 1.700")


def test_runs_that_diverged_are_told_and_none_that_did_not_is_refused():
    diverged = making.probe("sweep", "lora", None, rank=4, lr=1.0)
    assert "Not drawn: 1 losses of runs that diverged" in words(
        plots.figure("sweep", making.probed([*making.swept(), diverged]))
    )
    base = making.probe("sweep", "base", 2.0)
    assert plots.why_not("sweep", making.probed([base, diverged])) == "no run of the sweep is finished with a loss"


def test_a_truncation_shows_loss_errors_ends_and_energy_on_the_scale_of_the_change():
    records = making.truncated()
    ax = plots.truncation(making.probed(records))
    cut = [r for r in records if r.set == "held_out" and r.rank is not None]
    (bars,) = ax.containers
    points, _, (errors,) = bars
    np.testing.assert_allclose(np.array(points.get_xydata()), [(r.rank, r.loss) for r in cut])
    for record, (low, high) in zip(cut, errors.get_segments(), strict=True):
        np.testing.assert_allclose((high[1] - low[1]) / 4, record.gap_error)
    (energy,) = lines(ax, "_energy")
    np.testing.assert_allclose(energy, [(r.rank, 2.0 + r.energy * (1.2 - 2.0)) for r in cut])
    assert lines(ax, "_BASE 2.000")[0][0, 1] == 2.0
    assert lines(ax, "_TUNED 1.200")[0][0, 1] == 1.2
    assert ax.get_title(loc="left").replace("\xa0", " ") == "held_out: r = 64 keeps 94% of the change, C(64) = 0.89"


def test_two_truncations_are_compared_by_what_they_keep():
    runs = [making.probed(making.truncated(tuned=tuned), name=str(tuned)) for tuned in (1.2, 1.6)]
    figure = plots.figure("truncation", runs, labels=["a", "b"])
    ax = figure.axes[0]
    kept = [np.array(bars[0].get_xydata()) for bars in ax.containers]
    expected = [(r.rank, r.kept) for r in making.truncated() if r.set == "held_out" and r.rank is not None]
    for points in kept:
        np.testing.assert_allclose(points, expected)
    spans = [bars[2][0].get_segments()[0] for bars in ax.containers]
    # The same error is twice as large a share of a change half as large.
    np.testing.assert_allclose([(span[1][1] - span[0][1]) / 4 for span in spans], [0.02 / 0.8, 0.02 / 0.4])


@pytest.mark.parametrize("name", ["sweep", "truncation"])
def test_each_probe_s_figure_takes_its_own_records_of_a_mix(name):
    both = [making.probed(making.swept()), making.probed(making.truncated()), making.results(making.model(1))]
    assert plots.why_not(name, both) is None
    assert plots.why_not(name, both[2]) == f"no {name} records"
    assert "loradiag probe" in plots.figure_named(name).made_by
    assert plots.why_not("heatmap", both[0]) == "no records"


def test_layers_truncated_alone_are_not_all_layers():
    alone = making.truncated(module_type="mlp.up_proj")
    ends = making.truncated(ranks=())
    assert "truncated together" in plots.why_not("truncation", making.probed(alone))
    assert plots.why_not("truncation", making.probed([*ends, *making.truncated()])) is None
