"""``loradiag gate`` and ``loradiag gate init``."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from lora_diag.cli import options
from lora_diag.cli.output import line, message, rerun_command, result, terminal
from lora_diag.errors import DONE, GATE_FAILED, INCONCLUSIVE, InputError, UsageError
from lora_diag.files import CARD, JUNIT, POLICY, RESULTS, check_outputs, write_whole
from lora_diag.gating import GateOptions
from lora_diag.rendering.html import read_card
from lora_diag.running.options import BASE, INPUTS, OUTPUT, Option

if TYPE_CHECKING:
    from lora_diag.records import Results

EXIT_CODES = {"passed": DONE, "failed": GATE_FAILED, "inconclusive": INCONCLUSIVE}

_POLICY = Option(None, "Policy to write; default: print it.", "FILE", ("--output", "-o"), OUTPUT)

PolicyAndResults = Annotated[
    list[str] | None, typer.Argument(metavar="POLICY RESULTS", help="Policy file, then results files.")
]


class CommandOptions(TypedDict, total=False):
    """Options of the command that ``gate()`` has no need of: a built-in policy, inputs to measure, and outputs."""

    policy: Annotated[
        str | None, Option(None, "Built-in policy, instead of POLICY; default: none.", "NAME", panel=INPUTS)
    ]
    base: Annotated[str | None, BASE]
    tuned: Annotated[str | None, Option(None, "Full fine-tune to measure on --base.", "TUNED", panel=INPUTS)]
    adapter: Annotated[Sequence[str], Option((), "Adapter to measure on --base; repeatable.", "ADAPTER", panel=INPUTS)]
    output: Annotated[Path | None, Option(None, "Verdicts (JSONL) to write.", "FILE", ("--output", "-o"), OUTPUT)]
    junit: Annotated[Path | None, Option(None, "JUnit report to write.", "FILE", panel=OUTPUT)]
    model_card: Annotated[Path | None, Option(None, "Model card to put the outcome into.", "FILE", panel=OUTPUT)]
    github: Annotated[bool, Option(False, "Print annotations and step summary of GitHub Actions.", panel=OUTPUT)]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


@options.spread
def gate(
    paths: PolicyAndResults = None,
    *,
    arguments: GateOptions,
    own_options: CommandOptions,
    shown: options.Shown,
) -> None:
    """Judge results by a policy before a release.

    Exit codes: 0 passed, 1 failed, 2 invalid policy or usage error, 3 a file cannot be read, 4 nothing to judge,
    5 inconclusive.

    Example: loradiag gate policy.toml results.jsonl --junit gate.xml
    """
    files = list(paths or [])
    policy, output, overwrite = own_options["policy"], own_options["output"], own_options["overwrite"]
    junit, card, github = own_options["junit"], own_options["model_card"], own_options["github"]
    baseline = arguments["baseline"]
    to_measure = (own_options["base"], own_options["tuned"], list(own_options["adapter"]))
    if github and shown.json:
        raise UsageError("--github and --json: both write to standard output; take --github with -o FILE")
    # The content of a baseline is checked as it is read; of a card, only a block is replaced.
    check_outputs([], [(Path(path) if arguments["ratchet"] else None, RESULTS) for path in baseline], overwrite=True)
    check_outputs([*files, *baseline], [(output, RESULTS), (junit, JUNIT)], overwrite)
    check_outputs([*files, *baseline, output, junit], [(card, CARD)], overwrite=True)
    if card is not None:
        read_card(card)
    from lora_diag.gating import show
    from lora_diag.gating.policy import ready_policy
    from lora_diag.gating.record import outcome
    from lora_diag.gating.run import gate as judge

    if policy is None and not files:
        raise UsageError("gate: give a policy file and results, or --policy NAME and results")
    policy_or_path = ready_policy(policy) if policy is not None else Path(files.pop(0))
    results = judge(policy_or_path, *files, *_measure_inputs(*to_measure, files), **arguments)
    if output is not None:
        results.write(output, overwrite)
    if junit is not None:
        write_whole(junit, show.junit(results), JUNIT, overwrite)
    if card is not None:
        write_whole(card, show.model_card(results, read_card(card)), CARD, overwrite=True)
    if shown.json:
        from lora_diag.records import lines_of

        for text in lines_of(results.records()):
            line(text)
    has_passed = outcome(results.whole) == "passed"
    if shown.quiet and not has_passed:
        message(show.reason(results))
    if shown.table:
        if not has_passed and files:
            hint = f"{shlex.join(['loradiag', 'inspect', files[0], '--per', 'layer'])}   (the measured values)"
        elif output is None:
            hint = f"{rerun_command('-o', 'verdicts.jsonl')}   (saves these verdicts)"
        else:
            hint = f"{shlex.join(['loradiag', 'inspect', str(output)])}   (these verdicts again)"
        # A layer's name may look like a workflow command; between these lines GitHub executes none.
        token = secrets.token_hex(16)
        text = show.verdict_table(results, *terminal(), next_command=hint)
        result(f"::stop-commands::{token}\n{text}\n::{token}::" if github else text)
    if github:
        for command in show.workflow_commands(results):
            result(command)
        _append_step_summary(show.step_summary(results))
    raise typer.Exit(EXIT_CODES[outcome(results.whole)])


@options.spread
def init(
    results: options.ResultsFiles,
    *,
    output: Annotated[Path | None, options.typer_option("output", _POLICY)] = None,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a policy: no value of RESULTS may get 10% worse.

    Example: loradiag gate init results.jsonl -o policy.toml
    """
    check_outputs(results, [(output, POLICY)], overwrite)
    from lora_diag.gating.run import gate_init

    text = gate_init(*results, name=str(output or "policy.toml"))
    if output is None:
        result(text.rstrip("\n"))
        return
    write_whole(output, text, POLICY, overwrite)
    if not quiet:
        from lora_diag.gating.run import gate as judge
        from lora_diag.gating.show import headline

        count = text.count("\n[[baseline]]")
        field_count = f"{count} {'field' if count == 1 else 'fields'}"
        result(f"{output}: compares {field_count}, layer by layer, with these results; review each tolerance")
        result(f"Outcome of these results: {headline(judge(output, *results))}")
        result(f"Next  {shlex.join(['loradiag', 'gate', str(output), *map(str, results)])}")


def _measure_inputs(base: str | None, tuned: str | None, adapters: list[str], results: list[str]) -> list[Results[Any]]:
    """Return the results of ``--base``; none without it.

    Raises:
        UsageError: Both results and ``--base`` are given, or neither, or other inputs to measure without ``--base``.
    """
    if base is None:
        if tuned is not None or adapters:
            raise UsageError("--tuned and --adapter: need --base, the checkpoint to compare with; add it")
        if not results:
            raise UsageError("gate: give results files, or --base with --tuned or --adapter to measure first")
        return []
    if results:
        raise UsageError(f"--base: measures results itself; remove the results file {results[0]}")
    from lora_diag.gating.run import measure  # deferred: imports torch

    return measure(base, tuned, adapters)


def _append_step_summary(text: str) -> None:
    """Append to the step summary of GitHub Actions, if there is one.

    Raises:
        InputError: It cannot be written.
    """
    if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary_file).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"{summary_file}: the step summary cannot be written: {error.strerror}") from error
