"""The command: layouts of runs, steps, logs, bad input, resuming, figures, gate."""

import json
import shutil

import numpy as np
import pytest

import lora_diag
from lora_diag.diagnostics.checkpoints.record import RunCheckpoint
from lora_diag.diagnostics.checkpoints.series import find_series
from lora_diag.errors import InputError, NothingComparedError, UsageError
from tests.adapters.making import lora
from tests.conftest import edit_results
from tests.diagnostics.checkpoints.making import (
    LAYERS,
    STEPS,
    cosine_rate,
    healthy,
    save_full,
    save_run,
    write_state,
)
from tests.messages import assert_names, raises_naming


@pytest.fixture
def out(tmp_path):
    return save_run(tmp_path / "out", healthy())


def steps_of(results):
    return [record.step for record in results.whole_of(RunCheckpoint)]


@pytest.mark.parametrize(
    "name", ["checkpoint-{}", "step_{}", "epoch_{}", "global_step{}", "run.v2-step={}", "iter-{}"]
)
def test_steps_are_read_from_names(tmp_path, name):
    for step, update in zip((9, 10, 100), healthy(), strict=False):
        lora(tmp_path / "out" / name.format(step), update)
    for other in ("runs", "tmp-checkpoint-200", "step_200.part"):
        (tmp_path / "out" / other).mkdir()
    (tmp_path / "out" / "step_notes.txt").write_text("")
    assert steps_of(lora_diag.checkpoints(tmp_path / "out")) == [9, 10, 100]
    paths = [tmp_path / "out" / name.format(step) for step in (100, 9, 10)]
    assert steps_of(lora_diag.checkpoints(paths)) == [9, 10, 100]


def test_trainer_log_is_kept_with_its_step(out):
    records = lora_diag.checkpoints(out).whole_of(RunCheckpoint)
    for before, record in zip([0, *STEPS], records, strict=False):
        rates = [
            np.interp(s, range(5, 101, 5), [cosine_rate(x, 100) for x in range(5, 101, 5)])
            for s in range(before + 1, record.step + 1)
        ]
        assert record.train_loss == pytest.approx(
            np.mean([4 - s / 100 for s in (before + 5, before + 10)])
        )
        assert record.eval_loss == pytest.approx(3 - record.step / 100)
        assert record.rate == pytest.approx(cosine_rate(record.step, 100))
        assert record.rate_sum == pytest.approx(sum(rates))


@pytest.mark.parametrize("final", ["other", "same", "unknown"])
def test_final_model_counts_if_it_differs(out, final):
    source = out / f"checkpoint-{STEPS[-2 if final == 'same' else -1]}"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(source / file, out / file)
    if final != "same":
        shutil.rmtree(out / f"checkpoint-{STEPS[-1]}")
    if final == "unknown":
        write_state(out, STEPS[-2], STEPS[-2])
        with raises_naming(InputError, out, "step"):
            lora_diag.checkpoints(out)
        return
    records = lora_diag.checkpoints(out).whole_of(RunCheckpoint)
    assert [record.step for record in records] == list(STEPS)
    assert [record.final for record in records] == [False] * 9 + [final == "other"]


def test_base_is_first_word_or_option(tmp_path, run):
    base = {name: np.ones((6, 5)) for name in LAYERS[:2]}
    steps = [{name: np.eye(6, 5) * t for name in base} for t in (1, 2, 3)]
    save_full(tmp_path, base, steps, (1, 2, 3))
    words = [
        ["base", "run"],
        ["run", "--base", "base"],
        [*(f"run/checkpoint-{t}" for t in (3, 1, 2)), "--base", "base"],
    ]
    outputs = [run("checkpoints", *each, "--json").out.splitlines() for each in words]
    assert (
        outputs[0][1:-1] == outputs[1][1:-1] == outputs[2][1:-1]
    )  # all but the run record, with its time
    assert len(outputs[0]) == 12
    found = run("checkpoints", "run")
    assert found.code == 2
    assert_names(found.err, "checkpoint-1", "BASE")
    swapped = run("checkpoints", "run", "base")
    assert swapped.code == 2
    assert_names(swapped.err, "run", "the order is", "[BASE] RUN_DIR")


BAD = {
    "no folder": (lambda out: shutil.rmtree(out), InputError),
    "empty": (lambda out: [shutil.rmtree(path) for path in out.iterdir()], NothingComparedError),
    "one": (
        lambda out: [shutil.rmtree(out / f"checkpoint-{step}") for step in STEPS[1:]],
        InputError,
    ),
    "same step": (lambda out: shutil.copytree(out / "checkpoint-10", out / "step_10"), InputError),
    "renamed": (lambda out: (out / "checkpoint-10").rename(out / "checkpoint-15"), InputError),
    "state": (
        lambda out: (out / "checkpoint-20" / "trainer_state.json").write_text("[" * 10**5),
        InputError,
    ),
    "truncated": (
        lambda out: (out / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"123"),
        InputError,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_run_is_one_message(out, case):
    spoil, error = BAD[case]
    spoil(out)
    with raises_naming(error, out.name):
        lora_diag.checkpoints(out)


def test_other_shape_and_other_layers_are_named(tmp_path):
    updates = healthy()[:3]
    updates[1] = {
        name: (b[:-1], a) if name == LAYERS[0] else (b, a) for name, (b, a) in updates[1].items()
    }
    with raises_naming(InputError, "checkpoint-2", LAYERS[0]):
        lora_diag.checkpoints(save_run(tmp_path / "shape", updates, (1, 2, 3)))
    updates[1] = {name: pair for name, pair in updates[1].items() if name != LAYERS[0]}
    results = lora_diag.checkpoints(save_run(tmp_path / "missing", updates, (1, 2, 3)))
    assert [(item.layer, item.reason) for item in results.left_out] == [
        (LAYERS[0], "only_in_adapter")
    ]
    assert_names(results.left_out[0].detail, "1 of 3", "checkpoint-2")
    assert {record.layer for record in results} == set(LAYERS[1:])


def test_strange_log_is_ignored(out):
    log = [
        None,
        {"step": "x", "loss": 1},
        {"step": 95, "loss": "nan"},
        {"step": 96, "loss": float("nan")},
        {"loss": 2},
    ]
    write_state(out / "checkpoint-100", 100, 100, log_history=log, max_steps=-1)
    series = find_series([out])
    assert (series.losses, series.rates) == ({}, {})


def test_interrupted_run_resumes_to_the_same_bytes(out, tmp_path, run, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert run("checkpoints", out, "-o", "whole.jsonl", "-q").code == 0
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (1, 14, len(lines) - 2):
        (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        assert run("checkpoints", out, "-o", "part.jsonl", "-q", "--resume").code == 0
        assert (tmp_path / "part.jsonl").read_bytes() == b"".join(lines)
    lora(tmp_path / "x", healthy(1)[3])
    shutil.copy(tmp_path / "x" / "adapter_model.safetensors", out / "checkpoint-40")
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:9]))
    changed = run("checkpoints", out, "-o", "part.jsonl", "--resume")
    assert changed.code == 2
    assert_names(changed.err, "checkpoint-40")


@pytest.mark.slow
def test_results_are_shown_drawn_reported_and_judged(out, tmp_path, run):
    shown = run("checkpoints", out, "-o", "run.jsonl", width=80)
    assert_names(shown.out, "settled", "learning rates")
    assert max(map(len, shown.out.splitlines())) <= 80
    assert run("inspect", "run.jsonl", "--by", "layer").code == 0
    for width in ("slide", "column"):
        drawn = run(
            "plot", "run.jsonl", "--figure", "checkpoints", "--width", width, "-o", f"{width}.png"
        )
        assert drawn.code == 0, drawn.err
    page = run("report", "run.jsonl", "-o", "report.html")
    assert page.code == 0, page.err
    assert "A training run" in (tmp_path / "report.html").read_text()
    for require, code in (
        ("trajectory.dead == 0", 0),
        ("spike <= 1.0001", 1),
        ("growth <= 0.05", 0),
    ):
        (tmp_path / "policy.toml").write_text(f'[[rule]]\nname = "a"\nrequire = "{require}"\n')
        judged = run("gate", "policy.toml", "run.jsonl")
        assert judged.code == code, judged.out


def test_figure_draws_norms_and_overlaps_of_records(out):
    results = lora_diag.checkpoints(out)
    figure = results.plot("checkpoints")
    norms, _, increments, overlaps = figure.axes[:4]
    record = next(r for r in results if r.step == STEPS[4])
    of_type = [r.fro for r in results if r.step == STEPS[4] and r.layer.endswith("q_proj.weight")]
    drawn = {line.get_label(): line.get_ydata() for line in norms.lines}
    assert drawn["_self_attn.q_proj"][4] == pytest.approx(np.median(of_type))
    cells = increments.collections[0].get_array().reshape(len(LAYERS), len(STEPS))
    largest = max(r.increment for r in results if r.layer == record.layer)
    assert cells[0, 4] == pytest.approx(record.increment / largest)
    pair = overlaps.collections[0].get_array().reshape(len(STEPS), len(STEPS))
    assert pair[4, 2] == pytest.approx(
        np.median([r.overlaps[2] for r in results if r.step == STEPS[4]])
    )


def edited(path, change):
    """Change the parsed records of layers in a results file."""

    def change_lines(text):
        records = [json.loads(line) for line in text.splitlines()]
        change([record for record in records if record["record"] == "checkpoint_layer"])
        return "".join(json.dumps(record) + "\n" for record in records)

    edit_results(path, change_lines)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (
            lambda layers: layers[0].update(layer="another"),
            ["layer", "another", "1", str(len(STEPS)), "steps"],
        ),
        (
            lambda layers: layers[2].update(overlaps=[0.5] * 9),
            [f"step {STEPS[2]}", "overlaps", "9"],
        ),
    ],
)
def test_altered_layers_are_one_message(out, tmp_path, run, change, facts):
    assert run("checkpoints", out, "-q", "-o", "run.jsonl").code == 0
    edited(tmp_path / "run.jsonl", change)
    for words in (
        ["report", "run.jsonl", "-o", "report.html"],
        ["plot", "run.jsonl", "-o", "x.png"],
    ):
        ran = run(*words)
        assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
        assert_names(ran.err, "run.jsonl", *facts)
    assert not (tmp_path / "report.html").exists()


def test_layer_that_is_not_finite_at_one_step_is_drawn(tmp_path):
    updates = healthy()
    name = next(iter(updates[3]))
    updates[3] = updates[3] | {
        name: (np.full_like(updates[3][name][0], np.nan), *updates[3][name][1:])
    }
    results = lora_diag.checkpoints(save_run(tmp_path / "out", updates))
    assert sum(record.non_finite is not None for record in results) == 1
    overlaps = (
        results.plot("checkpoints")
        .axes[3]
        .collections[0]
        .get_array()
        .reshape(len(STEPS), len(STEPS))
    )
    known = [
        record.overlaps[2] for record in results if record.step == STEPS[3] and record.overlaps
    ]
    assert overlaps[3, 2] == pytest.approx(np.median(known))


def test_two_checkpoints_have_no_course(tmp_path):
    results = lora_diag.checkpoints(save_run(tmp_path / "out", healthy()[:2], (1, 2)))
    assert (results.whole[-1].state, results.whole[-1].growth) == (None, None)
    assert json.loads(results.whole[-1].model_dump_json())["spike"] is None


def test_options_are_checked(out):
    with raises_naming(UsageError, "directions=0"):
        lora_diag.checkpoints(out, directions=0)
    with raises_naming(UsageError, "ranks"):
        lora_diag.checkpoints(out, ranks=())
    with pytest.raises(NothingComparedError):
        lora_diag.checkpoints(out, layers="nothing")
