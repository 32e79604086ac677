"""Second moments of layers' inputs and output gradients: reading a file and matching it with the layers of BASE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_diag.adapters import Orientation, Shape, match_names
from lora_diag.checkpoints import open_checkpoint
from lora_diag.checkpoints.tensors import FLOAT_DTYPES
from lora_diag.deltas import Pairing, Side
from lora_diag.errors import InputError
from lora_diag.layers.metric import Moments, Weighting
from lora_diag.records import RunInput
from lora_diag.running.inputs import describe

# Prefix of matrices that are not E[xxᵀ] of a layer's input but E[ggᵀ] of its output gradient.
GRADIENTS = "output_gradients."


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Second moments C = E[xxᵀ] of layers' inputs, and G = E[ggᵀ] of their output gradients.

    Args:
        described: For the run record.
        of: Location of C, by the layer's name in BASE.
        gradients: Location of G, by the layer's name in BASE.
    """

    described: RunInput
    of: dict[str, Moments]
    gradients: dict[str, Moments]

    def weighting(self, layer: str, kfac: bool) -> Weighting | None:
        """Return the weighting of a layer; None if the file does not have all it needs."""
        inputs, gradients = self.of.get(layer), self.gradients.get(layer)
        if inputs is None or (kfac and gradients is None):
            return None
        return Weighting(inputs, gradients if kfac else None)


def second_moments(path: Path | str, base: Path | str, pairing: Pairing, verify: bool = False) -> SecondMoments:
    """Open second moments by their headers, and return them by the compared layers that they belong to.

    Args:
        path: A safetensors file, or a folder, with one ``(in, in)`` matrix under each weight's name, and perhaps one
            ``(out, out)`` under ``output_gradients.`` and its name.
        base: The checkpoint whose weights they belong to.
        pairing: The compared layers.
        verify: Whether to hash every byte (SHA-256).

    Raises:
        InputError: The file cannot be read, a matrix is not square, or no matrix belongs to a compared weight.
    """
    stored, before = open_checkpoint(path), open_checkpoint(base)
    sizes: dict[str, int] = {}
    for name in stored:
        shape = stored[name].shape
        if len(shape) != 2 or shape[0] != shape[1] or stored[name].dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{stored.file_of(name)}: {name} is {stored[name].dtype} {list(shape)}, not a square floating-point "
                "matrix; record the second moments again with loradiag probe activations"
            )
        sizes[name] = shape[0]
    gradient_sizes = {
        name.removeprefix(GRADIENTS): sizes.pop(name) for name in list(sizes) if name.startswith(GRADIENTS)
    }
    matched, _ = match_names({name: (None, size) for name, size in sizes.items()}, before, transposed=True, parts=True)
    shapes: dict[str, Shape] = {
        location.name: (None, sizes[name]) for name, locations in matched.items() for location in locations
    }
    orientation = Orientation(before, shapes, flag=False)
    compared = {delta.layer for delta in pairing.deltas if delta.is_matrix}
    of: dict[str, Moments] = {}
    gradients: dict[str, Moments] = {}
    for name, locations in matched.items():
        for location in locations:
            on_rows = orientation.in_out(location.name, (None, sizes[name]), before[location.name].shape)
            if location.layer in compared and location.shape[0 if on_rows else 1] == sizes[name]:
                of[location.layer] = Moments(Side(stored, name), sizes[name], on_rows)
                if gradient_sizes.get(name) == location.shape[1 if on_rows else 0]:
                    gradients[location.layer] = Moments(
                        Side(stored, GRADIENTS + name), gradient_sizes[name], not on_rows
                    )
    if not of:
        raise InputError(
            f"{path}: contains no second moment for a compared weight, such as {min(compared)}; record the "
            "activations of this BASE"
        )
    notes = [f"second moments of {len(of)} of {len(compared)} matrices"]
    notes += [f"recorded over {file.metadata['tokens']} tokens" for file in stored.files if "tokens" in file.metadata]
    return SecondMoments(describe("activations", stored, tuple(notes), verify), of, gradients)
