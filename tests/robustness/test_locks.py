"""The lock of one file: held, let go of, and never that of a file that is gone."""

import os
from pathlib import Path

import pytest

from lora_diag import files
from lora_diag.errors import UsageError
from lora_diag.files import MARKDOWN, check_output, lock
from tests.messages import raises_naming


def test_lock_is_released_between_processes(tmp_path: Path) -> None:
    first = lock(tmp_path / "a")
    with raises_naming(UsageError, "another process"):
        lock(tmp_path / "a")
    os.close(first)
    os.close(lock(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b""


def test_file_of_running_process_is_not_to_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text('{"record":"run","schema":1,"command":"spectrum"}\n')
    with raises_naming(UsageError, "unfinished run", "delete"):
        check_output(path, MARKDOWN)
    held = lock(path)
    with raises_naming(UsageError, "another process"):
        check_output(path, MARKDOWN)
    os.close(held)


def test_replaced_file_is_locked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replaced = tmp_path / "a", []
    path.touch()
    flock = files._lock_file

    def replacing(descriptor: int, place: Path) -> None:
        flock(descriptor, place)
        if not replaced:
            (tmp_path / "b").write_text("new")
            (tmp_path / "b").replace(path)
            replaced.append(path)

    monkeypatch.setattr(files, "_lock_file", replacing)
    held = lock(path)
    assert os.path.samestat(os.fstat(held), path.stat())
    os.close(held)
