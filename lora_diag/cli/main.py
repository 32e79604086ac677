"""The ``loradiag`` command: its subcommands, its version, and how errors become exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lora_diag.cli.inspect import inspect
from lora_diag.cli.output import message
from lora_diag.cli.spectrum import spectrum
from lora_diag.errors import LoradiagError
from lora_diag.version import __version__

COMMANDS = (spectrum, inspect)

app = typer.Typer(
    name="loradiag",
    help="Rank diagnostics for fine-tuned models: is the update low-rank, and can the files show it?",
    epilog="Exit codes: 0 done, 1 a gate failed, 2 usage, 3 could not measure, 4 nothing was compared, 5 inconclusive.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command(no_args_is_help=True)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"loradiag {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; every error meant for the user becomes one message and an exit code."""
    try:
        app()
    except LoradiagError as error:
        message(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        message("interrupted; with -o, --resume goes on from here")
        sys.exit(130)
    except BrokenPipeError:
        # The reader has seen enough (`| head`); keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
