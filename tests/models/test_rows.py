"""Folders of ``datasets`` give what JSON lines of the same rows give; everything else is one
message.
"""

import json
import sys

import datasets
import pytest
import torch

import lora_diag
from lora_diag.errors import InputError, UsageError
from lora_diag.models.data import read_source, read_texts
from lora_diag.models.opening import open_model
from tests.messages import raises_naming
from tests.probes.making import bert, gpt2, moved

CPU = torch.device("cpu")
ROWS = [
    {"text": "The first line."},
    {"text": "Another, which is longer than the model has room for, and cut."},
]


def saved(rows, path, features=None):
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(path))
    return path


def lines(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "rows",
    [ROWS, [{"prompt": "Say ", "completion": "yes."}, {"prompt": "And ", "completion": "no."}]],
)
def test_data_set_equals_json_lines(tmp_path, rows):
    model = open_model(gpt2(tmp_path / "base"), CPU)
    more = [{**row, "id": i} for i, row in enumerate(rows)]
    one = read_texts(saved(more, tmp_path / "my.data"), model)
    other = read_texts(lines(rows, tmp_path / "x.jsonl"), model)
    assert (one.name, one.sequences) == ("my.data", other.sequences)
    assert one.about == other.about.replace("lines", "rows")
    # The hash is that of the text, independent of its format.
    assert one.hash == read_texts(saved(rows, tmp_path / "other"), model).hash
    assert one.hash != read_texts(saved(rows[:1], tmp_path / "less"), model).hash


def test_only_line_feed_ends_json_line(tmp_path):
    rows = [{"text": "one\u2028two\u2029three\u0085four"}, {"text": "five"}]
    path = tmp_path / "x.jsonl"
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_source(path).rows == ((f"{path}: line 1", rows[0]), (f"{path}: line 2", rows[1]))


def test_label_is_found_by_name_then_index(tmp_path):
    model = open_model(bert(tmp_path / "base"), CPU, tokenizer="bytes")  # ham, spam, other
    named = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["other", "spam"])}
    )
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    result = read_texts(saved(rows, tmp_path / "named", named), model)
    assert [sequence.labels for sequence in result.sequences] == [(2,), (1,)]
    result = read_texts(saved(rows, tmp_path / "numbered"), model)
    assert [sequence.labels for sequence in result.sequences] == [(0,), (1,)]
    with raises_naming(InputError, "row 0", "label 7", "3 classes"):
        read_texts(saved([{"text": "a", "label": 7}], tmp_path / "wrong"), model)


def test_probe_accepts_data_set_or_file(tmp_path):
    base = gpt2(tmp_path / "base")
    tuned = moved(base, tmp_path / "tuned")
    sets = [saved(ROWS, tmp_path / "set"), lines(ROWS, tmp_path / "same.jsonl")]
    result = lora_diag.probe_truncation(base, tuned, eval=sets, ranks=(1,)).whole
    by_set = {name: [r.loss for r in result if r.set == name] for name in ("set", "same")}
    assert by_set["set"] == by_set["same"]


def test_invalid_data_set_is_one_message(tmp_path, monkeypatch):
    model = open_model(gpt2(tmp_path / "base"), CPU)
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    )
    splits.save_to_disk(str(tmp_path / "splits"))
    with raises_naming(InputError, "splits/train"):
        read_texts(tmp_path / "splits", model)
    with raises_naming(InputError, "folder without"):
        read_texts(tmp_path / "base", model)
    with raises_naming(InputError, "columns body", "text"):
        read_texts(saved([{"body": "x"}], tmp_path / "body"), model)
    broken = saved(ROWS, tmp_path / "broken")
    next(broken.glob("*.arrow")).write_bytes(b"not arrow")
    with raises_naming(InputError, "datasets cannot"):
        read_texts(broken, model)
    outside = saved(ROWS, tmp_path / "outside")
    state = json.loads((outside / "state.json").read_text())
    state["_data_files"] = [{"filename": "../set/data-00000-of-00001.arrow"}]
    (outside / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="which is not a file in this folder"):
        read_texts(outside, model)
    with pytest.raises(InputError, match="no such file"):
        lora_diag.probe_truncation(
            tmp_path / "base", tmp_path / "base", eval=[tmp_path / "nothing"]
        )

    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises_naming(UsageError, "install datasets"):
        read_texts(tmp_path / "splits" / "train", model)
