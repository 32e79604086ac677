"""Terminal output of ``checkpoints``: the checkpoints, what the weights show of the run, and the
live table.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.diagnostics.checkpoints.held_out import (
    held_out_grids,
    held_out_lines,
    is_better,
)
from lora_diag.diagnostics.checkpoints.record import (
    CheckpointChoice,
    CheckpointLayer,
    Combination,
    RunCheckpoint,
    Trajectory,
    group_by,
)
from lora_diag.diagnostics.checkpoints.series import MONITOR, list_checkpoints
from lora_diag.diagnostics.checkpoints.trainer import read_log
from lora_diag.diagnostics.checkpoints.verdict import APART, GROWING, judge_trajectory
from lora_diag.errors import InputError, NothingComparedError
from lora_diag.feature import Hint
from lora_diag.records import Results, is_results_file
from lora_diag.records.base import Shown, pooled_value
from lora_diag.rendering.losses import describe_few
from lora_diag.rendering.statements import Statement, make_statement, summarize
from lora_diag.rendering.tables import Column, Grid, grid_of, grids_table, rows_of
from lora_diag.rendering.text import (
    format_shown,
    fraction,
    list_names,
    number,
    quantity,
    strip,
    written,
)


def checkpoints_grids(results: Results[CheckpointLayer], per: str = "type") -> list[Grid]:
    """Return the table of the checkpoints; with ``per`` = ``layer`` also that of the layers of the
    last one.
    """
    rows = [(str(each.step), [each]) for each in results.whole_of(RunCheckpoint)]
    grids = held_out_grids(results)
    if rows:
        grids.insert(0, grid_of(RunCheckpoint.shown, rows, "step"))
    if per == "layer" and rows:
        last = [record for record in results if str(record.step) == rows[-1][0]]
        grids.append(grid_of(CheckpointLayer.shown, rows_of(last, per), per, f"step {rows[-1][0]}"))
    return grids


def checkpoints_lines(results: Results[CheckpointLayer]) -> list[Statement]:
    """Return the statements of the summary: the verdict first, then how the run moved."""
    checkpoints = results.whole_of(RunCheckpoint)
    if not checkpoints:
        return summarize(results)
    run = next(iter(results.whole_of(Trajectory)), None) or judge_trajectory(
        results.layers, checkpoints
    )
    problems = list(_describe_problems(run, checkpoints))
    movement = _describe_movement(run)
    if problems:
        verdict = make_statement("verdict", "Verdict", *problems, level="warning", priority=0)
    else:
        lead = "no layer is dead, collapsed, spiked or not finite"
        if movement:
            lead, *movement = movement
        elif len(checkpoints) < 3:
            compared = quantity(len(checkpoints), "checkpoint")
            lead = f"{compared} compared: three or more show a course"
        verdict = make_statement("verdict", "Verdict", lead, priority=0)
    meaning = (
        "weights do not show quality: no number here leads the held-out loss; compare it "
        "before choosing"
    )
    return summarize(
        results,
        describe_few(results),
        *held_out_lines(results),
        verdict,
        make_statement("movement", "Movement", *movement),
        make_statement("path", "Path", *_describe_path(run)),
        make_statement("interpretation", "Interpretation", meaning),
    )


def suggest_next(results: Results[CheckpointLayer], values: Mapping[str, Any]) -> Hint | str | None:
    """Return the command that writes a combination that is better than every checkpoint, else the
    one that asks how strong the best checkpoint should be; None without losses.
    """
    better = next((each for each in results.whole_of(Combination) if each.chosen), None)
    if better is None or not is_better(better):
        return _suggest_strength(results)
    base = next(item.path for item in results.run.inputs if item.role == "base")
    paths = {record.step: record.path for record in results.whole_of(RunCheckpoint)}
    steps = zip(better.steps, better.weights, strict=True)
    weights = {paths[step]: repr(weight) for step, weight in steps if weight}
    words = ["loradiag", "merge", base, *weights, "--method", "sum"]
    words += ["--weights", ",".join(weights.values())]
    if not results.run.settings["factored"]:
        words.append("--checkpoint")
    if values["alpha"] is not None:
        words += ["--alpha", str(values["alpha"])]
    for name in ("alpha_is_rank", "allow_unmatched"):
        if values[name]:
            words.append(f"--{name.replace('_', '-')}")
    words += ["-o", better.name.replace(":", "-")]
    return f"{shlex.join(words)}   (writes {better.name})"


def _suggest_strength(results: Results[CheckpointLayer]) -> Hint | None:
    """Return the command that tries the best checkpoint at several strengths."""
    choice = next(iter(results.whole_of(CheckpointChoice)), None)
    if choice is None:
        return None
    base = next(item.path for item in results.run.inputs if item.role == "base")
    paths = {record.step: record.path for record in results.whole_of(RunCheckpoint)}
    words = shlex.join(["probe", "strength", base, paths[choice.step]])
    return Hint(words, "how much of this update to keep")


def _describe_problems(run: Trajectory, checkpoints: Sequence[RunCheckpoint]) -> Iterator[str]:
    """State what is wrong with the run, the most serious first."""
    layers = quantity(checkpoints[-1].layers, "layer")
    named = {
        key: f"{len(names)} of {layers}: {list_names(names)}" for key, names in run.affected.items()
    }
    bad = [index for index, each in enumerate(checkpoints) if each.non_finite]
    if bad:
        problem = f"not finite from step {checkpoints[bad[0]].step} on, in {named['non_finite']}"
        if bad[0]:
            problem += f"; the last finite checkpoint is {checkpoints[bad[0] - 1].step}"
        yield problem
    if run.other_run is not None:
        problem = f"step {run.other_run} is not of the run of the checkpoint before it"
        yield f"two runs: {problem}; give the checkpoints of one run"
    elif run.swapped:
        order = " and ".join(map(str, run.swapped))
        yield f"out of order: with {order} exchanged the path is much shorter; check both files"
    if run.dead == checkpoints[-1].layers:
        yield "nothing was trained: ΔW = 0 in every layer"
    elif run.dead:
        yield f"dead: ΔW = 0 at the last checkpoint in {named['dead']}; check that they are trained"
    if run.collapsed and run.other_run is None:
        at = f" at step {run.step}" if run.state == "collapsed" else ""
        yield f"collapsed{at}: most of the rank is lost in {named['collapsed']}"
    if (run.spiked or run.state == "spiked") and run.other_run is None:
        layers = f", in {named['spiked']}" if run.spiked else ""
        step = run.step if run.state == "spiked" else run.spike_step
        change = "changes far more than at its neighbours and other layers do"
        if step == run.spike_step:
            change = (
                f"the whole update changes {number(run.spike or 0.0)} times as much as at its "
                "neighbours"
            )
        yield f"spiked at step {step}: {change}{layers}"
    if run.frozen:
        yield (
            f"frozen: unchanged from step {run.frozen_step} on, while others move, in "
            f"{named['frozen']}"
        )
    if run.repeated:
        yield (
            f"step {run.repeated[0]} equals the checkpoint before it: a copy, or training stood "
            "still"
        )


def _describe_movement(run: Trajectory) -> list[str]:
    """State whether the run settled or still moves, and what the learning rates alone give; empty
    if not known.
    """
    if run.growth is None:
        return []
    alone = ""
    growth = f"the last tenth of the steps adds {number(100 * run.growth)}% of ‖ΔW‖"
    lines = []
    if run.growth_schedule is None:
        lines.append("learning rates are not known: shrinking steps may be those of the schedule")
    else:
        alone = f" (by the learning rates alone from {run.settled_schedule})"
        growth += f", by the learning rates alone {number(100 * run.growth_schedule)}%"
    if run.state == "random walk":
        lead = (
            "a random walk: increments have no common direction, and the path is that of "
            "independent steps"
        )
    elif run.settled is not None:
        rest = "the rest of the run moves ΔW by less than 10%"
        lead = f"settled from step {run.settled}{alone}: {rest}"
    else:
        word = "growing" if run.growth > GROWING else "moving"
        lead = f"still {word}: the last quarter moves ΔW by more than 10%"
    return [lead, growth, *lines]


def _describe_path(run: Trajectory) -> list[str]:
    """State how much of the path is one direction, and what a random walk has; empty if
    not known.
    """
    if run.first_share is None:
        return []
    shown = partial(format_shown, formatter=fraction)
    lines = [
        f"one direction has {shown(run.first_share)} of the energy over time, of a random walk "
        f"with equal increments {shown(run.first_share_random)}",
        f"it grows linearly with R² {shown(run.linear)}, of the random walk "
        f"{shown(run.linear_random)}",
        f"cosine of increments {shown(run.cosine)}, of a random walk with momentum 0.9 "
        f"{shown(run.cosine_momentum)}",
    ]
    if run.drift is None:
        lines.append(
            f"no increments are {APART} steps apart: a random walk is not told from a path with a "
            "direction"
        )
    else:
        lines.append(
            f"increments {APART} or more steps apart have the cosine {shown(run.cosine_far)} and "
            f"give {number(100 * run.drift)}% of ‖ΔW‖², of a random walk 0"
        )
    return lines


# Quantities of the live table after the norm, the first to be dropped in a narrow terminal last.
LIVE = ("increment", "effective_rank", "spectral_share", "cosine")

# Bars of a course.
BARS = 7


def draw_live(
    results: Results[CheckpointLayer] | None, waiting: str, width: int, color: bool
) -> str:
    """Return a table with the course of each module type, and the verdict, for a terminal that is
    refreshed.

    Args:
        results: The records so far; None without any.
        waiting: Text in place of the table while no step is measured.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
    """
    checkpoints = results.whole_of(RunCheckpoint) if results is not None else []
    if results is None or not checkpoints:
        return waiting
    steps = [dict(rows_of(group, "type")) for group in group_by(results, "step").values()]
    names = tuple(steps[-1])
    shown = {field.path: field for field in RunCheckpoint.shown}
    norm = "fro" if checkpoints[-1].relative is None else "relative"
    columns = []
    for drop, path in enumerate((norm, *LIVE)):
        field = shown[path]
        courses = []
        for name in names:
            values = [pooled_value(field, step.get(name, ())) for step in steps]
            courses.append(_draw_course(field, values))
        columns.append(Column(field.title, tuple(courses), drop=drop))
    last = describe_step(checkpoints[-1])
    grid = Grid(last, "module type", names, tuple(columns), most=len(names))
    verdict = [each for each in checkpoints_lines(results) if each.key == "verdict"]
    return grids_table([grid], verdict, width, color)


def _draw_course(shown: Shown, values: Sequence[Any]) -> str:
    """Return bars of the values of all steps over the largest, and the last value."""
    largest = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    bars = strip([None if value is None else max(0.0, value / largest) for value in values], BARS)
    last = "-" if values[-1] is None else written(values[-1], shown.form, shown.share)
    return f"{bars:<{BARS}} {last:>6}"


def describe_step(checkpoint: RunCheckpoint) -> str:
    """Return the numbers of a checkpoint as one line."""
    texts = [f"step {checkpoint.step}"]
    for shown in RunCheckpoint.shown:
        value = shown.value(checkpoint)
        if isinstance(value, float):
            texts.append(f"{shown.title} {written(value, shown.form, shown.share)}")
    if checkpoint.dead:
        texts.append(f"{checkpoint.dead} dead")
    if checkpoint.non_finite:
        texts.append(f"{checkpoint.non_finite} non_finite")
    return ", ".join(texts)


# Seconds between two looks at the files.
INTERVAL = 1.0

# Shows a text that depends on the width of the terminal and on its colours, or prints lines where
# there is none.
OnView = Callable[[Callable[[int, bool], str], Sequence[str]], None]


def follow_run(
    run: Path, measure: Callable[[], Results[CheckpointLayer]], on_view: OnView
) -> Results[CheckpointLayer]:
    """Show the records of a run until it ends, or until Ctrl-C.

    The records are those that ``LoraMonitor`` writes, if there are any; else those of the
    checkpoints, which are measured whenever a file of one has changed.

    Args:
        run: The folder of a run, or the results file of a monitor.
        measure: Measures the checkpoints in the folder.
        on_view: Called at every look.

    Returns:
        The last records.

    Raises:
        InputError: There is no such folder or file.
        KeyboardInterrupt: Ctrl-C, before there were records.
    """
    if not run.exists():
        raise InputError(
            f"{run}: no such file or folder; give the folder that the trainer writes to"
        )
    monitor = run if run.is_file() else run / MONITOR
    waiting = f"{run}: waiting for {monitor.name} or checkpoints"
    results: Results[CheckpointLayer] | None = None
    measured: list[tuple[Path, int, int]] = []
    printed: set[str] = set()
    ended = False
    try:
        while not ended:
            start = time.monotonic()
            is_monitored = is_results_file(monitor)
            paths = [monitor] if is_monitored else list_checkpoints(run)
            states = _list_states(paths)
            if paths and states != measured:
                # Errors are of a file that is being written, or of only one.
                try:
                    if is_monitored:
                        results = read_results(monitor)
                        ended = results.end is not None
                    else:
                        results = measure()
                        ended = _has_ended(paths)
                except (InputError, NothingComparedError) as error:
                    waiting = f"waiting for more: {error}"
            measured = states
            shown = results.whole_of(RunCheckpoint) if results is not None else []
            lines = [describe_step(each) for each in shown] or [waiting]
            new_lines = [line for line in lines if line not in printed]
            on_view(partial(draw_live, results, waiting), new_lines)
            printed |= set(lines)
            if not ended:
                time.sleep(max(INTERVAL, 10 * (time.monotonic() - start)))
    except KeyboardInterrupt:
        if results is None:
            raise
    assert results is not None
    return results


def _list_states(paths: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """Return size and time of the last change of every file at some paths."""
    states = []
    with suppress(OSError):  # of a file that is removed at this moment
        for path in paths:
            for file in (path, *sorted(path.rglob("*"))):
                status = file.stat()
                states.append((file, status.st_size, status.st_mtime_ns))
    return states


def _has_ended(checkpoints: Sequence[Path]) -> bool:
    """Return whether a checkpoint is that of the last planned step, as its trainer state says."""
    logs = map(read_log, checkpoints)
    return any(log.step == log.planned for log in logs if log is not None and log.step is not None)
