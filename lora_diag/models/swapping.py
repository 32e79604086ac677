"""In-place changes of a model's weights: W_0, W_0 + ΔW, W_0 + t·ΔW, W_0 + ΔW_r, or some singular
directions of ΔW, for the layers of a probe.

Only one layer's ΔW and its decomposition are in memory at a time. Between ranks only the leading
singular triplets and σ² are kept, about as many numbers as in an adapter of the largest rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.deltas import Delta, Side, StoredDelta, row_blocks, row_spans, selector
from lora_diag.errors import InputError, NothingComparedError, damaged
from lora_diag.layers.change import Change, load_change
from lora_diag.linalg.exact import Factors
from lora_diag.models.opening import Model, Weights
from lora_diag.records.names import part_of


def truncated_layers(
    deltas: Sequence[Delta], layers: str | None = None, exclude: str | None = None
) -> dict[str, tuple[int, int]]:
    """Return the layers to truncate, with their shapes: the selected matrices outside embeddings
    and head.

    Args:
        deltas: The layers.
        layers: Regular expression; only names with a match are selected. Default all.
        exclude: Regular expression; names with a match are not selected. Default none.

    Raises:
        NothingComparedError: No matrix is selected.
    """
    selected = selector(layers, exclude)
    truncated = {
        delta.layer: delta.shape
        for delta in deltas
        if delta.is_matrix and part_of(delta.layer) == "matrices" and selected(delta.layer)
    }
    if not truncated:
        raise NothingComparedError(
            "TUNED",
            "no matrix outside embeddings and head is selected",
            "check $layers and $exclude",
        )
    return truncated


# Used instead of a rank for the whole ΔW.
FULL = -1


@dataclass(frozen=True)
class _Leading:
    """The leading singular triplets of one ΔW: U·S ``(out, k)``, Vᵀ ``(k, in)`` float32, σ² of all
    values, ‖ΔW‖².
    """

    us: Tensor
    vh: Tensor
    squares: Tensor
    energy: float


@dataclass(frozen=True, slots=True)
class _State:
    """The update of one layer.

    Args:
        rank: r of ΔW_r; ``FULL`` for all of ΔW, 0 for none.
        strength: Its factor.
        places: Singular directions: those kept for r = 0, those dropped for ``FULL``.
    """

    rank: int
    strength: float = 1.0
    places: tuple[int, ...] = ()


_AS_BASE, _AS_TUNED = _State(0), _State(FULL)


class Swapped:
    """A model with the weights of BASE plus an update: none, all or a multiple of it, its best
    rank-r approximation, or some of its singular directions.

    Args:
        model: BASE opened by transformers; changed in place.
        deltas: ΔW of every layer that can change.
        max_rank: Largest rank that will be used; None for any.

    Attributes:
        absent: ΔW of tensors that the model does not have; never a matrix.

    Raises:
        InputError: A matrix is not in the model, a tensor has another number of entries there or
            shares its weight with another, the model's values differ from BASE's file, or a file
            could not be read.
    """

    def __init__(self, model: Model, deltas: Iterable[Delta], max_rank: int | None) -> None:
        by_layer = {delta.layer: delta for delta in deltas}
        self._tensors = Weights(model.module).place(
            {layer: delta.shape for layer, delta in by_layer.items()}
        )
        self._deltas = {layer: by_layer[layer] for layer in self._tensors}
        self.absent = tuple(
            delta for layer, delta in by_layer.items() if layer not in self._tensors
        )
        if missing := next((delta.layer for delta in self.absent if delta.is_matrix), None):
            problem = "not part of the model that transformers builds from BASE"
            raise damaged(missing, problem, "exclude it where the command has $exclude")
        self._max_rank = max_rank
        self._leading: dict[str, _Leading] = {}
        self._states = dict.fromkeys(self._deltas, _AS_BASE)
        for layer in self._deltas:
            self._check(layer)

    def arrange(self, ranks: Mapping[str, int], others: int = 0, match_norm: bool = False) -> None:
        """Set every layer to W_0 + ΔW_r: all of ΔW for ``FULL``, none of it for 0.

        Args:
            ranks: r by layer: ``FULL``, 0 to ``max_rank``, or at least min(out, in), which is the
                same as ``FULL``.
            others: r of layers that are not named.
            match_norm: Whether every ΔW_r is lengthened to the norm of ΔW.
        """
        for layer in self._deltas:
            rank = ranks.get(layer, others)
            rank = FULL if rank >= min(self._deltas[layer].shape) else rank
            longer = self._lengthening(layer, rank) if match_norm and rank > 0 else 1.0
            self._set(layer, _State(rank, longer))

    def toggle(self, places: Mapping[str, Sequence[int]], others: int, keep: bool) -> None:
        """Set layers to W_0 + Σσuvᵀ over some singular directions of ΔW, or to W_0 + ΔW − Σσuvᵀ.

        Args:
            places: Positions of the directions by layer, 0 for the largest σ.
            others: ``FULL`` or 0: all or none of ΔW in layers that are not named.
            keep: Whether the directions are kept, and not dropped.
        """
        for layer in self._deltas:
            rank = others if layer not in places else 0 if keep else FULL
            self._set(layer, _State(rank, places=tuple(places.get(layer, ()))))

    def scale(self, strengths: Mapping[str, float], others: float) -> None:
        """Set every layer to W_0 + t·ΔW; for t = 1 it has TUNED's values, for t = 0 those of BASE.

        Args:
            strengths: t by layer.
            others: t of layers that are not named.
        """
        for layer in self._deltas:
            strength = strengths.get(layer, others)
            self._set(layer, _State(FULL, strength) if strength else _AS_BASE)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the whole update while the block runs, and then BASE's weights again.

        Raises:
            InputError: ΔW of a layer is not finite, or could not be read.
        """
        self.arrange({}, FULL)
        yield
        self.arrange({})

    def _set(self, layer: str, state: _State) -> None:
        """Write the weight of one layer, unless it is there already."""
        if state != self._states[layer]:
            self._put(layer, state)
            self._states[layer] = state

    @property
    def layers(self) -> list[str]:
        """The layers that can change."""
        return list(self._deltas)

    def factors(self, layer: str) -> Factors:
        """Return all singular values and vectors of one layer's ΔW."""
        return _load_finite(self._deltas[layer]).decompose(vectors=True)

    def update(self, layer: str) -> Tensor:
        """Return ΔW of one layer, float64."""
        return torch.cat(list(self._iterate_update(layer, FULL)))

    def energy(self, layers: Iterable[str], rank: int) -> float | None:
        """Return Σ_ℓ Σ_{i≤r}σ² / Σ_ℓ ‖ΔW_ℓ‖² over layers, for r ≥ 0; None if none changed."""
        kept = total = 0.0
        for layer in layers:
            leading = self._decompose_layer(layer)
            kept += float(leading.squares[:rank].sum())
            total += leading.energy
        return min(1.0, kept / total) if total else None

    def _lengthening(self, layer: str, rank: int) -> float:
        """Return ‖ΔW‖ / ‖ΔW_r‖ of one layer for r ≥ 1; 1 for a zero update."""
        leading = self._decompose_layer(layer)
        kept = float(leading.squares[:rank].sum())
        return math.sqrt(leading.energy / kept) if kept else 1.0

    def _put(self, layer: str, state: _State) -> None:
        """Write the weight of one layer; for all of ΔW, TUNED's values if they are stored."""
        delta, weight = self._deltas[layer], self._tensors[layer]
        if state == _AS_TUNED and isinstance(delta, StoredDelta):
            for (first, last), block in zip(
                row_spans(delta.shape), row_blocks(delta.tuned, delta.shape), strict=True
            ):
                weight[first:last].copy_(block)
            return
        base_blocks, update = (
            row_blocks(_side_of_base(delta), delta.shape),
            self._iterate_update(layer, state.rank, state.places),
        )
        for (first, last), block, change in zip(
            row_spans(delta.shape), base_blocks, update, strict=True
        ):
            weight[first:last].copy_(block.double() + state.strength * change)

    def _iterate_update(
        self, layer: str, rank: int, places: tuple[int, ...] = ()
    ) -> Iterator[Tensor]:
        """Yield ΔW_r in row blocks, float64, with ``places`` as in ``_State``; scalar zeros for
        rank 0.
        """
        shape = self._deltas[layer].shape
        if places:
            leading, sign = self._decompose_layer(layer), -1 if rank == FULL else 1
            us, vh = leading.us[:, places], sign * leading.vh[list(places)].double()
            rest = self._iterate_update(layer, rank)
            for (first, last), block in zip(row_spans(shape), rest, strict=True):
                yield block + us[first:last].double() @ vh
        elif rank == FULL:
            yield from _load_finite(self._deltas[layer]).blocks(shape)
        elif rank == 0:
            yield from (torch.zeros((), dtype=torch.float64) for _ in row_spans(shape))
        else:
            leading = self._decompose_layer(layer)
            for first, last in row_spans(shape):
                yield leading.us[first:last, :rank].double() @ leading.vh[:rank].double()

    def _decompose_layer(self, layer: str) -> _Leading:
        """Return the leading singular triplets of a layer, computed once."""
        if layer not in self._leading:
            factors = self.factors(layer)
            u, vh = factors.vectors
            us, vh = (u * factors.s)[:, : self._max_rank], vh[: self._max_rank]
            self._leading[layer] = _Leading(
                us.float().clone(), vh.float().clone(), factors.s**2, factors.fro**2
            )
        return self._leading[layer]

    def _check(self, layer: str) -> None:
        """Check that the model has the values of BASE's file.

        Raises:
            InputError: The model has other values.
        """
        delta, weight = self._deltas[layer], self._tensors[layer]
        base_blocks = row_blocks(_side_of_base(delta), delta.shape)
        for (first, last), block in zip(row_spans(delta.shape), base_blocks, strict=True):
            if not torch.equal(weight[first:last].cpu(), block.to(weight.dtype)):
                raise InputError(
                    layer,
                    "the model that transformers builds from BASE has other values "
                    "than BASE's file, so it cannot be swapped",
                    "exclude it where the command has $exclude",
                )


def _side_of_base(delta: Delta) -> Side:
    """Return the location of W_base, which every delta of a model has."""
    assert delta.base is not None
    return delta.base


def _load_finite(delta: Delta) -> Change:
    """Return ΔW of a layer.

    Raises:
        InputError: ΔW is not finite, or could not be read.
    """
    change = load_change(delta, torch.device("cpu"))
    if change.non_finite:
        raise InputError(
            delta.layer, change.non_finite, "exclude it where the command has $exclude"
        )
    return change
