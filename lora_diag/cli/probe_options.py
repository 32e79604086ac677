"""The options that the probes share, what they tell while they run, and what to run next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_diag.cli.output import again, message

Base = Annotated[Path, typer.Argument(metavar="BASE", help="The model before: a folder for transformers, or a Hub id.")]
Eval = Annotated[
    list[Path] | None,
    typer.Option("--eval", metavar="FILE", help="Held-out text, JSONL or datasets folder; repeatable."),
]
OneEval = Annotated[
    list[Path] | None, typer.Option("--eval", metavar="FILE", help="Held-out text, JSONL or datasets folder; one.")
]
Length = Annotated[int | None, typer.Option(metavar="N", help="Tokens of a sequence; default 512 or the model's most.")]
MaxSequences = Annotated[int | None, typer.Option(metavar="N", help="Use the first N sequences of each file.")]
Tokenizer = Annotated[str, typer.Option(metavar="auto|bytes|DIR", help="Of BASE; UTF-8 bytes; or of a folder.")]
Dtype = Annotated[str, typer.Option(metavar="float32|bfloat16|float16", help="Of the weights while they run.")]
Widen = Annotated[
    int, typer.Option(metavar="N", help="Rates to try beyond a grid where the best is its last; 0 for none.")
]
Steps = Annotated[int, typer.Option("--steps", "--max-steps", metavar="N", help="Updates of a run.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the data's order, and the first of the seeds.")]
Labels = Annotated[str, typer.Option(metavar="data|model", help="Of the loss: the text's own, or the model's draws.")]
LabelSeed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of labels drawn from the model.")]


@dataclass(frozen=True)
class HeldOut:
    """Which texts tell the loss."""

    eval_: Eval = None
    shifted: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Text of another kind; repeatable.")] = None

    def arguments(self) -> dict[str, Any]:
        """Return what a function of the API takes."""
        return {"evaluate": self.eval_ or (), "shifted": self.shifted or ()}


@dataclass(frozen=True)
class Run:
    """How the model runs on them."""

    length: Length = None
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences in a batch.")] = 8
    max_sequences: MaxSequences = None
    tokenizer: Tokenizer = "auto"
    dtype: Dtype = "float32"
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to run the model.")] = "auto"


def noted(quiet: bool) -> Callable[[str], None] | None:
    """Return who is told what a careful reader should know before it takes time."""
    return None if quiet else message


def next_step(output: Path | None, then: str) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is not None:
        return then
    return f"{again('-o', 'probe.jsonl')}   (keeps these numbers)"
