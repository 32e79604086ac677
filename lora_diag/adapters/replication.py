"""``layer_replication``: a model that repeats some layers of its base, each copy with its own factors.

Layer j of the replicated model is layer ``concat(range(s, e) for s, e in layer_replication)[j]`` of BASE. Several
updates then change one stored weight, and no single checkpoint can hold them all: each is measured against the weight
it acts on, under its own name in the replicated model.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lora_diag.adapters.source import Config
from lora_diag.adapters.updates import Update
from lora_diag.errors import InputError

# The first number between dots is the layer index.
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")

# Limit on the layers of a replicated model, which has hundreds: a range in a config may claim any number.
MAX_LAYERS = 100_000


def replicate_updates(updates: list[Update], config: Config) -> tuple[list[Update], list[str]]:
    """Assign every update to the layer of BASE that it acts on.

    Raises:
        InputError: The ranges are invalid, or an update belongs to a layer beyond them.
    """
    if "layer_replication" not in config:
        return updates, []
    order = _read_order(config)
    note = (
        f"layer_replication: {len(order)} layers are made of {len(set(order))}; layers are named as in the replicated "
        "model, and each is compared with the layer of BASE that it repeats"
    )
    assigned = [
        replace(update, base_weight=_rename_in_base(update.weight, order, config), keeps_name=True)
        for update in updates
    ]
    return assigned, [note]


def _read_order(config: Config) -> list[int]:
    """Return for each layer of the replicated model its layer in BASE."""
    ranges = config.values["layer_replication"]
    try:
        pairs = [(int(first), int(last)) for first, last in ranges]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{config.path}: layer_replication must be a list of [first, last) pairs; correct the config"
        ) from error
    if not all(0 <= first < last <= MAX_LAYERS for first, last in pairs) or len(pairs) > MAX_LAYERS:
        raise InputError(f"{config.path}: layer_replication has an invalid range: {ranges!r:.100}; correct the config")
    order = [layer for first, last in pairs for layer in range(first, last)]
    if not order:
        raise InputError(f"{config.path}: layer_replication is empty; correct the config")
    return order


def _rename_in_base(weight: str, order: list[int], config: Config) -> str:
    """Return the weight of BASE that a weight of the replicated model repeats."""

    def find_index(match: re.Match[str]) -> str:
        if int(match[0]) >= len(order):
            raise InputError(
                f"{config.path}: {weight} is beyond the {len(order)} layers of layer_replication; correct the config"
            )
        return str(order[int(match[0])])

    return LAYER.sub(find_index, weight, count=1)
