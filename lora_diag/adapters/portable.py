"""An adapter → a copy that every program scales equally: one rank, α = r, scaling in B, plain
names.

Factors of a lower rank are padded with zeros, which leaves B·A unchanged. α/r is 1 for every
program that divides α by this common rank. Other updates than pairs of factors cannot be
represented, except DoRA by the nearest LoRA of its rank.

Layers are read one at a time: once for ranks and dtype, and again when their factors are written.
Results of decompositions are cached in files.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.adapters.adapter import Adapter
from lora_diag.adapters.contents import LOW_RANK_PARTS, Contents, Item, read_contents
from lora_diag.adapters.layouts import GGUF, LAYOUTS, Placed, TensorSlot
from lora_diag.adapters.updates import UpdateSite, as_float64, read
from lora_diag.adapters.writing import pad_factor, store_factors, write_config
from lora_diag.deltas import Delta, DenseDelta, FactoredDelta
from lora_diag.errors import Given, InputError, UsageError, damaged
from lora_diag.files import check_folder_of, sync
from lora_diag.storage import Checkpoint, TensorInfo, open_checkpoint
from lora_diag.storage.gguf import write_gguf
from lora_diag.storage.gguf_model import to_pairs
from lora_diag.storage.safetensors import write_safetensors

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors


@dataclass(frozen=True, slots=True)
class Written:
    """Description of the written files.

    Args:
        rank: r of every pair of factors, and α.
        dtype: Dtype of the factors.
        truncated: ε of every weight whose update was truncated to its rank: with DoRA, or with a
            saved copy of BASE.
        epsilon: ε of these weights together: √(Σ‖ΔW' − ΔW‖² / Σ‖ΔW‖²); 0 without any.
        unsupported: Unsupported weights, with the reason.
    """

    rank: int
    dtype: str
    truncated: Mapping[str, float]
    epsilon: float
    unsupported: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _UnpaddedFactors:
    """The factors of one weight to be written, before padding to the common rank.

    Args:
        placed: The weight, and the shapes of its factors.
        load: Reads s·B ``(out, r)`` and A ``(r, in)``, float64.
        epsilon: ‖ΔW − s·B·A‖_F / ‖ΔW‖_F; above 0 only where a full-rank update was truncated.
        fro: ‖ΔW‖_F of such an update.
        is_exact: Whether the stored dtype holds both.
    """

    placed: Placed
    load: Callable[[], Factors]
    epsilon: float = 0.0
    fro: float = 0.0
    is_exact: bool = False


def why_not_portable(item: Item, has_delta: bool, dora_to_lora: bool) -> str:
    """Return the reason why a portable adapter cannot represent an item; empty if it can.

    Args:
        item: The item.
        has_delta: Whether its ΔW against BASE is known.
        dora_to_lora: Whether DoRA may be truncated to its rank.
    """
    if item.part == "dora":
        if not dora_to_lora:
            return "DoRA; $dora_to_lora writes the nearest LoRA of its rank"
        return "" if has_delta else "DoRA is relative to the base weight; give BASE"
    if item.part == "residual":
        return "" if has_delta else "its initialisation changed the base; give BASE"
    if item.part == "experts":
        return "stacked experts (target_parameters)"
    if item.part not in LOW_RANK_PARTS:
        return {"bias": "a bias", "rows": "rows of an embedding", "other": "no LoRA"}.get(
            item.part, "a weight in full"
        )
    is_inside = ".base_layer.out_proj." in item.key or item.module.endswith("in_proj_weight")
    return "a part of an nn.MultiheadAttention" if is_inside else ""


def write_portable(
    adapter: Adapter,
    folder: Path,
    base: Checkpoint | None = None,
    form: str | None = None,
    dora_to_lora: bool = False,
    leave_out: bool = False,
) -> Written:
    """Write a portable copy of an adapter to a temporary folder, rename that, and return a
    description of the files.

    Args:
        adapter: The adapter.
        folder: The new folder; must not exist.
        base: Its BASE, if names or updates depend on it.
        form: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``; by default that of the
            adapter.
        dora_to_lora: Write the nearest LoRA of its rank for DoRA.
        leave_out: Skip unsupported weights instead of raising an error.

    Raises:
        UsageError: Something exists at ``folder``, or there is no such layout.
        InputError: A weight is unsupported (with ``leave_out``: all are), BASE does not fit the
            adapter, the layout needs names from a BASE, a file cannot be read, or the folder cannot
            be written.
    """
    form = form or adapter.form
    if form not in LAYOUTS:
        raise UsageError(Given("format", form), f"use {', '.join(LAYOUTS)}")
    check_folder_of(folder)
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder}: exists already; choose another folder for the adapter")
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        (work / "files").mkdir(parents=True)
        written = convert(adapter, work / "files", work, base, form, dora_to_lora, leave_out)
        (work / "files").rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return written


def convert(
    adapter: Adapter,
    folder: Path,
    scratch: Path,
    base: Checkpoint | None,
    form: str,
    dora_to_lora: bool = False,
    leave_out: bool = False,
    for_tied_head: bool = False,
) -> Written:
    """Write the files of a portable copy into an existing folder, and return their description.

    Args:
        adapter: The adapter.
        folder: The existing folder.
        scratch: A folder for factors that are computed by a decomposition.
        base: Its BASE, if names or updates depend on it; else None.
        form: One of ``LAYOUTS``.
        dora_to_lora: Write the nearest LoRA of its rank for DoRA.
        leave_out: Skip unsupported weights instead of raising an error.
        for_tied_head: Whether the update of an embedding is meant for a tied head as well, as that
            of a fine-tune.

    Raises:
        InputError: A weight is unsupported (with ``leave_out``: all are), BASE does not fit the
            adapter, the layout needs names from a BASE, or a file cannot be read or written.
    """
    _refuse_unresolved_gguf(adapter, base, form)
    contents = read_contents(adapter, base)
    pairing = adapter.pair(base)[0] if base is not None else None
    deltas: dict[str, Delta] = {delta.layer: delta for delta in pairing.deltas} if pairing else {}
    reasons = {
        item.layer: why_not_portable(item, deltas.get(item.layer) is not None, dora_to_lora)
        or LAYOUTS[form].unsupported(item, contents)
        or ("" if for_tied_head else _why_changed(item, contents, form))
        for item in contents.items
    }
    unsupported = {layer: reason for layer, reason in reasons.items() if reason}
    if unsupported and not leave_out:
        raise InputError(
            adapter.path, _list_by_reason(unsupported), "$leave_out writes the adapter without"
        )
    supported = [item for item in contents.items if item.layer not in unsupported]
    if not supported:
        problem = "no part of it can be written as a portable adapter"
        raise InputError(adapter.path, f"{problem}: {_list_by_reason(unsupported)}")
    dtypes = {update.dtype for update in adapter.reading.updates}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    parts = {
        item.layer: _make_part(item, deltas.get(item.layer), scratch, number, dtype)
        for number, item in enumerate(supported)
    }
    dtype = dtype if all(part.is_exact for part in parts.values()) else "float32"
    rank = max(part.placed.rank for part in parts.values())
    plan, config = LAYOUTS[form].plan(
        [part.placed for part in parts.values()], contents, base, rank
    )
    _write(folder / LAYOUTS[form].file, config, _Reader(parts, plan, rank, dtype))
    truncated = {
        name: part
        for name, part in parts.items()
        if part.epsilon or part.placed.item.part == "dora"
    }
    norm = math.hypot(*(part.fro for part in truncated.values()))
    epsilon = math.hypot(*(part.epsilon * part.fro for part in truncated.values())) / (norm or 1.0)
    return Written(
        rank, dtype, {name: part.epsilon for name, part in truncated.items()}, epsilon, unsupported
    )


def _why_changed(item: Item, contents: Contents, form: str) -> str:
    """Return why an update would change its meaning in another layout; empty if it keeps it.

    mlx-lm applies the update of an embedding in a head that is tied to it; PEFT does so only in a
    merge.
    """
    if "mlx" not in {form, contents.form} or form == contents.form or item.tied_role != "embedding":
        return ""
    if contents.tied is None:
        return (
            "mlx-lm applies it in a head that is tied to the embedding, too; give BASE, which "
            "shows whether it is"
        )
    changed = (
        "the head is tied to the embedding; mlx-lm applies the update in both, and PEFT does not"
    )
    return changed if contents.tied else ""


def _refuse_unresolved_gguf(adapter: Adapter, base: Checkpoint | None, form: str) -> None:
    """Refuse to convert to another layout a GGUF adapter whose names or order of rows are unknown.

    Raises:
        InputError: A name or the order of rows of a weight is unknown.
    """
    if adapter.form != GGUF or form == GGUF:
        return
    foreign = next(
        (update for update in adapter.reading.updates if update.weight.startswith("blk.")), None
    )
    if foreign is not None:
        problem = f"{foreign.weight} has no known name outside of GGUF"
        raise damaged(adapter.path, problem, "write it with $format gguf")
    if base is None and (
        first := next((update for update in adapter.reading.updates if update.heads), None)
    ):
        problem = f"the rows of {first.weight} are in llama.cpp's order, which depends on BASE"
        raise damaged(adapter.path, problem, "give BASE")


def _make_part(
    item: Item, delta: Delta | None, scratch: Path, number: int, dtype: str
) -> _UnpaddedFactors:
    """Return the part of one item to be written; store the factors of a full-rank ΔW in a file of
    ``scratch``.
    """
    import torch

    load: Callable[[], Factors] = partial(_load_factors, item)
    epsilon = fro = 0.0
    if item.part in {"dora", "residual"}:
        assert delta is not None
        if isinstance(delta, FactoredDelta):
            load = partial(_load_delta_factors, delta)
        else:
            assert isinstance(delta, DenseDelta)
            b, a, epsilon, fro = _approximate_delta(item, delta)
            file = scratch / f"{number:06d}.safetensors"
            store_factors(file, b.float(), a.float())
            load = partial(_load_cached, file)
    b, a = load()
    torch_dtype = getattr(torch, dtype)
    is_exact = all(torch.equal(as_float64(x.to(torch_dtype)), x) for x in (b, a))
    return _UnpaddedFactors(
        Placed(item, b.shape[1], (b.shape[0], a.shape[1])), load, epsilon, fro, is_exact
    )


def _load_factors(item: Item) -> Factors:
    """Return s·B and A of an item, whose ΔW is their product."""
    assert item.load is not None
    loaded = item.load(UpdateSite(item.shape))
    assert isinstance(loaded, tuple)
    return loaded


def _load_delta_factors(delta: FactoredDelta) -> Factors:
    """Return B and A of ΔW against BASE, in the adapter's orientation."""
    b, a = delta.load()
    return (a.T, b.T) if delta.transposed else (b, a)


def _load_cached(file: Path) -> Factors:
    """Return B and A from a file of ``store_factors``."""
    checkpoint = open_checkpoint(file)
    return read(checkpoint, "B"), read(checkpoint, "A")


def _approximate_delta(
    item: Item, delta: DenseDelta
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Form ΔW; return its best approximation of the item's rank, the error ε (Eckart and Young
    1936) and ‖ΔW‖_F.
    """
    import torch

    assert item.rank is not None
    whole = as_float64(delta.load())
    if delta.transposed:
        whole = whole.T
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    rank = min(item.rank, len(s))
    norm = float(torch.linalg.vector_norm(s))
    epsilon = float(torch.linalg.vector_norm(s[rank:])) / norm if norm else 0.0
    return u[:, :rank] * s[:rank], vh[:rank], epsilon, norm


def _list_by_reason(unsupported: Mapping[str, str]) -> str:
    """Return unsupported weights by reason as text, with one example each."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in unsupported.items():
        reasons.setdefault(reason, []).append(layer)
    more = {
        reason: f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        for reason, layers in reasons.items()
    }
    return "; ".join(f"{layers[0]}{more[reason]}: {reason}" for reason, layers in reasons.items())


class _Reader:
    """Reader of the tensors of a plan, each when it is written; the factors of the last layer are
    cached.
    """

    def __init__(
        self,
        parts: Mapping[str, _UnpaddedFactors],
        plan: Mapping[str, TensorSlot],
        rank: int,
        dtype: str,
    ) -> None:
        self._parts = parts
        self._plan = plan
        self._rank = rank
        self._dtype = dtype
        self._last: tuple[str, Factors] | None = None

    def make_infos(self) -> dict[str, TensorInfo]:
        """Return shape and dtype of every tensor, by name."""
        return {
            name: TensorInfo(
                name, slot.sizes(self._rank), self._dtype if slot.placed is not None else "float32"
            )
            for name, slot in self._plan.items()
        }

    def __call__(self, name: str) -> torch.Tensor:
        """Return a tensor as it is written."""
        import torch

        slot = self._plan[name]
        if slot.placed is None:
            return torch.tensor(slot.value, dtype=torch.float32)  # bfloat16 does not hold every α
        layer = slot.placed.item.layer
        if self._last is None or self._last[0] != layer:
            self._last = layer, self._parts[layer].load()
        b, a = self._last[1]
        matrix = a if slot.side == "A" else b
        whole = pad_factor(
            to_pairs(matrix, slot.heads) if slot.heads else matrix, slot.side, self._rank
        )
        whole = whole.T if slot.turned else whole
        return whole.to(getattr(torch, self._dtype)).reshape(slot.sizes(self._rank)).contiguous()


def _write(file: Path, config: Mapping[str, Any], reader: _Reader) -> None:
    """Write the weights file, and the config if the layout has one."""
    infos = reader.make_infos()
    if file.suffix == ".gguf":
        write_gguf(file, config, infos, reader)
        return
    write_safetensors(file, infos, reader, {"format": "pt"})
    if config:
        write_config(file.parent, config)
