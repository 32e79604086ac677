"""One layer's inner products with the gradient, integrated over the path from BASE to TUNED."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_diag.deltas import Delta
from lora_diag.models.activations import linear_layers
from lora_diag.models.directions import Projection, Tracker, WholeUpdate, sides_of, users_of
from lora_diag.models.opening import Weights
from lora_diag.models.swapping import Swapped
from lora_diag.records.names import part_of

# Memory limit of the singular vectors, updates and sums of the layers of one pass over the text.
PASS_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Layer:
    """How one layer is measured.

    Args:
        delta: Its update.
        users: The modules that use its weight, and its name in each.
        is_split: Whether the update is split into singular directions: that of a linear layer.
    """

    delta: Delta
    users: list[tuple[nn.Module, str]]
    is_split: bool

    def count_directions(self, top: int | None) -> int:
        """Return the number of directions into which the update is split."""
        rank = getattr(self.delta, "rank", 0) or min(self.delta.shape)
        return min(rank, top or rank) if self.is_split else 0

    def needs_update(self, top: int | None) -> bool:
        """Return whether ΔW is one term: it is not split, or only its largest directions are."""
        return not self.is_split or self.count_directions(top) < self.count_directions(None)

    def bytes(self, sequences: int, top: int | None) -> int:
        """Estimate the memory of a pass: vectors and ΔW in float32, sums in float64."""
        directions = self.count_directions(top) * (4 * sum(self.delta.shape) + 8 * sequences)
        return directions + 4 * math.prod(self.delta.shape) * self.needs_update(top)


def layers_of(
    model: nn.Module, deltas: Mapping[str, Delta]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers that can be measured, and why the others cannot.

    Args:
        model: The model.
        deltas: Updates of weights that it has, by layer.
    """
    weights, linear = Weights(model), linear_layers(model)
    layers: dict[str, Layer] = {}
    problems: dict[str, str] = {}
    for name, delta in deltas.items():
        located = weights.locate(name)
        assert located is not None
        parameter, index = located
        users = users_of(model, parameter)
        if index is not None:
            problems[name] = "one of a stack of experts, whose inputs are not to be had"
        elif users is None:
            problems[name] = "used by a module with parts, whose output is not its own"
        else:
            is_matrix = delta.is_matrix and part_of(name) == "matrices" and len(users) == 1
            module = linear.get(weights.name(name) or "")
            layers[name] = Layer(delta, users, is_matrix and module is users[0][0])
    return layers, problems


def groups_of(
    layers: Mapping[str, Layer], sequences: int, top: int | None, limit: int = PASS_BYTES
) -> list[list[str]]:
    """Return the layers of each pass over the text, as many as fit into ``limit`` bytes, at least
    one; one empty group without layers.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, layer in layers.items():
        own = layer.bytes(sequences, top)
        if groups[-1] and used + own > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += own
    return groups


class Integral:
    """The integral of one layer's inner products over the path, by sequence.

    Args:
        name: The layer's name.
        layer: The layer.
        swapped: The weights of the model.
        top: Number of directions to split; None for all.
        sequences: Number of sequences.

    Attributes:
        trackers: The inner products of the current batch: of the directions, then of the whole
            update if it is one term; empty for a zero update that is not split.
        fro: ‖ΔW‖_F.
        sigma: Singular values of the directions.
        terms: Σ_j w_j⟨∇ℓ_s, ·⟩ of each of these, ``(sequences, k)``.
        along: Σ_s⟨∇ℓ_s, ΔW⟩ at every node.
    """

    def __init__(
        self, name: str, layer: Layer, swapped: Swapped, top: int | None, sequences: int
    ) -> None:
        self.trackers: list[Tracker] = []
        self.sigma: list[float] = []
        module, own_name = layer.users[0]
        if layer.is_split:
            factors = swapped.factors(name)
            s, outer, inner = sides_of(module, factors, torch.float32)
            self.fro = factors.fro
            self.sigma = s[:top].tolist()
            self.trackers.append(Projection(module, s[:top], outer[:, :top], inner[:, :top]))
        self.has_whole = layer.needs_update(top)
        if self.has_whole:
            update, weight = swapped.update(name), module.get_parameter(own_name)
            self.fro = float(update.norm())
            dense = update.to(weight.device, weight.dtype).reshape(weight.shape)
            self.has_whole = self.fro > 0
        if self.has_whole:
            self.trackers.append(WholeUpdate(layer.users, dense))
        self.terms = np.zeros((sequences, len(self.sigma) + self.has_whole))
        self.along: list[float] = []
        self._is_reached = not self.trackers

    @property
    def problem(self) -> str:
        """Why the layer cannot be measured; empty if it can."""
        found = next((tracker.problem for tracker in self.trackers if tracker.problem), "")
        return found or ("" if self._is_reached else "no gradient reaches it on this text")

    def add(self, places: list[int], weight: float) -> None:
        """Add the terms of a batch to those of the current node, the last of ``along``.

        Args:
            places: Positions of its sequences in the text.
            weight: Weight of the node.
        """
        found = [own for tracker in self.trackers if (own := tracker.terms()) is not None]
        if not found or len(found) < len(self.trackers):
            return
        self._is_reached = True
        terms = torch.cat(found, dim=1).cpu().numpy()
        self.terms[places] += weight * terms
        self.along[-1] += float(terms[:, -1].sum() if self.has_whole else terms.sum())
