"""The command ``lint``: outputs and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lora_diag.catalog import table
from lora_diag.cli.output import print_message
from lora_diag.errors import DONE, GATE_FAILED
from lora_diag.gating.command import annotate, check_verdict_outputs, print_guarded, write_verdicts
from lora_diag.linting import LintOptions

if TYPE_CHECKING:
    from lora_diag.cli.options import Shown


def run_lint(
    shown: Shown,
    config: str | None,
    base: str | None,
    *,
    fail_on: str,
    output: Path | None,
    junit: Path | None,
    github: bool,
    overwrite: bool,
    **options: Unpack[LintOptions],
) -> int:
    """Judge a configuration, write and print the findings, and return the exit code.

    Raises:
        UsageError: Options contradict each other, or an output may not be replaced; or as ``lint``.
        InputError: An input cannot be read, or an output cannot be written.
    """
    check_verdict_outputs([config, base], shown, output, junit, github, overwrite)
    from lora_diag.gating.record import outcome
    from lora_diag.linting.run import lint
    from lora_diag.linting.show import as_verdicts, lint_lines, suggest_next

    results = lint(config, base, **options)
    verdicts = as_verdicts(results, fail_on)
    has_failed = outcome(verdicts.whole) == "failed"
    write_verdicts(shown, results, verdicts, output, junit, overwrite)
    if shown.table:
        print_guarded(shown, table(results, *shown.terminal, next_command=suggest_next(results)), github)
    elif shown.quiet and has_failed:
        print_message(": ".join(statement.lead for statement in lint_lines(results)[:2]))
    if github:
        annotate(shown, verdicts)
    return GATE_FAILED if has_failed else DONE
