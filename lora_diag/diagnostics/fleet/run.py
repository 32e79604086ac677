"""``fleet``: measure many adapters in one pass."""

from __future__ import annotations

import glob
import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.adapters.source import StatedAlpha
from lora_diag.checkpoints import as_path, locate, open_checkpoint
from lora_diag.checkpoints.remote import RemotePath
from lora_diag.deltas import natural_order
from lora_diag.diagnostics.fleet.measure import fleet as measure
from lora_diag.diagnostics.fleet.options import FleetOptions
from lora_diag.diagnostics.fleet.record import Fleet
from lora_diag.errors import InputError, LoradiagError, NothingComparedError
from lora_diag.records import LeftOut, Results, RunInput
from lora_diag.running.fingerprint import content_hash, files_of, legible
from lora_diag.running.inputs import adapter_deltas, compare, describe
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import show_options

COMMAND = "spectrum --adapters"

# Memory of one adapter while it is measured: factors of a layer, their vectors, normals of the sketches.
SIZE = 64 * 2**20

# Bytes of all adapters from which each worker is a process: less is measured in the time that processes take to start.
PROCESS_BYTES = 2**29

# Files that identify an adapter or a base; others, such as a log, may change.
READ = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".json"}


@dataclass(frozen=True, slots=True)
class FleetPath:
    """A path and its files at the start of the run.

    Args:
        path: An adapter, or the base of all.
        files: Hash of its files' names and sizes; empty if they cannot be listed, as on object storage.
        size: Their bytes.
    """

    path: Path
    files: str
    size: int = 0

    @classmethod
    def now(cls, path: Path) -> FleetPath:
        """Return the path with its current files."""
        try:
            files = [] if isinstance(path, RemotePath) else sorted(path.iterdir()) if path.is_dir() else [path]
            sizes = {file.name: file.stat().st_size for file in files if file.suffix in READ and file.is_file()}
        except OSError:
            sizes = {}
        lines = "\n".join(f"{name} {size}" for name, size in sizes.items())
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cls(path, digest if lines else "", sum(sizes.values()))

    def check(self) -> None:
        """Check that the files are those at the start of the run: a cluster's worker has its own mounts.

        Raises:
            InputError: The files differ or are missing.
        """
        if self.now(self.path).files != self.files:
            raise InputError(
                f"{self.path}: the worker on {platform.node()} finds other files there, or none; put adapters and "
                "base on storage shared by all nodes, under the same path, and do not change them during the run"
            )


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter that is not opened yet."""

    layer: str
    seen: FleetPath
    shape: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Settings of the measurement of an adapter.

    Args:
        base: Base checkpoint of all adapters.
        layers: Only weights whose name contains a match.
        exclude: Skip weights whose name contains a match.
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
    r"""Measure many adapters: used rank, zero updates, spikes, outliers and near-duplicates.

    Each adapter is a task: ``workers`` of them run concurrently, with a few layers of each in memory. From 512 MiB
    of adapters on, these are processes, by default one per core. An adapter that cannot be read is skipped.

    Args:
        adapters: Folders, files, or patterns such as ``runs/**``.
        base: Base checkpoint, for adapters that need it (DoRA, PiSSA).
        **options: ``FleetOptions``.

    Returns:
        One record per adapter.

    Raises:
        UsageError: An option is invalid.
        InputError: The results file cannot be written, or a cluster's worker has different files.
        NothingComparedError: No adapter was found.

    Example:
        >>> found = fleet(["sample_checkpoints/*"], layers=r"layers\.0")
        >>> [(record.adapter, record.rank, record.dead) for record in found]
        [('sample_checkpoints/lora_r4', 4, 0), ('sample_checkpoints/lora_r16', 16, 0)]
    """
    run = LayerRun(COMMAND, options, FleetOptions)
    run.torch = run.options["engine"] is not None or run.options["device"] not in {"auto", "cpu"}
    base = run.options["base"]
    members = [Member(legible(path), FleetPath.now(path)) for path in expand(adapters)]
    base_path = FleetPath.now(as_path(base)) if base is not None else None
    if not run.torch and base_path is None and not any(isinstance(member.seen.path, RemotePath) for member in members):
        run.apart = sum(member.seen.size for member in members) >= PROCESS_BYTES
        run.usual_workers = None if run.apart else 1  # two threads took twice the processor time of one, and as long
    device = run.where.tasks if run.torch else "cpu"  # reading factors takes longer than a GPU would save
    return run.over(
        members,
        _measure_here if run.options["engine"] is None else _measure_on_worker,
        lambda _, settings: SIZE,
        FleetSettings(base_path, run.options["layers"], run.options["exclude"], device, stated_alpha=run.stated_alpha),
        lambda _, __, ___: (),
        tuple(
            RunInput(
                role="adapter",
                path=member.layer,
                kind="adapter",
                tensors=0,
                fingerprint=_fingerprint(member.seen),
                sha256=_hash_content(member.seen.path) if run.options["verify"] else "",
            )
            for member in members
        ),
        {"base": legible(base) if base is not None else None},
        recorded=("layers", "exclude", "device"),
    )


def _measure_on_worker(member: Member, settings: FleetSettings) -> tuple[Fleet | LeftOut]:
    for seen in (member.seen, settings.base):
        if seen is not None:
            seen.check()
    return _measure_here(member, settings)


def _measure_here(member: Member, settings: FleetSettings) -> tuple[Fleet | LeftOut]:
    path = member.seen.path
    base = settings.base.path if settings.base is not None else None
    try:
        if is_adapter(locate(path)):
            opened = open_checkpoint(base) if base is not None else None
            kind, deltas = adapter_deltas(path, opened, settings.layers, settings.exclude, settings.stated_alpha)
        elif base is None:
            inside = path.is_dir() and any(map(is_adapter, path.iterdir()))
            fix = (
                f"quote the pattern '{path}/**' for the adapters in it"
                if inside
                else "give its base with --base if it is a checkpoint"
            )
            raise InputError(f"{path}: is not an adapter; {fix}")
        else:
            comparison = compare(base, path, settings.layers, settings.exclude, stated_alpha=settings.stated_alpha)
            kind, deltas = comparison.inputs[-1].kind, comparison.pairing.deltas
        matrices = (delta for delta in deltas if delta.is_matrix)
        return (measure(member.layer, kind, matrices, settings.device),)
    except LoradiagError as error:
        detail = str(error).removeprefix(f"{path}: ")
        return (LeftOut(layer=member.layer, shape=(), reason="unreadable", detail=detail),)


def expand(patterns: Iterable[Path | str]) -> list[Path]:
    """Return the distinct adapters given by paths and patterns, in natural order.

    Matches of a pattern that are not adapters are ignored, and so are the contents of an adapter's folder.

    Raises:
        NothingComparedError: No adapter was found.
    """
    words = [pattern if isinstance(pattern, str) else str(pattern) for pattern in patterns]
    found: dict[Path, None] = {}
    for word in words:
        named = not glob.has_magic(word) or as_path(word).exists()
        for path in [as_path(word)] if named else map(Path, glob.glob(word, recursive=True)):  # noqa: PTH207
            if named or is_adapter(path):
                found.setdefault(path)
    folders = {path for path in found if path.is_dir()}
    paths = [path for path in found if path.parent not in folders]
    if not paths:
        raise NothingComparedError(
            f"{', '.join(words) or 'standard input'}: no adapter found; give folders of adapters, or a quoted pattern"
        )
    return sorted(paths, key=lambda path: natural_order(str(path)))


def _fingerprint(seen: FleetPath) -> str:
    """Return a fingerprint that lets ``--resume`` detect a changed adapter by file sizes, without opening it.

    An adapter on object storage is opened, since its server may not list folders and sizes cost as many requests.
    """
    if not isinstance(seen.path, RemotePath):
        return seen.files
    try:
        return describe("adapter", open_adapter(seen.path, "rank").checkpoint).fingerprint
    except LoradiagError:
        return ""


def _hash_content(path: Path) -> str:
    """Return the hash of an adapter's weights; empty if they cannot be read, an error that measuring reports."""
    try:
        return content_hash(files_of(open_adapter(path, "rank").checkpoint))
    except LoradiagError:
        return ""


def unreadable(results: Results[Fleet]) -> Sequence[LeftOut]:
    """Return the adapters that could not be measured."""
    return [item for item in results.left_out if item.reason == "unreadable"]
