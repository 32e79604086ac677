"""The output folder of a command that writes weights.

The folder is written next to its target and renamed when complete. Until then, ``NAME.part`` holds
the records so far and one file of factors per layer, so that an interrupted run resumes after the
last layer. The model card is written last and marks a folder whose files are all written. No folder
that has files of others is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lora_diag.adapters.layouts import LAYOUTS
from lora_diag.adapters.source import CONFIG
from lora_diag.adapters.writing import WEIGHTS
from lora_diag.errors import InputError, UsageError, flag
from lora_diag.files import check_folder_of, lock, sync, write_whole
from lora_diag.records import Run
from lora_diag.running.fingerprint import legible
from lora_diag.running.options import list_typed_options

CARD = "README.md"
FACTORS = "factors"
SPECTRA = "spectra.jsonl"

# The files of an adapter, in every format, and its card.
ADAPTER_FILES = frozenset({WEIGHTS, CONFIG, CARD, *(layout.file for layout in LAYOUTS.values())})

# A temporary name of ``files.replacing``, left by a killed process.
_HALF_WRITTEN = re.compile(r"^\.(.+)\.\d+$")


class OutputFolder:
    """The folder that one run writes; a subclass for each command names its files.

    A folder that still has its factors is not complete: a time limit left layers out. Resuming
    turns it back into ``NAME.part``.

    Args:
        final: Path of the folder.
        inputs: Input paths.
        overwrite: Whether an existing output may be replaced.
        resume: Whether to resume an interrupted run.

    Attributes:
        records_name: Name of the results file.
        own_files: Names of all files of the complete folder.
        description: What it holds, for messages.
        finished: Whether the output to resume is complete at its final path, so that only its
            records remain to be reported.
        whole: Whether all files of the output to resume are written, possibly not yet at their
            final path.

    Raises:
        UsageError: The path is an input, a link or a file, or it or ``NAME.part`` exists and may
            not be replaced, or is being written by another process.
        InputError: The folder cannot be written there.
    """

    records_name: ClassVar[str]
    own_files: ClassVar[frozenset[str]]
    description: ClassVar[str]

    def __init__(
        self, final: Path, inputs: Sequence[Path | str], overwrite: bool, resume: bool
    ) -> None:
        check_folder_of(final)
        self.final = Path(os.path.realpath(final))
        self.work = self.final.with_name(f"{self.final.name}.part")
        for path in (final, self.work, self.work / FACTORS):
            if path.is_symlink():
                raise UsageError(
                    f"{path}: is a symbolic link, which is not followed; give the folder itself"
                )
        self._overwrite, self._resume = overwrite, resume
        has_records = (self.final / self.records_name).is_file()
        continues_final = resume and not overwrite and not self.work.exists() and has_records
        self._reopened = continues_final and (self.final / FACTORS).is_dir()
        self.finished = continues_final and not self._reopened
        if self.finished:
            self.work = self.final
        self.whole = (
            resume and (self.work / CARD).is_file() and (self.work / self.records_name).is_file()
        )
        self._refuse_inside(inputs)
        self._check_final()
        if self.finished or not self.work.exists():
            return
        if overwrite or resume:
            self._check_ours(self.work)
            return
        self._refuse_running()
        raise UsageError(
            self.work,
            f"holds {self.description} that did not finish",
            "continue it with $resume, or delete it",
        )

    def _refuse_inside(self, inputs: Sequence[Path | str]) -> None:
        """Refuse a target that is an input or inside one, whose files must stay as they are.

        Raises:
            UsageError: The target is there.
        """
        for path in inputs:
            source = Path(os.path.realpath(path))
            if source == self.final:
                raise UsageError(self.final, "is an input", "choose another folder for $output")
            if source in self.final.parents:
                raise UsageError(
                    self.final,
                    f"is inside the input {path}",
                    "choose a folder outside it for $output",
                )

    def _refuse_running(self) -> None:
        """Refuse a folder that another process is writing, which must not be deleted."""
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
            raise UsageError(self.final, "is a file", "give $output a folder for the adapter")
        if any(self.final.iterdir()) and not self.finished:
            self._check_ours(self.final)
            if not (self._overwrite or self._reopened):
                raise UsageError(
                    self.final,
                    "is not empty",
                    "choose another folder, or replace it with $overwrite",
                )

    def _check_ours(self, folder: Path) -> None:
        """Refuse to replace a folder that this command did not write, or that has other files in
        it.

        A trained adapter has files of the same names, but no records and no factors by layer.

        Raises:
            UsageError: The folder may not be replaced.
        """
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if names and not names & {self.records_name, FACTORS}:
            raise UsageError(
                f"{folder}: is not {self.description}, so it is not replaced; choose another folder"
            )
        own = {*self.own_files, FACTORS, SPECTRA, f"{self.records_name}.part", f"{SPECTRA}.part"}
        foreign = sorted(name for name in names if _HALF_WRITTEN.sub(r"\1", name) not in own)
        factors = (_HALF_WRITTEN.sub(r"\1", path.name) for path in (folder / FACTORS).glob("*"))
        foreign += sorted(
            f"{FACTORS}/{name}" for name in factors if not re.fullmatch(r"\d{6}\.safetensors", name)
        )
        if foreign:
            raise UsageError(
                f"{folder}: holds {foreign[0]}, which is not a file of {self.description}; choose "
                "another folder"
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
        """Create the folder next to the target, or keep the one to resume: a target that is not
        complete is moved back.

        A folder there that is not resumed is deleted first. Nothing is done if all files are
        written.

        Raises:
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
        """Write the model card, remove the files needed only for resuming, and move the folder to
        its target.

        An adapter at the target is replaced. Nothing is done if the folder is ``finished``.

        Args:
            card: Text of the model card.
            complete: Whether no layer is left to measure; else the factors of layers are kept, for
                a resumed run.

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
                    # half-written when an earlier process was killed (files.replacing)
                    leftover.unlink()
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
    """Return the words of a run's options as typed: those other than the defaults, without
    ``others`` and the device.

    Args:
        group: The options of the command, a ``TypedDict``.
        run: The run.
        others: Names of options to leave out.
    """
    words = []
    for name, value in list_typed_options(group, run.settings).items():
        if name not in {"device", *others}:
            typed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(flag(name))
            if value is not True:
                words.append(legible(typed))
    return words
