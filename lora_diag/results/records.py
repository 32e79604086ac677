"""The records of schema 1: one JSON object a line, in the words of the field.

Fractions lie in [0, 1]. "Energy" means Σσ² and nothing else. A value that does not exist (the energy share of a zero
update, a rank beyond the values kept) is null, never NaN.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1

Reason = Literal[
    "vector",
    "only_in_base",
    "only_in_tuned",
    "not_float",
    "shape_differs",
    "added_rows",
    "removed_rows",
    "empty",
    "not_selected",
    "non_finite",
    "not_in_base",
    "needs_base",
]


class _Record(BaseModel):
    """Frozen, strict about its fields' values, and silent about fields that a later version added."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class RunInput(_Record):
    r"""One input of a run: its part in the command, where it was, what it is.

    Args:
        role: ``base``, ``tuned`` or ``adapter``.
        path: What the user named; bytes that are not UTF-8 are spelled ``\xff``.
        kind: What it is, in words.
        tensors: How many it holds.
        notes: What a careful reader should know.
        fingerprint: By which ``--resume`` notices that the input changed; empty if it was not taken.
    """

    role: str
    path: str
    kind: str
    tensors: int
    notes: tuple[str, ...] = ()
    fingerprint: str = ""


class Run(_Record):
    """First line of a results file: what was asked of what."""

    record: Literal["run"] = "run"
    schema_: int = Field(SCHEMA, alias="schema", serialization_alias="schema")
    command: str
    version: str
    inputs: tuple[RunInput, ...]
    settings: dict[str, Any]


class Tail(_Record):
    """Eckart–Young errors of the best rank-r approximation: √Σ_{i>r}σ_i² and σ_{r+1} (null if it was not computed)."""

    fro: float
    spectral: float | None


class Resolution(_Record):
    """What the files' rounding lets one see of ΔW.

    Args:
        unchanged: Share of the entries that are bit-identical on both sides; null for an adapter, which has no sides.
        mantissa: Mantissa bits that the stored values of base and tuned really use; null for an adapter.
        rounding_fro: Bound on ‖E‖_F, the norm of the rounding error of ΔW; by Mirsky Σ(σ_i − σ̂_i)² ≤ ‖E‖_F².
        noise_fro: Expected ‖E‖_F if E behaves like noise.
        edge: Where the singular values of such noise end.
        signal_rank: Singular values above the edge; null if all that were kept are and there are more.
        verdict: Whether the files can show this update.
    """

    unchanged: float | None
    mantissa: tuple[int, int] | None
    rounding_fro: float
    noise_fro: float
    edge: float
    signal_rank: int | None
    verdict: Literal["resolved", "floor-limited", "unresolved"]


class Spectrum(_Record):
    """The singular values of one ΔW and what follows from them.

    Args:
        layer: The weight's name in BASE; one matrix of a stack is ``name[3]``.
        shape: ``(out, in)``.
        dtypes: Stored dtypes of base and tuned; of an adapter: of the base (null without one) and of its factors.
        fro: ‖ΔW‖_F, accumulated in float64.
        base_fro: ‖W_base‖_F, likewise; null if the base was not given.
        s: Singular values of ΔW, descending, to 9 significant digits.
        complete: True if ``s`` holds all min(out, in) of them, or all that can differ from zero (an adapter's r).
        method: What computed them, such as ``gram`` or ``exact``.
        energy_error: Bound on the absolute error of every energy fraction in this record.
        energy: C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F² by r; null for a zero update and for r beyond the values kept.
        rank_at: Smallest r with C(r) ≥ the threshold; null if it is beyond the values kept, 0 for a zero update.
        tail: Errors of the best rank-r approximation, by r.
        stable_rank: ‖ΔW‖_F² / σ_1²; null for a zero update.
        effective_rank: exp of the entropy of p_i = σ_i²/Σσ²; null for a zero update or an incomplete spectrum.
        resolution: What the files' rounding lets one see.
    """

    record: Literal["spectrum"] = "spectrum"
    layer: str
    shape: tuple[int, int]
    dtypes: tuple[str | None, str]
    fro: float
    base_fro: float | None
    s: tuple[float, ...]
    complete: bool
    method: str
    energy_error: float
    energy: dict[str, float | None]
    rank_at: dict[str, int | None]
    tail: dict[str, Tail | None]
    stable_rank: float | None
    effective_rank: float | None
    resolution: Resolution

    @property
    def relative(self) -> float | None:
        """‖ΔW‖_F / ‖W_base‖_F; None without a base, or where it is zero."""
        return self.fro / self.base_fro if self.base_fro else None


class LeftOut(_Record):
    """A tensor, or rows of one, without a spectrum.

    Args:
        layer: Its name.
        shape: Its shape; for rows that only one side has, theirs.
        reason: One word, for programs.
        detail: One sentence, for people.
        fro: ‖Δ‖_F where both sides have it (1-D tensors), the norm of the rows that only one side has, else null.
        base_fro: ‖W_base‖_F where both sides have it, else null.
    """

    record: Literal["left_out"] = "left_out"
    layer: str
    shape: tuple[int, ...]
    reason: Reason
    detail: str
    fro: float | None = None
    base_fro: float | None = None


class End(_Record):
    """Last line of a finished results file; without it, the run was interrupted."""

    record: Literal["end"] = "end"
    layers: int
    left_out: int
    fro: float
    base_fro: float | None


class StoredTensor(_Record):
    """One tensor of a checkpoint, as its header describes it.

    Args:
        layer: Its name.
        shape: Its shape.
        dtype: Stored dtype.
        left_out: Why ``spectrum`` would not measure it; null if it would.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: str
    left_out: str | None = None


class AdaptedWeight(_Record):
    """One weight that an adapter changes.

    Args:
        layer: The adapter's name for it; of stacked experts, one of them.
        shape: ``(out, in)`` in the adapter's orientation; null where only the base tells.
        form: ``factored`` (B·A), ``dense`` (computed in full) or ``value`` (the weight's new value).
        dtype: Stored dtype.
        rank: r of its factors; null where it has none.
        scaling: s by which they are multiplied; null where it has none or it lies in the file as a number.
        needs_base: What makes ΔW depend on the base weight, such as ``DoRA``; empty if nothing does.
    """

    layer: str
    shape: tuple[int | None, ...]
    form: Literal["factored", "dense", "value"]
    dtype: str
    rank: int | None = None
    scaling: float | None = None
    needs_base: str = ""


class Inventory(_Record):
    """What is in a checkpoint or an adapter, from headers alone.

    Args:
        path: Where it is.
        kind: What it is, in words.
        notes: What a careful reader should know.
        tensors: The tensors of its files.
        adapts: Of an adapter: the weights it changes; else empty.
        scaling: Of an adapter: how its updates are scaled and where that is said.
    """

    record: Literal["inventory"] = "inventory"
    path: str
    kind: str
    notes: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    adapts: tuple[AdaptedWeight, ...] = ()
    scaling: str = ""


AnyRecord = Annotated[Run | Spectrum | LeftOut | End, Field(discriminator="record")]
