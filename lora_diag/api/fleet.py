"""``spectrum --adapters``: many adapters in one pass."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.api.fingerprint import content_hash, files_of, legible
from lora_diag.api.inputs import compare, describe
from lora_diag.api.measuring import Progress, Watch, check_running, measure_layers
from lora_diag.checkpoints import as_path
from lora_diag.checkpoints.remote import RemotePath
from lora_diag.deltas import natural_order
from lora_diag.diagnostics.fleet import fleet as measure
from lora_diag.engines import Layout, layout_for
from lora_diag.errors import LoradiagError, NothingComparedError
from lora_diag.linalg import resolve_device
from lora_diag.results import AnyRecord, Fleet, LeftOut, Results, ResultsWriter, Run, RunInput
from lora_diag.version import __version__

COMMAND = "spectrum --adapters"

# Bytes that one adapter takes while it is measured: the factors of a layer, their vectors, the sketches' normals.
SIZE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter, not yet opened."""

    layer: str
    shape: tuple[int, int] = (1, 1)


def fleet(
    adapters: Iterable[Path | str],
    *,
    base: Path | str | None = None,
    layers: str | None = None,
    exclude: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    output: Path | str | None = None,
    resume: bool = False,
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
        output: Results file, appended adapter by adapter.
        resume: Go on behind what an interrupted run left in ``output``.
        verify: Let ``resume`` compare a SHA-256 of every byte of the adapters, not the sizes of their files.
        on_progress: Called at the start and after every adapter.
        on_record: Called with every record, in the order of the file, as it comes.

    Returns:
        One record for each adapter.

    Raises:
        UsageError: An option makes no sense.
        InputError: The results file cannot be written.
        NothingComparedError: No adapter is there.

    Example:
        >>> found = fleet(["sample_checkpoints/*"], layers=r"layers\.0")
        >>> [(record.adapter, record.rank, record.dead) for record in found]
        [('sample_checkpoints/lora_r4', 4, 0), ('sample_checkpoints/lora_r16', 16, 0)]
    """
    check_running(workers, 0)
    on = resolve_device(device)
    paths = expand(adapters)
    run = Run(
        command=COMMAND,
        version=__version__,
        inputs=tuple(
            RunInput(
                role="adapter",
                path=legible(path),
                kind="adapter",
                tensors=0,
                fingerprint=_sizes(path),
                sha256=_content(path) if verify else "",
            )
            for path in paths
        ),
        settings={
            "base": legible(base) if base is not None else None,
            "layers": layers,
            "exclude": exclude,
            "device": on.type,
        },
    )

    def one(member: Member) -> tuple[Fleet | LeftOut]:
        path = known[member.layer]
        try:
            side = compare(path, None, layers, exclude) if base is None else compare(base, path, layers, exclude)
            kind = side.inputs[-1].kind
            return (measure(member.layer, kind, (d for d in side.pairing.deltas if d.is_matrix), on),)
        except LoradiagError as error:
            detail = str(error).removeprefix(f"{path}: ")
            return (LeftOut(layer=member.layer, shape=(), reason="unreadable", detail=detail),)

    known = {legible(path): path for path in paths}
    layout: Layout = layout_for(1, workers, on.type)
    writer: ResultsWriter[Fleet]
    with ResultsWriter(Path(output) if output is not None else None, run, resume) as writer:
        return measure_layers(
            writer,
            [Member(name) for name in known],
            one,
            tuple,
            layout,
            lambda member: SIZE,
            Watch(on_progress, on_record),
        )


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


def _sizes(path: Path) -> str:
    """Return by what ``--resume`` notices that an adapter changed, without opening a thousand: its files' sizes.

    One on object storage is opened: its server may not tell what is in a folder, and sizes are no cheaper there.
    """
    if isinstance(path, RemotePath):
        try:
            return describe("adapter", open_adapter(path).checkpoint).fingerprint
        except LoradiagError:
            return ""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        told = "\n".join(f"{file.name} {file.stat().st_size}" for file in files if file.is_file())
    except OSError:
        return ""
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _content(path: Path) -> str:
    """Return the hash of an adapter's weights; empty where it cannot be read, which is told when it is measured."""
    try:
        return content_hash(files_of(open_adapter(path).checkpoint))
    except LoradiagError:
        return ""


def unreadable(results: Results[Fleet]) -> Sequence[LeftOut]:
    """Return the adapters that could not be measured."""
    return [item for item in results.left_out if item.reason == "unreadable"]
