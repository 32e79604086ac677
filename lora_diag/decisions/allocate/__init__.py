"""``allocate``: choose ranks under a budget, with a certificate; its declaration and options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import SPECTRA_ARGUMENT, Command, Feature, Figure, Section
from lora_diag.running import options
from lora_diag.running.options import INPUTS, OUTPUT, Option


class AllocateOptions(TypedDict, total=False):
    """Options of ``allocate``."""

    params: Annotated[str | int | None, options.PARAMS]
    total_rank: Annotated[int | None, Option(None, "Budget: sum of the ranks of all layers.", "R")]
    memory_budget: Annotated[str | int | None, options.MEMORY_BUDGET]
    energy: Annotated[float | None, options.ENERGY]
    match: Annotated[
        Path | str | None, Option(None, "Budget: number of parameters of this adapter.", "ADAPTER")
    ]
    min_rank: Annotated[int, Option(0, "Smallest rank of a layer with any signal.", "R")]
    max_rank: Annotated[
        int | None, Option(None, "Largest rank of a layer; default: no limit.", "R")
    ]
    allowed_ranks: Annotated[
        Sequence[int] | None,
        Option(None, "Allowed ranks, e.g. 8,16,32; default: any.", "R,R,...", former="ranks_from"),
    ]
    layers: Annotated[str | None, options.TARGETS]
    exclude: Annotated[str | None, options.EXCLUDE]
    layer_weights: Annotated[
        Path | str | Mapping[str, float] | None,
        Option(
            None,
            "Factors by layer (JSON), or results of probe fisher or gain.",
            "FILE",
            panel=INPUTS,
            former="weights",
        ),
    ]
    portable: Annotated[bool, options.PORTABLE]
    relative: Annotated[bool, Option(False, "Count the energy of every layer as 1.")]
    optimizer: Annotated[str, options.OPTIMIZER]
    adapter_dtype: Annotated[str, options.ADAPTER_DTYPE]
    allow_unfinished: Annotated[bool, options.UNFINISHED]


class ConfigOptions(TypedDict, total=False):
    """Options of the output: file, format and scaling, the check of a config, and the source of a
    learning rate.
    """

    output: Annotated[
        Path | None,
        Option(
            None,
            "PEFT config (.json) or records (.jsonl) to write.",
            "FILE",
            "-o",
            OUTPUT,
        ),
    ]
    format: Annotated[
        str,
        Option(
            "peft", "Configuration to write.", "peft|axolotl|llamafactory|trl|unsloth", panel=OUTPUT
        ),
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]
    scaling: Annotated[
        float, Option(2.0, "PEFT config: lora_alpha / r of every layer.", "S", panel=OUTPUT)
    ]
    rslora: Annotated[bool, options.RSLORA]
    check: Annotated[
        Path | None,
        Option(
            None,
            "PEFT config: compare its ranks with this model; default: off.",
            "BASE",
            panel=INPUTS,
        ),
    ]
    sweep: Annotated[Path | None, options.SWEEP]


FEATURE = Feature(
    __name__,
    "allocate",
    "Train",
    commands=(
        Command(
            help="Ranks that keep the most energy within a budget.",
            question="Which ranks fit a budget, layer by layer?",
            notes="Without a budget: the ranks of each layer by several rules.",
            run=".run:allocate_and_write",
            examples=("allocate results.jsonl --params 10M -o adapter_config.json",),
            arguments=(SPECTRA_ARGUMENT,),
            options=(AllocateOptions, ConfigOptions),
            suggest=".show:suggest_next",
            table=".show:policies_table",
        ),
    ),
    records=(".record:Allocation", ".record:Certificate"),
    functions=(".run:allocate",),
    table=".show:allocation_table",
    statements=".show:allocation_lines",
    section=Section("Allocation"),
    figures=(
        Figure(
            "allocation",
            "rank by layer, and energy kept compared with the bound",
            made_by="loradiag allocate spectrum.jsonl --params 10M -o allocation.jsonl",
        ),
    ),
)
