"""The output folder of ``extract``, and the treatment of each tensor: factors, stored in full, or skipped.

The folder is written next to its target and renamed when complete. Until then, ``NAME.part`` holds the records so far
and one file of factors per layer, so that an interrupted extraction resumes after the last layer. The model card is
written last and marks a folder whose files are all written. No folder that has files of others is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from lora_diag.adapters import Adapter
from lora_diag.adapters.layouts import LAYOUTS
from lora_diag.adapters.writing import (
    CAUSAL,
    Described,
    Part,
    can_be_saved,
    check_written,
    list_full_values,
    write_adapter,
)
from lora_diag.adapters.writing_targets import VERIFIED_MODELS, Model, Target, names_in_memory
from lora_diag.checkpoints import Checkpoint
from lora_diag.decisions.extract.measure import measure_left_out
from lora_diag.deltas import Delta, Pairing, stored_name
from lora_diag.errors import InputError, UsageError
from lora_diag.files import check_folder_of, lock, sync, write_whole
from lora_diag.records import LeftOut, Run
from lora_diag.running.engines import Layout
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison
from lora_diag.running.layers import leave_out
from lora_diag.running.options import list_options, list_typed_options

WEIGHTS, CONFIG, CARD, RECORDS = "adapter_model.safetensors", "adapter_config.json", "README.md", "extraction.jsonl"
FACTORS, SPECTRA = "factors", "spectra.jsonl"
OWN_FILES = frozenset({WEIGHTS, CONFIG, CARD, RECORDS, *(layout.file for layout in LAYOUTS.values())})

# A temporary name of ``files.replacing``, left by a killed process.
_HALF_WRITTEN = re.compile(r"^\.(.+)\.\d+$")


class OutputFolder:
    """The folder of one extraction; a subclass names the files of another command.

    A folder that still has its factors is not complete: a time limit left layers out. Resuming turns it back into
    ``NAME.part``.

    Args:
        final: Path of the adapter.
        inputs: Input paths.
        overwrite: Whether an existing adapter may be replaced.
        resume: Whether to resume an interrupted extraction.

    Attributes:
        finished: Whether the adapter to resume is complete at its final path, so that only its records remain to be
            reported.
        whole: Whether all files of the adapter to resume are written, possibly not yet at their final path.

    Raises:
        UsageError: The path is an input, a link or a file, or it or ``NAME.part`` exists and may not be replaced, or is
            being written by another process.
        InputError: The folder cannot be written there.
    """

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = OWN_FILES
    description: ClassVar[str] = "an extraction"

    def __init__(self, final: Path, inputs: Sequence[Path | str], overwrite: bool, resume: bool) -> None:
        check_folder_of(final)
        self.final = Path(os.path.realpath(final))
        self.work = self.final.with_name(f"{self.final.name}.part")
        for path in (final, self.work, self.work / FACTORS):
            if path.is_symlink():
                raise UsageError(f"{path}: is a symbolic link, which is not followed; give the folder itself")
        self._overwrite, self._resume = overwrite, resume
        has_records = (self.final / self.records_name).is_file()
        continues_final = resume and not overwrite and not self.work.exists() and has_records
        self._reopened = continues_final and (self.final / FACTORS).is_dir()
        self.finished = continues_final and not self._reopened
        if self.finished:
            self.work = self.final
        self.whole = resume and (self.work / CARD).is_file() and (self.work / self.records_name).is_file()
        self._refuse_inside(inputs)
        self._check_final()
        if self.finished or not self.work.exists():
            return
        if overwrite or resume:
            self._check_ours(self.work)
            return
        self._refuse_running()
        raise UsageError(
            f"{self.work}: holds {self.description} that did not finish; continue it with --resume, or delete it"
        )

    def _refuse_inside(self, inputs: Sequence[Path | str]) -> None:
        """Refuse a target that is an input or inside one, whose files must stay as they are.

        Raises:
            UsageError: The target is there.
        """
        for path in inputs:
            source = Path(os.path.realpath(path))
            if source == self.final:
                raise UsageError(f"{self.final}: is an input; choose another folder for -o")
            if source in self.final.parents:
                raise UsageError(f"{self.final}: is inside the input {path}; choose a folder outside it for -o")

    def _refuse_running(self) -> None:
        """Refuse a folder that another process is writing, which must not be deleted.

        Raises:
            UsageError: Another process holds the lock of one of its files.
        """
        for file in filter(Path.exists, (self.records, self.spectra)):
            os.close(lock(file))

    def _check_final(self) -> None:
        """Refuse a target that is a file, or a folder that may not be replaced.

        Raises:
            UsageError: The target may not be written.
        """
        if not self.final.exists():
            return
        if not self.final.is_dir():
            raise UsageError(f"{self.final}: is a file; give -o a folder for the adapter")
        if any(self.final.iterdir()) and not self.finished:
            self._check_ours(self.final)
            if not (self._overwrite or self._reopened):
                raise UsageError(f"{self.final}: is not empty; choose another folder, or replace it with --overwrite")

    def _check_ours(self, folder: Path) -> None:
        """Refuse to replace a folder that this command did not write, or that has other files in it.

        A trained adapter has files of the same names, but no records and no factors by layer.

        Raises:
            UsageError: The folder may not be replaced.
        """
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if names and not names & {self.records_name, FACTORS}:
            raise UsageError(f"{folder}: is not {self.description}, so it is not replaced; choose another folder")
        own = {*self.own_files, FACTORS, SPECTRA, f"{self.records_name}.part", f"{SPECTRA}.part"}
        foreign = sorted(name for name in names if _HALF_WRITTEN.sub(r"\1", name) not in own)
        factors = (_HALF_WRITTEN.sub(r"\1", path.name) for path in (folder / FACTORS).glob("*"))
        foreign += sorted(f"{FACTORS}/{name}" for name in factors if not re.fullmatch(r"\d{6}\.safetensors", name))
        if foreign:
            raise UsageError(
                f"{folder}: holds {foreign[0]}, which is not a file of {self.description}; choose another folder"
            )

    @property
    def records(self) -> Path:
        """The results file, where the folder is now: next to its target, or at it once finished."""
        return self.work / self.records_name

    @property
    def spectra(self) -> Path:
        """The file of spectra for a budget; it exists only while the folder is incomplete."""
        return self.work / SPECTRA

    def factors(self, index: int) -> Path:
        """Return the file for the factors of one layer."""
        return self.work / FACTORS / f"{index:06d}.safetensors"

    def open(self) -> None:
        """Create the folder next to the target, or keep the one to resume: a target that is not complete is moved back.

        A folder there that is not resumed is deleted first. Nothing is done if all files are written.

        Raises:
            UsageError: Another process is writing the folder.
            InputError: The folder cannot be created.
        """
        if self.whole:
            return
        try:
            if self._reopened:
                (self.final / CARD).unlink(missing_ok=True)
                self.final.rename(self.work)
            if self.work.exists() and not self._resume:
                self._refuse_running()
                shutil.rmtree(self.work)
            self._resume = True
            (self.work / FACTORS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.work}: cannot be written: {error.strerror}") from error

    def discard(self) -> None:
        """Remove the folder next to the target."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self, card: str, complete: bool = True) -> None:
        """Write the model card, remove the files needed only for resuming, and move the folder to its target.

        An adapter at the target is replaced. Nothing is done if the folder is ``finished``.

        Args:
            card: Text of the model card.
            complete: Whether no layer is left to measure; else the factors of layers are kept, for a resumed run.

        Raises:
            InputError: A file cannot be written, or the folder cannot be moved.
        """
        if self.finished:
            return
        backup = self.final.with_name(f".{self.final.name}.{os.getpid()}")
        try:
            write_whole(self.work / CARD, card)
            if complete:
                shutil.rmtree(self.work / FACTORS, ignore_errors=True)
            self.spectra.unlink(missing_ok=True)
            for name in self.own_files:
                for leftover in self.work.glob(f".{name}.[0-9]*"):
                    leftover.unlink()  # half-written when an earlier process was killed (files.replacing)
            if self.final.exists():
                self.final.rename(backup)
            self.work.rename(self.final)
            sync(self.final.parent)
        except OSError as error:
            if backup.exists() and not self.final.exists():
                backup.rename(self.final)
            raise InputError(
                f"{self.final}: cannot be written: {error.strerror}; the adapter is in {self.work}"
            ) from error
        shutil.rmtree(backup, ignore_errors=True)


def list_words(group: type, run: Run, *others: str) -> list[str]:
    """Return the words of a run's options as typed: those other than the defaults, without ``others`` and the device.

    Args:
        group: The options of the command, a ``TypedDict``.
        run: The run.
        others: Names of options to leave out.
    """
    words = []
    for name, value in list_typed_options(group, run.settings).items():
        if name not in {"device", *others}:
            typed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [list_options(group)[name][1].flag(name), *([] if value is True else [legible(typed)])]
    return words


RESIZED = "its vocabulary was resized"


@dataclass(frozen=True)
class TensorPlan:
    """The treatment of all tensors.

    Args:
        base: Base checkpoint.
        model: Names of its tensors in memory.
        pairing: Compared layers, and skipped tensors.
        targets: PEFT's view of each layer with factors.
        refused: Why a matrix gets no factors, by layer.
        save: Whether to store tensors without factors in full.
        portable: Whether the adapter has one rank for all layers, and only parts that all programs scale alike.
    """

    base: Checkpoint
    model: Model
    pairing: Pairing
    targets: Mapping[str, Target]
    refused: Mapping[str, str]
    save: bool
    portable: bool = False

    def list_notes(self) -> tuple[str, ...]:
        """Return notes for users of the adapter: on untested names, and on factors of an embedding tied to the head."""
        notes = []
        if self.model.type and self.model.type not in VERIFIED_MODELS and not self.model.has_names_in_memory:
            notes.append(
                f"model type {self.model.type!r} has not been tested with PEFT: names on disk are assumed to equal "
                "those in memory, and PEFT ignores unknown names; watch for missing adapter keys when it loads the "
                "adapter"
            )
        table = stored_name(self.base, "lm_head.weight")
        target = self.targets.get(table or "")
        if target is not None and target.kind == "embedding" and CAUSAL.search(self._read_architecture()):
            notes.append(f"{table} is tied to the head: its update reaches the head only after merging")
        return tuple(notes)

    def measure_left_out(self, layout: Layout, device: str) -> Iterator[LeftOut]:
        """Yield the records of tensors without factors, with the norm of their change if it has one.

        Raises:
            InputError: A file could not be read.
            UsageError: The device is unknown or not available.
        """
        for record in leave_out(self.pairing, layout, device):
            yield self._mark_saved(record)
        for delta in self.pairing.deltas:
            if delta.layer in self.refused:
                yield self._mark_saved(measure_left_out(delta, self.refused[delta.layer], device))

    def _mark_saved(self, record: LeftOut) -> LeftOut:
        """Return a record with the reason ``saved`` if its tensor is to be stored in full; else unchanged."""
        if not self.save or not record.fro or record.reason not in {"vector", "no_factors", "added_rows"}:
            return record
        if not can_be_saved(self._find_base_name(record.layer), self.base, self.model):
            return record
        return record.model_copy(update={"reason": "saved", "detail": f"{record.detail}; stored in full"})

    def _find_base_name(self, layer: str) -> str:
        """Return the name of the tensor of BASE that holds a layer; the layer's name without one."""
        return next((delta.base.name for delta in self.pairing.deltas if delta.layer == layer and delta.base), layer)

    def write(
        self,
        folder: Path,
        results: Iterable[Any],
        left_out: Iterable[LeftOut],
        files: Mapping[str, Path],
        base_name: str,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write the adapter's two files, read them back, and compare them with the measured factors.

        Args:
            folder: An existing folder.
            results: The rank of each layer, 0 for none: one record per layer.
            left_out: The tensors to store in full, and others.
            files: File with the factors of each layer.
            base_name: Name of the base model for the config.
            metadata: Metadata of the weights file, besides its format.

        Raises:
            InputError: The files cannot be written, or differ when read back.
        """
        parts = [Part(self.targets[r.layer], r.rank, files[r.layer]) for r in results if r.rank]
        names = {self._find_base_name(record.layer) for record in left_out if record.reason == "saved"}
        deltas: dict[str, Delta] = {delta.base.name: delta for delta in self.pairing.deltas if delta.base}
        adapted = {part.target.module for part in parts if part.target.kind != "parameter"}
        values = list_full_values(sorted(names), deltas, self.base, self.model, adapted)
        write_adapter(folder, parts, values, self._describe_base(base_name), self.portable, metadata)
        check_written(folder, self.base, parts)

    def _read_architecture(self) -> str:
        """Return the first class in the config of BASE; empty without one."""
        classes = self.base.config.get("architectures")
        first = classes[0] if isinstance(classes, list) and classes else ""
        return first if isinstance(first, str) else ""

    def _describe_base(self, base_name: str) -> Described:
        """Return what the config of an adapter depends on: name, class, modules and parameters of BASE."""
        modules = {self.model.in_memory(name).rpartition(".")[0] for name in self.base} - {""}
        # With the parents of every module: a target ``0`` also matches ``blocks.0``.
        modules |= {module[: dot.start()] for module in modules for dot in re.finditer(r"\.", module)}
        return Described(
            base_name=base_name,
            architecture=self._read_architecture(),
            modules=frozenset(modules),
            parameters=frozenset(self.model.parameter(name) for name in self.base),
        )


def plan_tensors(
    compared: Comparison, save: bool, portable: bool = False, others: Sequence[Checkpoint | Adapter] = ()
) -> TensorPlan:
    """Return the treatment of all tensors.

    Args:
        compared: BASE, and a fine-tuned checkpoint or an adapter, whose own names of modules are kept.
        save: Whether to store tensors without factors in full; a resized vocabulary then gets no factors.
        portable: Whether only matrices that all programs scale equally get factors.
        others: Further updates with layers in the pairing.

    Raises:
        InputError: Two updates change one weight of BASE, as with ``layer_replication``.
    """
    base, tuned, pairing = compared.base, compared.update, compared.pairing
    assert base is not None
    adapters = [update for update in (*others, tuned) if isinstance(update, Adapter)]
    model = Model(base, dict(chain.from_iterable(names_in_memory(adapter, base).items() for adapter in adapters)))
    resized = {item.layer for item in pairing.unpaired if item.reason in {"added_rows", "removed_rows"}}
    targets: dict[str, Target] = {}
    refused: dict[str, str] = {}
    for delta in pairing.deltas:
        if not delta.is_matrix:
            continue
        target = RESIZED if save and delta.layer in resized else model.find_target(delta)
        if portable and isinstance(target, Target) and target.kind == "parameter":
            target = "stacked experts, which a portable adapter cannot hold"
        if isinstance(target, Target):
            targets[delta.layer] = target
        else:
            refused[delta.layer] = target
    _refuse_repeated(tuned.path, targets)
    return TensorPlan(base, model, pairing, targets, refused, save, portable)


def _refuse_repeated(tuned: Path, targets: Mapping[str, Target]) -> None:
    """Refuse two layers that change one weight of BASE.

    Raises:
        InputError: Such layers exist, as with ``layer_replication``.
    """
    first: dict[tuple[str, tuple[int, int], tuple[int, int]], str] = {}
    for layer, target in targets.items():
        earlier = first.setdefault((target.module, target.expert, target.half), layer)
        if earlier != layer:
            raise InputError(
                f"{tuned}: {earlier} and {layer} change one weight of BASE, as layer_replication does, and no adapter "
                "of BASE holds both; use this adapter unchanged, or exclude one of them with --exclude"
            )
