"""``loradiag gate`` and ``loradiag gate init``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, check_outputs, line, message, result, terminal
from lora_diag.errors import DONE, GATE_FAILED, INCONCLUSIVE, InputError, UsageError
from lora_diag.files import CARD, JUNIT, POLICY, RESULTS, SARIF, write_whole

if TYPE_CHECKING:
    from lora_diag.records import Results

EXIT = {"passed": DONE, "failed": GATE_FAILED, "inconclusive": INCONCLUSIVE}

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="POLICY RESULTS...", help="A policy file and results files; or: init RESULTS..."),
]
Ready = Annotated[
    str | None, typer.Option("--policy", metavar="NAME", help="A policy of the package, instead of POLICY.")
]
MeasureBase = Annotated[str | None, typer.Option("--base", metavar="BASE", help="Measure first, on this checkpoint.")]
MeasureTuned = Annotated[str | None, typer.Option("--tuned", metavar="TUNED", help="The full fine-tune to measure.")]
MeasureAdapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="ADAPTER", help="The adapter to measure; may be repeated.")
]
For = Annotated[
    list[str] | None,
    typer.Option("--for", metavar="PATH", help="The checkpoint or adapter that the results must be of; repeatable."),
]
MaxAge = Annotated[
    str | None, typer.Option("--max-age", metavar="AGE", help="Oldest results to accept, such as 12h, 7d or 2w.")
]
Baseline = Annotated[Path | None, typer.Option(metavar="FILE", help="Results to compare with, layer by layer.")]
Ratchet = Annotated[bool, typer.Option("--ratchet", help="If passed: put what got better into --baseline.")]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a JUnit report.")]
Sarif = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a SARIF log.")]
Card = Annotated[Path | None, typer.Option(metavar="FILE", help="Put the outcome into this model card.")]
Github = Annotated[bool, typer.Option("--github", help="Annotations and step summary for GitHub Actions.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the verdicts (JSONL); of init: the policy.")
]
Json = Annotated[bool, typer.Option("--json", help="Verdicts on standard output, and nothing else there.")]


def gate(
    words: Words = None,
    policy: Ready = None,
    base: MeasureBase = None,
    tuned: MeasureTuned = None,
    adapter: MeasureAdapters = None,
    baseline: Baseline = None,
    ratchet: Ratchet = False,
    shipped: For = None,
    max_age: MaxAge = None,
    junit: Junit = None,
    sarif: Sarif = None,
    model_card: Card = None,
    github: Github = False,
    output: Output = None,
    json: Json = False,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Judge results by a policy: may this checkpoint ship? ``gate init`` writes a policy from results.

    Exit codes: 0 passed, 1 failed, 2 policy or request not valid, 3 a file cannot be read, 4 nothing to judge,
    5 inconclusive.

    Example: loradiag gate policy.toml results.jsonl --junit gate.xml
    """
    given = list(words or [])
    if github and json:
        raise UsageError("--github and --json: both write to standard output; take --github with -o FILE")
    reports = (junit, sarif, model_card)
    if given[:1] == ["init"] and policy is None:
        if any((base, tuned, adapter, baseline, ratchet, shipped, max_age, github, json, *reports)):
            raise UsageError("gate init: takes results files and -o POLICY, nothing else; a policy file is ./init")
        _init(given[1:], output, quiet, overwrite)
        return
    ready = policy is not None or not given
    read = [*(given if ready else given[1:]), *([] if ready else given[:1]), baseline]
    check_outputs(
        [], [(baseline if ratchet else None, RESULTS)], overwrite=True
    )  # its content is checked as it is read
    written = [(output, RESULTS), (junit, JUNIT), (sarif, SARIF)]
    check_outputs(read, written, overwrite)
    # Of the card only a block is replaced: what else it holds is checked as it is read.
    check_outputs([*read, *(path for path, _ in written)], [(model_card, CARD)], overwrite=True)
    if model_card is not None:
        _read_card(model_card)
    from lora_diag.decisions.gate.record import outcome
    from lora_diag.decisions.gate.run import gate as judge
    from lora_diag.decisions.gate.run import ready_policy

    if policy is None and not given:
        raise UsageError("gate: give a policy file and results, or --policy NAME and results")
    rules = ready_policy(policy) if policy is not None else Path(given.pop(0))
    measured = _measured(base, tuned, adapter or [], given)
    results = judge(
        rules, *given, *measured, baseline=baseline, ratchet=ratchet, shipped=shipped or (), max_age=max_age
    )
    if output is not None:
        results.write(output, overwrite)
    _write_reports(results, *reports, overwrite)
    if json:
        from lora_diag.records import lines_of

        for text in lines_of(results.records()):
            line(text)
    if quiet and outcome(results.whole) != "passed":
        from lora_diag.decisions.gate.summary import reason

        message(reason(results))
    if not quiet and not json:
        _show(results, github, _next(results, given, output))
    if github:
        _tell_github(results)
    raise typer.Exit(EXIT[outcome(results.whole)])


def init(
    results: Annotated[list[str], typer.Argument(metavar="RESULTS", help="Results of a checkpoint that served well.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="POLICY", help="Write the policy; default: print it.")
    ] = None,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a policy whose limits are measured values with a margin.

    Example: loradiag gate init results.jsonl -o policy.toml
    """
    _init(results, output, quiet, overwrite)


def _init(given: list[str], output: Path | None, quiet: bool, overwrite: bool) -> None:
    """Write a policy, or print it."""
    if not given:
        raise UsageError("gate init: give the results of a checkpoint that served well")
    check_outputs(given, [(output, POLICY)], overwrite)
    from lora_diag.decisions.gate.run import gate_init

    text = gate_init(*given, name=str(output or "policy.toml"))
    if output is None:
        result(text.rstrip("\n"))
        return
    write_whole(output, text, POLICY, overwrite)
    if not quiet:
        from lora_diag.decisions.gate.run import gate as judge
        from lora_diag.decisions.gate.summary import headline

        rules = text.count("\n[[rule]]")
        result(f"{output}: {rules} {'rule' if rules == 1 else 'rules'}; read it: every limit says what it is from")
        result(f"These results under it: {headline(judge(output, *given))}")
        result(f"Next  {shlex.join(['loradiag', 'gate', str(output), *given])}")


def _measured(base: str | None, tuned: str | None, adapters: list[str], given: list[str]) -> list[Results[Any]]:
    """Measure first, where that is asked."""
    if base is None:
        if tuned is not None or adapters:
            raise UsageError("--tuned and --adapter: need --base, the checkpoint that they are compared with")
        if not given:
            raise UsageError("gate: give results files, or --base with --tuned or --adapter to measure first")
        return []
    if given:
        raise UsageError(f"--base: measures first, so leave out the results file {given[0]}")
    # torch comes with it: not before it is needed
    from lora_diag.decisions.gate.run import measure

    return measure(base, tuned, adapters)


def _write_reports(
    results: Results[Any], junit: Path | None, sarif: Path | None, card: Path | None, overwrite: bool
) -> None:
    if junit is not None:
        from lora_diag.decisions.gate.junit import junit as as_junit

        write_whole(junit, as_junit(results), JUNIT, overwrite)
    if sarif is not None:
        from lora_diag.decisions.gate.sarif import sarif as as_sarif

        write_whole(sarif, as_sarif(results), SARIF, overwrite)
    if card is not None:
        from lora_diag.decisions.gate.model_card import model_card

        write_whole(card, model_card(results, _read_card(card)), CARD, overwrite=True)


def _show(results: Results[Any], github: bool, then: str) -> None:
    from lora_diag.decisions.gate.summary import verdict_table

    text = verdict_table(results, *terminal(), then=then)
    if github:
        import secrets

        # A layer's name may begin like a workflow command; between these lines none is obeyed.
        token = secrets.token_hex(16)
        text = f"::stop-commands::{token}\n{text}\n::{token}::"
    result(text)


def _tell_github(results: Results[Any]) -> None:
    from lora_diag.decisions.gate.github import step_summary, workflow_commands

    for command in workflow_commands(results):
        result(command)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(step_summary(results))
        except OSError as error:
            raise InputError(f"{summary}: the step summary cannot be written: {error.strerror}") from error


def _next(results: Results[Any], given: list[str], output: Path | None) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    from lora_diag.decisions.gate.record import outcome

    if outcome(results.whole) != "passed" and given:
        return f"{shlex.join(['loradiag', 'inspect', given[0], '--per', 'layer'])}   (the numbers behind this)"
    if output is None:
        return f"{again('-o', 'verdicts.jsonl')}   (keeps these verdicts)"
    return f"{shlex.join(['loradiag', 'inspect', str(output)])}   (these verdicts again)"


def _read_card(path: Path) -> str:
    """Return the text of a model card, line ends as they are; empty if there is none yet.

    Raises:
        UsageError: It is not Markdown.
        InputError: It cannot be read.
    """
    try:
        if path.suffix.lower() not in {".md", ".markdown"} or (path.exists() and not CARD.is_at(path)):
            raise UsageError(f"--model-card {path}: is not Markdown; give a Markdown file whose name ends in .md")
        return path.read_bytes().decode("utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"--model-card {path}: is not UTF-8 text: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
