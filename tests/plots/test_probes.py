"""Figures of probe records: every point is a record's, and what cannot be drawn says why."""

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lora_diag import plots
from tests import oracles
from tests.messages import assert_names
from tests.plots import making

pytestmark = pytest.mark.slow


def lines(ax, label):
    return [np.array(line.get_xydata()) for line in ax.lines if line.get_label() == label]


def title_of(ax):
    return ax.get_title(loc="left").replace("\n", " ").replace("\xa0", " ")


def bars(ax):
    """Return (name, value, half the bar) of every row from top to bottom, by the labels and
    containers.
    """
    names = [label.get_text() for label in ax.get_yticklabels()]
    spans = [
        (dots.get_xdata()[0], errors.get_segments()[0]) for dots, _, (errors,) in ax.containers
    ]
    return [
        (name, x, (span[1][0] - span[0][0]) / 2)
        for name, (x, span) in zip(names, spans, strict=True)
    ]


STILL = [record.model_copy(update={"fisher": (0.0,)}) for record in making.fishers()]
BASE = [making.probe("sweep", "base", 2.0), making.probe("sweep", "lora", None, rank=4, lr=1.0)]
BLIND = [record.model_copy(update={"hidden": None}) for record in making.said()]


@pytest.mark.parametrize(
    ("name", "records", "reason"),
    [
        ("sweep", BASE, "no run"),
        ("truncation", making.truncated(module_type="mlp.up_proj"), "all layers truncated"),
        ("alone", making.truncated(), "truncated alone"),
        ("strength", making.scaled((0.0, 1.0)), "fewer than three"),
        ("outputs", [r for r in making.said() if r.subject != "adapter"], "no model"),
        ("depth", BLIND, "hidden states"),
        ("sensitivity", making.adapted()[:1], "no unit"),
        ("intrinsic", making.reached(sets=("shifted",)), "no set"),
        ("fisher", STILL, "no truncation"),
        ("gain", making.gained()[:-4], "significant"),
        ("sweep", making.truncated(), "no sweep records"),
        ("heatmap", making.swept(), "no records"),
    ],
)
def test_undrawable_probe_records_state_reason(name, records, reason):
    assert_names(plots.why_not(name, making.probed(records)), reason)


def test_sweep_shows_mean_over_seeds_at_each_rank_s_best_rate():
    records = making.swept()
    ax = plots.sweep(making.probed(records))
    expected = {
        rank: np.mean(
            [r.loss for r in records if (r.set, r.rank, r.lr) == ("held_out", rank, 1e-3)]
        )
        for rank in (4, 8, 16, 64)
    }
    np.testing.assert_allclose(lines(ax, "_mean")[0], list(expected.items()))
    assert len(lines(ax, "_seeds")[0]) == 12
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        f"{rank}\n0.001" for rank in expected
    ]
    assert lines(ax, "_BASE 1.800")[0][0, 1] == 1.8
    # 0.15/16 - 0.15/64 = 0.0070 is more than 2% of the gain, 0.0059, and seeds are quiet enough to
    # show it.
    assert_names(title_of(ax), "held_out", "r = 64")
    assert lines(ax, "_enough")[0][0, 0] == 64
    (band,) = [patch for patch in ax.patches if patch.get_label() == "_tolerance"]
    np.testing.assert_allclose(band.get_height(), 0.02 * (1.8 - expected[64]))
    assert "BASE 1.900 ↑" in [text.get_text() for text in plots.sweep(records, name="other").texts]
    assert (
        plots.sweep(making.swept(base=90.0)).get_ylim()[1] < 2
    )  # a distant BASE is named at the edge


def test_diverged_run_does_not_prevent_refusal_of_heat_map():
    """A report asks for every figure: one diverged run of a sweep was a traceback."""
    runs = making.probed([making.probe("sweep", "lora", None, rank=4, lr=1.0), *making.swept()])
    assert_names(plots.why_not("heatmap", runs, field="nope"), "numeric field nope")


def test_strength_labels_of_near_points_stand_apart():
    places = {0.5: (-0.14, -0.01), 0.56: (-0.145, 0.0), 0.75: (-0.13, 0.04), 1: (-0.1, 0.12)}
    examples = [r for r in making.scaled() if getattr(r, "scale", None) == 1]
    records = []
    for scale, changes in places.items():
        for record in examples:
            update = {"scale": float(scale), "change": changes[record.shifted]}
            records.append(record.model_copy(update=update))
    figure = plots.figure("strength", making.probed(records, command="probe strength"))
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_strength_shows_gain_against_cost_at_each_t():
    records = making.scaled()
    ax = plots.figure("strength", making.probed(records, command="probe strength")).axes[0]
    task, other = (
        [r for r in records if getattr(r, "scale", None) is not None and r.shifted == side]
        for side in (0, 1)
    )
    ((points, _, (sides, heights)),) = ax.containers
    np.testing.assert_allclose(
        np.array(points.get_xydata()),
        [(b.change, -a.change) for a, b in zip(task, other, strict=True)],
    )
    # 95% for three comparisons with one t together.
    half = scipy.stats.t.ppf(1 - 0.05 / 2 / 3, 1.5) * 0.01
    assert [s[1][0] - s[0][0] for s in sides.get_segments()] == pytest.approx([2 * half] * 4)
    assert [s[1][1] - s[0][1] for s in heights.get_segments()] == pytest.approx([2 * half] * 4)
    assert [text.get_text() for text in ax.texts] == ["0", "0.5", "1", "1.5"]


def test_truncation_shows_gaps_with_their_errors():
    records = making.truncated()
    ax = plots.truncation(making.probed(records))
    cut = [r for r in records if r.set == "held_out" and r.rank is not None]
    ((points, _, (errors,)),) = ax.containers
    np.testing.assert_allclose(
        np.array(points.get_xydata()), [(r.rank, r.loss - 1.2) for r in cut], atol=1e-12
    )
    for record, (low, high) in zip(cut, errors.get_segments(), strict=True):
        np.testing.assert_allclose((high[1] - low[1]) / 4, record.gap_error)
    np.testing.assert_allclose(
        lines(ax, "_energy")[0], [(r.rank, (1 - r.energy) * (2.0 - 1.2)) for r in cut]
    )
    assert lines(ax, "_BASE 2.000")[0][0, 1] == pytest.approx(0.8)
    assert lines(ax, "_TUNED 1.200")[0][0, 1] == 0


def test_two_truncations_are_compared_by_kept_gain():
    runs = [making.probed(making.truncated(tuned=tuned), name=str(tuned)) for tuned in (1.2, 1.6)]
    ax = plots.figure("truncation", runs, labels=["a", "b"]).axes[0]
    expected = [
        (r.rank, r.kept) for r in making.truncated() if r.set == "held_out" and r.rank is not None
    ]
    for points, *_ in ax.containers:
        np.testing.assert_allclose(np.array(points.get_xydata()), expected)
    spans = [errors.get_segments()[0] for _, _, (errors,) in ax.containers]
    # The same error is twice as large a share of a change half as large.
    np.testing.assert_allclose(
        [(span[1][1] - span[0][1]) / 4 for span in spans], [0.02 / 0.8, 0.02 / 0.4]
    )


def test_parts_truncated_alone_are_ranked_by_cost_with_errors():
    records = making.alone()
    error = next(r.gap_error for r in records if r.subject == "truncated")
    drawn = bars(plots.alone(making.probed(records)))
    assert [name for name, *_ in drawn] == ["self_attn.q_proj", "mlp.up_proj"]
    np.testing.assert_allclose([row[1:] for row in drawn], [(1.1, 2 * error), (0.1, 2 * error)])
    ax = plots.figure("alone", making.probed(records), rank=4).axes[0]
    assert [value for _, value, _ in bars(ax)] == [0.55, 0.05]


def test_adapters_are_shown_with_fine_tune_and_errors():
    drawn = bars(plots.outputs(making.probed(making.said())))
    assert [name for name, *_ in drawn] == [
        "r16",
        "r4",
    ]  # BASE, 0.8 away, would press both together
    np.testing.assert_allclose([row[1:] for row in drawn], [(0.03, 0.02), (-0.02, 0.02)])
    near = bars(plots.outputs(making.probed(making.said(base=0.1))))
    assert [name for name, *_ in near] == ["BASE", "r16", "r4"]


def test_hidden_states_are_drawn_at_compared_depths():
    records = making.said()
    drawn = {
        line.get_label(): np.array(line.get_xydata())
        for line in plots.depth(making.probed(records)).lines
    }
    for record in records[2:4]:
        expected = [
            (depth, value) for depth, value in enumerate(record.hidden) if value is not None
        ]
        np.testing.assert_allclose(drawn[record.name.removeprefix("runs/")], expected)


def test_gains_of_single_units_are_ranked_at_best_rate():
    records = making.adapted()
    expected = []
    for unit in ("self_attn.q_proj", "mlp.up_proj"):
        base = records[0]
        run = max(
            (r for r in records if r.set == "held_out" and r.unit == unit), key=lambda r: r.gain
        )
        d, n = np.subtract(base.nll, run.nll), np.array(base.predictions)
        gain = d.sum() / n.sum()
        # As improbable as two errors of a normal variable: Student's t with 1.5(4/2 − 1) degrees of
        # freedom.
        errors = scipy.stats.t.ppf(scipy.stats.norm.cdf(2), 1.5)
        expected.append((gain, errors * 4 * oracles.error_of_mean(d - gain * n) / n.sum()))
    drawn = bars(plots.sensitivity(making.probed(records)))
    assert [name for name, *_ in drawn] == ["self_attn.q_proj", "mlp.up_proj"]
    np.testing.assert_allclose([row[1:] for row in drawn], expected)


def test_curvature_figure_has_model_bound_and_gap():
    records = making.curved()
    ax = plots.curvature(making.probed(records))
    gaps = {0: 1.0, 4: 1 / 5, 16: 1 / 17}
    # The measured line is part of a bar, which has no name of its own.
    ((points, _, (errors,)),) = ax.containers
    np.testing.assert_allclose(points.get_xydata(), list(gaps.items()))
    np.testing.assert_allclose(
        lines(ax, "_predicted")[0][:, 1], [0.9 * gap for gap in gaps.values()]
    )
    np.testing.assert_allclose(lines(ax, "_bound")[0][:, 1], [100.1 * gap for gap in gaps.values()])
    np.testing.assert_allclose(
        [bar[:, 1] for bar in errors.get_segments()],
        [[0.4 * gap, 1.6 * gap] for gap in gaps.values()],
    )
    both = plots.figure("curvature", making.probed(records))
    rows = bars(both.axes[1])
    assert [(name.split(".")[-1], value) for name, value, _ in rows] == [
        ("all layers", 50.0),
        ("up_proj", 3.0),
        ("up_proj", 2.0),
    ]
    assert len(plots.figure("curvature", making.probed(making.curved(eigen=False))).axes) == 1
    at_base = plots.curvature(making.curved(ranks=(), eigen=False))
    assert at_base.get_xlabel() == "trace (nats per squared weight)"


def test_ggn_gives_no_bound():
    newton = [
        r.model_copy(update={"matrix": "ggn"}) if r.record == "curvature" else r
        for r in making.curved()
    ]
    page = plots.figure("curvature", making.probed(newton))
    assert "bound" not in page.legends[0].get_title().get_text()
    assert "not a bound" in page.texts[0].get_text().replace("\n", " ")


def test_intrinsic_figure_omits_sets_without_gain():
    ax = plots.intrinsic(making.probed(making.reached(), share=0.9))
    gain = 2.0 - (1.0 + 1.04) / 2
    result = {d: (2 - (2 - 0.3 * np.log10(d) + 0.02)) / gain for d in (10, 100, 1000)}
    np.testing.assert_allclose(lines(ax, "_subspace")[0], list(result.items()))
    np.testing.assert_allclose(lines(ax, "_lora")[0], [[500, 0.7 / gain], [4000, 0.84 / gain]])
    assert lines(ax, "_90%")[0][0, 1] == 0.9
    assert sum(map(len, lines(ax, "_seeds"))) == 10
    assert len(plots.figure("intrinsic", making.probed(making.reached())).axes) == 1


def test_fisher_shows_predictor_orders_and_unmeasured_tails():
    page = plots.figure("fisher", making.probed(making.fishers()))
    assert [title_of(ax).split(" (")[0] for ax in page.axes] == [
        "over all layers",
        "within module types",
    ]
    for ax in page.axes:
        for name, rho in (
            ("Fisher", 1.0),
            ("weight energy", -1.0),
            ("K-FAC energy", 1.0),
            ("layer size", 1.0),
        ):
            np.testing.assert_allclose(lines(ax, name)[0], [[4, rho], [8, rho]])
    for ax in (
        plots.fisher(making.fishers(measured=False)),
        plots.fisher(making.fishers(), by="type"),
    ):
        (tail,) = lines(ax, "mlp.up_proj")
        np.testing.assert_allclose(
            tail[:-1], [[r, sum(range(1, 5)) * (1 - r / 32) / 2] for r in range(1, 32)]
        )


def test_gain_shows_curves_layers_and_modules():
    records = making.gained()
    curves, layers, modules, _ = plots.figure("gain", making.probed(records)).axes
    of_layers = [record for record in records if record.record == "layer_gain"]
    total = sum(record.gain for record in of_layers)
    parts = np.sort(np.concatenate([record.directions for record in of_layers]))[::-1]
    counts = np.arange(1, len(parts) + 1)
    (gain,) = lines(curves, "attributed gain")
    np.testing.assert_allclose(gain, np.stack([counts, np.cumsum(parts) / total], 1), atol=1e-12)
    squares = np.sort(np.concatenate([np.square(record.sigma) for record in of_layers]))[::-1]
    (energy,) = lines(curves, "energy")
    np.testing.assert_allclose(energy[:, 1], np.cumsum(squares) / squares.sum())
    measured = curves.containers[0][0].get_xydata()
    np.testing.assert_allclose(measured, [[1, 0.2], [8, 0.6], [32, 0.92]])
    whole = sum(record.fro**2 for record in of_layers)
    for kind in making.TYPES:
        own = [record for record in of_layers if f".{kind}." in record.layer]
        expected = [[100 * r.fro**2 / whole, 100 * r.gain / total] for r in own]
        np.testing.assert_allclose(lines(layers, kind)[0], expected)
    cells = modules.images[0].get_array()
    for row, kind in enumerate(making.TYPES):
        for block in range(4):
            (own,) = (r for r in of_layers if r.layer == f"model.layers.{block}.{kind}.weight")
            assert cells[row, block] == pytest.approx(100 * own.gain / total)
    assert next(label.get_text() for label in modules.get_yticklabels()) == "q_proj"


def test_map_of_gain_leaves_layers_outside_of_blocks_blank():
    records = making.gained(types=("q_proj",), blocks=2)
    outside = records[1].model_copy(update={"layer": "pooler.dense.weight"})
    modules = plots.figure("gain", making.probed([records[0], outside, *records[2:]])).axes[2]
    cells = np.ma.filled(modules.images[0].get_array(), np.nan)
    assert np.isfinite(cells).sum() == 1
