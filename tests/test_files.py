"""Outputs: a file is there as a whole or not at all, nothing goes through a link, and only own
files are replaced.
"""

import errno
import os

import pytest

from lora_diag.errors import InputError, UsageError
from lora_diag.files import (
    CARD,
    CONFIG,
    CSV,
    JUNIT,
    MARKDOWN,
    PAGE,
    PDF,
    POLICY,
    RESULTS,
    SVG,
    check_folder_of,
    check_output,
    is_unfinished,
    lock,
    replacing,
    write_whole,
)
from tests.messages import assert_names, raises_naming

RUN, END = '{"record":"run","schema":1}\n', '{"record":"end","layers":0}\n'


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_whole(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_whole(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", [PAGE, MARKDOWN, SVG, PDF, JUNIT])
def test_signed_file_is_own_until_it_is_edited(tmp_path, kind):
    path = tmp_path / "a"
    write_whole(path, "one", kind)
    assert path.read_text().startswith("one\n")
    write_whole(path, "two\n", kind)
    content = path.read_bytes()
    assert content.startswith(b"two\n")
    assert b"one" not in content
    for edited in (
        content.replace(b"two", b"2"),
        content + b"mine\n",
        b"mine\n" + content,
        content[:-9],
        b"two\n",
    ):
        path.write_bytes(edited)
        with pytest.raises(UsageError, match="--overwrite"):
            write_whole(path, "three", kind)
        assert path.read_bytes() == edited
    write_whole(path, "three", kind, overwrite=True)
    check_output(path, kind)


def test_file_of_another_kind_is_not_replaced(tmp_path):
    kinds = [RESULTS, PAGE, MARKDOWN, JUNIT, CSV, CONFIG, POLICY]
    for kind in (PAGE, MARKDOWN, JUNIT):
        path = tmp_path / "a"
        write_whole(path, "text", kind, overwrite=True)
        for other in kinds:
            if other is not kind:
                with pytest.raises(UsageError, match="--overwrite"):
                    check_output(path, other)


@pytest.mark.parametrize("kind", [RESULTS, PAGE, POLICY, CARD])
@pytest.mark.parametrize("overwrite", [False, True])
def test_new_and_empty_files_are_written(tmp_path, kind, overwrite):
    (tmp_path / "empty").touch()
    for name in ("new", "empty"):
        write_whole(tmp_path / name, "text", kind, overwrite)
        assert (tmp_path / name).read_text().startswith("text")
    assert names(tmp_path) == ["empty", "new"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_unfinished_run_is_never_replaced(tmp_path, overwrite):
    path = tmp_path / "r.jsonl"
    for content in (RUN, RUN[:20], RUN + '{"record":"spectrum"}\n', RUN + END[:12]):
        path.write_text(content)
        assert is_unfinished(path)
        for kind in (RESULTS, PAGE):
            with raises_naming(UsageError, "unfinished", "--resume"):
                write_whole(path, "new", kind, overwrite)
        assert path.read_text() == content
    path.write_text(RUN + END)
    assert not is_unfinished(path)
    write_whole(path, "new", RESULTS)
    assert path.read_text() == "new"


def test_link_is_refused_and_linked_folder_is_not(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "runs").symlink_to(tmp_path / "there")
    for name, target in (
        ("link", "there/file"),
        ("broken", "gone/file"),
        ("dangling", "gone"),
        ("folder", "there"),
    ):
        (tmp_path / name).symlink_to(tmp_path / target)
        for overwrite in (False, True):
            with raises_naming(UsageError, name, "symbolic link"):
                write_whole(tmp_path / name, "new", PAGE, overwrite)
        assert (tmp_path / name).is_symlink()
    assert names(tmp_path / "there") == ["file"]
    assert not (tmp_path / "there" / "file").stat().st_size
    write_whole(tmp_path / "runs" / "new", "new", POLICY)
    assert (tmp_path / "there" / "new").read_text() == "new"


def test_hard_link_keeps_other_name(tmp_path):
    write_whole(tmp_path / "a", "old", PAGE)
    os.link(tmp_path / "a", tmp_path / "b")
    write_whole(tmp_path / "a", "new", PAGE)
    assert [(tmp_path / name).read_text()[:3] for name in "ab"] == ["new", "old"]


def test_file_that_appears_during_run_is_kept(tmp_path):
    path, other = tmp_path / "a", tmp_path / "other"
    other.write_text("weights")

    def meanwhile():
        with replacing(path, PAGE) as file:
            file.write(b"new")
            path.write_text("mine")

    with pytest.raises(UsageError, match="--overwrite"):
        meanwhile()
    assert path.read_text() == "mine"
    path.unlink()
    with replacing(path) as file:  # of a folder of our own, which nothing is looked at in
        file.write(b"new")
        path.symlink_to(other)
    assert not path.is_symlink()
    assert (path.read_text(), other.read_text()) == ("new", "weights")
    assert names(tmp_path) == ["a", "other"]


def test_link_in_place_of_temporary_file(tmp_path):
    (tmp_path / "victim").write_text("weights")
    (tmp_path / f".a.{os.getpid()}").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "a", "new", PAGE)
    assert (tmp_path / "victim").read_text() == "weights"
    assert names(tmp_path) == ["a", "victim"]


@pytest.mark.parametrize(
    "weights", ["adapter_model.safetensors", "model-00001-of-00002.safetensors", "a.gguf"]
)
def test_adapter_config_is_not_written_next_to_weights(tmp_path, weights):
    path = tmp_path / "adapter_config.json"
    check_output(path, CONFIG)
    (tmp_path / "activations.safetensors").touch()
    check_output(path, CONFIG)
    (tmp_path / weights).touch()
    for name in ("adapter_config.json", "Adapter_Config.json"):
        for kind in (CONFIG, RESULTS):
            with pytest.raises(UsageError, match=f"weights in .*{weights}"):
                write_whole(tmp_path / name, "{}", kind, overwrite=True)
    check_output(tmp_path / "ranks.json", CONFIG)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("file/a.txt", InputError, "cannot be written: "),
        ("folder", UsageError, "is a folder; choose another name"),
        ("a" * 300, InputError, "cannot be written: File name too long"),
    ],
)
def test_unwritable_output_is_one_message(tmp_path, name, kind, why):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for refuse in (
        lambda path: check_output(path, PAGE, True),
        lambda path: write_whole(path, "new", PAGE, True),
    ):
        with pytest.raises(kind, match=why):
            refuse(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_missing_folders_are_made_on_writing(tmp_path):
    path = tmp_path / "gates" / "new" / "a.txt"
    check_output(path, PAGE)
    assert not names(tmp_path)
    write_whole(path, "new", PAGE)
    assert path.read_text().startswith("new")
    os.close(lock(tmp_path / "runs" / "new" / "r.jsonl"))
    assert names(tmp_path) == ["gates", "runs"]


def test_permission_errors_are_reported(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr("os.access", lambda place, mode: place == path)  # root may write anywhere
    check_folder_of(path, in_place=True)
    with pytest.raises(InputError, match="permission denied"):
        check_output(path, PAGE)
    monkeypatch.setattr("os.access", lambda place, mode: place == tmp_path)
    check_output(path, PAGE, overwrite=True)
    with pytest.raises(InputError, match="permission denied"):
        check_folder_of(path, in_place=True)


def test_failed_flush_of_folder_is_no_failed_write(tmp_path, monkeypatch, caplog):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("lora_diag.files.sync", fail)
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert_names(caplog.text, tmp_path / "a.txt", "Input/output error")


def test_interrupted_write_keeps_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]
