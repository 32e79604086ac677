"""Data frames and CSV: one value a cell, the same numbers as the records."""

import csv
import importlib.util
import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.catalog import read_results
from lora_diag.diagnostics.fleet.record import Fleet, FleetLayer
from lora_diag.diagnostics.intruders.record import Direction, Intruders
from lora_diag.records import Probe, Results
from lora_diag.records.names import short_names
from lora_diag.records.verdict import Verdict
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.run import to_csv, to_parquet
from tests.building import build
from tests.conftest import ROOT
from tests.reports.making import decay, residual, residuals, run, spectra, spectrum, vector

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.jsonl"))


def in_csv(results, values=False):
    return list(
        csv.DictReader(io.StringIO(to_csv(Evidence((Source("r.jsonl", results),)), values)))
    )


def test_row_has_values_of_its_record():
    records = [
        spectrum("model.layers.3.mlp.up_proj.weight", decay(300, 0.7)),
        spectrum("lm_head.weight", decay(90, 1)),
    ]
    frame = spectra(records).to_pandas()
    assert frame.module_type.tolist() == ["mlp.up_proj", "lm_head"]
    assert frame.block.dtype == "Int64"
    assert frame.block[0] == 3
    assert frame.block.isna().tolist() == [False, True]
    for row, record in zip(frame.to_dict("records"), records, strict=True):
        assert row["layer"] == record.layer
        assert row["relative"] == record.fro / record.base_fro
        assert (row["shape.0"], row["shape.1"]) == record.shape
        assert row["energy.8"] == record.energy["8"]
        assert row["tail.16.fro"] == record.tail["16"].fro
        assert row["resolution.mantissa.1"] == record.resolution.mantissa[1]
        assert row["rank_at.0.9"] == record.rank_at["0.9"]
    assert "s" not in frame


def test_values_are_one_row_layer_and_index():
    records = [spectrum("h.0.q.weight", decay(40, 0.7)), spectrum("h.1.q.weight", decay(30, 1))]
    frame = spectra(records).to_pandas(values=True)
    assert len(frame) == 70
    assert frame.field.unique().tolist() == ["s"]
    for record in records:
        mine = frame[frame.layer == record.layer]
        assert mine["index"].tolist() == list(range(1, len(record.s) + 1))
        assert tuple(mine.value) == record.s
    assert [
        (row["layer"], row["block"]) for row in in_csv(spectra(records), values=True)[39:41]
    ] == [
        ("h.0.q.weight", "0"),
        ("h.1.q.weight", "1"),
    ]


def test_adapters_have_short_and_unique_names():
    records = [residual("h.0.q.weight", 8, 0.5, adapter=path) for path in ("a/x/lora", "b/y/lora/")]
    inputs = (
        ("base", "base"),
        ("tuned", "tuned"),
        ("adapter", "a/x/lora"),
        ("adapter", "b/y/lora/"),
    )
    frame = replace(residuals(records), run=run("residual", *inputs)).to_pandas()
    assert frame.adapter.tolist() == ["a/x/lora", "b/y/lora/"]
    assert frame.adapter_name.tolist() == ["x/lora", "y/lora"]
    assert frame.columns[:2].tolist() == ["record", "layer"]


@given(st.lists(st.text(st.sampled_from("ab/"), max_size=6), max_size=5))
def test_short_names_distinguish_paths(paths):
    result = short_names(paths)
    assert set(result) == set(paths)
    if len({path.rstrip("/") for path in paths}) == len(set(paths)):
        assert len(set(result.values())) == len(result)
    assert all(path.rstrip("/").endswith(name) or name == path for path, name in result.items())


def test_probe_has_one_row_record():
    probes = [
        Probe(
            probe="outputs",
            set="s",
            subject="adapter",
            name="x/a",
            tokens=4,
            data="d",
            loss=loss,
            nll=(1.0, 2.5),
        )
        for loss in (1.25, None)
    ]
    results = Results(run("probe outputs", ("adapter", "x/a")), (), whole=tuple(probes))
    frame = results.to_pandas()
    assert len(frame) == 2
    assert frame.loss[0] == 1.25
    assert frame.loss.isna()[1]
    assert frame.adapter_name.tolist() == ["a", "a"]
    assert results.to_pandas(values=True).value.tolist() == [1.0, 2.5] * 2
    layer = results.whole[0].model_copy(update={"layer": "h.2.q.weight", "module_type": None})
    other = results.whole[0].model_copy(update={"module_type": "mlp.up"})
    assert replace(results, whole=(layer, other)).to_pandas().module_type.tolist() == [
        "q",
        "mlp.up",
    ]


def test_list_entries_of_records_are_values():
    directions = tuple(
        build(Direction, sigma=s, kind=k) for s, k in ((3.0, "kept"), (2.0, "intruder"))
    )
    record = build(Intruders, layer="h.0.q.weight", directions=directions)
    frame = Results(run("intruders"), (record,)).to_pandas(values=True)
    assert frame[frame.field == "directions.sigma"].value.tolist() == [3.0, 2.0]
    assert frame[frame.field == "directions.kind"].text.tolist() == ["kept", "intruder"]


def test_layers_of_fleet_are_rows_and_no_columns():
    layers = {"h.0.q.weight": FleetLayer(fro=2.0, rank=4, rank_99=3, spike=0.5)}
    record = build(Fleet, adapter="x/a", layers=layers, update=(0.5,), space=(1.0,))
    results = Results(run("spectrum --adapters", ("adapter", "x/a")), (record,))
    assert not [name for name in results.columns() if name.startswith(("layers", "update"))]
    frame = results.to_pandas(values=True)
    rows = frame[frame.field.str.startswith("layers.")]
    expected = {
        f"layers.{name}": value for name, value in layers["h.0.q.weight"].model_dump().items()
    }
    assert dict(zip(rows.field, rows.value, strict=True)) == expected
    assert set(rows.layer) == {"h.0.q.weight"}
    assert set(frame.adapter_name) == {"a"}


def test_kind_selects_records():
    results = spectra([spectrum("h.0.q.weight", decay(20, 1))], [vector("norm.weight", 0.25)])
    assert results.to_pandas(kind="left_out").relative.tolist() == [0.25]
    assert results.to_pandas(kind="spectrum").equals(results.to_pandas())
    assert results.to_pandas(kind="nothing").empty


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_csv_cells_are_scalars(path):
    results = read_results(path)
    for values in (False, True):
        columns = results.columns(values)
        assert len({len(column) for column in columns.values()}) <= 1
        kinds = {type(value) for column in columns.values() for value in column}
        assert kinds <= {str, int, float, bool, type(None)}
    assert len(results.columns()["record"]) == len(results.layers or results.whole)


finite = st.floats(0, 1e30, allow_nan=False)


@st.composite
def drawn(draw):
    """Results whose numbers are any: not those that a spectrum could have."""
    made = spectrum("h.0.q.weight", decay(5, 1))
    records = [
        made.model_copy(
            update={
                "layer": f"h.{place}.q.weight",
                "fro": draw(finite),
                "base_fro": draw(st.none() | finite),
                "energy": {str(rank): draw(st.none() | st.floats(0, 1)) for rank in (4, 8)},
                "rank_at": {"0.9": draw(st.none() | st.integers(0, 5))},
                "s": tuple(draw(st.lists(finite, max_size=3))),
            }
        )
        for place in range(draw(st.integers(1, 4)))
    ]
    return spectra(records)


@pytest.mark.slow
@given(drawn(), st.booleans())
def test_csv_and_data_frames_have_same_numbers(results, values):
    frame, rows = results.to_pandas(values), in_csv(results, values)
    assert len(frame) == len(rows)
    for name in frame:
        for cell, value in zip((row[name] for row in rows), frame[name].tolist(), strict=True):
            known = not pd.isna(value)
            assert bool(cell) == known, name
            if known and not isinstance(value, str):
                assert cell == str(value) if isinstance(value, bool) else float(cell) == value


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="pyarrow is not installed")
@given(drawn(), st.booleans())
def test_arrow_and_parquet_have_columns_of_records(results, values):
    import pyarrow.parquet as pq

    columns = results.columns(values)
    assert results.to_arrow(values).to_pydict() == columns
    table = pq.read_table(io.BytesIO(to_parquet(Evidence((Source("r.jsonl", results),)), values)))
    result = table.to_pydict()
    assert result.pop("results") == ["r.jsonl"] * table.num_rows
    assert {
        name: column
        for name, column in result.items()
        if any(value is not None for value in column)
    } == {
        name: column
        for name, column in columns.items()
        if any(value is not None for value in column)
    } or not table.num_rows


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="pyarrow is not installed")
def test_mixed_column_is_text_in_arrow():
    verdicts = [build(Verdict, measured=value) for value in (1.5, "x")]
    assert Results(run("gate"), (), whole=tuple(verdicts)).to_arrow()["measured"].to_pylist() == [
        "1.5",
        "x",
    ]


@pytest.mark.skipif(not importlib.util.find_spec("polars"), reason="polars is not installed")
def test_polars_has_columns_of_records():
    results = spectra([spectrum("h.0.q.weight", decay(20, 1))])
    assert results.to_polars().to_dict(as_series=False) == results.columns()


def test_numpy_numbers_select_records():
    results = spectra([spectrum(f"h.{i}.q.weight", decay(20, 1)) for i in range(3)])
    assert results[np.int64(1)] is results.layers[1]
