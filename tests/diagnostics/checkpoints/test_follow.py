"""``checkpoints --follow`` in a terminal and in a pipe, of a monitor's records and of checkpoints
as they arrive.
"""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import lora_diag
from lora_diag.diagnostics.checkpoints import show
from lora_diag.diagnostics.checkpoints.measure import measure_run
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer, RunCheckpoint
from lora_diag.diagnostics.checkpoints.show import follow_run
from lora_diag.errors import InputError, UsageError
from lora_diag.records import ResultsWriter, Run, RunInput, totals
from tests.conftest import PATIENCE
from tests.messages import assert_names, raises_naming

STEPS = (10, 20, 30)


def records_of(step) -> list:
    layers = [
        CheckpointLayer(
            layer=f"model.layers.0.{name}.weight",
            step=step,
            shape=(8, 8),
            fro=0.1 * step,
            effective_rank=3.0,
        )
        for name in ("q_proj", "up_proj")
    ]
    return [
        *layers,
        RunCheckpoint(step=step, path="out", fro=0.2 * step, train_loss=3.0 - step / 100, layers=2),
    ]


def open_monitor(path) -> ResultsWriter:
    source = RunInput(role="training", path=str(path.parent), kind="in training", tensors=2)
    return ResultsWriter(
        path, Run(command="checkpoints", version="1", inputs=(source,), settings={})
    )


def end(writer, step):
    writer.append(totals(records_of(step)[:2], []))


def start(path, stdout) -> subprocess.Popen:
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    words = [sys.executable, "-m", "lora_diag", "checkpoints", str(path), "--follow"]
    return subprocess.Popen(
        words, stdout=stdout, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env
    )


def read_until(descriptor, pattern, seconds=PATIENCE) -> str:
    """Return what a descriptor gives until a pattern is found in it; or until its end, if the
    pattern is empty.
    """
    read, limit = "", time.monotonic() + seconds
    while time.monotonic() < limit:
        if pattern and re.search(pattern, read, re.DOTALL):
            return read
        if select.select([descriptor], [], [], 0.2)[0]:
            try:
                part = os.read(descriptor, 65536).decode(errors="replace")
            except OSError:  # of a terminal whose program has ended
                part = ""
            if not part and not pattern:
                return read
            if not part:
                break
            read += part
    pytest.fail(f"after {seconds} s {pattern or 'the end'!r} is missing in: {read}")


@pytest.mark.slow
def test_follow_prints_line_per_step_in_pipe_and_ends_with_run(tmp_path):
    with open_monitor(tmp_path / "monitor.jsonl") as writer:
        writer.append(*records_of(10))
        process = start(tmp_path, subprocess.PIPE)
        assert_names(read_until(process.stdout.fileno(), "\n"), "step 10", "train loss 2.9")
        writer.append(*records_of(20))
        assert_names(read_until(process.stdout.fileno(), "\n"), "step 20", "train loss 2.8")
        end(writer, 20)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, b"")
    assert "Verdict" in rest.decode()
    assert "step 10," not in rest.decode()


@pytest.mark.slow
def test_follow_ends_when_reader_closes_pipe(tmp_path):
    with open_monitor(tmp_path / "monitor.jsonl") as writer:
        writer.append(*records_of(10))
        process = start(tmp_path, subprocess.PIPE)
        read_until(process.stdout.fileno(), "step 10")
        process.stdout.close()
        assert process.wait(PATIENCE) == 0  # without a further record
        assert process.communicate()[1] == b""


@pytest.mark.slow
def test_follow_refreshes_one_table_in_terminal_until_ctrl_c(tmp_path):
    with open_monitor(tmp_path / "monitor.jsonl") as writer:
        writer.append(*records_of(10))
        leader, follower = pty.openpty()
        process = start(tmp_path, follower)
        os.close(follower)
        read_until(leader, "step 10")
        writer.append(*records_of(20))
        table = read_until(leader, "step 20.*up_proj")
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", table)
        assert max(map(len, shown.splitlines())) <= 80
        process.send_signal(signal.SIGINT)
        rest = read_until(leader, "", PATIENCE)
        assert process.wait(PATIENCE) == 0
        assert rest.endswith("\x1b[?25h") or "\x1b[?25h" in rest  # the cursor is shown again
        assert "Verdict" in rest
        assert process.communicate()[1] == b""
    os.close(leader)


def collect(run, monkeypatch, on_look, measure=lambda: pytest.fail("measured")) -> tuple:
    """Follow a run; ``on_look`` is called with the number of each look in place of a pause."""
    looks, lines = [], []

    def pause(seconds):
        looks.append(seconds)
        on_look(len(looks))

    monkeypatch.setattr(show.time, "sleep", pause)
    return follow_run(run, measure, lambda draw, new: lines.extend(new)), lines, looks


def test_follow_reads_only_files_that_changed(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(
        show, "read_results", lambda path: reads.append(path) or lora_diag.read_results(path)
    )
    with open_monitor(tmp_path / "m.jsonl") as writer:
        writer.append(*records_of(10))

        def on_look(number):
            if number == 3:
                writer.append(*records_of(20))
            if number == 5:
                end(writer, 20)

        results, lines, looks = collect(tmp_path / "m.jsonl", monkeypatch, on_look)
    assert (len(looks), len(reads)) == (5, 3)
    assert [line.partition(",")[0] for line in lines] == ["step 10", "step 20"]
    assert [each.step for each in results.whole_of(RunCheckpoint)] == [10, 20]


def test_follow_measures_checkpoints_as_they_arrive(tmp_path, monkeypatch):
    """It waits where there are none, where one is half written, and where there is only one; it
    ends at the last.
    """
    adapter, run = Path("sample_checkpoints/lora_r4"), tmp_path / "out"
    run.mkdir()

    def save(step, name):
        target = run / f"checkpoint-{step}"
        target.mkdir(exist_ok=True)
        shutil.copy(adapter / name, target)

    def on_look(number):
        if number == 1:
            save(10, "adapter_config.json")
        if number == 2:
            save(10, "adapter_model.safetensors")
        if number == 3:
            (run / "checkpoint-20").mkdir()
            (run / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
        if number == 4:
            save(20, "adapter_model.safetensors")
            save(20, "adapter_config.json")
            (run / "checkpoint-20" / "trainer_state.json").write_text(
                '{"global_step": 20, "max_steps": 20}'
            )

    results, lines, _ = collect(run, monkeypatch, on_look, lambda: lora_diag.checkpoints(run))
    assert [each.step for each in results.whole_of(RunCheckpoint)] == [10, 20]
    assert_names(lines[0], "waiting", "monitor.jsonl")
    assert [line.partition(",")[0] for line in lines[-2:]] == ["step 10", "step 20"]


@pytest.mark.parametrize(
    "name", ["README.md", "trainer_state.json", "training_args.bin", "optimizer.pt"]
)
def test_follow_waits_for_weights_of_checkpoint(tmp_path, monkeypatch, name):
    """PEFT writes README.md before the weights; another folder may never get any."""
    adapter, run = Path("sample_checkpoints/lora_r4"), tmp_path / "out"
    for step in (10, 20):
        shutil.copytree(adapter, run / f"checkpoint-{step}")

    def on_look(number):
        if number == 1:
            (run / "checkpoint-30").mkdir()
            (run / "checkpoint-30" / name).write_text("{}")
        if number == 3:
            shutil.copytree(adapter, run / "checkpoint-30", dirs_exist_ok=True)
            (run / "checkpoint-30" / "trainer_state.json").write_text(
                '{"global_step": 30, "max_steps": 30}'
            )

    results, _, looks = collect(run, monkeypatch, on_look, partial(measure_run, [run]))
    assert [each.step for each in results.whole_of(RunCheckpoint)] == [10, 20, 30]
    assert len(looks) == 3


def test_checkpoint_without_weights_is_named(tmp_path):
    shutil.copytree("sample_checkpoints/lora_r4", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "README.md").touch()
    with raises_naming(InputError, tmp_path / "checkpoint-20", "no weights"):
        lora_diag.checkpoints(tmp_path)
    (tmp_path / "checkpoint-20" / "model.safetensors").touch()
    with raises_naming(UsageError, tmp_path / "checkpoint-20", "BASE"):
        lora_diag.checkpoints(tmp_path)


def test_follow_refuses_what_it_cannot_follow(tmp_path, monkeypatch):
    with raises_naming(InputError, tmp_path / "nowhere"):
        follow_run(tmp_path / "nowhere", lambda: None, lambda draw, lines: None)
    with raises_naming(UsageError, "BASE"):  # which no later file will give
        collect(
            tmp_path, monkeypatch, lambda number: (tmp_path / "step_1.safetensors").touch(), refuse
        )
    for option in ({"output": tmp_path / "r.jsonl"}, {"on_record": lambda record: None}):
        with raises_naming(UsageError, "--follow", "-o", "--json"):
            measure_run([tmp_path], follow=True, **option)


def refuse():
    raise UsageError("full checkpoints need BASE")
