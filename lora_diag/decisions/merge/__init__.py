"""``merge``: updates of one BASE in one adapter or checkpoint; its methods, declaration and
options.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import BASE_ARGUMENT, Argument, Command, Feature, Figure, Section
from lora_diag.running import options
from lora_diag.running.options import (
    REQUIRED,
    Callbacks,
    Matching,
    ModelOptions,
    Notes,
    Option,
    Resources,
    Resuming,
)


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A method of merging.

    Args:
        name: Value of ``--method``; also the function in ``methods.py``, unless ``run`` names
            another.
        title: Its name in its paper.
        source: The paper.
        averages: Whether the default weights are 1/K; else 1.
        density: Default fraction of entries to keep; None if it trims nothing.
        entrywise: Whether it merges entries of ΔW, so that the merge has no factors.
        needs_factors: Whether every update must have factors.
        linear: Whether the merge is Σ w_kΔW_k, so that its expectation is known.
        run: Another function in ``methods.py``.
    """

    name: str
    title: str
    source: str
    averages: bool = False
    density: float | None = None
    entrywise: bool = False
    needs_factors: bool = False
    linear: bool = False
    run: str = ""


METHODS = {
    method.name: method
    for method in (
        MergeMethod(
            "mean", "weighted mean", "Wortsman et al. 2022", averages=True, linear=True, run="add"
        ),
        MergeMethod(
            "sum",
            "task arithmetic",
            "Ilharco et al. 2023, arXiv 2212.04089",
            linear=True,
            run="add",
        ),
        MergeMethod(
            "ties", "TIES", "Yadav et al. 2023, arXiv 2306.01708", density=0.2, entrywise=True
        ),
        MergeMethod(
            "dare",
            "DARE",
            "Yu et al. 2024, arXiv 2311.03099",
            averages=True,
            density=0.5,
            entrywise=True,
        ),
        MergeMethod(
            "dare_ties",
            "DARE with TIES",
            "Yu et al. 2024, arXiv 2311.03099",
            density=0.5,
            entrywise=True,
        ),
        MergeMethod("tsv", "TSV-Merge", "Gargiulo et al. 2025, arXiv 2412.00081"),
        MergeMethod("iso_c", "Iso-C", "Marczak et al. 2025, arXiv 2502.04959"),
        MergeMethod(
            "knots_ties", "KnOTS-TIES", "Stoica et al. 2025, arXiv 2410.19735", density=1.0
        ),
        MergeMethod(
            "core_ties",
            "TIES in Core Space",
            "Panariello et al. 2025, arXiv 2509.17786",
            False,
            1.0,
            False,
            True,
        ),
    )
}

# Value of ``--method`` that compares all.
ALL = "all"


class JudgeOptions(ModelOptions, Notes, total=False):
    """Options of comparing merges by their losses."""

    eval: Annotated[
        Sequence[str],
        Option(
            (),
            "Held-out text; NAME is the folder of the update whose task it is; repeatable.",
            "[NAME=]FILE",
            panel=options.INPUTS,
            former="evaluate",
        ),
    ]
    scales: Annotated[
        Sequence[float],
        Option((), "With --eval: factors λ to choose from, instead of --scale.", "X,..."),
    ]
    choose: Annotated[
        str,
        Option(
            "worst", "With --eval: choose by the worst task, or by the mean of all.", "worst|mean"
        ),
    ]


class MergeOptions(JudgeOptions, Matching, Resources, Resuming, Callbacks, total=False):
    """Options of ``merge``."""

    method: Annotated[
        str,
        Option(
            "mean", "Method of merging; with --eval, all compares them.", "|".join((*METHODS, ALL))
        ),
    ]
    weights: Annotated[Sequence[float] | None, options.WEIGHTS]
    scale: Annotated[float, Option(1.0, "Factor of the merged update, or of a single one.", "X")]
    density: Annotated[
        float | None,
        Option(None, "Fraction of entries kept by TIES and DARE; default: by method.", "D"),
    ]
    rank: Annotated[int | None, options.RANK]
    energy: Annotated[float | None, options.ENERGY]
    checkpoint: Annotated[bool, options.CHECKPOINT]
    output_dtype: Annotated[
        str | None,
        Option(
            None,
            "Output dtype; default: float32, for a checkpoint BASE's.",
            "float32|bfloat16|float16",
            panel=options.OUTPUT,
        ),
    ]
    portable: Annotated[bool, options.PORTABLE]
    format: Annotated[str, options.FORMAT]
    base_name: Annotated[str | None, options.BASE_NAME]
    seed: Annotated[int, options.SEED]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=options.OUTPUT)]


class MergeRunOptions(MergeOptions, total=False):
    """``MergeOptions``, and the results file in the folder."""

    output: Annotated[Path, Option(REQUIRED, "Results file.", "FILE", cli=False)]


class MergeOutput(TypedDict, total=False):
    """The output of the command."""

    output: Annotated[Path, Option(REQUIRED, "Folder to write.", "OUT", "-o", options.OUTPUT)]


FEATURE = Feature(
    __name__,
    "merge",
    "Ship",
    commands=(
        Command(
            help="Merge updates of one BASE, and state what each keeps.",
            question="Which merge is best, and what does it keep?",
            notes="The merge is an adapter, by default of the exact rank, or a checkpoint. One "
            "update alone is written "
            "at the strength --scale.",
            examples=(
                "merge base/ sql/ chat/ code/ -o merged/",
                "merge base/ sql/ chat/ code/ --method tsv --rank 32 -o merged/",
                "merge base/ sql/ chat/ --method all --eval sql=sql.txt --eval chat=chat.txt -o "
                "merged/",
                "merge base/ sql/ --scale 0.75 -o weaker/",
            ),
            arguments=(
                BASE_ARGUMENT,
                Argument(
                    "updates", "One or more adapters or fine-tuned checkpoints.", "TUNED", True
                ),
            ),
            options=(MergeOutput, MergeOptions),
            suggest=".show:suggest_next",
        ),
    ),
    records=(".record:Merged", ".record:MergedLoss"),
    functions=(".run:merge",),
    statements=".show:merge_lines",
    grids=".show:merge_grids",
    section=Section("Merged updates"),
    questions=(("kept", "How much of each update survives the merge?"),),
    figures=(
        Figure(
            "merge",
            "what each update keeps in a merge, compared with the mean and with chance",
            needs="merged",
            made_by="loradiag merge BASE TUNED TUNED -o merged",
            by_color=False,
        ),
        Figure(
            "merged",
            "held-out loss of merges, compared with the updates alone",
            needs="merged_loss",
            page=".figures:make_loss_page",
            made_by="loradiag merge BASE TUNED TUNED --method all --eval NAME=FILE -o merged",
            by_color=False,
        ),
    ),
)
