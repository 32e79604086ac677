"""Records of ``lint``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Share, Shown, WholeRecord

Severity = Literal["error", "warning", "note"]

# From worst to least.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class LintFinding(WholeRecord):
    """A problem that a rule finds in a configuration.

    Args:
        id: The rule; ``loradiag explain ID`` explains it.
        severity: Severity of the problem. ``error``: training or serving will not do what the
            configuration says. ``warning``: likely to cost quality, or outside of what published
            recipes use. ``note``: a fact to know before training.
        where: File, line and key of the setting that causes it.
        line: The line in the file; null if the setting is not in a text file.
        evidence: Numbers and names that the rule read.
        fix: What to do.
        source: Measurement, paper or program that the rule is from.
    """

    key: ClassVar[tuple[str, ...]] = ("id", "where", "evidence")
    record: Literal["finding"] = "finding"
    id: str
    severity: Annotated[Severity, Shown(main=True)]
    where: str
    line: int | None = None
    evidence: str
    fix: str
    source: str


class StepShare(WholeRecord):
    """Fraction of the entries of BASE that one optimizer step moves at all, in the dtype in which
    they are trained.

    Args:
        name: The module type; ``all`` for all trained weights.
        dtype: The dtype, ``bfloat16`` or ``float16``.
        lr: Size of the step: the learning rate, as in Adam's first step.
        moved: Fraction of the entries that a step of size ``lr`` changes, as the mean of both
            directions.
        error: Standard error of ``moved``, from differences of successive sampled ranges; 0 if all
            entries were read.
        entries: Number of entries of the weights.
        sampled: Number of entries that were read.
    """

    key: ClassVar[tuple[str, ...]] = ("name", "dtype", "lr")
    table: ClassVar[tuple[Shown | str, ...]] = (
        "entries",
        "sampled",
    )
    record: Literal["step_share"] = "step_share"
    name: str
    dtype: Literal["bfloat16", "float16"]
    lr: float
    moved: Annotated[Share, Shown(title="moved by lr", main=True, form="small_percent")]
    error: float
    entries: Annotated[Count, Shown(main=True, form="count")]
    sampled: Annotated[Count, Shown(main=True, form="count", drop=2)]
