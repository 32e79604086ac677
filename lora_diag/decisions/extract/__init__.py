"""``extract``: write the best adapter of given ranks in PEFT's format or another; its declaration
and options.
"""

from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import BASE_ARGUMENT, TUNED_ARGUMENT, Command, Feature, Hint
from lora_diag.running import options
from lora_diag.running.options import INPUTS, OUTPUT, REQUIRED, FolderOptions, Option


class ExtractOptions(FolderOptions, total=False):
    """Options of ``extract``."""

    rank: Annotated[int | None, options.RANK]
    energy: Annotated[float | None, options.ENERGY]
    params: Annotated[str | int | None, options.PARAMS]
    allocation: Annotated[
        Path | str | None,
        Option(None, "Ranks from allocate: results or adapter_config.json.", "FILE", panel=INPUTS),
    ]
    directions: Annotated[
        Path | str | None,
        Option(
            None,
            "Choose by gain, from probe gain; with --params, --keep or --drop.",
            "FILE",
            panel=INPUTS,
        ),
    ]
    keep: Annotated[
        float | None,
        Option(None, "Fewest measured directions that keep this part of the gain.", "FRACTION"),
    ]
    drop: Annotated[bool, Option(False, "All directions but those that cost more than they gain.")]
    signal: Annotated[
        bool, Option(False, "Ranks: singular values above the files' rounding noise.")
    ]
    recover: Annotated[bool, options.RECOVER]
    activations: Annotated[Path | str | None, options.ACTIVATIONS]
    kfac: Annotated[bool, options.KFAC]
    split: Annotated[str, Option("both", "√Σ in both factors, or Σ in B.", "both|b")]
    adapter_dtype: Annotated[str, options.ADAPTER_DTYPE]
    unfactored: Annotated[
        str,
        Option(
            "list",
            "Tensors without factors: list them, or store them in full.",
            "list|save",
            panel=OUTPUT,
            former="rest",
        ),
    ]
    match_norm: Annotated[bool, options.MATCH_NORM]
    portable: Annotated[bool, options.PORTABLE]
    format: Annotated[str, options.FORMAT]
    base_name: Annotated[str | None, options.BASE_NAME]
    sweep: Annotated[Path | str | None, options.SWEEP]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


class ExtractOutput(TypedDict, total=False):
    """The output of the command."""

    output: Annotated[Path, Option(REQUIRED, "Adapter folder to write.", "ADAPTER", "-o", OUTPUT)]


FEATURE = Feature(
    __name__,
    "extract",
    "Ship",
    commands=(
        Command(
            help="Write the best adapter of given ranks for an update.",
            question="What is the best rank-r adapter of a full fine-tune?",
            examples=("extract base/ full_ft/ --rank 16 -o adapter/",),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(ExtractOutput, ExtractOptions),
            hints=(
                Hint(
                    "probe outputs {base} {tuned} {output} --eval held_out.txt",
                    "what it does to the loss",
                ),
            ),
        ),
    ),
    records=(".record:Extraction",),
    functions=(".run:extract",),
    statements=".show:extraction_lines",
)
