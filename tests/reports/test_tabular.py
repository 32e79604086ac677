"""One row a record, every number unrounded."""

import csv
import io
import sys

import pytest

from lora_diag.errors import InputError
from lora_diag.reports.run import to_csv, to_parquet
from tests.reports.making import decay, residual, residuals, spectra, spectrum
from tests.reports.test_html import evidence, small


def rows(*runs):
    return list(csv.DictReader(io.StringIO(to_csv(evidence(*runs)))))


def test_every_record_is_a_row():
    runs = small()
    result = rows(*runs)
    assert len(result) == sum(len(run) + len(run.left_out) for run in runs)
    by_kind = {
        kind: [row for row in result if row["record"] == kind]
        for kind in ("spectrum", "residual", "overlap")
    }
    for row, record in zip(by_kind["spectrum"], runs[0], strict=True):
        assert row["layer"] == record.layer
        assert float(row["tail.8.fro"]) == record.tail["8"].fro
        assert ("s" in row, row["epsilon"], row["results"]) == (False, "", "spectrum0.jsonl")
    assert [float(row["epsilon"]) for row in by_kind["residual"]] == [
        record.epsilon for record in runs[1]
    ]
    assert [int(row["step"]) for row in by_kind["overlap"]] == [record.step for record in runs[2]]


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=cmd|'/c calc'!A1", "'=cmd|'/c calc'!A1"),
        ('a"b,c', 'a"b,c'),
        ("a\x1b[2J\x9b\u202e\t\nb", r"a\x1b[2J\x9b\u202e\t\nb"),
    ],
)
def test_hostile_name_is_text_in_its_cell(name, cell):
    (row,) = rows(spectra([spectrum(name, decay(16, 1))]))
    assert row["layer"] == cell


def test_spreadsheet_runs_no_computed_column():
    (row,) = rows(spectra([spectrum("-2+3", decay(16, 1))]))
    assert (row["layer"], row["module_type"]) == ("'-2+3", "'-2+3")
    (row,) = rows(residuals([residual("q", adapter="runs/=1+1")], ["runs/=1+1"]))
    assert (row["adapter"], row["adapter_name"]) == ("runs/=1+1", "'=1+1")


def test_values_of_several_runs_name_their_run():
    runs = small()
    result = list(csv.DictReader(io.StringIO(to_csv(evidence(*runs), values=True))))
    assert {row["results"] for row in result} == {"spectrum0.jsonl"}
    assert [float(row["value"]) for row in result] == [
        value for record in runs[0] for value in record.s
    ]


def test_page_has_no_rows_for_values(loradiag, tmp_path):
    small()[0].write(tmp_path / "r.jsonl")
    ran = loradiag(
        "report", tmp_path / "r.jsonl", "--format", "md", "--values", "-o", tmp_path / "x"
    )
    assert ran.code == 2
    assert "--values" in ran.err
    assert not (tmp_path / "x").exists()


def test_parquet_without_pyarrow_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow; pip install '\.\[arrow\]'"):
        to_parquet(evidence(*small()))
