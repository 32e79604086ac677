"""Output: results to standard output, progress and messages to standard error."""

from __future__ import annotations

import logging
import os
import re
import secrets
import select
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from json import dumps
from pathlib import Path
from textwrap import fill
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from lora_diag.errors import InputError, shorten
from lora_diag.rendering.text import byte_count, duration, replace_unencodable, safe, safe_lines

if TYPE_CHECKING:
    from lora_diag.records import AnyRecord, LeftOut
    from lora_diag.running.progress import Progress


# Smallest width that output is fitted to.
MIN_WIDTH = 60

# Seconds between lines of progress where standard error is not a terminal.
LINE_SECONDS = 60

# Maximum number of unmeasured layers listed one by one; a large model has 70,000 layers.
MAX_NAMED = 20

# Environment variables of programs that execute commands which they find in the output of a job.
CI_VARIABLES = ("GITHUB_ACTIONS", "GITLAB_CI")

# The only control characters of a text for the terminal: line ends, and colours where there are
# colours.
_LINE_END, _COLOR = r"\r?\n", r"\x1b\[[\d;]*m"

# The first character of a command: at GitHub ``::`` at the beginning of a line, whose blanks it
# ignores, and ``##[`` anywhere (``ActionCommand.cs`` of actions/runner); at GitLab the markers of a
# section, anywhere.
_CI_COMMAND = re.compile(
    rf"^((?:[^\S\n]|{_COLOR})*):(?=:)|#(?=#\[)|s(?=ection_(?:start|end):)", re.MULTILINE
)


class BrokenOutputError(Exception):
    """The reader closed standard output (``| head``)."""


def print_message(text: str) -> None:
    """Print a message to standard error; nothing if that is closed.

    A message is a single line in a log; on a terminal it is wrapped between words, so that paths
    without blanks can be copied.
    """
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            shown = shorten(safe(public(text)))
            if sys.stderr.isatty():
                width = _terminal_columns(sys.stderr)
                shown = fill(
                    shown,
                    width,
                    subsequent_indent="  ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            print(escape_commands(shown), file=sys.stderr)


def print_traceback(text: str) -> None:
    """Print a traceback to standard error."""
    sys.stderr.write(escape_commands(safe_lines(public(text))))


class MessageHandler(logging.Handler):
    """Prints what the package logs as messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the text of a log record."""
        print_message(record.getMessage())


def escape_commands(text: str) -> str:
    r"""Return text in which a CI system finds no command; unchanged elsewhere.

    >>> import os
    >>> os.environ["GITLAB_CI"] = "true"
    >>> escape_commands("a\n  ::error::b ##[error]c section_start:1:d")
    'a\n  \\x3a:error::b \\x23#[error]c \\x73ection_start:1:d'
    >>> del os.environ["GITLAB_CI"]
    """
    return _replace_commands(text, r"\x{:02x}")


def _replace_commands(text: str, form: str) -> str:
    """Return text with the first character of each CI command as its code in a form; unchanged
    outside CI.
    """
    if not any(map(os.environ.get, CI_VARIABLES)):
        return text
    return _CI_COMMAND.sub(lambda match: (match[1] or "") + form.format(ord(match[0][-1])), text)


def _make_printable(text: str) -> str:
    """Return text with all control characters escaped but line ends, and colours where there are
    colours.
    """
    kept = f"{_LINE_END}|{_COLOR}" if terminal()[1] else _LINE_END
    parts = re.split(f"({kept})", text)
    parts[::2] = map(safe, parts[::2])
    return "".join(parts)


def _terminal_columns(stream: TextIO) -> int:
    """Return ``COLUMNS``, else the width of a stream's own terminal, at least ``MIN_WIDTH``; 80 if
    neither is known.
    """
    try:
        return max(
            MIN_WIDTH,
            int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns),
        )
    except (OSError, ValueError):
        return 80


def public(text: str) -> str:
    """Return text in which addresses have no passwords and signatures.

    A layout that cuts an address into lines hides it from this function: texts for tables are made
    from ``Address``, whose text has no secrets.
    """
    if ":/" not in text:
        return text
    from lora_diag.running.fingerprint import legible

    # typer and Path repeat arguments as they are, and the password of an address may contain blanks
    # and quotes.
    for word in sys.argv[1:]:
        public_word = _public_word(word)
        if public_word != word:
            for form in (word, repr(word)[1:-1], str(Path(word))):
                text = text.replace(form, public_word)
    return legible(text)


def _public_word(word: str) -> str:
    """Return a word of the command line without the secrets of an address, which may be the value
    of an option.
    """
    if ":/" not in word:
        return word
    from lora_diag.storage import hide_secrets  # deferred: imports torch

    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{hide_secrets(value)}"


def print_result(text: str) -> None:
    """Print a result to standard output, without unprintable characters, CI commands and the
    secrets of addresses.
    """
    _write_result(
        escape_commands(_make_printable(replace_unencodable(public(text), _find_encoding())))
    )


def print_annotated(text: str, commands: Sequence[str]) -> None:
    """Print a result between lines at which GitHub Actions stops and resumes to execute commands,
    then own commands.
    """
    if text:
        token = secrets.token_hex(16)
        _write_result(f"::stop-commands::{token}")
        print_result(text)
        _write_result(f"::{token}::")
    for command in commands:
        # The first two characters are ours; the rest has names from files.
        text = replace_unencodable(public(command[2:]), _find_encoding())
        _write_result(command[:2] + escape_commands(safe(text)))


def append_step_summary(text: str) -> None:
    """Append to the step summary of GitHub Actions, if there is one.

    Raises:
        InputError: It cannot be written.
    """
    if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary_file).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(
                f"{summary_file}: the step summary cannot be written: {error.strerror}"
            ) from error


def _find_encoding() -> str:
    """Return the encoding of standard output."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def _write_result(text: str) -> None:
    """Write lines to standard output.

    Raises:
        BrokenOutputError: See ``print_result``.
        InputError: See ``print_result``.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise InputError("standard output: cannot be written: it is closed")
    # Not an OSError: typer turns a closed pipe into exit code 1, which means that a gate failed.
    try:
        print(text, flush=True)
    except BrokenPipeError as error:
        raise BrokenOutputError from error
    except OSError as error:
        raise InputError(f"standard output: cannot be written: {error.strerror}") from error


def print_json(line: str) -> None:
    r"""Print JSON, with ``\u`` escapes of unprintable characters, and of all but ASCII if the
    output is not UTF-8.
    """
    is_utf8 = _find_encoding().lower() == "utf-8"

    def escape(match: re.Match[str]) -> str:
        return match[0] if is_utf8 and match[0].isprintable() else dumps(match[0])[1:-1]

    text = re.sub(r"[^ -~\n]", escape, public(line))
    _write_result(_replace_commands(text, r"\u{:04x}"))


def record_printer(json: bool) -> Callable[[AnyRecord], None] | None:
    """Return a callback that prints each record as it is measured; None without ``--json``."""
    from lora_diag.records import to_line

    return (lambda record: print_json(to_line(record))) if json else None


def report_unmeasured(items: Sequence[LeftOut]) -> None:
    """Print a message on each layer that could not be measured; beyond ``MAX_NAMED``, the number of
    the others.
    """
    for item in items[:MAX_NAMED]:
        print_message(f"Error: {item.layer}: {item.detail}; it was left out")
    if len(items) > MAX_NAMED:
        print_message(
            f"Error: {len(items) - MAX_NAMED} more layers could not be measured; the records list "
            "all (--json, or -o FILE)"
        )


def report_reading() -> None:
    """Print how much was read from local files, if any, and how often on average: bytes over the
    size of the files.
    """
    from lora_diag.storage.file_bytes import READING

    read, files, size = READING.total()
    if size:
        count = "1 local file" if files == 1 else f"{files} local files"
        print_message(f"Read {byte_count(read)} from {count}, {read / size:.2f} times their size")


def rerun_command(*extra: str) -> str:
    """Return the running command, quoted for a shell, with more options and without secrets and
    verbosity options.
    """
    arguments = [
        _public_word(argument) for argument in sys.argv[1:] if argument not in {"-v", "--verbose"}
    ]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return shlex.join(["loradiag", *arguments[:end], *extra, *arguments[end:]])


def forget_output() -> None:
    """Flush the output; discard what cannot be written, so that the flush at interpreter exit does
    not fail again.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def terminal() -> tuple[int, bool]:
    """Return the width for standard output in columns, and whether to use colours
    (https://no-color.org).
    """
    tty = sys.stdout is not None and sys.stdout.isatty()
    color = (tty or bool(os.environ.get("FORCE_COLOR"))) and not os.environ.get("NO_COLOR")
    return max(MIN_WIDTH, shutil.get_terminal_size((80, 24)).columns), bool(
        color and os.environ.get("TERM") != "dumb"
    )


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that displays progress on standard error: a bar on a terminal, one line a
    minute elsewhere, nothing if ``quiet``.
    """
    if quiet or sys.stderr is None:
        yield lambda event: None
        return
    if not sys.stderr.isatty():
        yield _make_line_printer()
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
            rate = (
                f"{event.entries_done / elapsed / 1e6:,.0f} M entries/s"
                if event.entries_done and elapsed
                else ""
            )
            bar.update(
                task,
                total=1.0,
                completed=event.fraction,
                description=safe(event.label),
                count=f"{event.done}/{event.total}",
                rate=rate,
            )

        yield show


def _make_line_printer() -> Callable[[Progress], None]:
    """Return a function that prints progress and the time left, at most once in
    ``LINE_SECONDS``.
    """
    times = list[float]()  # of the first event, and then of the lines

    def show(event: Progress) -> None:
        now = monotonic()
        if not times:
            times.append(now)
        if event.fraction and now - times[-1] >= LINE_SECONDS:
            times.append(now)
            left = duration((now - times[0]) * (1 / event.fraction - 1))
            print_message(f"{event.done}/{event.total}, about {left} left: {event.label}")

    return show


@contextmanager
def live_view() -> Iterator[Callable[[Callable[[int, bool], str], Sequence[str]], None]]:
    """Yield a function that shows a text on a terminal in place of the one before; elsewhere it
    prints lines.

    It draws the text for the width of the terminal and its colours, each time. It raises
    ``BrokenOutputError`` once the reader has closed standard output, also without lines.
    """
    if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":

        def print_lines(draw: Callable[[int, bool], str], lines: Sequence[str]) -> None:
            for line in lines:
                print_result(line)
            with suppress(OSError, ValueError, AttributeError):  # no file, or a system without poll
                poll = select.poll()
                poll.register(sys.stdout.fileno(), 0)
                if any(event & select.POLLERR for _, event in poll.poll(0)):
                    raise BrokenOutputError

        yield print_lines
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(
        console=Console(), auto_refresh=False, transient=True, vertical_overflow="crop"
    ) as live:

        def refresh(draw: Callable[[int, bool], str], lines: Sequence[str]) -> None:
            text = replace_unencodable(public(draw(*terminal())), sys.stdout.encoding or "utf-8")
            live.update(Text.from_ansi(text), refresh=True)

        yield refresh


def silence_matplotlib() -> None:
    """Suppress Matplotlib's messages below errors, such as the location of its cache."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
