"""A file is there as a whole or not at all, whatever goes wrong and whatever lies in its place."""

import pytest

from lora_diag.errors import InputError, UsageError
from lora_diag.files import check_folder_of, check_place, replacing, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_whole(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_whole(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert names(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"
    assert names(tmp_path / "there") == ["file"]
    (tmp_path / "broken").symlink_to(tmp_path / "gone" / "file")
    with pytest.raises(InputError, match=r"broken: cannot be written: there is no folder .*gone; create it first"):
        check_place(tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("missing/a.txt", InputError, "cannot be written: there is no folder .*missing; create it first"),
        ("file/a.txt", InputError, "cannot be written: "),
        ("folder", UsageError, "is not a file; choose another name"),
        ("a" * 300, InputError, "cannot be written: File name too long"),
    ],
)
def test_what_cannot_be_written_is_one_message_and_leaves_nothing(tmp_path, name, kind, why):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for refuse in (check_place, lambda path: write_whole(path, "new")):
        with pytest.raises(kind, match=why):
            refuse(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_is_replaced_needs_its_folder_and_what_is_gone_on_with_needs_itself(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr("os.access", lambda place, mode: place == path)  # root may write anywhere
    check_folder_of(path, in_place=True)
    with pytest.raises(InputError, match="permission denied"):
        check_place(path)
    monkeypatch.setattr("os.access", lambda place, mode: place == tmp_path)
    check_place(path)
    with pytest.raises(InputError, match="permission denied"):
        check_folder_of(path, in_place=True)


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]
