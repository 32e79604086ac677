"""``gate``: a policy and records → verdicts.

A rule without the records it needs is inconclusive.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import RESULTS_ARGUMENT, Argument, Command, Feature
from lora_diag.running.options import BASE, INPUTS, OUTPUT, Option, VerdictOutputs


class GateOptions(TypedDict, total=False):
    """Options of ``gate``."""

    baseline: Annotated[
        Sequence[str | Path],
        Option((), "Results to compare with, layer by layer; repeatable.", "FILE", panel=INPUTS),
    ]
    ratchet: Annotated[
        bool, Option(False, "If passed, write improvements to --baseline.", panel=OUTPUT)
    ]
    for_: Annotated[
        Sequence[str | Path],
        Option(
            (),
            "Input that every results file must refer to; repeatable.",
            "PATH",
            panel=INPUTS,
            former="shipped",
        ),
    ]
    max_age: Annotated[
        str | None, Option(None, "Oldest results to accept, e.g. 12h, 7d, 2w; default: any.", "AGE")
    ]


class PluginOptions(TypedDict, total=False):
    """Whether plugins take part; read in ``lora_diag.cli.app`` before any is loaded."""

    plugins: Annotated[
        bool, Option(False, "Load installed plugins, for results of their commands.", panel=INPUTS)
    ]


class GateCommandOptions(PluginOptions, total=False):
    """Options of the command that ``gate()`` has no need of: a policy, inputs to measure, a model
    card, plugins.
    """

    policy: Annotated[
        str | None, Option(None, "Policy, instead of the argument POLICY.", "POLICY", panel=INPUTS)
    ]
    base: Annotated[str | None, BASE]
    tuned: Annotated[
        str | None, Option(None, "Full fine-tune to measure on --base.", "TUNED", panel=INPUTS)
    ]
    adapter: Annotated[
        Sequence[str],
        Option((), "Adapter to measure on --base; repeatable.", "ADAPTER", panel=INPUTS),
    ]
    model_card: Annotated[
        Path | None, Option(None, "Model card to put the outcome into.", "FILE", panel=OUTPUT)
    ]


class InitOptions(PluginOptions, total=False):
    """Options of ``gate init``."""

    output: Annotated[
        Path | None,
        Option(None, "Policy to write; default: print it.", "FILE", "-o", OUTPUT),
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


FEATURE = Feature(
    __name__,
    "gate",
    "Ship",
    commands=(
        Command(
            help="Judge results by a policy before a release.",
            question="May this checkpoint ship?",
            notes="Exit codes: 0 passed, 1 failed, 2 invalid policy or usage error, 3 a file "
            "cannot be read, 4 nothing "
            "to judge, 5 inconclusive.",
            examples=("gate policy.toml results.jsonl --junit gate.xml",),
            run=".command:run_gate",
            arguments=(
                Argument(
                    "paths",
                    "Policy: built-in or a file, then results files.",
                    "POLICY RESULTS",
                    many=True,
                    optional=True,
                ),
            ),
            options=(GateOptions, GateCommandOptions, VerdictOutputs),
            shows=("json", "quiet", "verbose"),
            call=True,
        ),
        Command(
            help="Write a policy: no value of RESULTS may get 10% worse.",
            name="gate init",
            examples=("gate init results.jsonl -o policy.toml",),
            run=".command:run_init",
            arguments=(RESULTS_ARGUMENT,),
            options=(InitOptions,),
            shows=("quiet",),
            call=True,
        ),
    ),
    records=("lora_diag.records.verdict:Verdict",),
    functions=(".run:gate",),
    table=".show:verdict_table",
    files=(("policy", ".policy:Policy"),),
    checks=".policy:Checks",
)
