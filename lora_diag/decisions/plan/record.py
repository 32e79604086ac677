"""Records of ``plan``, which are printed and not written to a file."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Record, Shown


class PlanType(Record):
    """All weights of one module type and shape.

    Args:
        name: The module type, such as ``self_attn.q_proj``.
        shape: ``(out, in)`` of each matrix as stored.
        matrices: Number of matrices; experts of a stack count separately.
        params: Number of entries, all trained by full fine-tuning.
        per_rank: Parameters of LoRA per rank: matrices · (out + in).
        targeted: Whether they get LoRA.
    """

    table: ClassVar[tuple[Shown | str, ...]] = ("matrices",)
    name: str
    shape: Annotated[tuple[int, int], Shown(main=True)]
    matrices: Annotated[int, Shown(title="n", main=True, form="d")]
    params: Annotated[int, Shown(title="full", main=True, form="count")]
    per_rank: int
    targeted: bool


class PlanRank(Record):
    """LoRA of one rank on every targeted matrix.

    Args:
        rank: r.
        params: Σ r(d_in + d_out).
        rho: params / entries of the targeted matrices; of one matrix r(d_in + d_out)/(d_in·d_out).
        of_model: params / parameters of the model.
        bytes: By optimizer: memory of the trainable parameters, gradients and state in bytes.
        flops: Multiply-adds per token that the unmerged adapter adds / those of the model's
            matrices.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "params",
        "of_model",
        "rho",
        "flops",
        Shown("bytes.adamw", "AdamW", "Weights, gradients and state", main=True, form="bytes"),
        Shown(
            "bytes.adamw8bit", "8-bit Adam", "Weights, gradients and state", main=True, form="bytes"
        ),
        Shown("bytes.sgd", "SGD", "Weights and gradients", main=True, form="bytes"),
        Shown(
            "bytes.sgd_momentum",
            "SGD+momentum",
            "Weights, gradients and state",
            main=True,
            form="bytes",
            drop=1,
        ),
    )
    rank: int
    params: Annotated[int, Shown(title="trains", main=True, form="count")]
    rho: Annotated[float, Shown(title="ρ", main=True, form="small_percent")]
    of_model: Annotated[float, Shown(main=True, form="small_percent")]
    bytes: dict[str, int]
    flops: Annotated[float, Shown(title="+ FLOPs", main=True, form="small_percent")]


class PlanFit(Record):
    """The ranks that a budget of parameters allows.

    Args:
        asked: The option as given.
        budget: The budget in parameters.
        rank: Largest rank that all targeted matrices can have, up to ``full_rank``; 0 if not even 1
            fits.
        full_rank: max of min(out, in) over them: no update of any of them has a higher rank.
        spent: Parameters at this rank.
        left: Remaining parameters.
        listed: Largest requested rank that fits; null if none does.
        listed_left: Parameters remaining at ``listed``; null if none fits.
        doubled: Number of blocks that can have twice ``listed`` with the rest; 0 if none fits.
        blocks: Number of blocks with targeted matrices; matrices outside of blocks count as one.
    """

    asked: str
    budget: int
    rank: int
    full_rank: int
    spent: int
    left: int
    listed: int | None
    listed_left: int | None
    doubled: int
    blocks: int


class PlanRates(Record):
    """Current speed of this machine, in core-seconds: t seconds on p cores are p·t.

    Args:
        cores: Number of cores.
        entry: Per entry of a matrix: both sides read from memory, subtracted, norms computed.
        product: Per multiply-add of the Gram product of order n with n rows, which has n³.
        eigen: Eigenvalues of a matrix, by its order.
        few: Per entry, the K largest values of a decaying spectrum, by order; empty if krylov is
            not used.
        few_from: Order from which krylov is used.
    """

    cores: int
    entry: float
    product: float
    eigen: dict[int, float]
    few: dict[int, float]
    few_from: int


class PlanCost(Record):
    """Estimated cost of a run of ``spectrum``.

    Args:
        top: K of ``--top``; null for all values.
        core_seconds: Total core-seconds.
        longest: Seconds of the matrix that takes longest, a lower bound for any number of machines.
        seconds: Seconds by number of machines like this one.
        bytes: Bytes read from both sides; null if ``Plan.base_bytes`` is.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "core_seconds",
        Shown(
            "speed",
            "one reads",
            "Bytes that one machine reads in a second",
            terminal=True,
            form="speed",
        ),
    )
    top: int | None
    core_seconds: Annotated[float, Shown(title="core time", main=True, form="time")]
    longest: float
    seconds: dict[int, float]
    bytes: int | None

    @property
    def speed(self) -> float | None:
        """Bytes that one machine reads in a second; None if ``bytes`` is."""
        return None if self.bytes is None else self.bytes / self.seconds[1]


class PlanRule(Record):
    """A published rule of thumb for capacity: a starting point, not an answer.

    Args:
        name: Description of the rule.
        source: Publication of the rule.
        params: Required trainable parameters.
        rank: Smallest rank of all targeted matrices that has as many; null where full rank has
            fewer.
    """

    name: str
    source: str
    params: int
    rank: int | None


class PlanCapacity(Record):
    """Size of the training data in tokens, and the rank required by rules of thumb.

    Args:
        data: The counted data, as named by the user; empty where the number was given.
        about: Interpretation of the data.
        notes: Notes on limitations.
        tokens: Number of predicted tokens: of completions, or of whole texts; for a classifier,
            labels.
        rules: The rules.
    """

    data: str
    about: str
    notes: tuple[str, ...] = ()
    tokens: int
    rules: tuple[PlanRule, ...]


class Plan(Record):
    """Cost of full fine-tuning and LoRA of a model, from headers or a config alone.

    Args:
        path: The input path.
        kind: Kind of input, as text.
        notes: Notes on limitations.
        params: Parameters of the model.
        targeted: Number of entries of the matrices with LoRA.
        base_bytes: Stored size of the model; null if a weight is quantized or its dtype is unknown.
        dtype: Dtype of the trainable parameters and their gradients.
        full_bytes: By optimizer: memory of training every parameter, with gradients and state, in
            bytes.
        types: The module types.
        ranks: LoRA by rank.
        fit: Ranks that the budget allows; null without one.
        rates: Speed of this machine; null if not requested.
        costs: Cost of the spectra of all matrices on it; empty if not requested.
        capacity: Information in the data, and rules of thumb; null without data or tokens.
    """

    record: Literal["plan"] = "plan"
    path: str
    kind: str
    notes: tuple[str, ...]
    params: int
    targeted: int
    base_bytes: int | None
    dtype: str
    full_bytes: dict[str, int]
    types: tuple[PlanType, ...]
    ranks: tuple[PlanRank, ...]
    fit: PlanFit | None = None
    rates: PlanRates | None = None
    costs: tuple[PlanCost, ...] = ()
    capacity: PlanCapacity | None = None

    @property
    def per_rank(self) -> int:
        """Parameters of LoRA per rank on all targeted matrices."""
        return sum(row.per_rank for row in self.types if row.targeted)
