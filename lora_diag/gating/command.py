"""The commands ``gate`` and ``gate init``: inputs measured now, outputs, and the exit code."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from lora_diag.cli.output import append_step_summary, print_message, rerun_command
from lora_diag.errors import DONE, GATE_FAILED, INCONCLUSIVE, Given, UsageError
from lora_diag.files import CARD, JUNIT, POLICY, RESULTS, check_outputs, write_whole
from lora_diag.gating import GateOptions
from lora_diag.rendering.html import read_card

if TYPE_CHECKING:
    from lora_diag.cli.options import OutputChoice
    from lora_diag.records import Results

EXIT_CODES = {"passed": DONE, "failed": GATE_FAILED, "inconclusive": INCONCLUSIVE}


def run_gate(
    shown: OutputChoice,
    paths: Sequence[str],
    *,
    policy: str | None,
    plugins: bool,
    base: str | None,
    tuned: str | None,
    adapter: Sequence[str],
    output: Path | None,
    junit: Path | None,
    model_card: Path | None,
    github: bool,
    overwrite: bool,
    **options: Unpack[GateOptions],
) -> int:
    """Judge results, write and print the verdicts, and return the exit code.

    Raises:
        UsageError: Options contradict each other, there are no results, an output may not be
            replaced, or the model card is not Markdown; or as ``gate``.
    """
    files, baseline, card = list(paths), options["baseline"], model_card
    if github and shown.json:
        raise UsageError(
            Given("github"),
            "writes to standard output, as $json does",
            "take $github with $output FILE",
        )
    # The content of a baseline is checked as it is read; of a card, only a block is replaced.
    if options["ratchet"]:
        check_outputs([], [(Path(path), RESULTS) for path in baseline], overwrite=True)
    check_outputs([*files, *baseline], [(output, RESULTS), (junit, JUNIT)], overwrite)
    check_outputs([*files, *baseline, output, junit], [(card, CARD)], overwrite=True)
    if card is not None:
        read_card(card)
    from lora_diag.gating import show
    from lora_diag.gating.run import gate as judge
    from lora_diag.records.file import write_results
    from lora_diag.records.verdict import outcome
    from lora_diag.rendering import verdicts

    if policy is None and not files:
        raise UsageError("gate", "give a policy file and results, or $policy NAME and results")
    chosen = files.pop(0) if policy is None else policy
    results = judge(chosen, *files, *_measure_inputs(base, tuned, list(adapter), files), **options)
    if output is not None:
        write_results(results, output, overwrite)
    if junit is not None:
        write_whole(junit, verdicts.junit(results), JUNIT, overwrite)
    if card is not None:
        write_whole(card, show.model_card(results, read_card(card)), CARD, overwrite=True)
    if shown.json:
        from lora_diag.records import lines_of

        for text in lines_of(results.records()):
            shown.print_line(text)
    has_passed = outcome(results.whole) == "passed"
    if shown.quiet and not has_passed:
        print_message(show.reason(results))
    text = ""
    if shown.table:
        hint = _suggest(has_passed, files, card)
        text = show.verdict_table(results, *shown.terminal, next_command=hint)
    if github:
        shown.print_annotated(text, verdicts.workflow_commands(results))
        append_step_summary(verdicts.step_summary(results))
    elif shown.table:
        shown.print(text)
    return EXIT_CODES[outcome(results.whole)]


def _suggest(has_passed: bool, files: Sequence[str], card: Path | None) -> str | None:
    """Return the next command after a gate; None after a pass whose model card was written."""
    if has_passed and card is not None:
        return None
    if has_passed:
        command = rerun_command("--model-card", "README.md")
        return f"{command}   (puts the outcome into a model card)"
    if files:
        command = shlex.join(["loradiag", "inspect", files[0], "--by", "layer"])
        return f"{command}   (the measured values)"
    return f"{rerun_command('-o', 'verdicts.jsonl')}   (saves all verdicts)"


def run_init(
    shown: OutputChoice,
    results: Sequence[str],
    *,
    plugins: bool,
    output: Path | None,
    overwrite: bool,
) -> int:
    """Print a policy, or write it and print the outcome of the results it is made from; return the
    exit code.
    """
    check_outputs(results, [(output, POLICY)], overwrite)
    from lora_diag.gating.run import gate_init

    text = gate_init(*results, name=str(output or "policy.toml"))
    if output is None:
        shown.print(text.rstrip("\n"))
        return DONE
    write_whole(output, text, POLICY, overwrite)
    if not shown.quiet:
        from lora_diag.gating.run import gate as judge
        from lora_diag.rendering.text import quantity
        from lora_diag.rendering.verdicts import headline

        fields = quantity(text.count("\n[[baseline]]"), "field")
        limits = text.count("\n[[rule]]")
        limited = f" and limits {quantity(limits, 'value')}" if limits else ""
        shown.print(
            f"{output}: compares {fields}, layer by layer, with these results{limited}; review "
            "each tolerance"
        )
        shown.print(f"Outcome of these results: {headline(judge(output, *results))}")
        shown.print(f"Next  {shlex.join(['loradiag', 'gate', str(output), *results])}")
    return DONE


def _measure_inputs(
    base: str | None, tuned: str | None, adapters: list[str], results: list[str]
) -> list[Results[Any]]:
    """Return the results of ``--base``; none without it.

    Raises:
        UsageError: Both results and ``--base`` are given, or neither, or other inputs to measure
            without ``--base``, or ``--base`` alone; or as ``measure``.
    """
    if base is None:
        if tuned is not None or adapters:
            raise UsageError(
                "gate", "$tuned and $adapter need $base, the checkpoint to compare with", "add it"
            )
        if not results:
            raise UsageError(
                "gate", "give results files, or $base with $tuned or $adapter to measure first"
            )
        return []
    if results:
        raise UsageError(
            Given("base"), "measures results itself", f"remove the results file {results[0]}"
        )
    from lora_diag.gating.run import measure  # deferred: imports torch

    return measure(base, tuned, adapters)
