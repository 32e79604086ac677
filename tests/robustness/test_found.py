"""What damaged inputs and faults brought to light, each as small as it can be."""

import json
import math
from pathlib import Path

import pytest
import torch

import lora_diag
from lora_diag.catalog import read_results, table
from lora_diag.errors import InputError
from lora_diag.linalg.methods import decompose
from lora_diag.storage import open_checkpoint
from tests.conftest import save_model, save_sharded
from tests.messages import assert_names


@pytest.mark.parametrize("largest", [3.4028e38, 1.5e38, 2e-38, 3e-45])
@pytest.mark.parametrize("method", ["exact", "gram"])
def test_number_at_edge_of_float32(largest: float, method: str) -> None:
    """All singular values were zero: the matrix was divided by 2^128, which is infinite
    in float32.
    """
    matrix = torch.zeros(4, 3)
    matrix[1, 2] = largest
    factors = decompose(matrix, method)
    assert math.isclose(float(factors.s[0]), float(matrix[1, 2]), rel_tol=1e-6)
    assert factors.s[1:].tolist() == [0.0, 0.0]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [save_model(tmp_path / str(k), {"a.weight": torch.eye(4) * k}) for k in (1, 2)]


def test_shard_with_invalid_name_is_refused(tmp_path: Path) -> None:
    """OSError: file name too long."""
    folder = save_sharded(tmp_path / "m", {"a.weight": torch.zeros(2, 2)}, shards=1)
    index = next(folder.glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"a.weight": "a" * 3000}}))
    with pytest.raises(InputError, match="is missing from"):
        open_checkpoint(folder)


def test_pickle_of_unknown_protocol_is_refused(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A warning of torch reached the terminal, asking for a bug report."""
    path = tmp_path / "m.bin"
    path.write_bytes(b"\x80\x34}q\x00.")
    with pytest.raises(InputError):
        open_checkpoint(path)
    assert not recwarn.list


def test_unfinished_allocation_is_reported(pair: list[Path], tmp_path: Path) -> None:
    """StopIteration: the certificate is among the last lines."""
    spectra = lora_diag.spectrum(*pair)
    lora_diag.allocate(spectra, total_rank=2).write(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:2]))
    assert_names(
        table(read_results(tmp_path / "a.jsonl"), 100), "did not finish", "incomplete file"
    )


def test_results_file_with_zeros_is_unfinished(pair: list[Path], tmp_path: Path) -> None:
    """After a loss of power: neither damaged nor finished."""
    lora_diag.spectrum(*pair, output=tmp_path / "r.jsonl")
    whole = (tmp_path / "r.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, -1)
    (tmp_path / "r.jsonl").write_bytes(whole[: last - 5] + b"\0" * 20 + whole[last:])
    results = read_results(tmp_path / "r.jsonl")
    assert (len(results), results.end) == (0, None)


def test_zeros_for_newline_do_not_hide_later_lines(pair: list[Path], tmp_path: Path) -> None:
    """The last record is whole and is kept, the zeros stayed: nothing behind them was ever read
    again.
    """
    lora_diag.spectrum(*pair, output=tmp_path / "r.jsonl")
    whole = (tmp_path / "r.jsonl").read_bytes()
    for newline in (whole.index(b"\n"), whole.rindex(b"\n", 0, -1)):
        (tmp_path / "r.jsonl").write_bytes(whole[:newline] + b"\0" * 20)
        lora_diag.spectrum(*pair, output=tmp_path / "r.jsonl", resume=True)
        assert (tmp_path / "r.jsonl").read_bytes() == whole
