"""``loradiag portability``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, line, result, tell_unmeasured, terminal
from lora_diag.errors import GATE_FAILED, UNREADABLE, UsageError
from lora_diag.running.options import RunOptions

Adapter = Annotated[str | None, typer.Argument(metavar="ADAPTER", help="The adapter that will be served.")]
Base = Annotated[str | None, typer.Argument(metavar="BASE", help="The checkpoint it was trained on.")]
For = Annotated[
    str | None,
    typer.Option("--for", metavar="NAMES", help="Programs, e.g. vllm,llamacpp or vllm==0.31; default those for it."),
]
Require = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Exit with 1 unless these programs apply the intended ΔW.")
]
Intended = Annotated[
    str | None, typer.Option(metavar="NAME", help="Program whose ΔW is intended; default PEFT or the format's rule.")
]
MaxRank = Annotated[int | None, typer.Option(metavar="R", help="Largest rank that the server is told to serve.")]
Fix = Annotated[
    bool, typer.Option("--fix", help="Write to -o an adapter that every program scales alike, and judge it.")
]
Form = Annotated[
    str | None, typer.Option("--format", metavar="peft|kohya|diffusers|mlx", help="With --fix: its layout.")
]
DoraToLora = Annotated[
    bool, typer.Option("--dora-to-lora", help="With --fix: write the nearest LoRA of its rank for DoRA; needs BASE.")
]
LeaveOut = Annotated[bool, typer.Option("--leave-out", help="With --fix: leave out biases and weights in full.")]
Rules = Annotated[bool, typer.Option("--rules", help="Show what each program does with each feature, and leave.")]


@options.spread
def portability(
    adapter: Adapter = None,
    base: Base = None,
    consumers: For = None,
    require: Require = None,
    intended: Intended = None,
    max_lora_rank: MaxRank = None,
    fix: Fix = False,
    form: Form = None,
    dora_to_lora: DoraToLora = False,
    leave_out: LeaveOut = False,
    rules: Rules = False,
    *,
    given: RunOptions,
    shown: options.Rows,
) -> None:
    """Will the adapter mean the same where it is served? The ΔW that each program applies, and its error.

    Example: loradiag portability lora_r16/ --for vllm,llamacpp --require vllm
    """
    if rules:
        from lora_diag.diagnostics.portability.table import rules_table

        result(rules_table(*terminal()))
        return
    if adapter is None:
        raise UsageError("portability: name an adapter; --rules shows what the programs do without one")
    _check_fix(fix, given, intended, {"--format": form, "--dora-to-lora": dora_to_lora, "--leave-out": leave_out})
    # torch comes with it: not before it is needed
    from lora_diag.diagnostics.portability.fix import make_portable
    from lora_diag.diagnostics.portability.run import portability as measure
    from lora_diag.diagnostics.portability.summary import failed, portability_table
    from lora_diag.records import to_line

    judging: dict[str, Any] = {
        "consumers": _names(consumers),
        "require": _names(require),
        "max_lora_rank": max_lora_rank,
    }
    if fix:
        writing: dict[str, Any] = {"form": form, "dora_to_lora": dora_to_lora, "leave_out": leave_out}
        stated: dict[str, Any] = {"alpha": given["alpha"], "alpha_is_rank": given["alpha_is_rank"]}
        results = make_portable(adapter, str(given["output"]), base, **writing, **judging, **stated)
        for record in results.records() if shown.json else ():
            line(to_line(record))
    else:
        with shown.callbacks() as callbacks:
            results = measure(adapter, base, intended=intended, **judging, **given, **callbacks)
    if shown.table:
        then = None if fix or shown.per is options.Per.layer else f"{again('--per', 'layer')}   (layer by layer)"
        result(portability_table(results, *terminal(), per=shown.per, then=then))
    if failed(results):
        raise typer.Exit(GATE_FAILED)
    if tell_unmeasured(results.unmeasured, "the layer was not judged"):
        raise typer.Exit(UNREADABLE)


def _check_fix(fix: bool, given: RunOptions, intended: str | None, others: dict[str, str | bool | None]) -> None:
    """Refuse options of writing without ``--fix``, and those of a results file with it.

    Raises:
        UsageError: There are such.
    """
    if not fix:
        if option := next((name for name, value in others.items() if value), None):
            raise UsageError(f"{option}: is of --fix; add it, and -o with the folder to write")
        return
    if given["output"] is None:
        raise UsageError("--fix: name the folder to write with -o")
    if any((given["resume"], given["overwrite"], given["layers"], given["exclude"], intended)):
        raise UsageError(
            "--fix: writes the whole adapter to a new folder; it takes none of --resume, --overwrite, "
            "--layers, --exclude and --intended"
        )


def _names(words: str | None) -> list[str]:
    return [word.strip() for word in (words or "").split(",") if word.strip()]
