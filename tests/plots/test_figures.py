"""The numbers in the figures, compared with NumPy in float64; what a notebook keeps; what cannot be
drawn.
"""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

import lora_diag
from lora_diag import plots
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.rendering.figures.fields import title_in
from tests.messages import assert_names, raises_naming
from tests.plots import making

pytestmark = pytest.mark.slow


def lines(ax, label):
    """Return the points of a layer's line, its grey continuation after it."""
    parts = [line for line in ax.lines if line.get_label() in {label, f"_floor of {label}"}]
    parts.sort(key=lambda line: line.get_xdata()[0])
    points = {}
    for line in parts:
        points |= dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return np.array(list(points)), np.array(list(points.values()))


def points(ax):
    """Return the points of every line by its label."""
    return {line.get_label(): np.array(line.get_xydata()) for line in ax.lines}


@pytest.mark.parametrize("values", [1, 7, 300])
@pytest.mark.parametrize("signal", [0, 5, None])
def test_energy_curve_is_cumulated_energy(values, signal):
    s = making.decay(4, values)
    record = making.spectrum("model.layers.0.q_proj.weight", s, signal=signal)
    ranks, shares = lines(plots.energy([record]), record.layer)
    assert (ranks[0], ranks[-1]) == (1, values)
    assert {rank for rank in (4, 16, 64) if rank <= values} <= set(ranks)
    np.testing.assert_allclose(
        shares, [np.sum(s[:r] ** 2) / np.sum(s**2) for r in ranks], rtol=1e-12
    )


def test_truncated_curve_divides_by_norm_and_ends_with_values():
    s = making.decay(2, 12)
    record = making.spectrum("h.0.q.weight", s, fro=9.0, complete=False)
    ranks, shares = lines(plots.energy([record]), record.layer)
    assert ranks[-1] == 12
    np.testing.assert_allclose(shares, np.cumsum(s**2)[ranks - 1] / 81, rtol=1e-12)


def test_two_runs_are_bands_of_median_and_range():
    runs = [making.results(making.model(5, ("q_proj",)), name=name) for name in ("a", "b")]
    ax = plots.figure("energy", runs, labels=["first", "second"]).axes[0]
    ranks, middle = points(ax)["first"].T
    ranks = ranks.astype(int)
    curves = [np.cumsum(np.square(record.s)) / np.sum(np.square(record.s)) for record in runs[0]]
    np.testing.assert_allclose(middle, np.median(curves, axis=0)[ranks - 1], rtol=1e-12)
    vertices = ax.collections[0].get_paths()[0].vertices
    at_16 = vertices[vertices[:, 0] == 16][:, 1]
    np.testing.assert_allclose(
        [at_16.min(), at_16.max()], [np.min(curves, 0)[15], np.max(curves, 0)[15]], rtol=1e-12
    )


def test_spectrum_is_singular_values_with_median_edge():
    records = [
        making.spectrum(f"h.{i}.q.weight", making.decay(i), edge=0.1 * (i + 1), signal=9)
        for i in range(3)
    ]
    ax = plots.spectrum(records)
    for record in records:
        ranks, values = lines(ax, record.layer)
        np.testing.assert_array_equal(values, np.array(record.s)[ranks - 1])
    assert points(ax)["_edge"][0, 1] == pytest.approx(0.2)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


@pytest.mark.parametrize(
    ("field", "of"),
    [
        ("energy.16", lambda r: r.energy["16"]),
        ("rank_at.0.9", lambda r: r.rank_at["0.9"]),
        ("resolution.edge", lambda r: r.resolution.edge),
        ("fro", lambda r: r.fro),
        ("relative", lambda r: r.fro / r.base_fro),
    ],
)
def test_cells_of_heat_map_are_fields_of_records(field, of):
    records = [*making.model(3, edge=0.5), making.spectrum("lm_head.weight", making.decay(1))]
    ax = plots.heatmap(records, field=field)
    columns = np.asarray(ax.collections[0].get_array()).T
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == [*making.TYPES, "lm_head"]
    by_name = {record.layer: of(record) for record in records}
    for block in range(3):
        expected = [by_name[f"model.layers.{block}.{name}.weight"] for name in making.TYPES]
        np.testing.assert_array_equal(columns[1 + block][:7], expected)
    assert columns[0][7] == by_name["lm_head.weight"]


def drawn_parts(axes):
    """Return the heights of the parts in a panel with one bar."""
    return [
        float(patch.get_data().values[0] - np.ravel(patch.get_data().baseline)[0])
        for patch in axes.patches
    ]


def test_bands_of_residual_are_parts_of_epsilon():
    record = making.residual("h.0.q.weight", 2.0, 1.5, 0.4, 0.5, rank=2)
    parts = [record.parts.rank, record.parts.direction, record.parts.scale]
    assert min(parts) > 0
    assert drawn_parts(plots.residual([record])) == pytest.approx(parts)


def test_experts_are_pooled_by_their_norms():
    records = [
        making.residual("h.0.experts.0.w1.weight", 3.0, 1.0, 0.2, 0.4),
        making.residual("h.0.experts.1.w1.weight", 1.0, 2.0, 0.1, 0.4),
    ]
    gaps = [9 + 1 - 2 * 0.2 * 3, 1 + 4 - 2 * 0.1 * 2]
    assert sum(drawn_parts(plots.residual(records))) == pytest.approx(sum(gaps) / 10)


def test_panel_of_residual_is_selected_by_adapter():
    records = making.residuals(2) + making.residuals(2, adapter="other")
    assert plots.residual(records, name="other").get_title(loc="left").startswith("other")
    with raises_naming(UsageError, "absent", "lora_r8, other"):
        plots.residual(records, name="absent")


def test_overlap_shows_medians_beside_their_baselines():
    records = making.overlaps(5, ("q_proj",))
    ax = plots.overlap(records)
    drawn = points(ax)
    for name, field in (("_κ", "kappa"), ("_tangent", "tangent")):
        for step in (0, 40, 200):
            result = [getattr(r, field) for r in records if r.step == step and r.rank == 8]
            assert dict(drawn[name])[step] == pytest.approx(np.median(result))
    assert set(drawn["_random κ"][:, 1]) == {8 / np.sqrt(32 * 64)}
    kappas = [record.kappa for record in records if (record.step, record.rank) == (40, 8)]
    at_40 = ax.collections[0].get_paths()[0].vertices
    at_40 = at_40[at_40[:, 0] == 40][:, 1]
    np.testing.assert_allclose([at_40.min(), at_40.max()], [min(kappas), max(kappas)])
    assert plots.overlap(records, rank=4).get_ylabel().endswith("r = 4")


def test_kept_fraction_is_drawn_beside_bound():
    records = making.allocations(1)
    ax = plots.allocation([*records, making.certificate(kept=0.5, bound=0.51)], name="energy")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.5, 0.45])
    assert [line.get_xdata()[0] for line in ax.lines] == [0.51]
    certificates = making.certificate(1000, 0.3, 0.3), making.certificate(2000, 0.5, 0.52)
    several = plots.allocation([*records, *certificates], name="energy")
    drawn = points(several)
    np.testing.assert_allclose(
        drawn["bound: maximum energy within the budget"], [[1000, 0.3], [2000, 0.52]]
    )
    np.testing.assert_allclose(drawn["kept by the allocation"], [[1000, 0.3], [2000, 0.5]])


def test_angles_of_layers_are_one_distribution_with_chance():
    rng = np.random.default_rng(0)
    spaces = [[np.linalg.qr(rng.normal(size=(m, 8)))[0] for _ in range(2)] for m in (64, 128)]
    cosines = [np.clip(np.linalg.svd(u.T @ v, compute_uv=False), 0, 1) for u, v in spaces]
    records = [
        making.interference(f"h.{i}.q.weight", {8: c}, {8: np.ones(8)}, shape=(len(u), 32))
        for i, (c, (u, _)) in enumerate(zip(cosines, spaces, strict=True))
    ]
    drawn = points(plots.angles(records))
    result = np.sort(np.concatenate(cosines))
    np.testing.assert_allclose(drawn["_sql × chat"].T, [[result[0], *result], np.arange(17) / 16])
    many = []
    for m in (64, 128):
        for _ in range(100):
            u, v = (np.linalg.qr(rng.normal(size=(m, 8)))[0] for _ in range(2))
            many += list(np.linalg.svd(u.T @ v, compute_uv=False))
    angles, chance = drawn["_random sql × chat"].T
    np.testing.assert_allclose(chance, [np.mean(np.array(many) <= x) for x in angles], atol=0.05)
    np.testing.assert_array_equal(
        points(plots.angles(records, name="rows"))["_sql × chat"][:, 0], np.ones(17)
    )


def test_union_figure_has_ranks():
    records = [
        making.union(f"h.{i}.q.weight", *ranks)
        for i, ranks in enumerate([(3, 6, 5), (4, 5, None), (2, 8, 9)])
    ]
    lone = making.union("h.3.q.weight", 7, 7, None, updates=("runs/sql",))
    bars, every, apart = plots.union([*records, lone]).patches
    assert list(bars.get_data().values) == [3, 4, 2]
    np.testing.assert_array_equal(every.get_data().values, [5, np.nan, 9])
    assert list(apart.get_data().values) == [6, 5, 8]
    assert plots.why_not("union", making.results([lone])) == "no layer is changed by two updates"


def test_merges_of_two_runs_are_not_pooled():
    records = making.merged(2, ("q_proj",))
    runs = [
        making.results([r.model_copy(update={"kept": r.kept + i}) for r in records])
        for i in range(2)
    ]
    page = plots.figure("merge", runs, labels=["one", "two"])
    drawn = {
        ax.get_title(loc="left"): next(p for p in ax.patches if p.get_label() == "kept")
        for ax in page.axes
    }
    assert list(drawn) == ["one: sql", "one: chat", "two: sql", "two: chat"]
    for number, (title, bars) in enumerate(drawn.items()):
        kept = [
            r.kept + number // 2 for r in records if title.endswith(r.update.removeprefix("runs/"))
        ]
        np.testing.assert_allclose(bars.get_data().values, kept)
    losses = plots.figure("merged", [making.example("merged")] * 2, labels=["one", "two"])
    names = [label.get_text() for label in losses.axes[0].get_yticklabels()]
    assert len(names) == len(set(names)) == 2 * 7
    assert {name.partition(":")[0] for name in names} == {"one", "two"}


def test_fleet_figure_names_outliers():
    ax = plots.fleet(making.adapters(20))
    drawn = points(ax)
    alive = [record for record in making.adapters(20) if record.fro]
    np.testing.assert_allclose(drawn["_adapters"], [(record.used, record.fro) for record in alive])
    np.testing.assert_allclose(drawn["_dead"], [(0, min(record.fro for record in alive) / 2)])
    named = {text.get_text().partition("/")[0] for text in ax.texts}
    assert named == {"dead", "loud", "spiked"}
    assert (
        plots.why_not("fleet", making.results([making.adapter("b", rank=None)]))
        == "no adapter has a rank"
    )


@pytest.mark.parametrize("name", [kind.name for kind in plots.FIGURES])
def test_panel_draws_on_given_axes(name):
    # Asking for the backend would make Matplotlib choose one, and import pyplot to do so.
    keys = set(mpl.rcParams) - {"backend", "backend_fallback"}
    before = {key: mpl.rcParams[key] for key in keys}
    panel = getattr(plots, name)
    records = making.example(name)
    theirs = Figure().subplots()
    assert panel(records, ax=theirs) is theirs
    panel(records).figure.draw_without_rendering()
    assert {key: mpl.rcParams[key] for key in keys} == before


@pytest.mark.parametrize("kind", plots.FORMATS)
def test_same_records_give_same_bytes(kind):
    made = [
        plots.encode_figure(plots.figure("energy", making.results(making.model(2))), kind)
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert b"2026" not in made[0] or kind == "png"


def test_users_settings_do_not_change_page():
    results = making.results(making.model(2))
    page = plots.encode_figure(plots.figure("energy", results), "svg")
    with mpl.rc_context(
        {"font.size": 30, "axes.grid": True, "lines.linewidth": 9, "svg.fonttype": "path"}
    ):
        assert plots.encode_figure(plots.figure("energy", results), "svg") == page


def test_undrawable_record_states_reason():
    spectra, zero = making.results(making.model(2)), [making.spectrum("h.0.q.weight", np.zeros(4))]
    assert plots.why_not("energy", spectra) is None
    assert_names(plots.why_not("residual", spectra), "residual records")
    assert_names(plots.why_not("energy", making.results(zero)), "ΔW = 0", "matrix")
    assert_names(plots.why_not("heatmap", spectra, field="nope"), "fro, base_fro")
    assert_names(
        plots.why_not("overlap", making.results(making.overlaps(1)), rank=5), "rank 5", 4, 8
    )
    assert_names(
        plots.why_not("angles", making.results(making.interferences(1)), rank=5), "rank 5", 4, 8
    )
    assert "at most 6 results" in plots.why_not("energy", [spectra] * 7)
    for wrong in ({"width": "poster"}, {"by": "head"}, {"labels": ["a", "b"]}):
        with pytest.raises(UsageError):
            plots.figure("energy", spectra, **wrong)
    with raises_naming(UsageError, "energy", "fleet"):
        plots.figure("pie", spectra)


def test_panel_without_values_says_why():
    records = [record.model_copy(update={"overlaps": ()}) for record in making.trained(2)]
    ax = plots.checkpoints(making.results(records), name="overlaps")
    assert "loradiag checkpoints" in ax.texts[0].get_text()


def test_figure_draws_on_given_axes():
    spectra = making.results(making.model(2))
    ax = Figure().subplots()
    assert plots.figure("heatmap", spectra, ax=ax, field="fro") is ax.figure
    assert ax.has_data()
    for wrong in ({"width": "slide"}, {"labels": ["a"]}):
        with pytest.raises(UsageError):
            plots.figure("energy", spectra, ax=ax, **wrong)
    with pytest.raises(UsageError):
        plots.figure("energy", [spectra, spectra], ax=ax)


def test_figure_refuses_unknown_options():
    with pytest.raises(TypeError, match="nonsense"):
        plots.figure("energy", making.results(making.model(2)), nonsense=1)


def test_heat_map_has_a_panel_for_each_pair_of_updates():
    records = making.interferences(2, ("q", "k"), ("runs/a", "runs/b", "runs/c"))
    records = [
        record.model_copy(update={"cosine": 0.01 * number}) for number, record in enumerate(records)
    ]
    page = plots.figure("heatmap", making.results(records), field="cosine")
    panels = {ax.get_title(loc="left"): ax for ax in page.axes if ax.get_title(loc="left")}
    assert list(panels) == ["a × b", "a × c", "b × c"]
    for title, ax in panels.items():
        mine = [r.cosine for r in records if title == f"{r.first[-1]} × {r.second[-1]}"]
        drawn = np.ravel(ax.collections[0].get_array())
        np.testing.assert_allclose(sorted(drawn), sorted(mine))
    assert plots.why_not("heatmap", making.example("fleet")) == "no records"


def test_spectra_in_other_metrics_name_it_and_share_no_axis():
    plain, norm = making.results(making.model(2)), "G^½·ΔW·C^½"
    weighted = making.results(
        [record.model_copy(update={"metric": "kfac"}) for record in making.model(2)]
    )
    assert norm in plots.energy(weighted).get_ylabel()
    assert title_in("fro", (*plain.layers, *weighted.layers)) == f"‖ΔW‖ and ‖{norm}‖"
    with raises_naming(UsageError, "common axis"):
        plots.figure("spectrum", [plain, weighted])
    assert plots.why_not("energy", [plain, weighted]) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"output": "x.jpg"},
        {"output": "x.png", "figure": "all"},
        {"output": "x.png", "format": "svg"},
        {"output": "x.png", "figure": "energy", "field": "fro"},
        {"output": "x.png", "figure": "energy", "show_rank": 4},
        {"output": "x.png", "figure": "residual"},
        {"output": "x", "format": "gif"},
        {"output": "x", "layers": "("},
        {"output": "x", "label": ["a", "b"]},
    ],
    ids=str,
)
def test_invalid_request_writes_nothing(wrong, tmp_path):
    output = tmp_path / wrong.pop("output")
    with pytest.raises(UsageError):
        lora_diag.plot(making.results(making.model(1)), output=output, **wrong)
    assert not list(tmp_path.iterdir())


def test_plot_without_records_or_output_is_an_error(tmp_path):
    zero = making.results([making.spectrum("h.0.q.weight", np.zeros(4))])
    with pytest.raises(NothingComparedError, match="no layer left"):
        lora_diag.plot(zero.filter("nothing"), output=tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        lora_diag.plot(making.results(making.model(1)), output=tmp_path / "file" / "x.png")


@pytest.mark.parametrize("name", [spec.name for spec in plots.FIGURES])
def test_panel_without_records_of_its_kind_is_refused(name):
    with raises_naming(UsageError, "records"):
        getattr(plots, name)(making.results(making.model(1)).filter("nothing"))
