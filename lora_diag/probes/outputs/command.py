"""``loradiag probe outputs``: whether adapters give the same outputs as the fine-tune."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import next_step
from lora_diag.probes.outputs import OutputsOptions
from lora_diag.running.options import INPUTS, Option

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="[TUNED] ADAPTER",
        help="Full fine-tune, then adapters; adapters alone are compared as equals, in the order of their steps.",
    ),
]
_TUNED = Option(
    None, "Full fine-tune; default: the first of the models, if it is not an adapter.", "TUNED", panel=INPUTS
)


@dataclass(frozen=True)
class FullFineTune:
    """The full fine-tune, where it is no positional argument."""

    tuned: Annotated[str | None, options.typer_option("tuned", _TUNED)] = None

    def split(self, models: Sequence[str]) -> tuple[str | None, list[str]]:
        """Return the full fine-tune, if there is one, and the models to compare.

        Without ``--tuned`` it is the first model, unless that is an adapter or one of several steps of a run. The
        others are sorted by step within each run: a shell sorts 100 before 20.
        """
        from lora_diag.adapters import is_adapter  # deferred: imports torch
        from lora_diag.checkpoints import locate

        run, step = _run_and_step(models[0])
        is_step = step >= 0 and any(_run_and_step(path)[0] == run for path in models[1:])
        if self.tuned is not None:
            tuned, others = self.tuned, [path for path in models if path.rstrip("/") != self.tuned.rstrip("/")]
        elif not is_step and not is_adapter(locate(models[0])):
            tuned, *others = models
        else:
            tuned, others = None, list(models)
        runs = list(dict.fromkeys(_run_and_step(path)[0] for path in others))
        return tuned, sorted(others, key=lambda path: (runs.index(_run_and_step(path)[0]), _run_and_step(path)[1]))


def _run_and_step(path: str) -> tuple[str, int]:
    """Return a path without the number at its end, and that number; -1 without one.

    >>> _run_and_step("out/checkpoint-100/"), _run_and_step("out/full")
    (('out/checkpoint-', 100), ('out/full', -1))
    """
    match = re.fullmatch(r"(.*?)(\d{1,18})?", path.rstrip("/"), re.DOTALL)
    assert match is not None
    return match[1], int(match[2] or -1)


@options.spread
def outputs(
    base: options.Base,
    models: Models,
    *,
    full: FullFineTune,
    arguments: OutputsOptions,
    shown: options.Shown,
) -> None:
    """Losses and outputs of adapters and a full fine-tune.

    Example: loradiag probe outputs base/ full_ft/ lora_r8/ lora_r64/ --eval held_out.txt -o outputs.jsonl
    """
    # deferred: imports torch
    from lora_diag.probes.outputs.measure import probe_outputs

    tuned, adapters = full.split(models)
    with shown.callbacks(notes=True) as callbacks:
        results = probe_outputs(base, tuned, adapters, **arguments, **callbacks)
    command = ["fleet"] if tuned is None else ["residual", str(base), str(tuned)]
    hint = shlex.join(["loradiag", *command, *map(str, adapters)]) + "   (where in the weights)"
    shown.show(results, next_step(arguments["output"], hint))
