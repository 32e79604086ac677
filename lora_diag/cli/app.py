"""The ``loradiag`` command: its subcommands, its version, and the mapping of errors to
exit codes.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from lora_diag import catalog
from lora_diag.cli.options import make_function
from lora_diag.cli.output import BrokenOutputError, MessageHandler, forget_output, print_message
from lora_diag.cli.project import Project, find_project, follow_results, replace_names
from lora_diag.errors import DONE, UNREADABLE, LoradiagError
from lora_diag.feature import GROUPS, Command
from lora_diag.running.options import EXECUTION, INPUTS, PANELS, list_options
from lora_diag.version import __version__

# Exit code that a shell reports for a program ended by Ctrl-C: 128 + SIGINT.
INTERRUPTED = 130


class _Command(TyperCommand):
    """A command that groups its help (``running.options.PANELS``)."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows_by_panel: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            panel = getattr(param, "rich_help_panel", None) or EXECUTION
            name = re.sub(r" <(?:(.+\|.+)|.*)>$", _format_choices, record[0])
            if param.param_type_name == "argument":
                panel, name = INPUTS, re.sub("[{}]", "", name)
            rows_by_panel[panel].append((name, record[1]))
        for panel, lines in rows_by_panel.items():
            if lines:
                with formatter.section(panel):
                    formatter.write_dl(lines)

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the command's line in the list of commands, of up to 80 characters."""
        return super().get_short_help_str(80)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]


class _Commands(TyperGroup):
    """The commands, including two-word ones: ``gate init`` is a command, and ``gate`` without it
    takes files.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands that have a question by it, the others by their groups: by name, those
        of the last group with their help.
        """
        groups: dict[str, list[tuple[str, Command]]] = {group: [] for group in GROUPS}
        for name, feature, command in catalog.commands():
            groups.setdefault(feature.group, []).append((name, command))
        listed = [each for group in groups.values() for each in group]
        with formatter.section("Questions"):
            # 18 columns for the longest name, which then stays in one piece.
            asked = [(c.question, name) for name, c in listed if c.question]
            formatter.write_dl(asked, formatter.width - 18)
        research = groups.pop(GROUPS[-1])
        with formatter.section("Further commands"):
            formatter.write_dl(
                (group, ", ".join(name for name, c in members if not c.question))
                for group, members in groups.items()
            )
        with formatter.section(GROUPS[-1]):
            formatter.write_dl([(name, command.help) for name, command in research])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = " ".join(args[:2])
        return super().resolve_command(ctx, [name, *args[2:]] if name in self.commands else args)


def _format_choices(match: re.Match[str]) -> str:
    """Return the choices of an option in the form of our metavars, without Python types."""
    return f" {match[1]}" if match[1] else ""


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"loradiag {__version__}")
        raise typer.Exit


def _configure(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@cache
def application(only: str = "") -> typer.Typer:
    """Return the application, built once per process and ``only``.

    Args:
        only: The one command to build, by its name; default all. Without the options of the others
            it starts faster.
    """
    app = typer.Typer(
        name="loradiag",
        cls=_Commands,
        help="Rank diagnostics for fine-tuned models: is the update low-rank, do the files resolve "
        "it, "
        "what did LoRA miss?",
        epilog="Exit codes: 0 done or passed, 1 check failed, 2 usage error, 3 could not measure, "
        "4 nothing compared, "
        "5 inconclusive.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_configure)
    probe = typer.Typer(name="probe", help="Diagnostics that run the model.", no_args_is_help=True)
    for full, feature, command in catalog.commands():
        if only not in {"", full}:
            continue
        parent = probe if full.startswith("probe ") else app
        add = parent.command(
            full.removeprefix("probe "),
            cls=_Command,
            no_args_is_help=command.needs_input,
        )
        add(make_function(feature, command))
    if probe.registered_commands:
        app.add_typer(probe)
    return app


@cache
def commands(only: str = "") -> Any:
    """Return the click command of ``application``."""
    return typer.main.get_command(application(only))


def _find_command(arguments: list[str]) -> str:
    """Return the command that the first words name in full; empty if they name none.

    >>> [
    ...     _find_command(words.split())
    ...     for words in ("probe sweep base", "gate init", "gate r.jsonl", "spektrum")
    ... ]
    ['probe sweep', 'gate init', 'gate', '']
    """
    command_names = {name for name, *_ in catalog.commands()}
    for name in (" ".join(arguments[:2]), *arguments[:1]):
        if name in command_names:
            return name
    return ""


def _judges_without_plugins(arguments: list[str]) -> bool:
    """Return whether the command is ``gate`` without ``--plugins``: no other package takes part in
    its verdict.

    >>> [
    ...     _judges_without_plugins(words.split())
    ...     for words in ("gate p r", "gate p --plugins r", "inspect r")
    ... ]
    [True, False, False]
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return arguments[:1] == ["gate"] and "--plugins" not in options


def main() -> None:
    """Run the command line; convert each user-facing error to one message, and exit
    with its code.
    """
    logger = logging.getLogger("lora_diag")
    if not logger.handlers:
        logger.addHandler(MessageHandler())
    if _judges_without_plugins(sys.argv[1:]):
        catalog.disable_plugins()
    code = _run()
    with suppress(ValueError):  # not the main thread, which receives no Ctrl-C
        # All output is written; an interrupt during interpreter shutdown loses nothing.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    forget_output()
    is_measuring = any(thread.name.startswith("layer") for thread in threading.enumerate())
    if code == INTERRUPTED and is_measuring:
        # Otherwise Python waits for running measurements, which take minutes each for large
        # matrices.
        os._exit(code)
    if "triton" in sys.modules:
        # nanobind reports objects that are not freed at exit, in 20 lines of standard error.
        gc.unfreeze()
    else:
        gc.freeze()  # after torch was imported, looking for garbage at exit took 0.4 s
    sys.exit(code)


def _run() -> int:
    """Run the command line and return its exit code; print one message about a
    user-facing error.
    """
    try:
        words, project = _read_project(sys.argv[1:])
        # Not in typer's standalone mode, which prints no message on Ctrl-C.
        code = commands(_find_command(words[:2]))(
            words,
            prog_name="loradiag",
            standalone_mode=False,
            obj=project,
            default_map=_nest(project.defaults),
        )
    except LoradiagError as error:
        print_message(f"Error: {error}")
        return error.exit_code
    except BrokenOutputError:
        return DONE
    except SystemExit as error:
        # Raised by typer when the reader of its help has closed the pipe.
        if isinstance(error.__context__, BrokenPipeError):
            return DONE
        # By a library: its exit code must not be taken for that of a check.
        print_message(
            f"Error: a library ended the command with exit code {error.code!r}; nothing was judged"
        )
        return UNREADABLE
    except (
        KeyboardInterrupt,
        typer.Abort,
    ):  # typer up to 0.15 raises Abort, later versions exit code 130
        code = INTERRUPTED
    except typer.Exit as error:
        code = error.exit_code
    except OSError as error:
        if not _is_stream_error(error):
            raise
        print_message(f"Error: standard output: cannot be written: {error.strerror}")
        return UNREADABLE
    except Exception as error:
        # A usage error of typer, or of the click that an older typer depends on; it carries its
        # message and exit code.
        format_message, code = (
            getattr(error, "format_message", None),
            getattr(error, "exit_code", None),
        )
        if not callable(format_message) or not isinstance(code, int):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            print_message(
                f"Error: {_format_usage_error(format_message(), getattr(error, 'ctx', None))}"
            )
    if code == INTERRUPTED:
        hint = "; a run with -o continues with --resume" if _can_resume(sys.argv[1:3]) else ""
        print_message(f"interrupted{hint}")
    return code if isinstance(code, int) else DONE


def _read_project(words: list[str]) -> tuple[list[str], Project]:
    """Return the words of the command line with paths in place of names, and what gives them.

    Raises:
        UsageError: The project file, or the results of ``--like``, cannot be used.
    """
    if words[:1] == ["gate"]:
        return words, Project()
    project = find_project(Path.cwd()) or Project()
    like = next((word.removeprefix("--like=") for word in words if word.startswith("--like=")), "")
    if "--like" in words[:-1]:
        like = words[words.index("--like") + 1]
    if like:
        (like,) = replace_names([like], project)
        project = follow_results(like, _find_command(words[:2]), project)
    return replace_names(words, project), project


def _nest(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of options by command, those of probes in a table of their own."""
    probes = {
        name.removeprefix("probe "): options
        for name, options in defaults.items()
        if name.startswith("probe ")
    }
    return {**defaults, "probe": probes}


def _format_usage_error(problem: str, context: Any) -> str:
    """Return typer's usage error in our style: the problem and the fix.

    >>> _format_usage_error("No such option: --rnak Did you mean --rank?", None)
    'No such option: --rnak Did you mean --rank?'
    >>> from types import SimpleNamespace
    >>> _format_usage_error(
    ...     "No such command 'plt'. Did you mean 'plot'?", SimpleNamespace(command_path="loradiag")
    ... )
    "No such command 'plt'. Did you mean 'plot'? See loradiag --help"
    """
    command_path = getattr(context, "command_path", "")
    problem = problem.replace("Value error, ", "").strip().removesuffix(".")
    if not command_path:
        return problem
    see = " See" if problem.endswith("?") else "; see"
    return f"{problem}{see} {command_path} --help"


def _can_resume(arguments: list[str]) -> bool:
    """Return whether the command given by these words has ``--resume``."""
    named = _find_command(arguments)
    for name, feature, command in catalog.commands():
        if name == named:
            return any("resume" in list_options(group) for group in feature.option_groups(command))
    return False


def _is_stream_error(error: OSError) -> bool:
    """Return whether writing to a standard stream failed, as of typer's own help: such an error
    names no file.
    """
    return error.filename is None and error.errno in {errno.ENOSPC, errno.EIO, errno.EBADF}
