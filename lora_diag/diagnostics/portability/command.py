"""``loradiag portability``."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import typer

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured, line, rerun_command, result, terminal
from lora_diag.diagnostics.portability import PortabilityOptions
from lora_diag.errors import GATE_FAILED, UsageError
from lora_diag.running.options import OUTPUT, Option

Adapter = Annotated[str | None, typer.Argument(metavar="ADAPTER", help="Adapter that will be served.")]
Base = Annotated[str | None, typer.Argument(metavar="BASE", help="Base checkpoint that it was trained on.")]


class FixOptions(TypedDict, total=False):
    """Options for writing a portable adapter."""

    fix: Annotated[bool, Option(False, "Write to -o an adapter that all programs scale alike.", panel=OUTPUT)]
    format: Annotated[
        str | None,
        Option(None, "With --fix: format; default: that of ADAPTER.", "peft|kohya|diffusers|mlx|gguf", panel=OUTPUT),
    ]
    dora_to_lora: Annotated[
        bool, Option(False, "With --fix: replace DoRA by the nearest LoRA of its rank; needs BASE.", panel=OUTPUT)
    ]
    leave_out: Annotated[bool, Option(False, "With --fix: leave out biases and weights stored in full.", panel=OUTPUT)]
    rules: Annotated[bool, Option(False, "Print what each program does with each feature, and stop.", panel=OUTPUT)]


@options.spread
def portability(
    adapter: Adapter = None,
    base: Base = None,
    *,
    arguments: PortabilityOptions,
    fixing: FixOptions,
    shown: options.Rows,
) -> None:
    """The ΔW that each serving program applies, and its error.

    Example: loradiag portability lora_r16/ --consumers vllm,llamacpp --require vllm
    """
    form, dora_to_lora, leave_out = fixing["format"], fixing["dora_to_lora"], fixing["leave_out"]
    if fixing["rules"]:
        from lora_diag.diagnostics.portability.show import rules_table

        result(rules_table(*terminal()))
        return
    if adapter is None:
        raise UsageError("portability: no adapter is given; give one, or use --rules for the rules of all programs")
    _check_fix(fixing["fix"], arguments, {"--format": form, "--dora-to-lora": dora_to_lora, "--leave-out": leave_out})
    # deferred: imports torch
    from lora_diag.diagnostics.portability.measure import make_portable
    from lora_diag.diagnostics.portability.measure import portability as measure
    from lora_diag.diagnostics.portability.show import failed
    from lora_diag.records import to_line

    judge_options: dict[str, Any] = {name: arguments[name] for name in ("consumers", "require", "max_lora_rank")}
    if fixing["fix"]:
        fix_options: dict[str, Any] = {"form": form, "dora_to_lora": dora_to_lora, "leave_out": leave_out}
        alpha_options: dict[str, Any] = {"alpha": arguments["alpha"], "alpha_is_rank": arguments["alpha_is_rank"]}
        results = make_portable(
            adapter, str(arguments["output"]), base, **fix_options, **judge_options, **alpha_options
        )
        for record in results.records() if shown.json else ():
            line(to_line(record))
    else:
        with shown.callbacks() as callbacks:
            results = measure(adapter, base, **arguments, **callbacks)
    hint = (
        None
        if fixing["fix"] or shown.per is options.Per.layer
        else f"{rerun_command('--per', 'layer')}   (layer by layer)"
    )
    shown.show(results, hint)
    if failed(results):
        raise typer.Exit(GATE_FAILED)
    exit_unmeasured(results.unmeasured, "the layer was not judged")


def _check_fix(fix: bool, arguments: PortabilityOptions, fix_options: dict[str, str | bool | None]) -> None:
    """Refuse options of ``--fix`` without it; with it, a missing ``-o`` and options that it does not support.

    Raises:
        UsageError: One of them is given, or ``-o`` is missing.
    """
    if not fix:
        if option := next((name for name, value in fix_options.items() if value), None):
            raise UsageError(f"{option}: needs --fix, and -o with the folder to write; add both")
        return
    if arguments["output"] is None:
        raise UsageError("--fix: no output folder; give it with -o")
    if any(
        (arguments["resume"], arguments["overwrite"], arguments["layers"], arguments["exclude"], arguments["intended"])
    ):
        raise UsageError(
            "--fix: writes the whole adapter to a new folder; remove --resume, --overwrite, --layers, --exclude "
            "and --intended"
        )
