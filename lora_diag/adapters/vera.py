"""VeRA: ΔW = diag(b)·B·diag(d)·A with random B and A shared by all layers, truncated to each layer's size.

Reference: Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454; ``peft.tuners.vera``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.refused import MERGE
from lora_diag.adapters.source import Source, by_module
from lora_diag.adapters.updates import Reading, Site, Update, add_stored_values, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    from lora_diag.adapters.updates import Factors

PARTS = ("vera_lambda_b", "vera_lambda_d")
SHARED = ("base_model.vera_A", "base_model.vera_B")


def read_vera(source: Source) -> Reading:
    """Read a PEFT VeRA adapter.

    Raises:
        InputError: The shared matrices were not saved, or the parts are inconsistent.
    """
    a_key, b_key = SHARED
    if a_key not in source.checkpoint or b_key not in source.checkpoint:
        raise InputError(
            f"{source.path}: VeRA without its shared matrices (save_projection=false), which depend on the random "
            f"generator of the training machine; {MERGE}"
        )
    names = [name for name in source.checkpoint if name not in SHARED]
    modules, unclaimed = by_module(names, PARTS, source.path)
    updates = [_read_update(source, module, parts) for module, parts in modules.items()]
    kind = f"PEFT VeRA, r={source.shape(a_key, 2)[0]}, {len(modules)} modules"
    return add_stored_values(Reading(kind, tuple(updates)), source, unclaimed)


def _read_update(source: Source, module: str, parts: dict[str, str]) -> Update:
    if set(parts) != set(PARTS):
        raise InputError(
            f"{source.checkpoint.path}: {module} has only {', '.join(sorted(parts))}, so the file is incomplete; save "
            "it again"
        )
    (out,), (rank,) = (source.shape(parts[part], 1) for part in PARTS)
    a, b = (source.shape(key, 2) for key in SHARED)
    if rank != a[0] or rank != b[1] or out > b[0]:
        raise InputError(
            f"{source.checkpoint.path}: {module}: lambdas of {out} and {rank} do not fit the shared A {list(a)} and B "
            f"{list(b)}; save it again"
        )
    load = partial(factors, source.checkpoint, parts)
    key = parts[PARTS[0]]
    dtype = source.checkpoint[key].dtype
    return Update(f"{module}.weight", (out, None), load, True, dtype, zero_if=key, rank=rank, diagonal=True)


def factors(checkpoint: Checkpoint, parts: dict[str, str], site: Site) -> Factors:
    """Return diag(b)·B[:out] and diag(d)·A[:, :in].

    Raises:
        InputError: The weight has more columns than A.
    """
    a, b = (read(checkpoint, key) for key in SHARED)
    if site.shape[1] > a.shape[1]:
        raise InputError(
            f"{checkpoint.path}: the shared A has {a.shape[1]} columns, but the weight {site.shape[1]}; check that it "
            "belongs to this BASE"
        )
    b_column, d_column = (read(checkpoint, parts[part]).reshape(-1, 1) for part in PARTS)
    return b_column * b[: site.shape[0]], d_column * a[:, : site.shape[1]]
