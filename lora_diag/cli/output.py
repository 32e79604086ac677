"""What goes where: results to standard output, progress and messages to standard error."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_diag.reports.text import safe

if TYPE_CHECKING:
    from lora_diag.api.spectrum import Progress


def message(text: str) -> None:
    """Print one line to standard error."""
    print(safe(text), file=sys.stderr)


def result(text: str) -> None:
    """Print a result to standard output, whatever encoding the terminal has."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def terminal() -> tuple[int, bool]:
    """Return the width of standard output and whether it takes colours (https://no-color.org)."""
    tty = sys.stdout.isatty()
    color = (tty or bool(os.environ.get("FORCE_COLOR"))) and not os.environ.get("NO_COLOR")
    return max(60, shutil.get_terminal_size((80, 24)).columns), bool(color and os.environ.get("TERM") != "dumb")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Give a function that shows how far a run is; it shows nothing where standard error is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda event: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.fields[count]}"),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, count="", rate="")

        def show(event: Progress) -> None:
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = f"{event.entries_done / elapsed / 1e6:,.0f} M entries/s" if event.entries_done and elapsed else ""
            bar.update(
                task,
                total=event.entries,
                completed=event.entries_done,
                description=safe(event.layer),
                count=f"{event.done}/{event.layers}",
                rate=rate,
            )

        yield show
