"""One row a record, every number unrounded."""

import csv
import importlib.util
import io
import json
import sys

import pytest

from lora_diag.decisions.gate.record import Verdict
from lora_diag.errors import InputError
from lora_diag.reports.tabular import to_csv, to_parquet
from tests.reports.making import decay, spectra, spectrum
from tests.reports.test_html import evidence, small


def rows(*runs):
    return list(csv.DictReader(io.StringIO(to_csv(evidence(*runs)))))


def test_every_record_is_a_row_with_its_numbers():
    runs = small()
    found = rows(*runs)
    assert len(found) == sum(len(run) + len(run.left_out) for run in runs)
    by_kind = {kind: [row for row in found if row["record"] == kind] for kind in ("spectrum", "residual", "overlap")}
    for row, record in zip(by_kind["spectrum"], runs[0], strict=True):
        assert row["layer"] == record.layer
        assert float(row["energy.8"]) == record.energy["8"]
        assert float(row["tail.8.fro"]) == record.tail["8"].fro
        assert row["resolution.verdict"] == record.resolution.verdict
        assert json.loads(row["s"]) == list(record.s)
        assert row["epsilon"] == ""
        assert row["results"] == "spectrum0.jsonl"
    assert [float(row["epsilon"]) for row in by_kind["residual"]] == [record.epsilon for record in runs[1]]
    assert [int(row["step"]) for row in by_kind["overlap"]] == [record.step for record in runs[2]]


def test_a_spreadsheet_runs_no_name():
    (row,) = rows(spectra([spectrum("=cmd|'/c calc'!A1", decay(16, 1))]))
    assert row["layer"] == "'=cmd|'/c calc'!A1"


def test_quotes_and_newlines_stay_in_their_cell():
    (row,) = rows(spectra([spectrum('a"b\n,c', decay(16, 1))]))
    assert row["layer"] == 'a"b\n,c'


def test_parquet_without_pyarrow_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pandas pyarrow"):
        to_parquet(evidence(*small()))


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="pyarrow is not installed")
def test_parquet_says_what_csv_says():
    from dataclasses import replace

    import pandas as pd

    verdicts = [
        Verdict(rule="r", layer=None, measured=m, allowed="", status="passed", severity="error", message="")
        for m in (1.0, "x")
    ]
    runs = (replace(small()[0], whole=tuple(verdicts)), *small()[1:])
    frame = pd.read_parquet(io.BytesIO(to_parquet(evidence(*runs))))
    assert list(frame.columns) == list(rows(*runs)[0])
    assert list(frame.layer.fillna("")) == [row["layer"] for row in rows(*runs)]
    assert list(frame["energy.8"].dropna()) == [record.energy["8"] for record in runs[0]]
    assert list(frame.s[0]) == list(runs[0].layers[0].s)
