"""What goes where: results to standard output, progress and messages to standard error."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from json import dumps
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, TextIO

from typer import Exit

from lora_diag.errors import UNREADABLE, InputError, UsageError
from lora_diag.files import Kind, check_output
from lora_diag.rendering.text import encodable, safe

if TYPE_CHECKING:
    from lora_diag.records import AnyRecord, LeftOut
    from lora_diag.running.progress import Progress


# Columns below which nothing is made to fit.
MINIMUM = 60

# Layers of which it is said one by one that they could not be measured; a large model has 70,000.
NAMED = 20


class ReaderGoneError(Exception):
    """The reader of standard output has seen enough (``| head``)."""


def message(text: str) -> None:
    """Print a message to standard error; where that is closed, nobody wants to know.

    It is one line, which a log keeps together; on a terminal it is wrapped between words, so that paths can be copied.
    """
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            said = safe(public(text))
            print(_wrapped(said, _columns(sys.stderr)) if sys.stderr.isatty() else said, file=sys.stderr)


def _wrapped(line: str, width: int) -> str:
    return fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _columns(stream: TextIO) -> int:
    """Return how wide the terminal of a stream is; of the other stream nothing is known where that goes into a pipe."""
    try:
        return max(MINIMUM, int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns))
    except (OSError, ValueError):
        return 80


def public(text: str) -> str:
    """Return text as it may be printed: addresses without a password or a signature."""
    if "://" not in text:
        return text
    from lora_diag.running.fingerprint import legible

    return legible(text)


def result(text: str) -> None:
    """Print a result to standard output, whatever encoding the terminal has.

    Raises:
        ReaderGoneError: Nobody reads it any more.
        InputError: It is closed, or its disk is full.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise InputError("standard output: cannot be written: it is closed")
    text = encodable(public(text), sys.stdout.encoding or "utf-8")
    # Not an OSError from here on: typer makes exit code 1 of a closed pipe, which means that a gate failed.
    try:
        print(text, flush=True)
    except BrokenPipeError as error:
        raise ReaderGoneError from error
    except OSError as error:
        raise InputError(f"standard output: cannot be written: {error.strerror}") from error


def line(json: str) -> None:
    """Print a line of JSON; a sign that standard output's encoding may lack is escaped, as JSON has it."""
    if (getattr(sys.stdout, "encoding", None) or "utf-8").lower() != "utf-8":
        json = re.sub(r"[^\x00-\x7f]", lambda sign: dumps(sign[0])[1:-1], json)
    result(json)


def check_outputs(
    inputs: Iterable[Path | str | None], outputs: Iterable[tuple[Path | None, Kind]], overwrite: bool
) -> None:
    """Refuse, before any work, to write over an input, two outputs to one file, or what ``check_output`` refuses.

    Args:
        inputs: What is read, or written by other means.
        outputs: The files, if they are asked for, and what is written to each.
        overwrite: Replace whatever file is there; inputs are safe from it.

    Raises:
        UsageError: An output is refused.
        InputError: There is no such folder, or it may not be written to.
    """
    taken = {os.path.realpath(path) for path in inputs if path is not None}
    for path, kind in outputs:
        if path is None:
            continue
        if os.path.realpath(path) in taken:
            raise UsageError(f"{path}: is read or written already by this command; choose another name")
        check_output(path, kind, overwrite)
        taken.add(os.path.realpath(path))


def as_lines(json: bool) -> Callable[[AnyRecord], None] | None:
    """Return what prints each record as it is measured, as ``--json`` asks; None without."""
    from lora_diag.records import to_line

    return (lambda record: line(to_line(record))) if json else None


def tell_unmeasured(items: Sequence[LeftOut], then: str) -> bool:
    """Name what could not be measured, where, and what became of it; return whether there is any."""
    for item in items[:NAMED]:
        message(f"Error: {item.layer}: {item.detail}; {then}")
    if len(items) > NAMED:
        message(f"Error: and {len(items) - NAMED} more like these; the records name every one (--json, or -o FILE)")
    return bool(items)


def exit_unmeasured(items: Sequence[LeftOut], then: str) -> None:
    """Name what could not be measured, and exit if there is any.

    Raises:
        Exit: With the code of what could not be measured.
    """
    if tell_unmeasured(items, then):
        raise Exit(UNREADABLE)


def again(*more: str) -> str:
    """Return the command that is running with more options, as a shell takes it; how much it prints is left out."""
    words = [word for word in sys.argv[1:] if word not in {"-v", "--verbose"}]
    end = words.index("--") if "--" in words else len(words)
    return shlex.join(["loradiag", *words[:end], *more, *words[end:]])


def forget_output() -> None:
    """Keep Python from failing once more at what standard output did not take, when it flushes at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def terminal() -> tuple[int, bool]:
    """Return the width of standard output and whether it takes colours (https://no-color.org)."""
    tty = sys.stdout is not None and sys.stdout.isatty()
    color = (tty or bool(os.environ.get("FORCE_COLOR"))) and not os.environ.get("NO_COLOR")
    return max(MINIMUM, shutil.get_terminal_size((80, 24)).columns), bool(color and os.environ.get("TERM") != "dumb")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Give a function that shows how far a run is; it shows nothing where standard error is not a terminal."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
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
                total=event.entries or event.total,
                completed=event.entries_done if event.entries else event.done,
                description=safe(event.label),
                count=f"{event.done}/{event.total}",
                rate=rate,
            )

        yield show


def next_step(output: Path | str | None, then: str) -> str:
    """Return the command that a user would run next: first the one that keeps these numbers, if nothing does."""
    return then if output is not None else f"{again('-o', 'probe.jsonl')}   (keeps these numbers)"


def quiet_matplotlib() -> None:
    """Keep Matplotlib's messages off the terminal: where its caches are is nothing that a user must know."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
