"""Full disks, broken disks, files that change under a reader, missing permissions, odd clocks: one
message, no loss.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

import lora_diag
from lora_diag.catalog import read_results
from lora_diag.errors import InputError, UsageError
from lora_diag.records import End
from tests.conftest import ROOT, save_model
from tests.messages import assert_names, mentions, raises_naming
from tests.robustness.conftest import Commands
from tests.robustness.test_killed import Case, contents, words_of
from tests.served import PATIENCE


@contextmanager
def mounted(place: Path, option: str) -> Iterator[Path]:
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("may not mount a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=64k") as place:
        yield place


def test_full_disk_is_reported(
    command: Commands, model: Path, small_disk: Path, tmp_path: Path
) -> None:
    case = Case("interference", command, model, tmp_path)
    free = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 2 * 4096))
    ended = command(*case.words, cwd=small_disk)
    assert_names(ended.told(3), "out", "space left", "--resume")
    kept = read_results(small_disk / "out")
    assert kept.layers
    assert kept.end is None
    # Still full: nothing is lost by trying.
    assert "No space left" in command(*case.words, "--resume", cwd=small_disk).told(3)
    assert read_results(small_disk / "out") == kept
    filler.unlink()
    case.place = small_disk
    case.goes_on()


@pytest.mark.parametrize("size", [100, 300, 1500])
def test_limit_on_size_of_files(command: Commands, model: Path, tmp_path: Path, size: int) -> None:
    case = Case("spectrum", command, model, tmp_path)
    assert "cannot be written: File too large" in case.run(full=size).told(3)
    if size < 1000:  # not even the first layer
        assert contents(case.place) == {}
    case.goes_on()


def test_extract_reports_full_disk_and_resumes(
    command: Commands, model: Path, tmp_path: Path
) -> None:
    case = Case("extract", command, model, tmp_path)
    assert "cannot be written: File too large" in case.run(full=2500).told(3)
    assert not (case.place / "out").exists()
    case.goes_on()


@pytest.mark.parametrize(
    "words",
    [
        ["report", "-o", "page.html"],
        ["plot", "-o", "a.png"],
        ["allocate", "--params", "300", "-o", "a.jsonl"],
    ],
    ids=lambda words: words[0],
)
def test_full_disk_is_reported_and_leaves_nothing(
    command: Commands, model: Path, tmp_path: Path, words: list[str]
) -> None:
    lora_diag.spectrum(model / "base", model / "fine", output=tmp_path / "r.jsonl")
    ended = command(words[0], "r.jsonl", *words[1:], cwd=tmp_path, full=500)
    assert "cannot be written: File too large" in ended.told(3)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(("fault", "at"), [("unreadable", 1), ("unreadable", 5), ("shrinking", 3)])
def test_read_error_is_reported(
    command: Commands, model: Path, tmp_path: Path, fault: str, at: int
) -> None:
    case = Case("residual", command, model, tmp_path)
    for name in ("base", "tuned", "lora", "lora2"):
        shutil.copytree(model / name, tmp_path / "copies" / name)
    original = case.words
    case.words = [word.replace(str(model), str(tmp_path / "copies")) for word in original]
    err = case.run(**{fault: at}).told(3)
    assert "Input/output error" in err or mentions(err, "ends inside") or "cut short" in err
    assert str(tmp_path / "copies") in err
    case.words = original
    assert contents(case.place).keys() <= {"out"}
    case.start_anew()  # what it began is of the copies, which are other inputs
    case.goes_on()


def test_short_reads_are_completed(command: Commands, model: Path, tmp_path: Path) -> None:
    case = Case("spectrum", command, model, tmp_path)
    case.ends_as_undisturbed(short=7)


def test_max_age_with_clock_errors(command: Commands, model: Path, tmp_path: Path) -> None:
    case = Case("spectrum", command, model, tmp_path)
    for name in ("base", "tuned"):
        shutil.copytree(model / name, tmp_path / "copies" / name)
        for when in (2**33, -(2**33), 2**40):
            os.utime(tmp_path / "copies" / name / "model.safetensors", (when, when))
    case.ends_as_undisturbed(backwards=1e6)
    os.utime(case.place / "out", (2**33, 2**33))
    assert command("report", "out", "--format", "md", cwd=case.place).code == 0


def test_results_with_invalid_year_are_handled(
    command: Commands, model: Path, small_disk: Path, tmp_path: Path
) -> None:
    """The file systems of most disks keep no such time; that of memory does."""
    out = small_disk / "r.jsonl"
    lora_diag.spectrum(model / "base", model / "fine", layers="0", output=out)
    os.utime(out, (2**40, 2**40))
    assert command("report", out, "--format", "md", cwd=tmp_path).code == 0
    assert command("report", out, "-o", "page.html", cwd=tmp_path).code == 0


def test_disk_error_on_sync_is_reported(command: Commands, model: Path, tmp_path: Path) -> None:
    case = Case("spectrum", command, model, tmp_path)
    assert_names(case.run(no_sync=errno.EIO).told(3), "Input/output")
    case.goes_on()
    case.start_anew()
    case.ends_as_undisturbed(no_sync=errno.EINVAL)


def test_read_only_disk_is_reported(command: Commands, model: Path, tmp_path: Path) -> None:
    """On a disk that is mounted read-only: root, who may run this, is permitted everything else."""
    with mounted(tmp_path / "disk", "ro") as place:
        for name in ("spectrum", "extract"):
            ended = command(*words_of(name, model), "-o", place / "out", "-q", cwd=tmp_path)
            assert "out: cannot be written: " in ended.told(3)


# --- two processes
# ----------------------------------------------------------------------------------------------------


def running(model: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a run and return when its first two layers are in the file and it is at the third,
    until its input ends.
    """
    words = [*words_of("spectrum", model), "-o", "out", "-q", "--json", *more]
    server = "import sys, lora_diag.running.engines.local as e; m = e._run_on_threads\n"
    server += "def third(): print('third', flush=True); sys.stdin.read()\n"
    server += "e._run_on_threads = lambda *a: (m(*a), third() if 's.2.' in a[2].layer else '')[0]\n"
    server += (
        f"sys.argv = ['loradiag', *{words!r}, '--workers', '1']\nfrom lora_diag.cli import "
        "main\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", server],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != b"third\n":
        assert line, "it has ended"
    return process


def test_lock_stops_second_process_and_is_freed_by_kill(
    command: Commands, model: Path, tmp_path: Path
) -> None:
    case = Case("spectrum", command, model, tmp_path)
    first = running(model, case.place)
    try:
        before = contents(case.place)
        for more in ([], ["--resume"]):
            assert_names(case.run(*more).told(2), "out", "another process")
        assert contents(case.place) == before
        # Nobody is kept from looking.
        assert command("inspect", "out", cwd=case.place).code == 0
    finally:
        first.kill()
        first.communicate()
    case.goes_on()


def test_second_process_stops_while_finished_run_is_remeasured(model: Path, tmp_path: Path) -> None:
    """Records go to out.part, and the lock is that of out all the same."""
    run = {"output": tmp_path / "out", "top": 2}
    lora_diag.spectrum(model / "base", model / "fine", output=tmp_path / "out")
    seen = []

    def another(record: object) -> None:
        if isinstance(record, End):  # and then all is done
            return
        for resume in (False, True):
            with raises_naming(UsageError, "another process"):
                lora_diag.spectrum(model / "base", model / "fine", resume=resume, **run)
        seen.append(record)

    lora_diag.spectrum(model / "base", model / "fine", on_record=another, **run)
    assert len(seen) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert len(read_results(tmp_path / "out").layers[0].s) == 2


def test_extraction_is_not_overwritten_while_it_runs(model: Path, tmp_path: Path) -> None:
    seen = []

    def another(record: object) -> None:
        for more in ({}, {"overwrite": True}, {"resume": True}):
            with raises_naming(UsageError, "another process"):
                lora_diag.extract(model / "base", model / "fine", tmp_path / "a", rank=2, **more)
        seen.append(record)

    lora_diag.extract(model / "base", model / "fine", tmp_path / "a", rank=2, on_record=another)
    assert seen
    assert not (tmp_path / "a.part").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_file_system_without_locks_is_noted(
    command: Commands, model: Path, tmp_path: Path, number: int
) -> None:
    case = Case("intruders", command, model, tmp_path)
    assert_names(case.ends_as_undisturbed(no_locks=number).err, "out", "no locks")


# --- Ctrl-C
# -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_at_step(command: Commands, model: Path, tmp_path: Path) -> None:
    for name in ("spectrum", "extract"):
        folder = tmp_path / name
        folder.mkdir()
        case = Case(name, command, model, folder)
        steps = len(case.undisturbed.steps)
        for at in range(1, steps + 1, 1 if os.environ.get("LORADIAG_EVERY_STEP") else steps // 3):
            case.start_anew()
            ended = case.run(at=at, signal=signal.SIGINT)
            if ended.code != case.undisturbed.code:  # in the last steps all is done
                assert_names(ended.told(130), "interrupted", "-o", "--resume")
            case.goes_on()


def test_ctrl_c_does_not_wait_for_current_layer(model: Path, tmp_path: Path) -> None:
    """Python would: for a large matrix, minutes; for this one, until its input ends."""
    process = running(model, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    process.communicate()


# Sends itself Ctrl-C when a module is about to be imported, wherever that is.
AT_AN_IMPORT = """
import os, runpy, signal, sys
at = [sys.argv.pop(1)]
def interrupt(event, arguments):
    if event == "import" and arguments[0] in at:
        at.remove(arguments[0])
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
runpy.run_module("lora_diag", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module", ["typer", "torch", "torch.nn", "torch.cuda", "lora_diag.layers.change"]
)
def test_ctrl_c_while_real_process_starts(module: str, model: Path, tmp_path: Path) -> None:
    """An exception amid the imports of torch came out as a RecursionError and exit code 1: that of
    a failed gate.
    """
    words = [
        sys.executable,
        "-c",
        AT_AN_IMPORT,
        module,
        *words_of("spectrum", model),
        "-o",
        "out",
        "-q",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


# --- inputs that change
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Files larger than all samples together, so that a change fits between two of them."""
    import torch

    weights = {f"layers.{index}.w.weight": torch.ones(200, 400) for index in range(2)}
    save_model(tmp_path / "base", weights)
    save_model(tmp_path / "tuned", {name: value * 1.5 for name, value in weights.items()})
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))


def change_between_samples(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(8000)
        file.write(b"\0\0\0\0")


@pytest.mark.parametrize("verify", [False, True])
def test_verify_detects_changed_byte(large: Path, verify: bool) -> None:
    run = {"output": large / "out", "verify": verify}
    lora_diag.spectrum(large / "base", large / "tuned", **run)
    cut(large / "out")
    change_between_samples(large / "tuned")
    # Without it too: small files are hashed whole, and the samples of larger ones are tested with
    # the fingerprint.
    with raises_naming(UsageError, "tuned changed"):
        lora_diag.spectrum(large / "base", large / "tuned", resume=True, **run)


def test_hash_equals_file_hash(large: Path) -> None:
    results = lora_diag.spectrum(large / "base", large / "tuned", verify=True)
    assert (
        results.run.inputs[0].sha256
        == sha256((large / "base" / "model.safetensors").read_bytes()).hexdigest()
    )
    assert lora_diag.spectrum(large / "base", large / "tuned").run.inputs[0].sha256 == ""


def test_resume_uses_original_settings(large: Path) -> None:
    lora_diag.spectrum(large / "base", large / "tuned", output=large / "out")
    cut(large / "out")
    with pytest.raises(UsageError, match="without verify"):
        lora_diag.spectrum(
            large / "base", large / "tuned", output=large / "out", resume=True, verify=True
        )


def test_unhashable_input_gives_one_message(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Path, *_: object, **__: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    from lora_diag.running import fingerprint

    monkeypatch.setattr(Path, "open", broken)
    with raises_naming(InputError, "model.safetensors", "Input/output"):
        fingerprint.content_hash([large / "base" / "model.safetensors"])
