"""Orientation of weights in BASE: ``(out, in)``, as ``nn.Linear``, or ``(in, out)``, as the ``Conv1D`` of GPT-2.

``fan_in_fan_out`` in an adapter's config is unreliable: PEFT overwrites it layer by layer during injection, so that the
kind of the last layer is saved for all. Shapes decide; a square weight takes the orientation of weights of the same
name elsewhere (``mlp.c_proj`` for ``attn.c_proj``), then of its block, and only then of the flag.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_diag.adapters.updates import Shape
from lora_diag.checkpoints import Checkpoint
from lora_diag.records.names import depth_of


class Orientation:
    """Evidence of BASE's shapes for ``(in, out)`` storage.

    Args:
        base: The base.
        shapes: ``(out, in)`` of adapted weights by their names in BASE.
        flag: ``fan_in_fan_out`` of the config.
    """

    def __init__(self, base: Checkpoint, shapes: Mapping[str, Shape], flag: bool) -> None:
        self._flag = flag
        self._votes: dict[str, dict[bool, int]] = {}
        for name in base:
            stored = base[name].shape
            if (
                len(stored) == 2
                and stored[0] != stored[1]
                and (vote := _infer_nonsquare_in_out(base, name, shapes)) is not None
            ):
                for group in _list_groups(name):
                    counts = self._votes.setdefault(group, {True: 0, False: 0})
                    counts[vote] += 1

    def in_out(self, name: str, expected: Shape, stored: tuple[int, ...]) -> bool:
        """Return whether a weight is stored as ``(in, out)``."""
        if len(expected) != 2 or len(stored) != 2:
            return False
        plain = _shapes_agree(expected, stored)
        if plain != _shapes_agree(expected[::-1], stored):
            return not plain
        for group in _list_groups(name):
            votes = self._votes.get(group)
            if votes is not None and votes[True] != votes[False]:
                return votes[True] > votes[False]
        return self._flag


def _shapes_agree(expected: Shape, stored: tuple[int, ...]) -> bool:
    """Return whether a stored shape of two dimensions is the expected one; None stands for any size."""
    return all(w is None or w == s for w, s in zip(expected, stored, strict=True))


def _list_groups(name: str) -> tuple[str, str]:
    """Return the groups of a weight: its name elsewhere, and its block."""
    parts = name.split(".")
    return f"leaf {'.'.join(parts[-2:])}", f"block {depth_of(name)}"


def _infer_nonsquare_in_out(base: Checkpoint, name: str, shapes: Mapping[str, Shape]) -> bool | None:
    """Return whether a weight that is not square is stored as ``(in, out)``; None if unknown."""
    stored = base[name].shape
    expected = shapes.get(name)
    if (
        expected is not None
        and len(expected) == 2
        and _shapes_agree(expected, stored) != _shapes_agree(expected[::-1], stored)
    ):
        return not _shapes_agree(expected, stored)
    bias = name.removesuffix("weight") + "bias"
    if not name.endswith(".weight") or bias not in base or len(base[bias].shape) != 1:
        return None
    size = base[bias].shape[0]
    return size == stored[1] if size in stored else None
