"""The contents of an adapter, before they are matched with BASE: updates of weights, and weights
stored in full.

A ``WeightUpdate`` has the adapter's name of the weight and the orientation ``(out, in)`` of a
linear layer. The location of the weight in BASE, and whether it is stored as ``(in, out)``, are
determined in ``placing``, which then passes an ``UpdateSite`` to the loader.

``modules_to_save``, ``bias="all"`` and resized embeddings are stored as new values under the
weight's plain name. They are identified by the file, not by the config: PEFT matches
``modules_to_save`` by the end of a name without a dot, so that "norm" also saves every
``input_layernorm``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.adapters.source import AdapterFiles, Config, drop_prefix, group_by_module, is_named
from lora_diag.deltas import Side
from lora_diag.errors import damaged
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    import torch

    from lora_diag.deltas import ThinFactors

    # B (out, r) including the scaling, and A (r, in).
    Factors = tuple[torch.Tensor, torch.Tensor]

# Some rows of an embedding.
ROWS = "trainable_tokens_delta"
TOKENS = f".token_adapter.{ROWS}"

# Names inside PEFT's wrappers, as in manual dumps.
SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
ORIGINAL = re.compile(r"\.original_module\.")

# A dimension is None if only BASE determines it.
Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class UpdateSite:
    """The weight of an update.

    Args:
        shape: ``(out, in)`` in the adapter's orientation; of a convolution ``(out, in·kh·kw)``, of
            a vector ``(n,)``.
        base: Location of W; None without a BASE, or if BASE does not give floats.
        transposed: Whether W is stored as ``(in, out)``.
    """

    shape: tuple[int, ...]
    base: Side | None = None
    transposed: bool = False

    def weight(self) -> torch.Tensor:
        """Return W in the adapter's orientation, float64; raises like ``Checkpoint.read``."""
        assert self.base is not None, "an update that needs W was not given a BASE"
        flat = as_float64(self.base.read(0, math.prod(self.shape)))
        return flat.view(self.shape[::-1]).T if self.transposed else flat.view(self.shape)

    def rows(self, indices: list[int]) -> torch.Tensor:
        """Return the rows ``indices`` of W, ``(len(indices), in)``, float64, without reading
        others.
        """
        import torch

        assert self.base is not None, "an update that needs W was not given a BASE"
        assert not self.transposed, "a table is stored row by row"
        width = self.shape[1]
        return as_float64(
            torch.stack([self.base.read(row * width, (row + 1) * width) for row in indices])
        )


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """The change of one weight.

    Args:
        weight: The adapter's name for the weight, such as
            ``model.layers.0.self_attn.q_proj.weight``.
        shape: ``(out, in)``, or ``(n,)``; of stacked experts, that of one of them.
        load: Takes an ``UpdateSite``; returns ``(B, A)`` if ``factored``, else ΔW, in the site's
            shape and float64. A ``functools.partial`` of a module's function, so that it can be
            sent to another process; it raises ``InputError`` if a file cannot be read.
        factored: Whether ``load`` gives factors.
        dtype: Stored dtype of its tensors.
        needs_weight: Name of the kind of update if it needs W, such as ``DoRA``; else empty.
        expert: Index and number of experts if the weight is a stack of them, else None.
        in_out: Returns whether square experts are stored as ``(in, out)``, by BASE's model type;
            None if not needed.
        base_weight: The name in BASE if different from ``weight``.
        keeps_name: Whether the layer keeps the name ``weight`` with a BASE, because several updates
            act on one weight.
        zero_if: A tensor of the adapter; if it is zero, so is ΔW. Empty if none is known.
        rank: r of its factors; None without factors, and for rows of an embedding that are
            replaced.
        scale: Its scale s; None without one, or if α is stored as a number in the file.
        diagonal: Whether a stored vector scales the columns of B or its rows (AdaLoRA, VeRA).
        optional: Whether the weight (a bias) may be missing from BASE.
        alpha: Name of the tensor with α; empty without one.
        plain: Loads s·B and A alone, for an update that is not just their product (DoRA, PiSSA);
            else None.
        heads: Setting of BASE's config that counts the heads whose rows are in llama.cpp's order;
            empty if none are.
        thin: B, A and s, to be read without torch; None if only ``load`` can read the update.
    """

    weight: str
    shape: Shape
    load: Callable[[UpdateSite], Factors | torch.Tensor]
    factored: bool
    dtype: str
    needs_weight: str = ""
    expert: tuple[int, int] | None = None
    in_out: Callable[[str], bool] | None = None
    base_weight: str = ""
    keeps_name: bool = False
    zero_if: str = ""
    rank: int | None = None
    scale: float | None = None
    diagonal: bool = False
    optional: bool = False
    alpha: str = ""
    plain: Callable[[UpdateSite], Factors | torch.Tensor] | None = None
    heads: str = ""
    thin: ThinFactors | None = None

    @property
    def layer(self) -> str:
        """The adapter's name of the matrix; for stacked experts, with an index."""
        return self.weight if self.expert is None else f"{self.weight}[{self.expert[0]}]"

    @property
    def expected(self) -> tuple[str, Shape]:
        """Name and shape of the tensor in BASE."""
        shape = self.shape if self.expert is None else (self.expert[1], *self.shape)
        return self.base_weight or self.weight, shape


@dataclass(frozen=True, slots=True)
class NewValue:
    """A weight stored in full in the adapter: its new value, not a change.

    Args:
        weight: The adapter's name for the weight.
        key: The tensor in the adapter file.
        is_copy: Whether it may be a copy of BASE's weight, saved because the module is adapted.
    """

    weight: str
    key: str
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class AdapterReading:
    """The contents of an adapter as read by a family.

    Args:
        kind: Description, such as ``PEFT LoRA, r=8, alpha=16``.
        updates: The changes.
        values: The weights stored in full.
        notes: Notes on the adapter.
        ignored: Tensors that change no weight.
        scaling: The scaling of the updates and its source; empty without scaling.
    """

    kind: str
    updates: tuple[WeightUpdate, ...]
    values: tuple[NewValue, ...] = ()
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    scaling: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One family of adapters.

    Args:
        name: Its name.
        claims: Returns whether an opened source is of this family.
        read: Returns the contents of such a source.
        form: The layout of its files: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``.
        marks: Parts of its tensor names that occur only in adapters.
        starts: Starts of such names.
    """

    name: str
    claims: Callable[[AdapterFiles], bool]
    read: Callable[[AdapterFiles], AdapterReading]
    form: str = "peft"
    marks: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()

    @staticmethod
    def of_peft(
        name: str,
        peft_type: str,
        read: Callable[[AdapterFiles], AdapterReading],
        marks: tuple[str, ...],
    ) -> Family:
        """Return the family of a type of PEFT, which the config names."""
        return Family(
            f"PEFT {name}", lambda source: source.peft_type == peft_type, read, marks=marks
        )


def as_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in float64."""
    import torch

    return tensor.to(torch.float64)


def read(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    """Return a tensor of the adapter in its stored shape, float64."""
    return as_float64(checkpoint.read(key)).view(checkpoint[key].shape)


def load_product(
    checkpoint: Checkpoint, b_key: str, a_key: str, scale: float, turned: bool, site: UpdateSite
) -> Factors:
    """Return s·B ``(out, r)`` and A ``(r, in)``, both stored transposed if ``turned``."""
    b, a = read(checkpoint, b_key), read(checkpoint, a_key)
    return (b.T * scale, a.T) if turned else (b * scale, a)


def flatten_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight as a matrix, ``(out, in·kh·kw)``.

    >>> flatten_shape((64, 3, 7, 7))
    (64, 147)
    """
    return shape[0], math.prod(shape[1:])


def format_ranks(updates: Iterable[WeightUpdate]) -> str:
    """Return the range of the ranks of updates as text."""
    ranks = sorted({update.rank or 0 for update in updates})
    return "-".join(map(str, ranks[:: max(1, len(ranks) - 1)]))


def read_modules(
    source: AdapterFiles,
    parts: tuple[str, ...],
    read_module: Callable[[AdapterFiles, str, dict[str, str]], list[WeightUpdate]],
    kind: str,
    scaling: str = "",
    ignored: tuple[str, ...] = (),
    unit: str = "modules",
) -> AdapterReading:
    """Return the contents of an adapter of PEFT whose modules are read one by one.

    Args:
        source: The adapter.
        parts: Names of the family's parts, such as ``lora_A``.
        read_module: Takes the source, a module and the names of its tensors by their parts; returns
            its updates.
        kind: Description of the adapter.
        scaling: The scaling of the updates and its source.
        ignored: Tensors that belong to no module.
        unit: What a module is called in the description.
    """
    names = [name for name in source.checkpoint if name not in ignored]
    modules, unclaimed = group_by_module(names, parts, source.path)
    for module in [
        module for module, found in modules.items() if found.keys().isdisjoint(parts)
    ]:  # a bias alone
        unclaimed += modules.pop(module).values()
    updates = [
        update for module, found in modules.items() for update in read_module(source, module, found)
    ]
    reading = AdapterReading(f"{kind}, {len(modules)} {unit}", tuple(updates), scaling=scaling)
    return add_stored_values(reading, source, unclaimed)


def add_stored_values(
    reading: AdapterReading, source: AdapterFiles, names: Iterable[str]
) -> AdapterReading:
    """Return a reading with the tensors that its family did not claim: weights in full, updated
    rows, unused ones.

    Args:
        reading: The contents as read by the family.
        source: The adapter.
        names: The tensors that the family did not claim.
    """
    values, updates, ignored = [*reading.values], [*reading.updates], [*reading.ignored]
    for key in names:
        name = SAVED.sub("", drop_prefix(key))
        if name.endswith(TOKENS):
            indices = source.settings.values.get("trainable_token_indices")
            updates.append(
                make_rows_update(source, drop_prefix(key).removesuffix(TOKENS), key, indices)
            )
        elif ORIGINAL.search(name):
            ignored.append(key)
        else:
            values.append(
                NewValue(
                    name.replace(".base_layer.", "."), key, name.endswith(".base_layer.weight")
                )
            )
    return replace(reading, updates=tuple(updates), values=tuple(values), ignored=tuple(ignored))


def make_rows_update(source: AdapterFiles, module: str, key: str, indices: Any) -> WeightUpdate:
    """Return the update that replaces rows of a table.

    Despite its name, ``trainable_tokens_delta`` ``(n, dim)`` holds the new values: ΔW[i] = value −
    W[i] for the trained rows i, else 0. As S·(value − W[i]) with S ``(vocab, n)`` picking the rows,
    the update has rank at most n and stays in factored form.

    Args:
        source: The adapter's files.
        module: The table's module.
        key: The tensor of the new values.
        indices: Token indices: a list, or a dict of lists by module.

    Raises:
        InputError: The indices are missing, invalid or repeated, their number differs from that of
            the rows, or the values are no matrix.
    """
    rows = _read_row_indices(source.settings, module, indices)
    shape = source.checkpoint[key].shape
    if len(shape) != 2 or not rows or len(rows) != shape[0] or len(set(rows)) != len(rows):
        problem = (
            f"{key} has shape {list(shape)}, but {source.settings.path.name} has "
            f"{len(set(rows))} token indices"
        )
        raise damaged(source.checkpoint.path, f"{problem} for it", "save the adapter again")
    load = partial(load_row_factors, source.checkpoint, key, rows)
    return WeightUpdate(
        f"{module}.weight",
        (None, shape[1]),
        load,
        True,
        source.checkpoint[key].dtype,
        "trainable tokens",
    )


def _read_row_indices(config: Config, module: str, indices: Any) -> list[int]:
    """Return the indices of one table, from a list for the only one or from a mapping by module.

    Raises:
        InputError: There is no list of indices for the module.
    """
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if is_named(module, name)), None)
    if not isinstance(indices, list) or not all(type(row) is int and row >= 0 for row in indices):
        problem = f"has no token indices for {module}, which the adapter trained"
        raise damaged(config.path, problem, "give the config that it was trained with")
    return indices


def load_row_factors(
    checkpoint: Checkpoint, key: str, rows: list[int], site: UpdateSite
) -> Factors:
    """Return S ``(vocab, n)``, which picks the rows, and value − W[rows] ``(n, dim)``.

    Raises:
        InputError: A row is beyond BASE's embedding, or a file could not be read.
    """
    import torch

    if max(rows) >= site.shape[0]:
        problem = f"token {max(rows)} is beyond the {site.shape[0]} rows of BASE's embedding"
        raise damaged(checkpoint.path, problem, "give the base with the resized vocabulary")
    selection = torch.zeros(site.shape[0], len(rows), dtype=torch.float64)
    selection[rows, range(len(rows))] = 1.0
    return selection, read(checkpoint, key) - site.rows(rows)
