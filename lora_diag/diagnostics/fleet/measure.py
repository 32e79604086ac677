"""``fleet``: measure norm and rank of many adapters, and sketches of their updates for comparison.

On the CPU, thin factors are measured with NumPy and SciPy, if their Gram matrices give the
energies; other layers are decomposed with torch.
"""

from __future__ import annotations

import glob
import hashlib
import math
import platform
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, Unpack

import numpy as np
import torch

from lora_diag import thin
from lora_diag.adapters import Adapter, is_adapter, locate, open_input
from lora_diag.adapters.source import StatedAlpha
from lora_diag.deltas import Delta, FactoredDelta, Pairing, natural_order, selector
from lora_diag.diagnostics.fleet import FleetOptions
from lora_diag.diagnostics.fleet.record import Fleet, FleetLayer
from lora_diag.errors import InputError, LoradiagError, NothingComparedError
from lora_diag.layers.change import load_change
from lora_diag.linalg.devices import resolve_device
from lora_diag.metrics.energy import energy_curve, rank_at, ranks_at
from lora_diag.records import LeftOut, Results, RunInput
from lora_diag.running.fingerprint import content_hash, files_of, fingerprint, legible
from lora_diag.running.inputs import open_base, open_update, pair_update
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import show_options
from lora_diag.storage import as_path
from lora_diag.storage.remote import RemotePath

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_diag.storage.file_bytes import Numbers


# Maximum number of entries of factors that are read at once: 2 MiB in float32.
ENTRIES = 2**19

# The fraction of the energy that a layer's rank is counted to.
ENERGY = 0.99


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """The measurement of one layer of an adapter.

    Args:
        layer: The layer's part of the record.
        sigma_1: The largest singular value; 0 for a zero update.
        update: The sketch of ΔW; None for a zero update.
        space: The sketch of the projector on the left singular vectors up to 99% of the energy;
            None likewise.
    """

    layer: FleetLayer
    sigma_1: float = 0.0
    update: NDArray[np.float64] | None = None
    space: NDArray[np.float64] | None = None


def _make_measured(
    rank: int | None,
    fro: float,
    sigma_1: float = 0.0,
    rank_99: int = 0,
    update: NDArray[np.float64] | None = None,
    space: NDArray[np.float64] | None = None,
) -> MeasuredLayer:
    """Return the measurement of a layer, without sketches if its update is zero."""
    if fro == 0.0:
        return MeasuredLayer(FleetLayer(fro=0.0, rank=rank, rank_99=0, spike=None))
    layer = FleetLayer(fro=fro, rank=rank, rank_99=rank_99, spike=min(1.0, (sigma_1 / fro) ** 2))
    return MeasuredLayer(layer, sigma_1, update, space)


def is_thin(delta: Delta) -> TypeGuard[FactoredDelta]:
    """Return whether a layer's update has factors that can be read without torch, of a rank up to
    ``MAX_RANK``.
    """
    return (
        isinstance(delta, FactoredDelta) and delta.thin is not None and delta.rank <= thin.MAX_RANK
    )


def measure_thin(deltas: Sequence[FactoredDelta]) -> list[MeasuredLayer | None]:
    """Measure layers of one rank from their stored factors; None for those that ``measure_dense``
    has to measure.

    These are layers whose Gram matrices do not give the energies, as of a zero update or an entry
    that is not finite, or whose norm overflows. Factors of one kind are read and reduced in
    batches, which saves calls; the remaining steps are computed for all layers together.

    Args:
        deltas: Layers that ``is_thin`` accepts, of one rank.
    """
    indices_by_kind: dict[Hashable, list[int]] = {}
    for i, delta in enumerate(deltas):
        assert delta.thin is not None
        indices_by_kind.setdefault(delta.thin.kind, []).append(i)
    batches: list[list[int]] = []
    for indices in indices_by_kind.values():
        first = deltas[indices[0]]
        size = max(1, ENTRIES // (max(first.shape) * first.rank))
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    left, right, folded = [], [], []
    for batch in batches:
        left_grams, right_grams, factors = _reduce([deltas[i] for i in batch])
        left.append(left_grams)
        right.append(right_grams)
        folded += factors
    order = [i for batch in batches for i in batch]
    values = thin.thin_energies(
        _concatenate(left), _concatenate(right), np.array([layer.scale for layer in folded])
    )
    known = np.flatnonzero(values.energy_error <= thin.MAX_GRAM_ERROR).tolist()
    measured: list[MeasuredLayer | None] = [None] * len(deltas)
    if known:
        assert values.mix is not None
        chosen = thin.ThinValues(
            values.s[known], values.energy_error[known], values.fro[known], values.mix[known]
        )
        found = _measure_folded(
            [deltas[order[k]] for k in known], [folded[k] for k in known], chosen
        )
        for k, layer in zip(known, found, strict=True):
            measured[order[k]] = layer
    return measured


@dataclass(frozen=True, slots=True)
class _Folded:
    """The factors of a layer, folded, and their scale.

    Args:
        rows: B with its rows summed in the buckets of both hashes, ``(2, LENGTH, r)``.
        columns: Aᵀ with its rows summed in the buckets of the hash of columns, ``(LENGTH, r)``.
        scale: s in ΔW = s·B·A.
    """

    rows: Numbers
    columns: Numbers
    scale: float


def _reduce(deltas: Sequence[FactoredDelta]) -> tuple[thin.Grams, thin.Grams, list[_Folded]]:
    """Return BᵀB and AAᵀ of layers of one kind, and their folded factors."""
    factors = [delta.thin for delta in deltas if delta.thin is not None]
    b = thin.to_row_major(factors[0].read_each_b(factors))
    left = thin.compute_grams(b)
    rows = thin.fold(b, thin.BOTH).reshape(len(factors), 2, thin.LENGTH, -1)
    del b
    a = thin.to_row_major(factors[0].read_each_a(factors).transpose(0, 2, 1))
    columns = thin.fold(a, thin.COLUMNS)
    folded = [_Folded(rows[i], columns[i], item.read_scale()) for i, item in enumerate(factors)]
    return left, thin.compute_grams(a), folded


def _concatenate(grams: Sequence[thin.Grams]) -> thin.Grams:
    """Return the Gram matrices of several batches as one batch."""
    return thin.Grams(
        np.concatenate([item.products for item in grams]),
        np.concatenate([item.terms for item in grams]),
    )


def _measure_folded(
    deltas: Sequence[FactoredDelta], folded: Sequence[_Folded], values: thin.ThinValues
) -> list[MeasuredLayer | None]:
    """Return the measurements of layers of one rank, given their values; None where a norm is not
    finite.
    """
    scale = np.array([each.scale for each in folded])
    assert values.mix is not None
    fro = np.where(np.isfinite(values.fro) & (values.fro > 0), values.fro, 1.0)
    ranks_99 = ranks_at(energy_curve(values.s, fro[:, None], True), ENERGY)
    directions = values.mix * (np.arange(values.s.shape[1]) < ranks_99[:, None])[:, None]
    names = [delta.layer for delta in deltas]
    rows, row_size = _normalize([each.rows for each in folded])
    columns, column_size = _normalize([each.columns for each in folded])
    left_rows, right_rows = thin.transform(rows).swapaxes(0, 1)
    update = (scale * row_size * column_size)[:, None] * thin.sketch_products(
        left_rows, thin.transform(columns), names
    )
    # Σ_k of (row transforms of u_k)·(column transforms of u_k), u_k = B·w_k, is one of B·WWᵀ and B.
    directions *= row_size[:, None, None]
    space = thin.sketch_products(
        thin.mix_columns(left_rows, directions @ directions.transpose(0, 2, 1)), right_rows, names
    )
    ranks = [int(rank) or values.s.shape[1] for rank in ranks_99]
    measured: list[MeasuredLayer | None] = []
    for i, norm in enumerate(values.fro.tolist()):
        layer = None
        if math.isfinite(norm):
            sigma_1 = float(values.s[i, 0])
            layer = _make_measured(deltas[i].rank, norm, sigma_1, ranks[i], update[i], space[i])
        measured.append(layer)
    return measured


def _normalize(arrays: Sequence[Numbers]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return stacked arrays, each divided by a power of two so that products are in float32's
    range, and the powers.
    """
    stack: NDArray[Any] = np.stack(arrays)
    flat = stack.reshape(len(stack), -1)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    size = np.ldexp(1.0, np.clip(np.frexp(largest)[1], -120, 120))
    stack *= (1 / size).astype(stack.dtype).reshape(-1, *[1] * (stack.ndim - 1))
    return stack, size


def measure_dense(path: str, delta: Delta, device: str) -> MeasuredLayer:
    """Measure one layer from its decomposition.

    Args:
        path: The adapter's path.
        delta: The layer.
        device: Device of the computation.

    Raises:
        InputError: A file cannot be read, an entry or a norm is not finite, or the decomposition
            does not converge.
    """
    change = load_change(delta, resolve_device(device))
    if change.non_finite is not None:
        raise InputError(f"{path}: {delta.layer}: {change.non_finite}")
    factors = change.decompose(vectors=True)
    if not math.isfinite(factors.fro):
        raise InputError(f"{path}: {delta.layer}: the product of its factors overflows float64")
    rank = change.factors[0].shape[1] if change.factors is not None else None
    if factors.fro == 0.0:
        return _make_measured(rank, 0.0)
    s = factors.s.numpy()
    rank_99 = rank_at(energy_curve(s, factors.fro, factors.complete), ENERGY) or len(s)
    if change.factors is not None:
        b, a = map(_to_float64, change.factors)
        update = thin.sketch((b, a), delta.layer)
    else:
        assert change.matrix is not None
        update = thin.sketch(_to_float64(change.matrix), delta.layer)
    columns = factors.vectors[0][:, :rank_99].cpu().numpy()
    space = thin.sketch((columns, columns.T), delta.layer)
    return _make_measured(rank, factors.fro, float(s[0]), rank_99, update, space)


def _to_float64(matrix: torch.Tensor) -> NDArray[np.float64]:
    return matrix.to("cpu", torch.float64).numpy()


# Maximum number of layers that are computed together: 8 blocks of seven matrices, so that batches
# of square ones are full. Of rank 16, their reduced factors take 10 MB; those of 112 layers, 21 MB,
# are new pages for each adapter.
TOGETHER = 56

# Significant digits of a stored sketch; their rounding is far below its own error.
DIGITS = 4


def measure_adapter(path: str, kind: str, deltas: Iterable[Delta], device: str) -> Fleet:
    """Measure one adapter, a few layers at a time; nothing of the size of a weight is kept.

    Args:
        path: The adapter's path.
        kind: Type of adapter.
        deltas: The adapter's updates of matrices.
        device: Device of the computation; on ``cpu``, thin factors are measured with NumPy.

    Raises:
        InputError: A file cannot be read, an entry or a norm is not finite, or a decomposition does
            not converge.
    """
    layers: dict[str, FleetLayer] = {}
    update = np.zeros(thin.LENGTH)
    space = np.zeros(thin.LENGTH)
    sigma_1_norm = 0.0  # √(Σσ_1²)
    for delta, measured in _measure_layers(path, deltas, device):
        layers[delta.layer] = measured.layer
        sigma_1_norm = math.hypot(sigma_1_norm, measured.sigma_1)
        if measured.update is not None and measured.space is not None:
            update += measured.update
            space += measured.space
    known_ranks = [layer.rank for layer in layers.values() if layer.rank is not None]
    total = sum(known_ranks) if len(known_ranks) == len(layers) else None
    fro = math.hypot(*(layer.fro for layer in layers.values()))
    if not math.isfinite(fro):
        raise InputError(f"{path}: its norm overflows float64; correct its alpha and factors")
    total_rank_99 = sum(layer.rank_99 for layer in layers.values())
    return Fleet(
        adapter=path,
        kind=kind,
        modules=len(layers),
        dead=sum(layer.fro == 0 for layer in layers.values()),
        rank=max(known_ranks, default=None),
        fro=fro,
        total_rank=total,
        total_rank_99=total_rank_99,
        used=total_rank_99 / total if total else None,
        spike=min(1.0, (sigma_1_norm / fro) ** 2) if fro else None,
        layers=layers,
        update=_round(update),
        space=_round(space),
    )


def _measure_layers(
    path: str, deltas: Iterable[Delta], device: str
) -> Iterator[tuple[Delta, MeasuredLayer]]:
    """Yield each layer with its measurement, in order; on ``cpu``, measure consecutive thin ones of
    a rank together.
    """

    def find_rank(delta: Delta) -> int | None:
        """Return the rank of a layer to measure with others; None for one on its own."""
        return delta.rank if device == "cpu" and is_thin(delta) else None

    for rank, group in groupby(deltas, find_rank):
        while batch := list(islice(group, 1 if rank is None else TOGETHER)):
            found: list[MeasuredLayer | None] = [None] * len(batch)
            if rank is not None:
                found = measure_thin([delta for delta in batch if is_thin(delta)])
            for delta, measured in zip(batch, found, strict=True):
                yield delta, measured or measure_dense(path, delta, device)


def _round(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Return values rounded to ``DIGITS`` significant digits."""
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())


COMMAND = "spectrum --adapters"

# Memory in bytes of one adapter while it is measured: factors of a layer, their vectors, normals of
# the sketches.
ADAPTER_BYTES = 64 * 2**20

# Bytes of all adapters from which each worker is a process: less is measured in the time that
# processes take to start.
PROCESS_BYTES = 2**29

# Suffixes of the files that identify an adapter or a base; others, such as a log, may change.
READ_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".json"}


@dataclass(frozen=True, slots=True)
class FleetPath:
    """A path and its files at the start of the run.

    Args:
        path: An adapter, or the base of all.
        digest: Hash of the names and sizes of its files with ``READ_SUFFIXES``; empty without any,
            and for a remote path.
        size: Bytes of these files; 0 likewise.
    """

    path: Path
    digest: str
    size: int = 0

    @classmethod
    def read(cls, path: Path) -> FleetPath:
        """Return the path with the digest and size of its current files; empty and 0 for a remote
        path.
        """
        if isinstance(path, RemotePath):
            return cls(path, "")
        sizes: dict[str, int] = {}
        with suppress(OSError):
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            sizes = {
                file.name: file.stat().st_size
                for file in files
                if file.suffix in READ_SUFFIXES and file.is_file()
            }
        lines = "\n".join(f"{name} {size}" for name, size in sizes.items())
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cls(path, digest if lines else "", sum(sizes.values()))

    def check_unchanged(self) -> None:
        """Check that the files are those at the start of the run: a cluster's worker has its own
        mounts.

        Raises:
            InputError: The files differ or are missing.
        """
        if self.read(self.path).digest != self.digest:
            raise InputError(
                f"{self.path}: the worker on {platform.node()} finds other files there, or none; "
                "put adapters and base on storage shared by all nodes, under the same path, and do "
                "not change them during the run"
            )


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter that is not opened yet.

    Args:
        layer: The adapter's path as text, in place of a layer name.
        seen: The path with its files at the start of the run.
        shape: Placeholder for the shape of a layer.
    """

    layer: str
    seen: FleetPath
    shape: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Settings of the measurement of an adapter.

    Args:
        base: Base checkpoint of all adapters; None without one.
        layers: Regular expression: only weights whose name contains a match; None for all.
        exclude: Regular expression: no weights whose name contains a match; None to exclude none.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        memory: Unused; adapters have no memory limit.
        stated_alpha: α of adapters whose files give none.
    """

    base: FleetPath | None
    layers: str | None
    exclude: str | None
    device: str
    memory: int | None = None
    stated_alpha: StatedAlpha = None


@show_options
def fleet(
    adapters: Iterable[Path | str],
    **options: Unpack[FleetOptions],
) -> Results[Fleet]:
    r"""Measure many adapters: used rank, zero updates, spikes, norms, and sketches that reveal
    near-duplicates.

    Each adapter is a task: ``workers`` of them run concurrently, with a few layers of each in
    memory. For local adapters measured on the CPU without BASE, the default is one worker, and from
    512 MiB of adapters on several processes. An adapter that cannot be measured is skipped.

    Args:
        adapters: Folders, files, or patterns such as ``runs/**``; with ``base`` also fine-tuned
            checkpoints, given directly.
        base: Base checkpoint, for adapters that need it (DoRA, PiSSA, IA³) and for checkpoints;
            None without one.
        **options: ``FleetOptions``.

    Returns:
        One record per adapter that could be measured; the others are in ``left_out``.

    Raises:
        UsageError: An option is invalid, or ``output`` may be neither replaced nor resumed.
        InputError: The results file cannot be written, an address is invalid or cannot be reached,
            or a cluster's worker has different files.
        NothingComparedError: No adapter was found.

    Example:
        >>> found = fleet(["sample_checkpoints/*"], layers=r"layers\.0")
        >>> [(record.adapter, record.rank, record.dead) for record in found]
        [('sample_checkpoints/lora_r4', 4, 0), ('sample_checkpoints/lora_r16', 16, 0)]
    """
    run = LayerRun(COMMAND, options, FleetOptions)
    options = run.options
    base, layers, exclude = options["base"], options["layers"], options["exclude"]
    selector(layers, exclude)  # an invalid pattern would make every adapter unreadable
    members = [Member(legible(path), FleetPath.read(path)) for path in expand_patterns(adapters)]
    base_path = FleetPath.read(as_path(base)) if base is not None else None
    if options["engine"] is None and options["device"] in {"auto", "cpu"}:
        is_remote = any(isinstance(member.seen.path, RemotePath) for member in members)
        is_simple = base_path is None and not is_remote
        apart = is_simple and sum(member.seen.size for member in members) >= PROCESS_BYTES
        # Two threads took twice the processor time of one, and as long.
        run.use_numpy(workers=1 if is_simple and not apart else None, apart=apart)
        device = "cpu"  # reading factors takes longer than a GPU would save
    else:
        device = run.where.tasks
    return run.over(
        members,
        _measure_member if options["engine"] is None else _measure_on_worker,
        lambda _, settings: ADAPTER_BYTES,
        FleetSettings(base_path, layers, exclude, device, stated_alpha=run.stated_alpha),
        Pairing((), ()),
        tuple(_describe(member, options["verify"]) for member in members),
        {"base": legible(base) if base is not None else None},
        recorded=("layers", "exclude", "device"),
    )


def _measure_on_worker(member: Member, settings: FleetSettings) -> tuple[Fleet | LeftOut]:
    """Check that a cluster's worker has the same files, then measure one adapter as
    ``_measure_member``.
    """
    for seen in (member.seen, settings.base):
        if seen is not None:
            seen.check_unchanged()
    return _measure_member(member, settings)


def _measure_member(member: Member, settings: FleetSettings) -> tuple[Fleet | LeftOut]:
    """Measure one adapter; return a ``left_out`` record if it cannot be measured."""
    path = member.seen.path
    base = settings.base.path if settings.base is not None else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this Python thread alone: adapters are measured side by side
    try:
        opened = open_base(locate(base)) if base is not None else None
        source = locate(path)
        if base is None and not source.is_adapter:
            fix = "give its base with $base if it is a checkpoint"
            if path.is_dir() and any(map(is_adapter, path.iterdir())):
                fix = f"quote the pattern '{path}/**' for the adapters in it"
            raise InputError(path, "is not an adapter", fix)
        update = open_update(source, opened, settings.stated_alpha)
        deltas = pair_update(opened, update, settings.layers, settings.exclude)[0].deltas
        matrices = [delta for delta in deltas if delta.is_matrix]
        return (measure_adapter(member.layer, legible(update.kind), matrices, settings.device),)
    except LoradiagError as error:
        detail = str(error).removeprefix(f"{path}: ")
        return (LeftOut(layer=member.layer, shape=(), reason="unreadable", detail=detail),)
    finally:
        torch.set_num_threads(threads)


def expand_patterns(patterns: Iterable[Path | str]) -> list[Path]:
    """Return the distinct paths given directly or matched by patterns, in natural order.

    Paths given directly are not checked. Matches of a pattern that are not adapters are ignored,
    and so are paths directly in a folder that is also found.

    Raises:
        NothingComparedError: No adapter was found.
    """
    patterns = list(patterns)
    found: list[Path] = []
    for pattern in patterns:  # the text of an address lacks its secrets
        if not glob.has_magic(str(pattern)) or as_path(pattern).exists():
            found.append(as_path(pattern))
        else:
            found += filter(is_adapter, map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207
    folders = {path for path in found if path.is_dir()}
    paths = [path for path in dict.fromkeys(found) if path.parent not in folders]
    if not paths:
        given = ", ".join(map(str, patterns)) or "standard input"
        raise NothingComparedError(
            f"{given}: no adapter found; give folders of adapters, or a quoted pattern"
        )
    return sorted(paths, key=lambda path: natural_order(str(path)))


def _describe(member: Member, verify: bool) -> RunInput:
    """Return the description of an adapter in the run record, before it is measured.

    Its fingerprint lets ``--resume`` detect a changed adapter by file sizes, without opening it.
    One on object storage is opened, since its server may not list folders and sizes cost as many
    requests; with ``verify``, every adapter or checkpoint is. What cannot be opened has no hash of
    its contents.
    """
    digest, sha256 = member.seen.digest, ""
    is_remote = isinstance(member.seen.path, RemotePath)
    if is_remote or verify:
        with suppress(LoradiagError):
            opened = open_input(locate(member.seen.path), "rank")
            checkpoint = opened.checkpoint if isinstance(opened, Adapter) else opened
            digest = fingerprint(checkpoint) if is_remote else digest
            sha256 = content_hash(files_of(checkpoint)) if verify else ""
    return RunInput(
        role="adapter",
        path=member.layer,
        kind="adapter",
        tensors=0,
        fingerprint=digest,
        sha256=sha256,
    )
