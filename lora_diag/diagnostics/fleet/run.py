"""``spectrum --adapters``: many adapters in one pass."""

from __future__ import annotations

import glob
import hashlib
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.checkpoints import as_path
from lora_diag.checkpoints.remote import RemotePath
from lora_diag.deltas import natural_order
from lora_diag.diagnostics.fleet.measure import fleet as measure
from lora_diag.diagnostics.fleet.record import Fleet
from lora_diag.errors import InputError, LoradiagError, NothingComparedError
from lora_diag.linalg import resolve_device
from lora_diag.records import AnyRecord, LeftOut, Results, ResultsWriter, Run, RunInput
from lora_diag.running.engines import Ray, layout_for
from lora_diag.running.fingerprint import content_hash, files_of, legible
from lora_diag.running.inputs import compare, describe
from lora_diag.running.measuring import Progress, Watch, check_running, measure_layers, place
from lora_diag.version import __version__

COMMAND = "spectrum --adapters"

# Bytes that one adapter takes while it is measured: the factors of a layer, their vectors, the sketches' normals.
SIZE = 64 * 2**20

# Files by which an adapter or a base is known; a log may grow beside them.
READ = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".json"}


@dataclass(frozen=True, slots=True)
class Seen:
    """A path and what was there when the run began.

    Args:
        path: An adapter, or the base of all.
        files: A hash of its files' names and sizes; empty where they cannot be listed, as on object storage.
    """

    path: Path
    files: str

    @classmethod
    def now(cls, path: Path) -> Seen:
        """Look at what is there."""
        try:
            files = [] if isinstance(path, RemotePath) else sorted(path.iterdir()) if path.is_dir() else [path]
            told = [f"{file.name} {file.stat().st_size}" for file in files if file.suffix in READ and file.is_file()]
        except OSError:
            told = []
        known = hashlib.sha256("\n".join(told).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cls(path, known if told else "")

    def check(self) -> None:
        """Refuse other files than those that were seen: a worker of a cluster has mounts of its own.

        Raises:
            InputError: There are others, or none.
        """
        if self.now(self.path).files != self.files:
            raise InputError(
                f"{self.path}: the worker on {platform.node()} sees other files there, or none; adapters and their "
                "base must be on storage that all nodes share, under the same path, and stay as they are"
            )


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter, not yet opened."""

    layer: str
    seen: Seen
    shape: tuple[int, int] = (1, 1)


def fleet(
    adapters: Iterable[Path | str],
    *,
    base: Path | str | None = None,
    layers: str | None = None,
    exclude: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    engine: Ray | None = None,
    output: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_record: Callable[[AnyRecord], None] | None = None,
) -> Results[Fleet]:
    r"""Measure many adapters: what rank each uses, which are dead, spiked or far from the others, and which are alike.

    One adapter's layer is in memory at a time and core, and an adapter that cannot be read is left out and told.

    Args:
        adapters: Folders, files, or patterns such as ``runs/**``.
        base: The base of all, for adapters that need it (DoRA, PiSSA).
        layers: Regular expression; only weights whose name contains a match.
        exclude: Regular expression; no weights whose name contains a match.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        workers: Adapters at once; by default as many as there are cores.
        engine: A Ray cluster to measure on; None for this machine alone.
        output: Results file, appended adapter by adapter.
        resume: Go on behind what an interrupted run left in ``output``.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Let ``resume`` compare a SHA-256 of every byte of the adapters, not the sizes of their files.
        on_progress: Called at the start and after every adapter.
        on_record: Called with every record, in the order of the file, as it comes.

    Returns:
        One record for each adapter.

    Raises:
        UsageError: An option makes no sense.
        InputError: The results file cannot be written, or a worker of the cluster does not see what is here.
        NothingComparedError: No adapter is there.

    Example:
        >>> found = fleet(["sample_checkpoints/*"], layers=r"layers\.0")
        >>> [(record.adapter, record.rank, record.dead) for record in found]
        [('sample_checkpoints/lora_r4', 4, 0), ('sample_checkpoints/lora_r16', 16, 0)]
    """
    check_running(workers, 0)
    where = place(engine, device)
    members = [Member(legible(path), Seen.now(path)) for path in expand(adapters)]
    run = Run(
        command=COMMAND,
        version=__version__,
        inputs=tuple(
            RunInput(
                role="adapter",
                path=member.layer,
                kind="adapter",
                tensors=0,
                fingerprint=_fingerprint(member.seen),
                sha256=_content(member.seen.path) if verify else "",
            )
            for member in members
        ),
        settings={
            "base": legible(base) if base is not None else None,
            "layers": layers,
            "exclude": exclude,
            "device": where.kind,
        },
    )
    under = Seen.now(as_path(base)) if base is not None else None
    one = _here if engine is None else _on_a_worker
    layout = layout_for(1, workers, where.kind)
    writer: ResultsWriter[Fleet]
    with ResultsWriter(Path(output) if output is not None else None, run, resume, overwrite) as writer:
        return measure_layers(
            writer,
            members,
            partial(one, base=under, layers=layers, exclude=exclude, device=where.tasks),
            tuple,
            layout,
            _size,
            Watch(on_progress, on_record),
            engine,
        )


def _size(member: Member) -> int:
    return SIZE


def _on_a_worker(
    member: Member, base: Seen | None, layers: str | None, exclude: str | None, device: str
) -> tuple[Fleet | LeftOut]:
    for seen in (member.seen, *([base] if base is not None else [])):
        seen.check()
    return _here(member, base, layers, exclude, device)


def _here(
    member: Member, base: Seen | None, layers: str | None, exclude: str | None, device: str
) -> tuple[Fleet | LeftOut]:
    path = member.seen.path
    try:
        side = compare(path, None, layers, exclude) if base is None else compare(base.path, path, layers, exclude)
        matrices = (delta for delta in side.pairing.deltas if delta.is_matrix)
        return (measure(member.layer, side.inputs[-1].kind, matrices, resolve_device(device)),)
    except LoradiagError as error:
        detail = str(error).removeprefix(f"{path}: ")
        return (LeftOut(layer=member.layer, shape=(), reason="unreadable", detail=detail),)


def expand(patterns: Iterable[Path | str]) -> list[Path]:
    """Return the adapters that paths and patterns name, in natural order, each once.

    A pattern's folders and files that are no adapter are passed over; so is what lies in an adapter's folder.

    Raises:
        NothingComparedError: There is none.
    """
    words = [str(pattern) for pattern in patterns]
    found: dict[Path, None] = {}
    for word in words:
        named = not glob.has_magic(word) or as_path(word).exists()
        for path in [as_path(word)] if named else map(Path, glob.glob(word, recursive=True)):  # noqa: PTH207
            if named or is_adapter(path):
                found.setdefault(path)
    folders = {path for path in found if path.is_dir()}
    paths = [path for path in found if path.parent not in folders]
    if not paths:
        raise NothingComparedError(f"no adapter is at {', '.join(words) or 'the end of an empty list'}")
    return sorted(paths, key=lambda path: natural_order(str(path)))


def _fingerprint(seen: Seen) -> str:
    """Return by what ``--resume`` notices that an adapter changed, without opening a thousand: its files' sizes.

    One on object storage is opened: its server may not tell what is in a folder, and sizes are no cheaper there.
    """
    if not isinstance(seen.path, RemotePath):
        return seen.files
    try:
        return describe("adapter", open_adapter(seen.path).checkpoint).fingerprint
    except LoradiagError:
        return ""


def _content(path: Path) -> str:
    """Return the hash of an adapter's weights; empty where it cannot be read, which is told when it is measured."""
    try:
        return content_hash(files_of(open_adapter(path).checkpoint))
    except LoradiagError:
        return ""


def unreadable(results: Results[Fleet]) -> Sequence[LeftOut]:
    """Return the adapters that could not be measured."""
    return [item for item in results.left_out if item.reason == "unreadable"]
