"""The results file: records are read as written, and a crash loses at most one line."""

import hashlib
import json
import os
import re
import shutil
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import lora_diag
from lora_diag import files
from lora_diag.catalog import read_results
from lora_diag.errors import InputError, LoradiagError, UsageError
from lora_diag.records import LeftOut, file, is_results_file
from lora_diag.records.file import iterate_records
from tests.conftest import edit_results, save_model, save_pair, time_limit
from tests.messages import assert_names, raises_naming


@pytest.fixture(scope="module")
def pair_of_models(tmp_path_factory):
    """Return what the fixture of this name does; no test leaves it changed."""
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def models(pair_of_models):
    return pair_of_models[:2]


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "r.jsonl"
    return lora_diag.spectrum(*models, output=path), path


@pytest.fixture
def results(measured):
    return measured[0]


@pytest.fixture
def path(measured, tmp_path):
    """Return a file of the results, which a test may change."""
    return Path(shutil.copy(measured[1], tmp_path))


def test_written_results_equal_read(results, path, tmp_path):
    assert read_results(path) == results
    results.write(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    assert list(tmp_path.glob(".*")) == []


def test_last_line_is_synced_to_disk(models, tmp_path, monkeypatch):
    path, kept = tmp_path / "r.jsonl", []
    monkeypatch.setattr(files, "sync_descriptor", lambda _: kept.append(path.read_bytes()))
    lora_diag.spectrum(*models, output=path)
    assert kept[-1] == path.read_bytes()


@pytest.mark.parametrize("cut", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("torn", [b"", b'{"record":"spec', '{"layer":"é'.encode()[:-1]])
def test_resume_ends_in_same_file(path, models, cut, torn):
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]) + torn)
    assert read_results(path).end is None
    with pytest.raises(UsageError, match="resume"):
        lora_diag.spectrum(*models, output=path)
    begun, message, events = len(read_results(path)), [], []
    lora_diag.spectrum(
        *models, output=path, resume=True, on_record=message.append, on_progress=events.append
    )
    assert path.read_bytes() == whole
    assert tuple(message) == tuple(read_results(path).records())
    assert events[-1].total == 10 - begun  # what is there is not measured again


def test_resume_of_finished_or_absent_run(results, path, models, tmp_path):
    assert lora_diag.spectrum(*models, output=path, resume=True) == results
    assert lora_diag.spectrum(*models, output=tmp_path / "new.jsonl", resume=True) == results


def test_resume_knows_former_names_of_settings(results, path, models):
    """``svd`` was ``method`` in settings; records have a ``method``, too."""
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text(first.replace('"svd":', '"method":') + "".join(lines[:4]))
    assert read_results(path).run.settings == results.run.settings
    resumed = lora_diag.spectrum(*models, output=path, resume=True)
    assert resumed.run.settings == results.run.settings
    assert list(resumed) == list(results)


def test_resume_refuses_other_settings_and_inputs(path, models):
    with pytest.raises(UsageError, match=r"settings \(top\)"):
        lora_diag.spectrum(*models, output=path, resume=True, top=3)
    with pytest.raises(UsageError, match="inputs"):
        lora_diag.spectrum(models[0], models[0], output=path, resume=True)


def test_layer_left_out_for_time_is_measured_by_resume(results, path, models):
    *layers, late = results.layers
    skipped = LeftOut(
        layer=late.layer, shape=late.shape, reason="time", detail="", fro=None, base_fro=None
    )
    left_out = [item for item in results.left_out if item.reason != "time"]
    replace(results, layers=tuple(layers), left_out=(*left_out, skipped)).write(path)
    lora_diag.spectrum(*models, output=path, resume=True)
    resumed = lora_diag.read_results(path)
    assert resumed[late.layer] == late
    assert resumed.left_out == results.left_out
    assert resumed.end is not None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda settings: settings.pop("seed"), "settings.seed"),
        (lambda settings: settings.pop("top"), "settings.top"),
        (lambda settings: settings.update(later=1), "later"),
    ],
)
def test_setting_of_one_run_is_named(path, models, change, named):
    """A field that was not requested is null, which differs from a run that does not have the
    field.
    """
    begun, *rest = path.read_text().splitlines(keepends=True)
    run = json.loads(begun)
    assert run["settings"]["top"] is None
    change(run["settings"])
    path.write_text("".join([json.dumps(run) + "\n", *rest[:3]]))
    with raises_naming(UsageError, named):
        lora_diag.spectrum(*models, output=path, resume=True)


def test_run_resumes_in_writable_file_of_read_only_folder(results, path, models, monkeypatch):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    monkeypatch.setattr(
        "os.access", lambda place, mode: str(place) == str(path)
    )  # root may write anywhere
    with pytest.raises(InputError, match="permission denied"):
        lora_diag.spectrum(*models, output=path.with_name("new.jsonl"))
    assert lora_diag.spectrum(*models, output=path, resume=True) == results


def test_text_after_torn_line_is_kept(path, tmp_path):
    """A record that lacked its newline, then the newline: it was called a line that is not JSON."""
    lines = path.read_bytes().splitlines(keepends=True)
    (tmp_path / "growing").write_bytes(b"".join(lines[:3])[:-1])
    reading = iterate_records(tmp_path / "growing")
    result = [next(reading) for _ in range(3)]
    with (tmp_path / "growing").open("ab") as file:
        file.write(b"\n" + lines[3])
    assert [*result, *reading] == list(read_results(path).records())[:3]


def test_results_of_other_work_are_kept(results, path, models, caplog):
    kept = path.read_bytes()
    with raises_naming(UsageError, path, "spectrum"):
        lora_diag.spectrum(models[0], models[0], output=path)
    with raises_naming(UsageError, path, "spectrum"):
        lora_diag.geometry(*models, output=path)
    assert path.read_bytes() == kept
    lora_diag.spectrum(*models, output=path)
    assert_names(caplog.text, path, "replaces")
    links = [path.parent / f"link-{each.name}" for each in models]
    for link, each in zip(links, models, strict=True):
        link.symlink_to(each)
    lora_diag.spectrum(*links, output=path)
    lora_diag.spectrum(models[0], models[0], output=path, overwrite=True)
    assert read_results(path).run.inputs[1].path == str(models[0])


def test_overwrite_replaces_only_finished_runs(path, models, tmp_path):
    lora_diag.spectrum(*models, output=path, top=2)
    assert len(read_results(path).layers[0].s) == 2
    other = tmp_path / "thesis.txt"
    other.write_text("precious")
    with pytest.raises(UsageError, match="not a results file"):
        lora_diag.spectrum(*models, output=other)
    with pytest.raises(UsageError, match="is a folder"):
        lora_diag.spectrum(*models, output=tmp_path)
    assert other.read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: ["hello", *lines], "line 1 is not JSON"),
        (lambda lines: lines[1:], "first line"),
        (lambda lines: [], "it is empty"),
        (lambda lines: [lines[0].replace('"schema":1', '"schema":2'), *lines[1:]], "schema 2"),
        (lambda lines: [*lines[:3], '{"record":"magic"}', *lines[3:]], "line 4"),
        (
            lambda lines: [*lines[:3], lines[3].replace('"fro":', '"fro":"x","was":'), *lines[4:]],
            "line 4.*fro",
        ),
        (lambda lines: [*lines, *lines], "line 15 begins a second run"),
        (lambda lines: [*lines[:4], *lines], "line 5 begins a second run"),
        (lambda lines: [*lines, lines[3]], "line 15 comes after the end"),
        (
            lambda lines: [lines[0].replace('"ranks":', '"rungs":'), *lines[1:]],
            r"line 1 .*settings\.ranks",
        ),
        (
            lambda lines: [*lines[:3], lines[3].replace('"8":', '"9":'), *lines[4:]],
            r"line 4 .*energy\.8",
        ),
        (
            lambda lines: [*lines[:3], lines[3].replace('"0.95":', '"0.96":'), *lines[4:]],
            r"line 4 .*rank_at\.0\.95",
        ),
        (lambda lines: [*lines[:3], "[" * 100_000, *lines[3:]], "line 4"),
        (
            lambda lines: [*lines[:3], lines[3].replace('"fro":', '"fro":NaN,"was":'), *lines[4:]],
            "line 4",
        ),
    ],
)
def test_damaged_results_files(path, change, words):
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(InputError, match=words):
        read_results(path)


def test_fields_of_later_version_are_ignored(results, path):
    edit_results(
        path, lambda text: text.replace('"record":"spectrum"', '"record":"spectrum","later":[1]')
    )
    result = read_results(path)
    assert (result.run, result.layers, result.left_out) == (
        results.run,
        results.layers,
        results.left_out,
    )


def test_last_line_hashes_lines_before_it(results, path):
    *lines, _ = path.read_bytes().splitlines(keepends=True)
    assert results.end.sha256 == hashlib.sha256(b"".join(lines)).hexdigest()
    assert read_results(path).end == results.end


@pytest.mark.parametrize("line", range(-1, 13))
def test_edited_line_is_refused(path, line):
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 14
    if line >= 0:
        lines[line] = re.sub(r"\d(?=\D*$)", lambda result: str(9 - int(result[0])), lines[line])
    else:
        lines[1], lines[2] = lines[2], lines[1]
    path.write_text("".join(lines))
    with raises_naming(InputError, "edited", "damaged"):
        read_results(path)


def test_line_endings_do_not_matter(results, path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_results(path) == results


def test_file_without_hash_is_read(results, path):
    path.write_text(path.read_text().replace(f',"sha256":"{results.end.sha256}"', ""))
    assert read_results(path).end == results.end.model_copy(update={"sha256": ""})


def test_run_time_is_now_and_kept_by_resume(models, tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    begun = datetime.now(UTC).replace(microsecond=0)
    made = lora_diag.spectrum(*models, output=tmp_path / "r.jsonl").run.made
    assert begun <= datetime.fromisoformat(made) <= datetime.now(UTC)
    whole = (tmp_path / "r.jsonl").read_bytes()
    (tmp_path / "r.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    resumed = lora_diag.spectrum(*models, output=tmp_path / "r.jsonl", resume=True)
    assert (resumed.run.made, (tmp_path / "r.jsonl").read_bytes()) == (made, whole)
    assert lora_diag.spectrum(*models).run.made == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize("epoch", ["soon", "1.5", "9" * 30])
def test_source_date_epoch_must_be_number(models, monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        lora_diag.spectrum(*models)


def test_interrupted_rerun_keeps_finished_run(path, models, tmp_path):
    before, part, seen = path.read_bytes(), tmp_path / "r.jsonl.part", []

    def stop(record):
        seen.append(record)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_diag.spectrum(*models, output=path, on_record=stop, top=2)
    assert path.read_bytes() == before
    assert len(part.read_bytes().splitlines()) == 4
    for words in ({}, {"top": 2}):
        with raises_naming(UsageError, "r.jsonl.part", "unfinished"):
            lora_diag.spectrum(*models, output=path, **words)
    with pytest.raises(UsageError, match=r"settings \(top\)"):
        lora_diag.spectrum(*models, output=path, resume=True)
    results = lora_diag.spectrum(*models, output=path, resume=True, top=2)
    assert read_results(path) == results
    assert results.run.settings["top"] == 2
    assert not part.exists()


def test_finished_part_replaces_file(path, models, tmp_path):
    """The machine stopped between the last line and the renaming."""
    part = tmp_path / "r.jsonl.part"
    whole = path.read_bytes()
    path.rename(part)
    path.write_bytes(whole.replace(b'"seed":0', b'"seed":1'))
    with pytest.raises(UsageError, match=r"r\.jsonl\.part"):
        lora_diag.spectrum(*models, output=path)
    lora_diag.spectrum(*models, output=path, resume=True)
    assert path.read_bytes() == whole
    assert not part.exists()


def test_part_with_torn_first_line_restarts(path, models, tmp_path):
    (tmp_path / "r.jsonl.part").write_bytes(path.read_bytes()[:100])
    lora_diag.spectrum(*models, output=path, resume=True, top=2)
    assert len(read_results(path).layers[0].s) == 2
    assert not (tmp_path / "r.jsonl.part").exists()


@pytest.mark.parametrize("name", ["link.jsonl", "link.jsonl.part"])
def test_runs_are_not_written_through_links(path, models, tmp_path, name):
    before = path.read_bytes()
    (tmp_path / name).symlink_to(path)
    for overwrite in (False, True):
        with raises_naming(UsageError, name, "symbolic link"):
            lora_diag.spectrum(*models, output=tmp_path / "link.jsonl", top=2, overwrite=overwrite)
    assert path.read_bytes() == before
    assert not (tmp_path / "link.jsonl").exists() or name == "link.jsonl"


def test_overwrite_replaces_foreign_file_by_finished_run(path, models, tmp_path):
    """Until the new run ends, what was there stays; a damaged results file is one of them, an
    unfinished one is not.
    """
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for content in (
        b"mine",
        b"mine\n",
        b'{"a": 1}\n' * 3,
        b"".join([lines[0], b"?\n", *lines[1:]]),
    ):
        path.write_bytes(content)
        os.link(path, tmp_path / "second")
        for resume in (False, True):
            with pytest.raises(LoradiagError):
                lora_diag.spectrum(
                    models[0], tmp_path / "gone", output=path, resume=resume, overwrite=True
                )
            assert path.read_bytes() == content
            with pytest.raises(UsageError):
                lora_diag.spectrum(*models, output=path, resume=resume)
            lora_diag.spectrum(*models, output=path, resume=resume, overwrite=True)
            assert path.read_bytes() == whole
            path.write_bytes(content)
        assert (tmp_path / "second").read_bytes() == content
        (tmp_path / "second").unlink()
    path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(UsageError, match="unfinished"):
        lora_diag.spectrum(*models, output=path, overwrite=True)
    assert path.read_bytes() == b"".join(lines[:3])


@pytest.mark.parametrize("resume", [False, True])
def test_torn_first_line_is_empty_file(path, models, resume):
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    lora_diag.spectrum(*models, output=path, resume=resume)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("lines", [1, 5, 14])
def test_last_line_without_newline_is_kept(results, path, models, lines):
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines])[:-1])
    assert len(list(read_results(path).records())) == lines
    if lines == 14:
        assert read_results(path) == results
        return
    lora_diag.spectrum(*models, output=path, resume=True)
    assert path.read_bytes() == whole


def test_resume_refuses_changed_input(path, pair_of_models, tmp_path):
    """Same names, same shapes, same sizes: a later step of the same training."""
    base, tuned, _, after = pair_of_models
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    save_model(tuned, {name: value + 1e-3 for name, value in after.items()})
    with raises_naming(UsageError, "tuned changed"):
        lora_diag.spectrum(base, tuned, output=path, resume=True)
    save_model(tuned, after)
    assert lora_diag.spectrum(base, tuned, output=path, resume=True).end is not None


def test_fingerprint_is_independent_of_path_and_time(pair_of_models, tmp_path):
    base, _, before, _ = pair_of_models
    runs = [lora_diag.spectrum(base, base).run.inputs[0]]
    os.utime(base / "model.safetensors", (0, 0))
    runs.append(lora_diag.spectrum(base, base).run.inputs[0])
    copy = save_model(tmp_path / "copy", before)
    runs.append(lora_diag.spectrum(copy, copy).run.inputs[0])
    prints = [run.fingerprint for run in runs]
    assert len(set(prints)) == 1
    assert len(prints[0]) == 32
    half = save_model(
        tmp_path / "half", {name: value.to(torch.float16) for name, value in before.items()}
    )
    assert lora_diag.spectrum(half, half).run.inputs[0].fingerprint != prints[0]


def test_filter_keeps_totals_and_left_out_together(results):
    result = results.filter("layers.0")
    assert {record.layer for record in result.left_out} == {"model.layers.0.input_layernorm.weight"}
    assert (result.end.layers, result.end.left_out) == (len(result), 1)
    assert result.end.fro == pytest.approx(sum(record.fro**2 for record in result) ** 0.5)
    unhashed = results.end.model_copy(update={"sha256": ""})
    assert results.filter("") == replace(results, end=unhashed)
    assert len(results.filter("nothing")) == results.filter("nothing").end.fro == 0


def test_unwritable_output_is_refused_before_measuring(models, tmp_path):
    events = []
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    targets = [
        tmp_path / ("n" * 300),
        *([] if os.getuid() == 0 else [locked / "r.jsonl"]),
    ]
    for output in targets:
        with pytest.raises(InputError, match="cannot be written"):
            lora_diag.spectrum(
                *models, output=output, on_progress=events.append, on_record=events.append
            )
    assert events == []
    assert {path.name for path in tmp_path.iterdir()} == {"locked"}


def test_pipe_and_folder_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, problem in ((tmp_path / "pipe.jsonl", "regular file"), (tmp_path, "folder")):
        with time_limit(30):
            assert not is_results_file(path)
            with raises_naming(InputError, problem):
                read_results(path)


@pytest.mark.parametrize("size", [file.MAX_LINE_BYTES, 3 * file.MAX_LINE_BYTES])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_overlong_line_is_not_kept_in_memory(path, size, end):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"record":"end","s":[' + b"1," * (size // 2) + b"1]}" + end)
    tracemalloc.start()
    with raises_naming(InputError, "line 2", "16,777,216 bytes"):
        read_results(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * file.MAX_LINE_BYTES


def test_zeros_after_power_loss_are_recognised(results, path):
    path.write_bytes(path.read_bytes() + bytes(2 * file.MAX_LINE_BYTES))
    assert read_results(path) == results


def test_written_lines_are_readable(results, tmp_path, monkeypatch):
    monkeypatch.setattr(file, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "long.jsonl"
    with (
        pytest.raises(InputError, match="limit of 1,000 bytes"),
        file.ResultsWriter(path, results.run) as writer,
    ):
        writer.append(*results)
    assert not path.exists()
