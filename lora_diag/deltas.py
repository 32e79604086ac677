"""Named ΔW: the pairing of two checkpoints, and the reasons for skipped tensors.

A ``Delta`` is a descriptor: it holds the location of its entries and how to read them, and is small
enough to be sent to another process. There are three kinds: the difference of two stored tensors,
an update in factored form, and an update that must be computed in full. Measurements are done by
``linalg``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from lora_diag.errors import Given, NothingComparedError, UsageError
from lora_diag.records.names import RESIZABLE, part_of
from lora_diag.records.run import Reason
from lora_diag.storage import Checkpoint, TensorInfo
from lora_diag.storage.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

    from lora_diag.storage.file_bytes import Numbers

# Entries per block and side: small enough that a block and its float32 copies stay near the cache.
# One core on a bf16 pair of 4096²: 0.52 s with 2^18, 0.39 s with 2^20, 0.95 s with 2^22, 2.7 s with
# 2^24.
BLOCK_ENTRIES = 2**20

# The output layer, which a model with tied embeddings does not store: it is the input embedding.
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")

# 3-D weights are stacks of matrices (fused experts), unless the name says convolution.
CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
EXPERTS = re.compile(r"expert", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Side:
    """The entries of one stored tensor from ``offset`` on."""

    checkpoint: Checkpoint
    name: str
    offset: int = 0

    @property
    def info(self) -> TensorInfo:
        """The tensor's name, shape and dtype in the checkpoint."""
        return self.checkpoint[self.name]

    @property
    def dtype(self) -> str:
        """Dtype in which it is read, by its torch name, or the file's if torch has none."""
        return self.info.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether values are dequantized when read."""
        return self.info.stored is not None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the entries ``start:stop``, relative to ``offset``; 1-D, in ``dtype``."""
        return self.checkpoint.read(self.name, self.offset + start, self.offset + stop)

    def read_steps(self, start: int, stop: int) -> torch.Tensor | None:
        """Return the spacing of the storage format at these entries; None where it follows from
        value and dtype.
        """
        return self.checkpoint.read_steps(self.name, self.offset + start, self.offset + stop)

    def read_scales(self, start: int, stop: int) -> torch.Tensor | None:
        """Return the scales of the codes at these entries; None if the format is not codes times a
        scale.
        """
        return self.checkpoint.read_scales(self.name, self.offset + start, self.offset + stop)


@dataclass(frozen=True, slots=True)
class StoredDelta:
    """ΔW = W_tuned − W_base of one layer with both weights stored.

    Args:
        layer: The weight's name in BASE, or in TUNED for a head that BASE stores as its embedding;
            one matrix of a stack is ``name[3]``.
        shape: ``(out, in)``; a 1-D tensor of n entries is ``(1, n)``.
        base: Location of W_base.
        tuned: Location of W_tuned.
        is_matrix: False for 1-D tensors (norms, biases), of which only the norm is measured.
    """

    layer: str
    shape: tuple[int, int]
    base: Side
    tuned: Side
    is_matrix: bool = True

    @property
    def dtypes(self) -> tuple[str, str]:
        """Dtypes in which base and tuned are read."""
        return self.base.dtype, self.tuned.dtype

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``(base, tuned)`` row blocks, each ``(rows, in)`` in its own dtype, from the first
        row to the last.
        """
        yield from zip(
            row_blocks(self.base, self.shape), row_blocks(self.tuned, self.shape), strict=True
        )

    def steps(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]] | None:
        """Return ``(base, tuned)`` spacings of the entries of each of ``blocks``; None if neither
        side is quantized.

        Each is 1-D of the block's number of entries, float32; None for a side that is not
        quantized.
        """
        if not (self.base.is_quantized or self.tuned.is_quantized):
            return None
        spans = (
            (first * self.shape[1], last * self.shape[1]) for first, last in row_spans(self.shape)
        )
        return ((self.base.read_steps(*span), self.tuned.read_steps(*span)) for span in spans)


class ThinFactors(Protocol):
    """Two stored factors and a scale, read one after the other without torch: ΔW = s·B·A."""

    def read_b(self) -> Numbers:
        """Return B ``(out, r)``."""

    def read_a(self) -> Numbers:
        """Return A ``(r, in)``."""

    def read_scale(self) -> float:
        """Return s."""

    @property
    def kind(self) -> Hashable:
        """Key, equal for factors that can be read as one stack: same files, orientation, shapes and
        dtypes.
        """

    def read_each_b(self, stack: Sequence[Any]) -> Numbers:
        """Return each B of several factors of this kind, ``(k, out, r)``."""

    def read_each_a(self, stack: Sequence[Any]) -> Numbers:
        """Return each A of several factors of this kind, ``(k, r, in)``."""


@dataclass(frozen=True, slots=True)
class FactoredDelta:
    """ΔW = B·A of one layer, given by its factors.

    Args:
        layer: The weight's name in BASE, or in the adapter when there is no BASE.
        shape: ``(out, in)``.
        load: Returns B ``(out, r)`` and A ``(r, in)`` with all scaling applied. A
            ``functools.partial`` of a module-level function, so that the descriptor can be pickled.
        dtypes: Dtype in which the base is read (None without one), and stored dtype of the factors.
        base: Location of W_base, if available.
        is_matrix: Always True: only matrices have factors.
        scale: s, already applied to B; None if it is unknown or not uniform.
        diagonal: Whether a stored vector scales the columns of B or its rows (AdaLoRA, VeRA).
        rank: r; 0 if it is not known.
        thin: B, A and s, to be read without torch; None where B and A are not stored as they are,
            or in another format than safetensors.
        transposed: Whether BASE stores the weight as ``(in, out)``, against the adapter's
            orientation.
    """

    layer: str
    shape: tuple[int, int]
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    dtypes: tuple[str | None, str]
    base: Side | None = None
    is_matrix: bool = True
    scale: float | None = None
    diagonal: bool = False
    rank: int = 0
    thin: ThinFactors | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class DenseDelta:
    """ΔW of one layer that is neither a difference of stored tensors nor a product of two thin
    factors.

    Args:
        layer: The weight's name in BASE, or in the adapter when there is no BASE.
        shape: ``(out, in)``; a 1-D tensor of n entries is ``(1, n)``.
        load: Computes ΔW, ``(out, in)``, float32 or float64; a ``functools.partial`` as in
            ``FactoredDelta``.
        dtypes: Dtype in which the base is read (None without one), and that of the tensors that
            define the update.
        base: Location of W_base, if available.
        is_matrix: False for 1-D tensors.
        transposed: As in ``FactoredDelta``.
    """

    layer: str
    shape: tuple[int, int]
    load: Callable[[], torch.Tensor]
    dtypes: tuple[str | None, str]
    base: Side | None = None
    is_matrix: bool = True
    transposed: bool = False


Delta = StoredDelta | FactoredDelta | DenseDelta


def drop_base(delta: Delta) -> Delta:
    """Return an adapter's update without its base weight, which would be read for its norm alone;
    any other as is.
    """
    return delta if isinstance(delta, StoredDelta) else replace(delta, base=None)


def footprint(delta: Delta) -> int:
    """Estimate the bytes needed to measure a layer.

    ΔW in float32, its Gram matrix in float64, and a copy; for an update in factored form, its
    factors.
    """
    if isinstance(delta, FactoredDelta):
        return 8 * 64 * sum(delta.shape)  # thin factors; 64 columns stand for any usual rank
    rows, columns = delta.shape
    return 4 * rows * columns + (16 * min(rows, columns) ** 2 if delta.is_matrix else 0)


def row_blocks(side: Side, shape: tuple[int, int], skip: int = 0) -> Iterator[torch.Tensor]:
    """Yield the row blocks of a stored matrix, ``(rows, in)`` in its dtype; not the first ``skip``
    blocks.
    """
    rows = list(row_spans(shape))[skip:]
    spans = (
        (side.offset + first * shape[1], side.offset + last * shape[1]) for first, last in rows
    )
    for (first, last), block in zip(rows, side.checkpoint.read_each(side.name, spans), strict=True):
        yield block.view(last - first, shape[1])


def row_spans(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the row range ``(start, stop)`` of every block of a matrix."""
    rows, columns = shape
    step = max(1, BLOCK_ENTRIES // max(1, columns))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A tensor, or rows of one, that cannot be compared.

    Args:
        layer: Its name.
        shape: Its shape; for added rows, theirs.
        reason: A value of ``lora_diag.records.run.Reason``.
        detail: The reason as text.
        rows: The rows, if the reason is that only one side has them; else, or without their
            entries, None.
        tuned_shape: Its shape in TUNED, if the reason is that the shapes differ.
    """

    layer: str
    shape: tuple[int, ...]
    reason: Reason
    detail: str
    rows: Side | None = None
    tuned_shape: tuple[int, ...] | None = None

    @classmethod
    def by_selection(cls, layer: str, shape: tuple[int, ...]) -> Unpaired:
        """Return a tensor that ``--layers`` or ``--exclude`` leaves out."""
        return cls(layer, shape, "not_selected", "left out by --layers or --exclude")

    @classmethod
    def by_rows(
        cls, layer: str, rows: tuple[int, int], columns: int, added: bool, side: Side | None = None
    ) -> Unpaired:
        """Return the vocabulary rows that only one side of an embedding has.

        Args:
            layer: Its name.
            rows: The first row, and the one after the last.
            columns: Number of columns.
            added: Whether TUNED has them, and not BASE.
            side: Their entries, for their norm; None to leave it out.
        """
        owner = "TUNED" if added else "BASE"
        detail = (
            f"vocabulary rows {rows[0]}-{rows[1] - 1} are only in {owner}; the others are compared"
        )
        shape = (rows[1] - rows[0], columns)
        return cls(layer, shape, "added_rows" if added else "removed_rows", detail, side)


@dataclass(frozen=True, slots=True)
class Pairing:
    """The compared matrices and vectors of two checkpoints or of an adapter.

    Args:
        deltas: Each as a ΔW.
        unpaired: The tensors that are not compared.
        own_names: A PEFT adapter's names of the weights that it changes, by their names in BASE,
            stacks aside; empty for checkpoints and other adapters.
    """

    deltas: tuple[Delta, ...]
    unpaired: tuple[Unpaired, ...]
    own_names: Mapping[str, str] = field(default_factory=dict)


def pair(
    base: Checkpoint, tuned: Checkpoint, layers: str | None = None, exclude: str | None = None
) -> Pairing:
    """Pair the tensors of two checkpoints by name.

    Args:
        base: The base checkpoint.
        tuned: The fine-tuned checkpoint.
        layers: Regular expression; only names with a match are compared. Default all.
        exclude: Regular expression; names with a match are not compared. Default none.

    Returns:
        The pairs and the rest, both in natural order of names. Every tensor of either side is in
            one of the two; a
        resized embedding is in both.
    """
    selected = selector(layers, exclude)
    deltas: list[Delta] = []
    unpaired: list[Unpaired] = []
    for name in sorted([*base, *(name for name in tuned if name not in base)], key=natural_order):
        if not selected(name):
            unpaired.append(
                Unpaired.by_selection(name, (base if name in base else tuned)[name].shape)
            )
        elif (after := stored_name(tuned, name)) is None:
            unpaired.append(
                Unpaired(name, base[name].shape, "only_in_base", f"only in {base.path}")
            )
        elif (before := stored_name(base, name)) is None:
            unpaired.append(
                Unpaired(name, tuned[name].shape, "only_in_tuned", f"only in {tuned.path}")
            )
        else:
            _pair_tensor(name, Side(base, before), Side(tuned, after), deltas, unpaired)
    return Pairing(tuple(deltas), tuple(unpaired))


def refuse_empty(pairing: Pairing, base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse a pairing without any compared layer.

    Raises:
        NothingComparedError: No tensor could be paired: the sides have no name in common, none is
            selected, shapes differ, or tensors are empty or not floating-point.
    """
    if not pairing.deltas:
        raise _make_nothing_paired_error(base, tuned, pairing.unpaired)


def stored_name(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the name under which a checkpoint stores a weight; None if it does not store it.

    A model with tied embeddings stores its output layer as the input embedding; None unless exactly
    one tensor may be that embedding. A config without ``tie_word_embeddings`` counts as tied; a
    checkpoint without a config does not.
    """
    if name in checkpoint:
        return name
    # transformers omits the key if the embeddings are tied
    if (
        not HEAD.search(name)
        or not checkpoint.config
        or _read_tie(checkpoint.config) not in {True, None}
    ):
        return None
    tables = [table for table in checkpoint if RESIZABLE.search(table)]
    return tables[0] if len(tables) == 1 else None


def has_tied_head(checkpoint: Checkpoint) -> bool:
    """Return whether the head is the embedding: ``config.json`` says so, or no head is stored."""
    return _read_tie(checkpoint.config) is True or not any(is_head(name) for name in checkpoint)


def is_head(name: str) -> bool:
    """Return whether a weight is the output layer over the vocabulary, by its name."""
    return HEAD.search(name) is not None or name == "output.weight"


def is_table(name: str) -> bool:
    """Return whether a weight is an embedding, of tokens or of positions, by its name."""
    return part_of(name) == "vocabulary" and not is_head(name)


def _read_tie(config: Mapping[str, Any]) -> Any:
    """Return ``tie_word_embeddings``, of the text model if there is one; None without it."""
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else {}
    return inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))


def natural_order(name: str) -> tuple[tuple[bool, int, str, str], ...]:
    """Return a sort key in which ``layers.2`` comes before ``layers.10``.

    >>> sorted(["h.10.w", "h.2.w", "a"], key=natural_order)
    ['a', 'h.2.w', 'h.10.w']
    """
    parts = filter(None, re.split(r"(\d+)", name))
    # Numbers of equally many digits are ordered as text: Python converts none of more than 4,300
    # digits.
    return tuple(
        (True, len(digits := part.lstrip("0")), digits, part)
        if part.isdecimal()
        else (False, 0, part, "")
        for part in parts
    )


def matrices(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, int]]]:
    """Return the matrices of a stored tensor, as ``(layer, (out, in))``, in stored order.

    A convolution ``(out, in, kh, kw)`` acts as the matrix ``(out, in·kh·kw)``; any other 3-D tensor
    is a stack of matrices, such as experts.

    >>> matrices("mlp.experts.down_proj", (2, 64, 32))
    [('mlp.experts.down_proj[0]', (64, 32)), ('mlp.experts.down_proj[1]', (64, 32))]
    >>> matrices("conv1.weight", (64, 3, 7, 7))
    [('conv1.weight', (64, 147))]
    """
    if len(shape) == 3 and (EXPERTS.search(name) or not CONVOLUTION.search(name)):
        return [(f"{name}[{index}]", (shape[1], shape[2])) for index in range(shape[0])]
    return [(name, (shape[0], math.prod(shape[1:])))]


def why_left_out(info: TensorInfo) -> str | None:
    """Return why a tensor cannot have a spectrum; None if it can."""
    if info.dtype not in FLOAT_DTYPES:
        return "not a float"
    if info.numel == 0:
        return "empty"
    return "1-D" if len(info.shape) < 2 else None


def _pair_tensor(
    name: str, base: Side, tuned: Side, deltas: list[Delta], unpaired: list[Unpaired]
) -> None:
    """Append each ΔW of a tensor to ``deltas``; append rows of one side, or why it has no ΔW, to
    ``unpaired``.
    """
    before, after = base.info, tuned.info
    if problem := _find_mismatch(before, after):
        other_shape = after.shape if problem[0] == "shape_differs" else None
        unpaired.append(Unpaired(name, before.shape, *problem, tuned_shape=other_shape))
        return
    if before.shape != after.shape:
        unpaired.append(added_rows(name, base, tuned))
    if len(before.shape) < 2:
        deltas.append(StoredDelta(name, (1, before.numel), base, tuned, is_matrix=False))
        return
    common_shape = (min(before.shape[0], after.shape[0]), *before.shape[1:])
    offset = 0
    for layer, shape in matrices(name, common_shape):
        deltas.append(
            StoredDelta(layer, shape, replace(base, offset=offset), replace(tuned, offset=offset))
        )
        offset += math.prod(shape)


def _find_mismatch(before: TensorInfo, after: TensorInfo) -> tuple[Reason, str] | None:
    """Return reason and detail if two tensors of one name cannot be subtracted; else None."""
    if not {before.dtype, after.dtype} <= FLOAT_DTYPES:
        dtypes = (
            before.dtype if before.dtype == after.dtype else f"{before.dtype} against {after.dtype}"
        )
        return "not_float", f"stored as {dtypes}, which is not a plain floating-point weight"
    if before.shape != after.shape:
        resized = RESIZABLE.search(before.name) and len(before.shape) == len(after.shape) == 2
        if not resized or before.shape[1:] != after.shape[1:]:
            return (
                "shape_differs",
                f"{list(before.shape)} in BASE against {list(after.shape)} in TUNED",
            )
    if min(before.numel, after.numel) == 0:
        return "empty", "has no entries"
    return None


def added_rows(name: str, base: Side, tuned: Side) -> Unpaired:
    """Return the vocabulary rows that only one side of an embedding has, added or removed, with
    their entries.
    """
    before, after = base.info.shape, tuned.info.shape
    first, last = sorted((before[0], after[0]))
    added = after[0] > before[0]
    entries = replace(tuned if added else base, offset=first * before[1])
    return Unpaired.by_rows(name, (first, last), before[1], added, entries)


def selector(layers: str | None, exclude: str | None) -> Callable[[str], bool]:
    """Return a predicate of names for ``--layers`` and ``--exclude``."""
    included = compile_pattern(layers, "layers")
    excluded = compile_pattern(exclude, "exclude")

    def is_selected(name: str) -> bool:
        return (included is None or bool(included.search(name))) and not (
            excluded and excluded.search(name)
        )

    return is_selected


def compile_pattern(pattern: str | None, option: str) -> re.Pattern[str] | None:
    """Return the compiled pattern of an option, named in the error; None without one.

    Raises:
        UsageError: It is no regular expression.
    """
    try:
        return re.compile(pattern) if pattern is not None else None
    except re.error as error:
        problem = f"not a valid regular expression ({error})"
        raise UsageError(Given(option, pattern), problem, "correct it") from error


def _make_nothing_paired_error(
    base: Checkpoint, tuned: Checkpoint, unpaired: tuple[Unpaired, ...]
) -> NothingComparedError:
    """Return the error of two checkpoints of which no tensor could be paired."""
    common = [name for name in base if name in tuned]
    if not common:
        return NothingComparedError(
            tuned.path,
            f"no weight name in common with {base.path}, so nothing was compared (BASE has names "
            f"like {min(base)}, TUNED like {min(tuned)})",
            "give two checkpoints of one model",
        )
    reasons = sorted({tensor.reason for tensor in unpaired if tensor.layer in common})
    if reasons == ["not_selected"]:
        problem = f"$layers or $exclude leaves out all {len(common)} weights"
        return NothingComparedError(tuned.path, problem, "correct the expression")
    fix = (
        "give two checkpoints of one model"
        if "shape_differs" in reasons
        else "nothing was compared"
    )
    return NothingComparedError(
        tuned.path,
        f"all {len(common)} weights in common with {base.path} are left out ({', '.join(reasons)})",
        fix,
    )
