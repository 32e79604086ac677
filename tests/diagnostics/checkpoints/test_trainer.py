"""The trainer state: read piece by piece as ``json`` reads it whole, in stated memory; numbers that
no training has.
"""

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.diagnostics.checkpoints import trainer
from lora_diag.diagnostics.checkpoints.series import find_series
from lora_diag.diagnostics.checkpoints.trainer import read_log
from lora_diag.errors import InputError
from tests.diagnostics.checkpoints.making import healthy, save_run, write_state
from tests.messages import raises_naming

# MAX_ENTRIES in each of three checkpoints, with all three numbers: 340 MB as measured, of which 79
# MB are the program.
MOST_ENTRIES_MB = 400


def write_text(folder, text: str):
    (folder / trainer.STATE).write_text(text)
    return folder


numbers = st.integers(0, 50) | st.floats(0, 9)
values = st.recursive(
    numbers | st.text(max_size=5) | st.none() | st.booleans(), st.lists, max_leaves=5
)
entries = st.dictionaries(
    st.sampled_from(["step", "loss", "learning_rate", "eval_loss", "other"]), values
)
states = st.fixed_dictionaries(
    {"global_step": st.integers(1, 99), "log_history": st.lists(entries | values)}
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    states,
    st.dictionaries(st.text(max_size=4), values),
    st.sampled_from([None, 2]),
    st.integers(500, 900),
)
def test_state_is_read_as_json_reads_it(tmp_path_factory, state, other, indent, piece):
    state = {**other, **state, "max_steps": 99, "last": [1, {"a": [2]}]}
    folder = write_text(tmp_path_factory.mktemp("state"), json.dumps(state, indent=indent))
    expected = {"loss": {}, "eval_loss": {}, "learning_rate": {}}
    for entry in state["log_history"]:
        step = entry.get("step") if isinstance(entry, dict) else None
        for name in (
            expected if isinstance(step, int) and not isinstance(step, bool) and step > 0 else ()
        ):
            if isinstance(entry.get(name), int | float):
                expected[name][step] = entry[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "PIECE", piece)
        log = read_log(folder)
    assert (log.step, log.planned, log.values) == (state["global_step"], 99, expected)


@pytest.mark.parametrize("end", range(1, 90, 4))
def test_truncated_state_is_one_message(tmp_path, end):
    text = (
        '{"global_step": 30, "log_history": [{"step": 10, "loss": 1.5}, {"step": 20}], '
        '"max_steps": 40}'
    )
    with raises_naming(InputError, tmp_path / trainer.STATE):
        read_log(write_text(tmp_path, text[:end]))


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[" * 100_000,
        '{"log_history": ' + "[" * 100_000,
        '{"global_step": 3, "global_step": 3}',
        '{"global_step": 3,}',
        '{"log_history": [1,]}',
        '{"global_step": 3} 4',
        '{"a": "' + "x" * 3_000_000 + '"}',
        '{"log_history": [[' + "[]," * 1_000_000 + "1]]}",
        '{"global_step": 1' + "0" * 5000 + "}",
    ],
    ids=range(10),
)
def test_damaged_state_is_one_message(tmp_path, text):
    with raises_naming(InputError, tmp_path / trainer.STATE):
        read_log(write_text(tmp_path, text))


@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("loss", "1" + "0" * 400),
        ("learning_rate", "1" + "0" * 400),
        ("loss", "1e308"),
        ("learning_rate", "1.7e308"),
    ],
)
def test_number_that_no_training_has_is_named(tmp_path, field, number):
    log = ",".join(f'{{"step": {step}, "{field}": {number}}}' for step in (10, 11, 12))
    run = save_run(tmp_path / "out", healthy()[:3], (10, 20, 30), state=False)
    write_text(run / "checkpoint-30", f'{{"global_step": 30, "log_history": [{log}]}}')
    with raises_naming(InputError, run / "checkpoint-30" / trainer.STATE, field, "step 10"):
        lora_diag.checkpoints(run)


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    text = (
        '{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": Infinity}, {"step": 3, '
        '"loss": 2}]}'
    )
    assert read_log(write_text(tmp_path, text)).values["loss"] == {3: 2.0}


def test_logs_of_two_runs_contradict_each_other(tmp_path):
    run = save_run(tmp_path / "out", healthy())
    assert find_series([run]).foreign == set()
    write_state(run / "checkpoint-60", 60, 100, log_history=[{"step": 5, "loss": 3.0}])
    assert find_series([run]).foreign == {60, 70}
    found = lora_diag.checkpoints(run).whole[-1]
    assert (found.state, found.step) == ("two runs", 60)


def test_size_and_number_of_entries_are_limited(tmp_path, monkeypatch):
    write_text(tmp_path, '{"log_history": [{}, {}, {}]}')
    monkeypatch.setattr(trainer, "MAX_ENTRIES", 2)
    with raises_naming(InputError, tmp_path / trainer.STATE, "entries"):
        read_log(tmp_path)
    monkeypatch.setattr(trainer, "MAX_STATE_BYTES", 10)
    with raises_naming(InputError, tmp_path / trainer.STATE, "10 bytes"):
        read_log(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empty entries", "most entries in three checkpoints"])
def test_large_state_takes_stated_memory(tmp_path, kind):
    run = save_run(tmp_path / "out", healthy()[:3], (10, 20, 30), state=False)
    history, steps = "{}," * 33_000_000 + "{}", [30]
    if kind != "empty entries":
        entry = '{{"step":{},"loss":1.5,"eval_loss":2.5,"learning_rate":1e-4}}'
        history, steps = ",".join(map(entry.format, range(1, trainer.MAX_ENTRIES))), [10, 20, 30]
    for step in steps:
        write_text(
            run / f"checkpoint-{step}", f'{{"global_step": {step}, "log_history": [{history}]}}'
        )
    program = (
        "import resource, subprocess, sys;"
        "done = subprocess.run([sys.executable, '-m', 'lora_diag', 'checkpoints', sys.argv[1]], "
        "capture_output=True);"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True
    )
    code, megabytes = map(int, done.stdout.split())
    shutil.rmtree(run)
    assert code == (3 if kind == "empty entries" else 0)
    assert megabytes < (150 if kind == "empty entries" else MOST_ENTRIES_MB)
