"""``checkpoints --follow``: show a run again whenever it has written more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from lora_diag.catalog import read_results
from lora_diag.diagnostics.checkpoints.record import Checkpoint, CheckpointLayer
from lora_diag.diagnostics.checkpoints.series import MONITOR, list_checkpoints, read_state
from lora_diag.diagnostics.checkpoints.show import describe_step, draw_live
from lora_diag.errors import InputError, NothingComparedError
from lora_diag.records import Results, is_results_file

# Seconds between two looks at the files.
INTERVAL = 1.0

# Shows a text that depends on the width of the terminal and on its colours, or prints lines where there is none.
OnView = Callable[[Callable[[int, bool], str], Sequence[str]], None]


def follow_run(run: Path, measure: Callable[[], Results[CheckpointLayer]], on_view: OnView) -> Results[CheckpointLayer]:
    """Show the records of a run until it ends, or until Ctrl-C.

    The records are those that ``LoraMonitor`` writes, if there are any; else those of the checkpoints, which are
    measured whenever a file of one has changed.

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
        raise InputError(f"{run}: no such file or folder; give the folder that the trainer writes to")
    monitor = run if run.is_file() else run / MONITOR
    waiting, results, measured, printed = f"{run}: waiting for {monitor.name} or checkpoints", None, None, set[str]()
    ended = False
    try:
        while not ended:
            is_monitored, start = is_results_file(monitor), time.monotonic()
            paths = [monitor] if is_monitored else list_checkpoints(run)
            if measured != (measured := _list_states(paths)) and paths:
                try:
                    results = read_results(monitor) if is_monitored else measure()
                    ended = results.end is not None if is_monitored else _has_ended(paths)
                except (InputError, NothingComparedError) as error:  # of a file that is being written, or only one
                    waiting = f"waiting for more: {error}"
            shown = results.whole_of(Checkpoint) if results is not None else []
            lines = [describe_step(each) for each in shown] or [waiting]
            on_view(partial(draw_live, results, waiting), [line for line in lines if line not in printed])
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
    with suppress(OSError):  # of a file that is removed at this moment
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        return [(file, status.st_size, status.st_mtime_ns) for file in files if (status := file.stat())]
    return []


def _has_ended(checkpoints: Sequence[Path]) -> bool:
    """Return whether a checkpoint is that of the last planned step, as its trainer state says."""
    states = [read_state(path) for path in checkpoints]
    return any(state.get("global_step") == state.get("max_steps", 0) for state in states if state)
